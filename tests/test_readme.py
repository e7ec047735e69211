"""The README's Python runs as it stands there, and says what the package says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet

from drkd.adapters import FCOSBuilder, RetinaNetBuilder
from drkd.adapters.checkpoint import save_student
from drkd.contracts import DetectionBatch

README = Path(__file__).parents[1] / "README.md"


def _block(opening: str, page: Path = README) -> str:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if opening in block)


@pytest.fixture
def boxes() -> list[Tensor]:
    return [torch.tensor([[4.0, 4.0, 40.0, 40.0], [30.0, 20.0, 60.0, 60.0]]), torch.tensor([[8.0, 8.0, 50.0, 30.0]])]


def _targets(boxes: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"boxes": box, "labels": torch.ones(len(box), dtype=torch.int64)} for box in boxes]


def test_the_three_lines(boxes: list[Tensor]) -> None:
    student = RetinaNetBuilder(backbone="resnet18", fpn_channels=32).build(["cat", "dog"]).model
    teacher = FCOSBuilder(backbone="resnet18", fpn_channels=64, extra="p6p7").build(["cat", "dog"]).model
    assert isinstance(student, RetinaNet)
    assert isinstance(teacher, FCOS)
    seen: list[torch.Size] = []
    for model in (student, teacher):
        model.transform.min_size, model.transform.max_size = (96,), 128
        model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    scope = {
        "student": student,
        "teacher": teacher,
        "names": ["cat", "dog"],
        "images": list(torch.rand(2, 3, 64, 64)),
        "targets": _targets(boxes),
    }
    exec(_block("import DRKD"), scope)
    kinds = {name.split("/")[0] for name in scope["losses"]}
    assert kinds == {"task", "kd"}
    # Both see the size that the student's own transform asks for.
    assert seen[-2:] == [torch.Size((2, 3, 96, 96))] * 2
    assert any(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_drkd_on_feature_maps_alone(boxes: list[Tensor]) -> None:
    student_maps = {"p3": torch.rand(2, 8, 64, 64, requires_grad=True), "p4": torch.rand(2, 8, 32, 32)}
    student_maps["p4"].requires_grad_()
    teacher_maps = {"0": torch.rand(2, 16, 64, 64), "1": torch.rand(2, 16, 32, 32)}
    task_loss = sum(level.square().mean() for level in student_maps.values())
    scope = {"student_maps": student_maps, "teacher_maps": teacher_maps, "boxes": boxes, "task_loss": task_loss}
    exec(_block("for_features"), scope)
    (scope["loss"] - task_loss).backward()
    gradient = student_maps["p3"].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("backbone", ["timm/resnet10t", "resnet18"])
def test_the_student_loads_without_drkd(backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = RetinaNetBuilder(backbone=backbone, fpn_channels=32, extra="none")
    detector = builder.build(["cat", "dog"])
    settings = {"min_size": 64, "max_size": 64, "size_divisor": 32}
    save_student(tmp_path / "student.pt", detector, builder=builder, image_settings=settings)
    code = torch.load(tmp_path / "student.pt", weights_only=True)["code"]
    assert "drkd" not in code
    monkeypatch.chdir(tmp_path)
    exec(_block("student.py"), {"torch": torch, "Path": Path})
    scope = runpy.run_path("student.py")
    expected = detector.model.state_dict()
    loaded = scope["model"].state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_whole_loop_trains_stops_and_goes_on(
    boxes: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop of docs/own_loop.md: one epoch, then the same lines again with two."""
    monkeypatch.chdir(tmp_path)
    lines = compile(_block("last.pt", README.parent / "docs" / "own_loop.md"), "own_loop.md", "exec")
    batches = [(list(torch.rand(2, 3, 48, 48)), _targets([0.7 * box for box in boxes]))]

    def run(epochs: int) -> dict[str, Any]:
        torch.manual_seed(0)
        builder = RetinaNetBuilder(backbone="resnet18", fpn_channels=32, score_threshold=0.0)
        models = [builder.build(["cat", "dog"]).model for _ in "12"]
        for model in models:
            assert isinstance(model, RetinaNet)
            model.transform.min_size, model.transform.max_size = (64,), 64
        scope = {
            "my_student": models[0],
            "my_teacher": models[1],
            "names": ["cat", "dog"],
            "loader": batches,
            "epochs": epochs,
        }
        exec(lines, scope)
        return scope

    first = run(1)
    assert (first["first_epoch"], first["epoch"]) == (0, 0)
    trained = torch.load("student.pth", weights_only=True)
    second = run(2)
    assert (second["first_epoch"], second["epoch"]) == (1, 1)
    assert second["distiller"].get_extra_state()["passes"] == 2
    assert list(trained) == list(second["my_student"].state_dict())
    assert len(second["found"]) == 2
    # In a batch that the transform made drkd finds boxes in px of the images, as the detector does.
    student, (images, targets) = second["student"], batches[0]
    batch = DetectionBatch.from_lists(images, targets, first_label=1, transform=second["my_student"].transform)
    assert batch.sizes == ((64, 64),) * 2
    for ours, theirs in zip(student.eval().detect(batch), second["found"], strict=True):
        assert float(ours.boxes.amax()) == pytest.approx(float(theirs["boxes"].amax()), abs=1e-3)
        assert 40 < float(ours.boxes.amax()) <= 48
