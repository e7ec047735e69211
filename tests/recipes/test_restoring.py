"""A checkpoint that loads and yet cannot be gone on from is refused before the first step, in one paragraph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from drkd.contracts import DrkdError
from drkd.recipes.restoring import Restoring, explained_by_checkpoint
from drkd.recipes.saved_state import find_misfit


@pytest.mark.parametrize(
    ("own", "saved", "place"),
    [
        ({"a": {"b": 0}}, {"a": {"b": -1}}, "x.a.b is -1"),
        ({"a": {"b": 0}}, {"a": {"b": 2**63}}, "x.a.b is 9223"),
        ({"a": {"b": 0}}, {"a": 3}, "x.a is 3, no mapping"),
        ({"a": False}, {"a": 0}, "x.a is 0, expected a bool"),
        ({"a": 0}, {"a": True}, "x.a is True, expected a count"),
        ({"a": 0.5}, {"a": float("nan")}, "x.a is nan"),
        ({"a": 0.5}, {"a": "x"}, "x.a is 'x', expected a float"),
        ({"a": None}, {"a": [1]}, r"x.a is \[1\]"),
        ({"a": [0.1, 0.2]}, {"a": [0.1]}, "no list of 2"),
        ({"a": torch.zeros(())}, {"a": torch.zeros(2)}, r"a tensor of float32 \(2,\)"),
        ({"a": torch.zeros(())}, {"a": torch.zeros((), dtype=torch.complex64)}, "complex64"),
    ],
)
def test_state_of_another_kind_is_named(own: Any, saved: Any, place: str) -> None:
    found = find_misfit(own, saved, "x")
    assert found is not None
    with pytest.raises(DrkdError, match=place):
        raise DrkdError(found)


def test_state_of_the_same_kind_passes() -> None:
    own = {"a": 0, "b": 0.5, "c": None, "d": [], "e": torch.tensor(float("inf")), "f": "", "new": 1, "g": float("inf")}
    saved = {
        "a": 7,
        "b": 1,
        "c": torch.tensor(0.5),
        "d": [1, 2],
        "e": torch.tensor(0.5),
        "f": "y",
        "old": object(),
        "g": float("inf"),
    }
    assert find_misfit(own, saved, "x") is None


def _checkpoint(folder: Path, **changes: Any) -> tuple[SimpleNamespace, dict[str, Any]]:
    """A trainer that keeps the best in a folder, and what a checkpoint of it says."""
    best = ModelCheckpoint(dirpath=folder, filename="best", monitor="val/ap", mode="max")
    path = str(folder / "best.ckpt")
    state = {
        "monitor": "val/ap",
        "best_model_score": torch.tensor(0.5),
        "best_model_path": path,
        "dirpath": str(folder),
    }
    state |= {"kth_best_model_path": path, "best_k_models": {path: torch.tensor(0.5)}, "last_model_path": ""}
    state |= {"kth_value": torch.tensor(0.5), "current_score": torch.tensor(0.5), **changes}
    trainer = SimpleNamespace(callbacks=[best, EarlyStopping("val/ap", mode="max")])
    return trainer, {"callbacks": {best.state_key: state}}


def test_the_best_student_is_looked_for_in_the_run_folder(tmp_path: Path) -> None:
    trainer, content = _checkpoint(tmp_path, best_model_path="/elsewhere/best.ckpt", dirpath="/elsewhere")
    Restoring(tmp_path / "last.ckpt").on_load_checkpoint(trainer, nn.Module(), content)
    (state,) = content["callbacks"].values()
    assert state["best_model_path"] == str(tmp_path / "best.ckpt") and state["dirpath"] == str(tmp_path)


@pytest.mark.parametrize("name", ["..", "a/..", ".", "x/", "../notes.txt"])
@pytest.mark.parametrize("field", ["best_model_path", "kth_best_model_path", "best_k_models"])
def test_lightning_is_given_nothing_but_checkpoints_to_remove(name: str, field: str, tmp_path: Path) -> None:
    """It removes the best one when there is a better one: of ".." that was the run folder with all that is in it."""
    value: Any = {name: torch.tensor(0.5)} if field == "best_k_models" else name
    trainer, content = _checkpoint(tmp_path, **{field: value})
    with pytest.raises(DrkdError, match=r"last.ckpt: the run cannot go on .* which is no checkpoint"):
        Restoring(tmp_path / "last.ckpt").on_load_checkpoint(trainer, nn.Module(), content)


@pytest.mark.parametrize(
    "changes", [{"best_model_score": "x"}, {"kth_value": torch.zeros(3)}, {"best_k_models": {"best.ckpt": "x"}}]
)
def test_scores_are_numbers(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer, content = _checkpoint(tmp_path, **changes)
    with pytest.raises(DrkdError, match=r"last.ckpt: the run cannot go on from this checkpoint"):
        Restoring(tmp_path / "last.ckpt").on_load_checkpoint(trainer, nn.Module(), content)


class _Trainer(SimpleNamespace):
    """A trainer with one optimizer, before anything is taken over, and what a checkpoint of it says."""

    def __init__(self) -> None:
        parameter = nn.Parameter(torch.zeros(2, 3))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        schedule = SimpleNamespace(scheduler=LambdaLR(optimizer, lambda step: 1.0))
        loops = {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}
        super().__init__(
            callbacks=[],
            optimizers=[optimizer],
            lr_scheduler_configs=[schedule],
            fit_loop=SimpleNamespace(state_dict=lambda: loops),
            global_step=3,
        )
        self.content: dict[str, Any] = {
            "callbacks": {},
            "global_step": 3,
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [schedule.scheduler.state_dict()],
            "loops": {
                "fit_loop": {
                    "state_dict": {"combined_loader": [{"epoch": 1, "position": 2}]},
                    "epoch_progress": {"total": {"ready": 2}},
                }
            },
        }
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros(2, 3)


def _restore(trainer: Any) -> None:
    restoring = Restoring(Path("last.ckpt"))
    with restoring:
        restoring.setup(trainer, nn.Module(), "fit")
        restoring.on_load_checkpoint(trainer, nn.Module(), trainer.content)
        restoring.on_fit_start(trainer, nn.Module())
        restoring.on_train_start(trainer, nn.Module())


def test_a_whole_checkpoint_passes() -> None:
    _restore(_Trainer())


def test_an_optimizers_own_shapes_are_its_own() -> None:
    trainer = _Trainer()
    trainer.optimizers[0].state[trainer.optimizers[0].param_groups[0]["params"][0]]["exp_avg_sq_row"] = torch.zeros(2)
    _restore(trainer)


def _change(trainer: Any, what: str) -> None:
    content = trainer.content
    fit = content["loops"]["fit_loop"]
    if what == "step":
        trainer.global_step = -1
    elif what == "counter":
        fit["epoch_progress"]["total"]["ready"] = -(10**30)
    elif what == "place":
        fit["state_dict"]["combined_loader"] = [{"epoch": "x", "position": 0}]
    elif what == "optimizers":
        content["optimizer_states"] = []
    elif what == "rate":
        content["optimizer_states"][0]["param_groups"][0]["lr"] = "x"
    elif what == "schedule":
        content["lr_schedulers"][0]["base_lrs"] = None
    elif what == "bare":
        trainer.optimizers[0].state[trainer.optimizers[0].param_groups[0]["params"][0]] = "x"
    else:
        value = torch.zeros(2, 3).to_sparse() if what == "sparse" else torch.zeros(7)
        trainer.optimizers[0].state[trainer.optimizers[0].param_groups[0]["params"][0]]["momentum_buffer"] = value


@pytest.mark.parametrize(
    "what", ["step", "counter", "place", "optimizers", "rate", "schedule", "sparse", "shape", "bare"]
)
def test_what_would_fail_steps_later_or_never_end_is_refused_first(what: str) -> None:
    trainer = _Trainer()
    _change(trainer, what)
    with pytest.raises(DrkdError, match=r"last.ckpt: the run cannot go on from this checkpoint"):
        _restore(trainer)


def test_a_damaged_best_student_is_one_paragraph() -> None:
    expected = r"best.ckpt: the best student cannot be taken .*RuntimeError: sizes"
    with pytest.raises(DrkdError, match=expected), explained_by_checkpoint("best.ckpt"):
        raise RuntimeError("sizes\ndiffer")


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:9134: Connection closed by peer."),
        torch.distributed.DistNetworkError("The server socket has failed to listen: EADDRINUSE"),
        torch.distributed.DistStoreError("Timed out after 1801 seconds waiting for clients. 1/2 clients joined."),
        torch.distributed.DistBackendError("NCCL error: unhandled system error"),
        torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_fault_of_the_machine_or_of_other_processes_is_not_the_checkpoints(fault: Exception) -> None:
    restoring = Restoring(Path("last.ckpt"))
    with pytest.raises(type(fault)) as caught, restoring:
        restoring.setup(_Trainer(), nn.Module(), "fit")  # type: ignore[arg-type]
        raise fault
    assert caught.value is fault


def test_an_error_is_the_checkpoints_only_while_it_is_restored() -> None:
    error = RuntimeError("size mismatch: a peer")
    early, late = Restoring(Path("last.ckpt")), Restoring(Path("last.ckpt"))
    trainer: Any = _Trainer()
    with pytest.raises(RuntimeError) as caught, early:
        raise error
    assert caught.value is error
    with pytest.raises(DrkdError, match="the run cannot go on from this checkpoint"), early:
        early.setup(trainer, nn.Module(), "fit")
        raise error
    with pytest.raises(RuntimeError) as caught, late:
        late.setup(trainer, nn.Module(), "fit")
        late.on_load_checkpoint(trainer, nn.Module(), trainer.content)
        late.on_train_start(trainer, nn.Module())
        raise error
    assert caught.value is error
