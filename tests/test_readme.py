"""The README's Python runs as it stands there, and says what the package says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet

from drkd.adapters import FCOSBuilder, RetinaNetBuilder
from drkd.adapters.checkpoint import save_student

README = Path(__file__).parents[1] / "README.md"


def _block(opening: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(block for block in blocks if opening in block)


@pytest.fixture
def boxes() -> list[Tensor]:
    return [torch.tensor([[4.0, 4.0, 40.0, 40.0], [30.0, 20.0, 60.0, 60.0]]), torch.tensor([[8.0, 8.0, 50.0, 30.0]])]


def test_the_three_lines(boxes: list[Tensor]) -> None:
    student = RetinaNetBuilder(backbone="resnet18", fpn_channels=32).build(["cat", "dog"]).model
    teacher = FCOSBuilder(backbone="resnet18", fpn_channels=64, extra="p6p7").build(["cat", "dog"]).model
    assert isinstance(student, RetinaNet)
    assert isinstance(teacher, FCOS)
    targets = [{"boxes": box, "labels": torch.ones(len(box), dtype=torch.int64)} for box in boxes]
    scope = {
        "student": student,
        "teacher": teacher,
        "names": ["cat", "dog"],
        "images": list(torch.rand(2, 3, 64, 64)),
        "targets": targets,
    }
    exec(_block("import DRKD"), scope)
    kinds = {name.split("/")[0] for name in scope["losses"]}
    assert kinds == {"task", "kd"}
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


def test_the_student_loads_without_drkd(tmp_path: Path) -> None:
    builder = RetinaNetBuilder(backbone="timm/resnet10t", fpn_channels=32, extra="none")
    detector = builder.build(["cat", "dog"])
    settings = {"min_size": 64, "max_size": 64, "size_divisor": 32}
    save_student(tmp_path / "student.pt", detector, builder=builder, image_settings=settings)
    code = torch.load(tmp_path / "student.pt", weights_only=True)["code"]
    imports = "\n".join(line for line in code.splitlines() if line.startswith(("import ", "from ")))
    assert "drkd" not in imports
    scope: dict[str, nn.Module] = {}
    lines = _block("weights_only").replace('"student.pt"', repr(str(tmp_path / "student.pt")))
    exec(imports + "\n" + lines, scope)
    expected = detector.model.state_dict()
    loaded = scope["model"].state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
