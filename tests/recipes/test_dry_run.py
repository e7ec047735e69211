"""A dry run takes two real steps, writes nothing, and projects from them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from drkd.cli import main
from drkd.contracts import DrkdError
from drkd.recipes.dry_run import Projection, dry_run
from drkd.recipes.recipe import Recipe, load_recipe


def _recipe(tiny_coco: Path, tiny_detector: Path, output: Path, *more: str) -> list[str]:
    return [
        f"--data.root={tiny_coco}",
        "--data.batch_size=2",
        "--data.workers=0",
        "--data.min_size=64",
        "--data.max_size=96",
        "--training.accelerator=cpu",
        "--student.backbone_weights=null",
        "--student.backbone=resnet18",
        "--student.width=0.25",
        "--student.fpn_channels=32",
        f"--teacher.path={tiny_detector}",
        f"--output={output}",
        *more,
    ]


def _load(*arguments: str) -> Recipe:
    return load_recipe(["coco/paper_retinanet_r50"], arguments)


def test_a_dry_run_steps_and_writes_nothing(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    recipe = _load(*_recipe(tiny_coco, tiny_detector, tmp_path / "run"))
    found = dry_run(recipe, kind="distill", price=3.6)
    assert not (tmp_path / "run").exists()
    # Six images in batches of two, 24 epochs, a validation every 4 and one of the finished student.
    assert (found.images, found.batch_size, found.steps_per_epoch, found.epochs, found.validations) == (6, 2, 3, 24, 7)
    assert found.step_seconds > 0 and found.loader_rate > 0
    assert found.needed_rate == pytest.approx(2 / found.step_seconds)
    assert {"task/classification", "kd/pixel_relation", "kd/instance_relation", "kd/instance"} <= set(found.losses)
    assert found.peak_bytes is None or found.peak_bytes > 2**26
    text = "\n".join(found.lines())
    assert f"costs {found.epoch_seconds / 1000:.2f}" in text and "7 times" in text


@pytest.mark.parametrize("first", [True, False])
def test_one_of_several_processes_prints(
    first: bool,
    tiny_coco: Path,
    tiny_detector: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Projection("cpu", 100, 10, 2.0, 10, 3.0, 50.0, 5.0, None, "", 7.0, 2, {}, None)
    asked: list[str] = []
    monkeypatch.setattr("drkd.recipes.dry_run.dry_run", lambda _, *, kind, price: asked.append(kind) or found)
    monkeypatch.setattr("drkd.recipes.run_folder.is_first_process", lambda: first)
    arguments = _recipe(tiny_coco, tiny_detector, tmp_path / "run", "--dry-run")
    assert main(["distill", "--config=coco/paper_retinanet_r50", *arguments]) == 0
    # All take part: the steps of several processes wait for each other.
    assert asked == ["distill"]
    assert bool(capsys.readouterr().out.strip()) is first


def test_the_slower_of_step_and_loader_decides() -> None:
    def project(loader_rate: float) -> Projection:
        return Projection("cpu", 100, 10, 2.0, 10, 3.0, loader_rate, 5.0, None, "", 7.0, 2, {}, None)

    assert project(50.0).epoch_seconds == 20.0
    assert project(2.5).epoch_seconds == 40.0
    assert project(2.5).total_seconds == 3 * 40.0 + 2 * 7.0
    assert any("raise data.workers" in line for line in project(2.5).lines())
    assert not any("raise data.workers" in line or "costs" in line for line in project(50.0).lines())


def test_the_command_line_prints_it(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _recipe(tiny_coco, tiny_detector, tmp_path / "run", "--dry-run", "--price=2")
    assert main(["train", "--config=coco/paper_retinanet_r50", *arguments]) == 0
    text = capsys.readouterr().out
    assert "task/classification" in text and "kd/" not in text
    assert re.search(r"epoch: +6 images, 3 steps, .*costs \d", text)
    assert re.search(r"loader: +[\d.]+ images a second, the step consumes [\d.]+", text)
    assert "peak memory" in text and not (tmp_path / "run").exists()
    assert main(["train", "--config=coco/paper_retinanet_r50", *arguments[:-2], "--price=2"]) == 2
    assert "give --dry-run too" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_student_alone_is_tried_without_the_unlabelled_images(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    more = (f"--data.unlabelled=[{tiny_coco / 'val'}]", "--data.unlabelled_share=0.5")
    found = dry_run(_load(*_recipe(tiny_coco, tiny_detector, tmp_path / "run", *more)), kind="train")
    # Three batches of the six labelled images; with the unlabelled ones among them there were six.
    assert found.steps_per_epoch == 3


def test_several_teachers_are_teachers(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    saved = {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(tiny_detector)}}
    arguments = [
        option for option in _recipe(tiny_coco, tiny_detector, tmp_path / "run") if not option.startswith("--teacher.")
    ]
    teachers = json.dumps({name: {"detector": saved} for name in ("one", "two")})
    found = dry_run(_load(*arguments, "--teacher=null", f"--teachers={teachers}"), kind="distill")
    assert {"kd/one.instance", "kd/two.instance"} <= set(found.losses)


def test_distilling_without_a_teacher_is_refused() -> None:
    alone = load_recipe(["digits/retinanet"], ["--teacher=null", "--method=null", "--student.backbone_weights=null"])
    with pytest.raises(DrkdError, match="needs a teacher and a method"):
        dry_run(alone, kind="distill")
