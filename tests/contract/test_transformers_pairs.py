"""Every method on features with a transformers detector as student and as teacher; those on predictions say why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import drkd.methods
from drkd.adapters import DetrBuilder, FasterRCNNBuilder, RetinaNetBuilder
from drkd.contracts import DetectionBatch, Detector, DrkdError, KDMethod
from drkd.engine.distiller import Distiller
from drkd.methods import DRKD, PKD

pytest.importorskip("transformers", minversion="5.24")

CLASSES = ("cat", "dog")
CONFIG: dict[str, Any] = {
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
ARGUMENTS = {
    "Combination": {"methods": {"relations": DRKD, "features": PKD}},
    "MismatchedTeacher": {"method": DRKD},
}
EXPORTED = [getattr(drkd.methods, name) for name in drkd.methods.__all__]
METHODS = [entry for entry in EXPORTED if isinstance(entry, type) and issubclass(entry, KDMethod)]
ON_FEATURES = [method for method in METHODS if method.needs == {"features"}]


def build(kind: str) -> Detector:
    torch.manual_seed(0)
    if kind == "rt_detr":
        return DetrBuilder(backbone="timm/resnet10t", config=CONFIG).build(CLASSES)
    if kind == "retinanet":
        return RetinaNetBuilder(width=0.25, fpn_channels=32).build(CLASSES)
    return FasterRCNNBuilder(width=0.25, fpn_channels=16, representation_size=32).build(CLASSES)


def make_batch() -> DetectionBatch:
    """Two images of different size, one of them without a box."""
    torch.manual_seed(1)
    images = [torch.rand(3, 128, 96), torch.rand(3, 100, 128)]
    boxes = torch.tensor([[5.0, 5, 60, 70], [30, 20, 90, 120], [10, 60, 40, 100]])
    targets = [
        {"boxes": boxes, "labels": torch.tensor([0, 1, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return DetectionBatch.from_lists(images, targets)


@pytest.mark.parametrize("method", ON_FEATURES)
@pytest.mark.parametrize(("student", "teacher"), [("rt_detr", "faster_rcnn"), ("retinanet", "rt_detr")])
def test_a_step(student: str, teacher: str, method: type[KDMethod]) -> None:
    arguments = ARGUMENTS.get(method.__name__, {})
    learner, guide = build(student), build(teacher)
    kd = method(learner.spec, guide.spec, **arguments)
    distiller = Distiller(learner, guide, kd, monitor_interval=1)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    losses = distiller.train()(make_batch())
    torch.stack(list(losses.values())).sum().backward()
    assert any(name.startswith("kd/") for name in losses)
    assert all(value.isfinite() for value in losses.values())
    assert any(float(ratio) > 0 for ratio in distiller.monitor.ratios.values())
    assert all(p.grad is not None for p in distiller.trainable_parameters())
    after = guide.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("method", [entry for entry in METHODS if entry not in ON_FEATURES])
def test_a_method_on_predictions_is_refused(method: type[KDMethod]) -> None:
    student, teacher = build("rt_detr"), build("rt_detr")
    with pytest.raises(DrkdError, match=r"\(rt_detr\)"):
        method(student.spec, teacher.spec)


def test_methods_are_discovered() -> None:
    assert {"DRKD", "PaperDRKD", "FGD", "MGD", "PKD"} <= {method.__name__ for method in ON_FEATURES}
    assert {"LogitKD", "CrossKD"} <= {method.__name__ for method in METHODS if method not in ON_FEATURES}
