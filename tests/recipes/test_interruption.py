"""Runs that are killed, stopped, or meet bad files go on as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import lightning
import pytest
import torch

from drkd.adapters import FasterRCNNBuilder, save_student
from drkd.cli import main
from drkd.contracts import DrkdError
from drkd.data.dataset import DetectionDataset
from drkd.data.module import DetectionDataModule
from drkd.engine import interruption
from drkd.engine.checkpoint_io import AtomicCheckpoints
from drkd.engine.interruption import Interruptible, StoppedBySignal, StopsAtOnce
from drkd.engine.module import DistillationModule
from drkd.recipes import requeue as requeue_module
from drkd.recipes import training
from drkd.recipes.recipe import load_recipe
from drkd.recipes.requeue import requeue
from drkd.recipes.run_folder import RunFolder, is_first_process
from drkd.recipes.training import train

pytestmark = pytest.mark.slow


def _overrides(data: Path, output: Path, *extra: str) -> list[str]:
    return [
        f"--data.root={data}",
        "--data.val_split=val",
        "--data.batch_size=1",
        "--data.min_size=64",
        "--data.max_size=96",
        "--student.fpn_channels=32",
        "--student.backbone_weights=null",
        "--training.epochs=2",
        "--training.validate_every=1",
        "--training.keep=best",
        "--training.ema=0.9",
        "--training.checkpoint_every=2",
        "--training.accelerator=cpu",
        "--evaluation.split=null",
        "--inherit=false",
        "--resume=auto",
        f"--output={output}",
        *extra,
    ]


def _train(data: Path, output: Path, *extra: str) -> dict[str, torch.Tensor]:
    train(load_recipe(["digits/retinanet"], _overrides(data, output, *extra)))
    return _student(output)


def _student(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "student.pt", weights_only=True)["state_dict"]


def _differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in ours.keys() | theirs.keys() if not torch.equal(ours[name], theirs[name])]


@pytest.fixture(scope="module")
def whole(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return _train(tiny_coco, tmp_path_factory.mktemp("whole") / "run")


class _Killed(BaseException):
    """Stands for SIGKILL: what follows it in the process writes nothing."""


# Saves of an epoch of six steps: after steps 2, 4 and 5, the best student, the epoch's end. Workers fetch ahead.
@pytest.mark.parametrize(("save", "workers"), [(1, 2), (3, 0), (7, 0)])
def test_a_run_killed_at_a_save_ends_as_if_it_had_not_been(
    save: int,
    workers: int,
    tiny_coco: Path,
    tmp_path: Path,
    whole: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = AtomicCheckpoints.save_checkpoint
    count = 0

    def kill(self: AtomicCheckpoints, *arguments: Any, **options: Any) -> None:
        nonlocal count
        if count == save:
            raise _Killed
        count += 1
        written(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpoints, "save_checkpoint", kill)
        with pytest.raises(_Killed):
            _train(tiny_coco, tmp_path / "run", f"--data.workers={workers}")
    assert _differences(_train(tiny_coco, tmp_path / "run", f"--data.workers={workers}"), whole) == []


def test_a_signal_in_validation_costs_one_step(
    tiny_coco: Path, tmp_path: Path, whole: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--training.checkpoint_every=null", "--training.checkpoint_minutes=null")
    with monkeypatch.context() as patch:
        real = DistillationModule.validation_step

        def signalled(self: DistillationModule, batch: Any, batch_idx: int) -> None:
            if not self.trainer.sanity_checking:
                os.kill(os.getpid(), signal.SIGTERM)
            real(self, batch, batch_idx)

        patch.setattr(DistillationModule, "validation_step", signalled)
        with pytest.raises(StoppedBySignal):
            _train(tiny_coco, tmp_path / "run", *options)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    assert _differences(_train(tiny_coco, tmp_path / "run", *options), whole) == []


@pytest.fixture
def arguments(tiny_coco: Path, tmp_path: Path) -> list[str]:
    """Of a run alone in the test's folder, as the whole one was."""
    return ["train", "--config=digits/retinanet", *_overrides(tiny_coco, tmp_path / "run")]


def _signal_in_step(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DistillationModule.training_step

    def signalled(self: DistillationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == step:
            os.kill(os.getpid(), number)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", signalled)


def test_sigterm_saves_stops_and_the_run_goes_on_from_that_step(
    arguments: list[str],
    tmp_path: Path,
    whole: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        _signal_in_step(2, signal.SIGTERM, patch)
        assert main(arguments) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step 3; a checkpoint of this step is saved. Go on with --resume" in (
        capsys.readouterr().err
    )
    assert signal.getsignal(signal.SIGTERM) == before
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["status"], run["steps"]) == ("interrupted", 3)
    assert main(arguments) == 0
    assert _differences(_student(tmp_path / "run"), whole) == []


@pytest.mark.parametrize(("accumulate", "step"), [(2, 1), (4, 0)])
def test_a_distillation_that_accumulates_goes_on_from_within_an_epoch(
    accumulate: int,
    step: int,
    tiny_coco: Path,
    tiny_detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Six batches an epoch, stopped in both cases after the fourth; with four a step, an epoch's last step has two."""

    def arguments(output: Path) -> list[str]:
        options = [
            f"--teacher.path={tiny_detector}",
            f"--training.accumulate={accumulate}",
            "--training.keep=last",
            "--training.validate_every=0",
            "--training.optimization.warmup_steps=0",
            "--doctor=false",
        ]
        return ["distill", "--config=digits/retinanet", *_overrides(tiny_coco, output, *options)]

    assert main(arguments(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        _signal_in_step(step, signal.SIGTERM, patch)
        assert main(arguments(tmp_path / "run")) == 128 + signal.SIGTERM
    assert f"at step {step + 1}; a checkpoint of this step is saved" in capsys.readouterr().err
    saved = AtomicCheckpoints().load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert (saved["epoch"], saved["global_step"]) == (0, step + 1)
    assert main(arguments(tmp_path / "run")) == 0
    assert _differences(_student(tmp_path / "run"), _student(tmp_path / "whole")) == []


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Signals for which a job was put back; without drkd's handlers a signal does nothing, rather than end pytest."""
    told: list[int] = []
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(training, "requeue", told.append)
    asking = (signal.SIGTERM, signal.SIGUSR1)
    nothing = lambda *_: None  # noqa: E731
    before = [signal.signal(number, nothing) for number in asking]
    yield told
    assert [signal.getsignal(number) for number in asking] == [nothing, nothing]
    for number, handler in zip(asking, before, strict=True):
        signal.signal(number, handler)


def _signalling(number: int) -> Callable[..., NoReturn]:
    def signalled(*_: object, **__: object) -> NoReturn:
        os.kill(os.getpid(), number)
        pytest.fail("the run went on")

    return signalled


def test_a_signal_before_training_stops_at_once_and_requeues(
    tiny_coco: Path,
    tiny_detector: Path,
    tmp_path: Path,
    requeued: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = [*_overrides(tiny_coco, tmp_path / "run"), f"--teacher.path={tiny_detector}"]
    arguments = ["distill", "--config=digits/retinanet", *overrides]
    with monkeypatch.context() as patch:
        patch.setattr(DetectionDataModule, "setup", _signalling(signal.SIGTERM))
        assert main(arguments) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before training; what was saved before stands. Go on" in capsys.readouterr().err
    monkeypatch.setattr(training, "preflight", _signalling(signal.SIGUSR1))
    assert main(arguments) == 128 + signal.SIGUSR1
    assert requeued == [signal.SIGTERM, signal.SIGUSR1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


def test_a_signal_in_the_final_evaluation_stops_at_once_and_the_run_goes_on_there(
    tiny_coco: Path,
    tmp_path: Path,
    requeued: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--training.epochs=1", "--training.keep=last", "--training.validate_every=0", "--evaluation.split=val")
    overrides = _overrides(tiny_coco, tmp_path / "run", *options, "--evaluation.cost=false")
    arguments = ["train", "--config=digits/retinanet", *overrides]
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_detector", _signalling(signal.SIGUSR1))
        assert main(arguments) == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 at step 6; a checkpoint of this step is saved. Go on" in capsys.readouterr().err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["status"], run["steps"], requeued) == ("interrupted", 6, [signal.SIGUSR1])
    student = _student(tmp_path / "run")
    assert main(arguments) == 0
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert _differences(_student(tmp_path / "run"), student) == []


def test_a_signal_to_a_process_that_decodes_images_is_its_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    stops = StopsAtOnce((signal.SIGUSR1,))
    with pytest.raises(StoppedBySignal, match="before training"):
        stops._stop(signal.SIGUSR1, None)
    with monkeypatch.context() as patch:
        patch.setattr(interruption, "os", SimpleNamespace(getpid=lambda: -1))
        stops._stop(signal.SIGUSR1, None)
    stops.ignore()
    stops._stop(signal.SIGUSR1, None)


def test_a_signal_after_trainings_last_look_stops_before_the_final_evaluation(tmp_path: Path) -> None:
    stop = Interruptible(tmp_path / "last.ckpt", every_steps=None, every_minutes=None, signals=(signal.SIGTERM,))
    trainer: Any = SimpleNamespace(world_size=1, global_step=6)
    stop.stop_if_asked(trainer)
    stop._note(signal.SIGTERM, None)
    with pytest.raises(StoppedBySignal, match="at step 6; a checkpoint of this step is saved"):
        stop.stop_if_asked(trainer)


def test_ctrl_c_saves_and_stops_too(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _signal_in_step(2, signal.SIGINT, monkeypatch)
    assert main(arguments) == 130
    assert "stopped by SIGINT at step 3; a checkpoint of this step is saved" in capsys.readouterr().err
    saved = AtomicCheckpoints().load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 3


def test_ctrl_c_twice_does_not_wait(tmp_path: Path) -> None:
    stop = Interruptible(tmp_path / "last.ckpt", every_steps=None, every_minutes=None, signals=(signal.SIGINT,))
    stop._note(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop._note(signal.SIGINT, None)


def test_in_validation_one_process_stops_at_once_and_several_after_it(tmp_path: Path) -> None:
    stop = Interruptible(tmp_path / "last.ckpt", every_steps=None, every_minutes=None, signals=(signal.SIGTERM,))
    one, two = (SimpleNamespace(world_size=size, global_step=6) for size in (1, 2))
    stop.on_validation_batch_end(one, None)  # type: ignore[arg-type]
    stop._note(signal.SIGTERM, None)
    stop.on_validation_batch_end(two, None)  # type: ignore[arg-type]
    with pytest.raises(StoppedBySignal, match="at step 6; the last checkpoint stands"):
        stop.on_validation_batch_end(one, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", [1, 2, 4, 5, 10])
def test_several_processes_stop_within_the_epoch_however_many_batches_a_step_takes(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    stop = Interruptible(tmp_path / "last.ckpt", every_steps=None, every_minutes=None, signals=(signal.SIGTERM,))
    stop._note(signal.SIGTERM, None)
    trainer: Any = SimpleNamespace(world_size=2, is_last_batch=False, global_step=0)
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer.save_checkpoint = lambda path: None
    trainer.check_val_every_n_epoch = None
    with pytest.raises(StoppedBySignal, match="at step 10; a checkpoint of this step is saved"):
        for batch_idx in range(20 * accumulate):
            ends_step = (batch_idx + 1) % accumulate == 0
            trainer.global_step += ends_step
            trainer.fit_loop = SimpleNamespace(_should_accumulate=lambda ends_step=ends_step: not ends_step)
            stop.on_train_batch_end(trainer, None, None, None, batch_idx)  # type: ignore[arg-type]


def test_a_checkpoint_is_written_when_the_last_one_is_old(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    saved: list[int] = []
    write = AtomicCheckpoints.save_checkpoint

    def pass_time(self: Interruptible, trainer: Any, *rest: Any) -> None:
        nonlocal now
        now += 20.0

    def note(self: AtomicCheckpoints, checkpoint: dict[str, Any], *rest: Any, **options: Any) -> None:
        saved.append(checkpoint["global_step"])
        write(self, checkpoint, *rest, **options)

    monkeypatch.setattr(interruption, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Interruptible, "on_train_batch_start", pass_time)
    monkeypatch.setattr(AtomicCheckpoints, "save_checkpoint", note)
    arguments = ["--training.epochs=1", "--training.keep=last", "--training.validate_every=0"]
    _train(
        tiny_coco, tmp_path / "run", *arguments, "--training.checkpoint_every=null", "--training.checkpoint_minutes=1"
    )
    # Twenty seconds a step: a minute has passed after the third; then the epoch's end, which is the run's.
    assert saved == [3, 6]


def test_slurm_is_told_to_requeue_on_its_signal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    class Done:
        returncode = 0
        stderr = ""

    monkeypatch.setattr(requeue_module.subprocess, "run", lambda command, **_: called.append(command) or Done())
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert not requeue(signal.SIGTERM)
    assert requeue(signal.SIGUSR1)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue(signal.SIGUSR1)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not requeue(signal.SIGUSR1)
    assert called == [["scontrol", "requeue", "17"], ["scontrol", "requeue", "5_2"]]


def test_a_run_that_never_saved_starts_again(tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match="Nothing to resume"):
        RunFolder(tmp_path / "run", resume=True)
    for resume in ("auto", True):  # the folder was taken, then the process was killed
        with RunFolder(tmp_path / "run", resume=resume) as folder:
            assert not folder.resumes


def test_a_log_cut_short_loses_its_last_row_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    part = tmp_path / "run" / "logs" / "part-000"
    part.mkdir(parents=True)
    (part / "metrics.csv").write_text("step,epoch,loss\n0,0,1.5\n1,0,1.25\n2,0,1")
    folder.merge_metrics()
    assert (tmp_path / "run" / "metrics.csv").read_text() == "step,epoch,loss\n0,0,1.5\n1,0,1.25\n"


@pytest.mark.parametrize(
    ("environment", "first"),
    [({}, True), ({"NODE_RANK": "1"}, False), ({"NODE_RANK": "0"}, True), ({"NODE_RANK": "1", "RANK": "0"}, True)],
)
def test_the_first_process_of_a_second_machine_writes_nothing(
    environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first


def test_a_damaged_checkpoint_is_one_paragraph(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = {"state_dict": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "loops": {}}
    version = {"pytorch-lightning_version": lightning.__version__}
    AtomicCheckpoints().save_checkpoint({**state, **version, "global_step": 1, "epoch": 0}, file)
    assert main(arguments) == 2
    assert "another student or method" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:300])
    assert main(arguments) == 2
    assert "the checkpoint is damaged" in capsys.readouterr().err.splitlines()[-1]


def _damage(data: Path, place: Path, *names: str) -> Path:
    copied = Path(shutil.copytree(data, place))
    for name in names:
        file = copied / "train" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:60])
    return copied


def test_a_truncated_image_fails_with_its_name_or_is_replaced_and_counted(
    tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _damage(tiny_coco, tmp_path / "data", "3")
    arguments = ["--training.epochs=1", "--training.keep=last", "--training.validate_every=0"]
    with pytest.raises(DrkdError, match=r"3\.png: the image cannot be decoded"):
        _train(data, tmp_path / "fails", *arguments)
    _train(data, tmp_path / "run", *arguments, "--data.unreadable=skip", "--data.workers=1")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [Path(file).name for file in run["unreadable"]] == ["3.png"]
    assert run["steps"] == 6


def test_images_that_could_not_be_read_are_listed_after_a_stop_too(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _damage(tiny_coco, tmp_path / "data", "3")
    options = ("--training.keep=last", "--training.validate_every=0", "--data.unreadable=skip")
    with monkeypatch.context() as patch:
        _signal_in_step(7, signal.SIGTERM, patch)
        with pytest.raises(StoppedBySignal):
            _train(data, tmp_path / "run", *options)
    shutil.copy(tiny_coco / "train" / "3.png", data / "train" / "3.png")
    for _ in range(2):
        run = json.loads((tmp_path / "run" / "run.json").read_text())
        assert [Path(file).name for file in run["unreadable"]] == ["3.png"]
        _train(data, tmp_path / "run", *options)
    assert run["status"] == "finished"


def test_the_stand_in_depends_on_the_files_only(tiny_coco: Path, tmp_path: Path) -> None:
    data = _damage(tiny_coco, tmp_path / "data", "2", "3")
    recipe = load_recipe(["digits/retinanet"], _overrides(data, tmp_path / "run", "--data.unreadable=skip"))
    dataset = recipe.data.train_dataloader().dataset
    assert isinstance(dataset, DetectionDataset)
    assert [dataset[(0, place)].image_id for place in (0, 1, 2, 3)] == [1, 4, 4, 4]
    assert [Path(file).name for file in recipe.data.unreadable_files()] == ["2.png", "3.png"]


def test_a_disk_that_is_gone_is_no_handful_of_bad_files(tiny_coco: Path, tmp_path: Path) -> None:
    data = _damage(tiny_coco, tmp_path / "data", *"123456")
    recipe = load_recipe(["digits/retinanet"], _overrides(data, tmp_path / "run", "--data.unreadable=skip"))
    with pytest.raises(DrkdError, match="6 images in a row cannot be read"):
        recipe.data.train_dataloader().dataset[(0, 0)]


def test_more_than_sixteen_in_a_row_stop_the_run_in_a_larger_split(tiny_coco: Path, tmp_path: Path) -> None:
    recipe = load_recipe(["digits/retinanet"], _overrides(tiny_coco, tmp_path / "run", "--data.unreadable=skip"))
    dataset = recipe.data.train_dataloader().dataset
    assert isinstance(dataset, DetectionDataset)
    gone = replace(dataset.split.records[0], path=tmp_path / "gone.png")
    dataset.split = replace(dataset.split, records=(*[gone] * 17, *dataset.split.records))
    dataset.unreadable = torch.zeros(len(dataset.split.records), dtype=torch.uint8)
    assert dataset[(0, 1)].image_id == dataset.split.records[17].image_id
    with pytest.raises(DrkdError, match="17 images in a row cannot be read"):
        dataset[(0, 0)]


def test_an_image_of_the_validation_split_has_no_stand_in(tiny_coco: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_coco, tmp_path / "data"))
    file = next((data / "val").glob("*.png"))
    file.write_bytes(file.read_bytes()[:60])
    recipe = load_recipe(["digits/retinanet"], _overrides(data, tmp_path / "run", "--data.unreadable=skip"))
    with pytest.raises(DrkdError, match=rf"{file.name}: the image cannot be decoded"):
        list(recipe.data.val_dataloader())


def test_a_worker_that_dies_is_explained(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, read = os.getpid(), DetectionDataset.__getitem__

    def die(self: DetectionDataset, index: Any) -> Any:
        if os.getpid() != parent and index[1] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)

    monkeypatch.setattr(DetectionDataset, "__getitem__", die)
    arguments = _overrides(tiny_coco, tmp_path / "run", "--data.workers=1", "--training.epochs=1")
    assert main(["train", "--config=digits/retinanet", *arguments]) == 1
    assert "A process that decodes images was killed" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_stopped_by_signal_is_no_failure() -> None:
    assert not issubclass(StoppedBySignal, Exception)


def _full_at_the_third_save(patch: pytest.MonkeyPatch) -> None:
    real, count = torch.save, 0

    def full(value: Any, file: Any, *rest: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, file, *rest, **options)

    patch.setattr(torch, "save", full)


def _out_of_memory_at_the_fourth_step(patch: pytest.MonkeyPatch) -> None:
    real = DistillationModule.training_step

    def too_large(self: DistillationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, batch, batch_idx)

    patch.setattr(DistillationModule, "training_step", too_large)


@pytest.mark.parametrize(
    ("fail", "steps", "words"),
    [
        (_full_at_the_third_save, 5, "the checkpoint cannot be written (No space left on device)"),
        (_out_of_memory_at_the_fourth_step, 3, "Out of memory. Use smaller batches (data.batch_size"),
    ],
)
def test_what_the_machine_lacks_for_a_moment_costs_the_steps_since_the_last_checkpoint(
    fail: Callable[[pytest.MonkeyPatch], None],
    steps: int,
    words: str,
    arguments: list[str],
    tmp_path: Path,
    whole: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        fail(patch)
        assert main(arguments) == 1
    assert words in capsys.readouterr().err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["status"], run["steps"]) == ("failed", steps)
    checkpoints = [*(tmp_path / "run" / "checkpoints").iterdir()]
    assert checkpoints and all(AtomicCheckpoints().load_checkpoint(file)["global_step"] for file in checkpoints)
    assert main(arguments) == 0
    assert _differences(_student(tmp_path / "run"), whole) == []


def test_what_two_stages_draw_at_random_is_drawn_again_after_a_stop(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regions and boxes are sampled, and `MGD` draws masks."""
    builder = FasterRCNNBuilder(width=0.25, fpn_channels=96, representation_size=32)
    torch.manual_seed(3)
    teacher = tmp_path / "teacher.pt"
    settings = {"min_size": 64, "max_size": 96, "size_divisor": 32}
    save_student(teacher, builder.build(["cat", "dog"]), builder=builder, image_settings=settings)

    def arguments(output: Path) -> list[str]:
        options = [f"--teacher.path={teacher}", "--method=drkd.methods.MGD", "--doctor=false", "--training.keep=last"]
        options += ["--student.rpn_batch_size=8", "--student.roi_batch_size=8", "--training.validate_every=0"]
        return ["distill", "--config=digits/faster_rcnn", *_overrides(tiny_coco, output, *options)]

    assert main(arguments(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        _signal_in_step(7, signal.SIGTERM, patch)
        assert main(arguments(tmp_path / "run")) == 128 + signal.SIGTERM
    assert main(arguments(tmp_path / "run")) == 0
    assert _differences(_student(tmp_path / "run"), _student(tmp_path / "whole")) == []
