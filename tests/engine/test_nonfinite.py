"""Steps that are not finite: left out without a trace, counted, and too many stop the run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader
from toys import ToyDetector, ToyMethod, toy_batch

from drkd.contracts import DetectionBatch, DrkdError
from drkd.engine import Distiller
from drkd.engine.module import DistillationModule, Optimization
from drkd.engine.nonfinite import NonFiniteSteps


def fit(tmp_path: object, batches: list[DetectionBatch], limit: int) -> tuple[DistillationModule, NonFiniteSteps]:
    distiller = Distiller(ToyDetector(seed=1), ToyDetector(6, seed=2), ToyMethod)
    module = DistillationModule(distiller, Optimization(learning_rate=0.05, warmup_steps=0, milestones=()))
    skipping = NonFiniteSteps(limit)
    Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[skipping],
    ).fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return module, skipping


def broken(batch: DetectionBatch, value: float) -> DetectionBatch:
    images = batch.images.clone()
    images[0, 0, 0, 0] = value
    return replace(batch, images=images)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_no_trace(value: float, tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    good = [toy_batch(seed=seed) for seed in range(4)]
    with_break, skipping = fit(tmp_path, [*good[:2], broken(toy_batch(seed=9), value), *good[2:]], limit=1)
    without, none = fit(tmp_path, good, limit=1)
    assert (skipping.skipped, none.skipped) == (1, 0)
    ours, theirs = (module.distiller.student.state_dict() for module in (with_break, without))
    assert all(value.isfinite().all() for value in ours.values())
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    assert "skipped: the loss or its gradient is not finite (images 0, 1); 1 of at most 1" in capsys.readouterr().err


def test_too_many_stop_the_run_and_name_the_images(tmp_path: object) -> None:
    bad = broken(toy_batch(seed=9), float("nan"))
    with pytest.raises(DrkdError, match=r"images 0, 1.*after 2 skipped steps.*skip_nonfinite"):
        fit(tmp_path, [bad] * 4, limit=2)


@pytest.mark.parametrize(
    ("scaler", "loss", "skipped"), [(object(), 1.0, 0), (object(), float("inf"), 1), (None, 1.0, 1)]
)
def test_a_gradient_scaler_sees_to_infinite_gradients_itself(scaler: object, loss: float, skipped: int) -> None:
    skipping = NonFiniteSteps(3)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), float("inf"))
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), world_size=1, global_step=5)
    skipping.on_before_backward(trainer, None, torch.tensor(loss))  # type: ignore[arg-type]
    skipping.on_before_optimizer_step(trainer, torch.nn.Identity(), torch.optim.SGD([weight]))  # type: ignore[arg-type]
    assert skipping.skipped == skipped
    assert (weight.grad is None) == bool(skipped)


def test_the_count_goes_on_after_a_checkpoint() -> None:
    first, second = NonFiniteSteps(3), NonFiniteSteps(3)
    first.skipped = 2
    second.load_state_dict(first.state_dict())
    assert second.skipped == 2
