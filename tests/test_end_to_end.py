"""One real distillation on the embedded digits, from recipe to student, in about a minute."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drkd.adapters import load_detector
from drkd.adapters.checkpoint import save_student
from drkd.contracts import DetectionBatch
from drkd.data.batches import TrainLoader
from drkd.data.digits import DigitsConfig, build_digits
from drkd.data.module import DetectionDataModule
from drkd.recipes.recipe import Recipe, load_recipe
from drkd.recipes.training import RunResult, distill

pytestmark = pytest.mark.slow

TEACHER = """
class_path: drkd.adapters.checkpoint.SavedDetectorBuilder
init_args: {path: PATH}
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits(tmp_path_factory.mktemp("digits"), config=DigitsConfig(train=24, tune=4, val=8))


@pytest.fixture(scope="module")
def teacher(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another width with weights of its own; its quality does not matter here."""
    recipe = _recipe(digits, None, tmp_path_factory.mktemp("teacher"), ["--student.init_args.fpn_channels=64"])
    torch.manual_seed(7)
    detector = recipe.student.build(recipe.data.class_names)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    save_student(path, detector, builder=recipe.student, image_settings=recipe.data.image_settings)
    return path


def _recipe(digits: Path, teacher: Path | None, output: Path, extra: list[str] | None = None) -> Recipe:
    overrides = [
        f"--data.root={digits}",
        "--data.batch_size=4",
        "--training.epochs=4",
        "--inherit=false",
        "--doctor=false",
        "--training.optimization.warmup_steps=4",
        "--training.log_interval=2",
        "--training.monitor_interval=2",
        "--training.calibration_steps=6",
        f"--output={output}",
        *([f"--teacher.init_args.path={teacher}"] if teacher else []),
        *(extra or []),
    ]
    return load_recipe(["digits/retinanet"], overrides)


@pytest.fixture(scope="module")
def finished(digits: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return distill(_recipe(digits, teacher, tmp_path_factory.mktemp("runs") / "whole"))


def _columns(folder: Path) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append(float(value))
    return columns


def test_every_loss_falls_and_every_term_is_heard(finished: RunResult) -> None:
    columns = _columns(finished.folder)
    for name in ("loss", "bare/pixel_relation", "bare/instance"):
        assert columns[name][-1] < columns[name][0], name
    for term in ("pixel_relation", "instance_relation", "instance"):
        assert min(columns[f"ratio/{term}"]) > 0, term
        assert any(name.startswith(f"weight/{term}/") for name in columns), term
    # Both sides are related by one unit whose target is a constant: nothing may shrink it to make it easy.
    assert min(columns["target/pixel_relation"]) > 0.5 * columns["target/pixel_relation"][0] > 0
    levels = [name for name in columns if name.startswith("weight/pixel_relation/")]
    assert all(len(set(columns[name][-3:])) == 1 for name in levels), "frozen after the calibration"


def test_the_teacher_is_what_it_was(finished: RunResult, teacher: Path) -> None:
    saved = load_detector(teacher).state_dict()
    trained = finished.distiller.teacher
    assert trained is not None
    for name, value in trained.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_the_saved_student_finds_the_same(finished: RunResult, digits: Path) -> None:
    data = DetectionDataModule(str(digits), min_size=128, max_size=128, workers=0, pad_to=(128, 128))
    batch = next(iter(data.val_dataloader()))
    # In the same memory layout: another one rounds differently, and near-ties in the suppression tip over.
    reloaded = load_detector(finished.folder / "student.pt").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert set(reloaded.state_dict()) == set(finished.student.state_dict())
    for ours, theirs in zip(reloaded.detect(batch), finished.student.eval().detect(batch), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.labels, theirs.labels)


def test_the_run_folder_says_where_the_run_comes_from(finished: RunResult) -> None:
    run = json.loads((finished.folder / "run.json").read_text())
    assert run["status"] == "finished" and run["steps"] == 24 and run["seed"] == 0
    assert run["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "DRKD" in (finished.folder / "recipe.yaml").read_text()
    assert len(list((finished.folder / "checkpoints").glob("*.ckpt"))) >= 1


class _Interrupted(RuntimeError):
    """Stands for whatever ends a process."""


def test_a_resumed_run_equals_an_uninterrupted_one(
    finished: RunResult, digits: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = 0
    whole_epoch = TrainLoader.__iter__

    def break_off(self: TrainLoader) -> Iterator[DetectionBatch]:
        nonlocal served
        for batch in whole_epoch(self):
            served += 1
            if served > 15:
                raise _Interrupted
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoader, "__iter__", break_off)
        with pytest.raises(_Interrupted):
            distill(_recipe(digits, teacher, tmp_path / "broken"))
    resumed = distill(_recipe(digits, teacher, tmp_path / "broken", ["--resume=true"]))
    whole = finished.student.state_dict()
    differences = [name for name, value in resumed.student.state_dict().items() if not torch.equal(value, whole[name])]
    assert differences == []
    assert _same_curve(_columns(resumed.folder), _columns(finished.folder))


def _same_curve(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> bool:
    return all(ours[name][-1] == pytest.approx(theirs[name][-1], rel=1e-6) for name in ("loss", "bare/instance"))


def test_the_result_is_on_record(finished: RunResult) -> None:
    scores: dict[str, Any] = json.loads((finished.folder / "evaluation.json").read_text())
    assert scores["thresholds_px"] == [16.0, 48.0]
    assert scores["ap"] == pytest.approx(finished.metrics["ap"]) and scores["split"] == "val"
