"""A whole run with labelled and unlabelled images: resumed in between it ends as one that was not interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drkd.adapters import load_detector
from drkd.adapters.checkpoint import read_category_ids
from drkd.recipes.recipe import load_recipe
from drkd.recipes.training import RunResult, distill, train


def run(tiny_coco: Path, tiny_detector: Path, output: Path, *extra: str, alone: bool = False) -> RunResult:
    overrides = [
        f"--data.root={tiny_coco}",
        "--data.val_split=val",
        "--data.batch_size=4",
        "--data.min_size=64",
        "--data.max_size=96",
        "--data.limit=4",
        f"--data.unlabelled=[rest, {tiny_coco / 'val'}]",
        "--data.unlabelled_share=0.5",
        "--training.unlabelled.score_threshold=0.0",
        "--training.unlabelled.max_boxes=5",
        "--student.fpn_channels=32",
        "--student.backbone_weights=null",
        f"--teacher.path={tiny_detector}",
        "--evaluation.split=null",
        "--inherit=false",
        "--training.accelerator=cpu",
        f"--output={output}",
        *extra,
    ]
    recipe = load_recipe(["digits/retinanet"], overrides)
    return (train if alone else distill)(recipe)


def test_a_resumed_run_is_bit_equal(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    whole = run(tiny_coco, tiny_detector, tmp_path / "whole", "--training.epochs=2")
    # The schedule is that of two epochs: the first run is stopped after one of them.
    halves = ("--training.epochs=2",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drkd.engine.module.DistillationModule.on_train_epoch_start", _stop_in_epoch_1, raising=False)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run(tiny_coco, tiny_detector, tmp_path / "halves", *halves)
    resumed = run(tiny_coco, tiny_detector, tmp_path / "halves", *halves, "--resume=true")
    ours, theirs = (load_detector(result.folder / "student.pt").state_dict() for result in (whole, resumed))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=0, msg=name)
    assert read_category_ids(whole.folder / "student.pt") == {"cat": 3, "dog": 7}


def _stop_in_epoch_1(module: object) -> None:
    if module.current_epoch == 1:  # type: ignore[attr-defined]
        raise RuntimeError("somebody pulled the plug")


def test_pseudo_labels_train_and_a_student_alone_leaves_unlabelled_images_out(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    taught = run(
        tiny_coco, tiny_detector, tmp_path / "a", "--training.epochs=1", "--training.unlabelled.pseudo_labels=true"
    )
    assert taught.distiller.unlabelled.pseudo_labels and (taught.folder / "student.pt").is_file()
    alone = run(tiny_coco, tiny_detector, tmp_path / "b", "--training.epochs=1", alone=True)
    # Four labelled images, four a batch.
    assert '"steps": 1' in (alone.folder / "run.json").read_text()
