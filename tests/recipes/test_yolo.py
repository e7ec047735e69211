"""YOLOs through the whole machinery: distilled from a recipe either way, carried to Ultralytics and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import TINY_CLASSES

import drkd
from drkd.adapters import UltralyticsBuilder, UltralyticsDetector, load_detector, save_student
from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.cli import main
from drkd.recipes.inheritance import inherit_neck_and_head
from drkd.recipes.recipe import load_recipe
from drkd.recipes.training import distill

pytest.importorskip("ultralytics")

YOLO = {"class_path": "drkd.adapters.UltralyticsBuilder", "init_args": {"model": "yolo11n.yaml"}}
RETINANET = {
    "class_path": "drkd.adapters.RetinaNetBuilder",
    "init_args": {"width": 0.25, "fpn_channels": 32, "norm": "frozen"},
}
DOCS = Path(drkd.__file__).parents[2] / "docs" / "ultralytics.md"


@pytest.fixture(scope="module")
def yolo_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger YOLO with random weights, as drkd saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    settings = {"min_size": 64, "max_size": 96, "size_divisor": 32}
    detector = UltralyticsBuilder(model="yolo11s.yaml").build(TINY_CLASSES)
    save_student(path, detector, builder=None, image_settings=settings)
    return path


def write_recipe(folder: Path, data: Path, *, student: dict[str, Any], teacher: Path, method: str) -> Path:
    content = {
        "student": student,
        "teacher": {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(teacher)}},
        "method": {"class_path": f"drkd.methods.{method}"},
        "data": {"root": str(data), "batch_size": 2, "min_size": 64, "max_size": 96, "workers": 0},
        "training": {
            "steps": 2,
            "validate_every": 1,
            "ema": 0.9,
            "accelerator": "cpu",
            "optimization": {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_steps": 0},
        },
        "evaluation": {"split": None},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("student", "teacher", "method"),
    [
        (YOLO, "yolo", "DRKD"),
        (YOLO, "yolo", "LD"),
        (YOLO, "retinanet", "DRKD"),
        (YOLO, "retinanet", "CWD"),
        (RETINANET, "yolo", "DRKD"),
        (RETINANET, "yolo", "CWD"),
    ],
)
def test_pairs_are_distilled_from_a_recipe(
    student: dict[str, Any],
    teacher: str,
    method: str,
    tiny_coco: Path,
    tiny_detector: Path,
    yolo_teacher: Path,
    tmp_path: Path,
) -> None:
    file = yolo_teacher if teacher == "yolo" else tiny_detector
    result = distill(load_recipe([write_recipe(tmp_path, tiny_coco, student=student, teacher=file, method=method)]))
    shown = result.distiller.monitor
    assert shown.terms and all(value.isfinite() and value > 0 for value in shown.terms.values())
    assert shown.ratios and all(ratio > 0 for ratio in shown.ratios.values())
    # The teacher is still what its file says, batch norms and all.
    before = load_detector(file).model.state_dict()
    assert result.distiller.teacher is not None
    after = result.distiller.teacher.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    loaded = load_detector(result.folder / "student.pt")
    assert loaded.spec == result.student.spec and isinstance(loaded, UltralyticsDetector) == (student is YOLO)
    assert all(
        torch.equal(value, result.student.model.state_dict()[name]) for name, value in loaded.model.state_dict().items()
    )


def test_only_neck_and_head_are_inherited() -> None:
    torch.manual_seed(0)
    student, teacher = (UltralyticsBuilder(model="yolo11n.yaml").build(TINY_CLASSES) for _ in range(2))
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    copied = inherit_neck_and_head(student, teacher).copied
    layers = {int(name.split(".")[1]) for name in copied}
    # Of its 24 layers the first eleven are the backbone.
    assert min(layers) == 13 and max(layers) == 23
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, (teacher.model.state_dict() if name in copied else before)[name])


def test_there_and_back_on_the_command_line(
    tiny_coco: Path, yolo_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, plain = tmp_path / "native.pt", tmp_path / "plain.pt"
    assert main(["yolo", "export", str(yolo_teacher), "--output", str(native)]) == 0
    assert f'YOLO("{native}")' in capsys.readouterr().out
    model = ultralytics_module("models").YOLO(native)
    assert model.names == {0: "cat", 1: "dog"} and model.overrides["imgsz"] == 96
    assert main(["yolo", "export", str(yolo_teacher), "--output", str(native)]) == 2
    assert "exists already" in capsys.readouterr().err
    # Nowhere without being told to trust it.
    for command in (
        ["yolo", "import", str(native), "--output", str(plain)],
        ["evaluate", str(native), "--data", str(tiny_coco)],
        ["predict", str(native), str(tiny_coco / "val"), "--output", str(tmp_path / "found")],
        ["init", str(tiny_coco), "--teacher", str(native), "--output", str(tmp_path / "recipe.yaml")],
    ):
        assert main(command) == 2
        assert "--trust-pickle" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="because you said to trust it"):
        assert main(["yolo", "import", str(native), "--trust-pickle", "--output", str(plain)]) == 0
    assert torch.load(plain, weights_only=True)["preprocessing"]["max_size"] == 96
    first, second = load_detector(yolo_teacher), load_detector(plain)
    assert first.spec == second.spec
    assert all(torch.equal(v, second.model.state_dict()[name]) for name, v in first.model.state_dict().items())


def test_a_trusted_checkpoint_is_measured_and_teaches(
    tiny_coco: Path, yolo_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, recipe = tmp_path / "native.pt", tmp_path / "recipe.yaml"
    assert main(["yolo", "export", str(yolo_teacher), "--output", str(native)]) == 0
    with pytest.warns(UserWarning, match="because you said to trust it"):
        told = ["evaluate", str(native), "--data", str(tiny_coco), "--workers=0", "--device=cpu", "--trust-pickle"]
        assert main([*told, "--cost", "--min-size=64", f"--output={tmp_path / 'numbers.json'}"]) == 0
        told = ["init", str(tiny_coco), "--teacher", str(native), "--output", str(recipe), "--trust-pickle"]
        assert main(told) == 0
    assert yaml.safe_load((tmp_path / "numbers.json").read_text())["cost"]["parameters"] > 1e6
    assert "yolo, 2 classes" in capsys.readouterr().out
    teacher = load_recipe([recipe]).teacher
    assert isinstance(teacher, UltralyticsBuilder) and teacher.trust_pickle and teacher.head == "own"


def test_what_is_no_yolo_is_not_exported(
    tiny_detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["yolo", "export", str(tiny_detector), "--output", str(tmp_path / "native.pt")]) == 2
    assert "holds a retinanet, not a YOLO" in capsys.readouterr().err


def test_the_recipe_of_the_documentation_loads(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    path = tmp_path / "recipe.yaml"
    path.write_text(block)
    recipe = load_recipe([path])
    assert isinstance(recipe.student, UltralyticsBuilder) and recipe.teacher is not None
    assert "AGPL-3.0" in DOCS.read_text(encoding="utf-8")
