"""Transformers detectors in whole runs: as teacher, as student, and in the recipes that ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from drkd.adapters import DetrBuilder, FasterRCNNBuilder, load_detector, save_student
from drkd.contracts import DrkdError
from drkd.recipes.builtin import list_builtin
from drkd.recipes.evaluation import evaluate
from drkd.recipes.recipe import Recipe, load_recipe
from drkd.recipes.training import distill, train

transformers = pytest.importorskip("transformers", minversion="5.24")

CLASSES = ("cat", "dog")
SMALL: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "num_queries": 20,
    "num_denoising": 5,
}
SHIPPED = [name for name in list_builtin() if name.startswith("transformers/")]
DETR = {
    "class_path": "drkd.adapters.DetrBuilder",
    "init_args": {"backbone": "timm/resnet10t", "config": SMALL},
}
RETINANET = {"class_path": "drkd.adapters.RetinaNetBuilder", "init_args": {"width": 0.25, "fpn_channels": 32}}


@pytest.fixture(scope="module")
def rtdetr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model's folder as the Hub has it. Read only."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "model"
    DetrBuilder(backbone="timm/resnet10t", config=SMALL).build(("dog", "cup", "cat")).model.save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def faster_rcnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Faster R-CNN of the classes cat and dog. Read only."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "student.pt"
    builder = FasterRCNNBuilder(width=0.25, fpn_channels=16, representation_size=32)
    settings = {"min_size": 64, "max_size": 96, "size_divisor": 32}
    save_student(path, builder.build(CLASSES), builder=builder, image_settings=settings)
    return path


def recipe(
    folder: Path, tiny_coco: Path, student: dict[str, Any], teacher: dict[str, Any], method: str, *extra: str
) -> Recipe:
    content = {
        "student": student,
        "teacher": teacher,
        "method": {"class_path": f"drkd.methods.{method}"},
        "data": {"root": str(tiny_coco), "val_split": "val", "batch_size": 2, "min_size": 64, "max_size": 96},
        "training": {"steps": 2, "validate_every": 1, "accelerator": "cpu", "monitor_interval": 1, "log_interval": 1},
        "evaluation": {"split": "val"},
        "output": str(folder / "run"),
    }
    content["data"]["workers"] = 0
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return load_recipe([folder / "recipe.yaml"], extra)


def plain_names(detector: Any) -> set[str]:
    plain = transformers.AutoModelForObjectDetection.from_config(detector.model.config)
    return {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize("method", ["DRKD", "PKD"])
def test_rtdetr_teaches_retinanet(method: str, rtdetr: Path, tiny_coco: Path, tmp_path: Path) -> None:
    teacher = {"class_path": "drkd.adapters.PretrainedDetrBuilder", "init_args": {"name": str(rtdetr)}}
    result = distill(recipe(tmp_path, tiny_coco, RETINANET, teacher, method))
    teacher_model: Any = result.distiller.teacher
    assert teacher_model.label_ids == (2, 0) and not teacher_model.training
    state = transformers.AutoModelForObjectDetection.from_pretrained(rtdetr).state_dict()
    for name, value in teacher_model.model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert all(not p.requires_grad and p.grad is None for p in teacher_model.parameters())
    assert all(0 < float(ratio) < float("inf") for ratio in result.distiller.monitor.ratios.values())
    assert result.distiller.monitor.ratios


@pytest.mark.parametrize("method", ["DRKD", "PKD"])
def test_faster_rcnn_teaches_rtdetr(method: str, faster_rcnn: Path, tiny_coco: Path, tmp_path: Path) -> None:
    teacher = {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(faster_rcnn)}}
    result = distill(recipe(tmp_path, tiny_coco, DETR, teacher, method))
    student: Any = result.student
    names = {name for name, _ in student.named_parameters()}
    assert names == {f"model.{name}" for name in plain_names(student)}
    assert all(0 < float(ratio) < float("inf") for ratio in result.distiller.monitor.ratios.values())
    assert 0 <= result.metrics["ap"] <= 1
    again: Any = load_detector(result.folder / "student.pt")
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, student.state_dict()[name].cpu(), rtol=0, atol=0)
    measured = evaluate(result.folder, data=str(tiny_coco), workers=0, device="cpu")
    assert measured.metrics["ap"] == pytest.approx(result.metrics["ap"], abs=1e-6)


@pytest.mark.parametrize("kind", ["rt_detr_v2", "d_fine", "deformable_detr"])
def test_the_family_teaches_itself(kind: str, tiny_coco: Path, tmp_path: Path) -> None:
    own = {"encoder_hidden_dim", "decoder_in_channels", "num_denoising"} if kind == "deformable_detr" else set()
    config = {name: value for name, value in SMALL.items() if name not in own}
    detector = {**DETR, "init_args": {**DETR["init_args"], "model_type": kind, "config": config}}  # type: ignore[dict-item]
    result = distill(recipe(tmp_path, tiny_coco, detector, detector, "DRKD", "--evaluation.split=null"))
    assert load_detector(result.folder / "student.pt").spec.family == kind


def test_a_method_on_predictions_says_that_there_are_none(tiny_coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match=r"LogitKD .* student \(rt_detr\) with no predictions that drkd can read"):
        distill(recipe(tmp_path, tiny_coco, DETR, DETR, "LogitKD"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_take_one_step(name: str, rtdetr: Path, tiny_coco: Path, tmp_path: Path) -> None:
    whole = load_recipe([name])
    assert type(whole.teacher).__name__ == "PretrainedDetrBuilder"
    assert str(whole.output) == f"runs/{name}"
    small = [
        f"--data.root={tiny_coco}",
        "--data.batch_size=2",
        "--data.workers=0",
        "--data.min_size=64",
        "--data.max_size=96",
        "--training.steps=1",
        "--training.epochs=null",
        "--training.validate_every=0",
        "--training.accelerator=cpu",
        "--evaluation.split=null",
        "--student.backbone_weights=null",
        f"--teacher.name={rtdetr}",
        f"--output={tmp_path / 'run'}",
    ]
    if type(whole.student).__name__ == "RetinaNetBuilder":
        small += ["--student.fpn_channels=32", "--student.width=0.25"]
    else:
        small += ["--student.config.num_queries=20"]
    result = distill(load_recipe([name], small))
    assert (result.folder / "student.pt").is_file()


def test_trained_alone_from_the_command_lines_arguments(tiny_coco: Path, tmp_path: Path) -> None:
    extra = ["--student.config.num_queries=11", "--training.precision=bf16-mixed", "--evaluation.split=null"]
    result = train(recipe(tmp_path, tiny_coco, DETR, DETR, "DRKD", *extra))
    student: Any = result.student
    assert student.model.config.num_queries == 11
