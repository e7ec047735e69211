"""Inheriting the teacher's neck and head: what is copied, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from tests.adapters.point_adapter import build, losses
from torch import nn

from drkd.adapters import (
    DetrBuilder,
    FasterRCNNBuilder,
    FCOSBuilder,
    MaskRCNNBuilder,
    RetinaNetBuilder,
    SSDLiteBuilder,
    wrap_model,
)
from drkd.adapters.class_map import build_mapped
from drkd.adapters.resized import ResizedDetector
from drkd.contracts import Detector, DrkdError
from drkd.recipes.inheritance import inherit_neck_and_head

NAMES = ["cat", "dog"]
CONFIG = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_layers": 1,
    "decoder_ffn_dim": 32,
    "num_queries": 20,
}


def test_what_fits_is_copied_and_the_body_is_left_alone() -> None:
    student = RetinaNetBuilder(width=0.25, fpn_channels=32, extra="none").build(NAMES)
    teacher = RetinaNetBuilder(width=0.5, fpn_channels=32, extra="none").build(NAMES)
    body = student.model.state_dict()["backbone.body.conv1.weight"].clone()
    inherited = inherit_neck_and_head(student, teacher)
    copied = inherited.copied
    ours, theirs = student.model.state_dict(), teacher.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in copied)
    assert "head.classification_head.cls_logits.weight" in copied
    assert any(name.startswith("backbone.fpn.layer_blocks") for name in copied)
    # Lateral convolutions read the body's channels, which differ.
    assert not any(name.startswith("backbone.body") or "inner_blocks.0.0.weight" in name for name in copied)
    assert torch.equal(ours["backbone.body.conv1.weight"], body)
    assert sorted((*copied, *inherited.own)) == sorted(name for name in ours if not name.startswith("backbone.body"))
    laterals = [f"backbone.fpn.inner_blocks.{level}.0" for level in range(3)]
    assert str(inherited).endswith(f"are the teacher's; its own: {', '.join(laterals)}.")
    student.model.state_dict()["head.classification_head.cls_logits.weight"].add_(1)
    assert not torch.equal(
        student.model.state_dict()["head.classification_head.cls_logits.weight"],
        teacher.model.state_dict()["head.classification_head.cls_logits.weight"],
    )


def test_a_head_of_another_kind_is_refused() -> None:
    student = RetinaNetBuilder(width=0.25, fpn_channels=32, extra="none").build(NAMES)
    teacher = FasterRCNNBuilder(width=0.25, fpn_channels=64, representation_size=16).build(NAMES)
    with pytest.raises(DrkdError, match=r"inherit: .*retinanet.*faster_rcnn.*same fpn_channels"):
        inherit_neck_and_head(student, teacher)


def detr(names: Sequence[str] = NAMES) -> Detector:
    pytest.importorskip("transformers", minversion="5.24")
    return DetrBuilder(backbone="timm/resnet10t", config=CONFIG).build(names)


def own() -> Detector:
    return wrap_model(build(NAMES), ["neck"], losses=losses, class_names=NAMES, image_size=(64, 64))


@pytest.mark.parametrize(
    ("make", "body", "head"),
    [
        (lambda: SSDLiteBuilder(width=0.25, size=96).build(NAMES), "backbone.features.", "head.classification_head."),
        (detr, "model.backbone.", "class_embed."),
        (own, "backbone.", "head."),
    ],
    ids=["ssdlite", "rt_detr", "own"],
)
def test_the_body_stays_the_students_own(make: Callable[[], Detector], body: str, head: str) -> None:
    """The two have the same shapes throughout, so that only the names keep the body apart."""
    student, teacher = make(), make()
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.add_(0.5)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    inherit_neck_and_head(student, teacher)
    ours, theirs = student.model.state_dict(), teacher.model.state_dict()
    inside = [name for name in ours if name.startswith(body)]
    outside = [name for name in ours if head in name and not name.startswith(body)]
    assert inside and all(torch.equal(ours[name], before[name]) for name in inside)
    assert outside and all(torch.equal(ours[name], theirs[name]) for name in outside)


def test_a_model_of_your_own_without_a_backbone_by_name_is_refused() -> None:
    class Layers(nn.Sequential):
        pass

    model = Layers(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.Conv2d(8, 4, 1))
    student = wrap_model(model, ["1"], features=lambda model, batch: model(batch.images), image_size=(64, 64))
    with pytest.raises(DrkdError, match=r"cannot tell the backbone of this Layers.*got 0\.weight, 0\.bias, 1\.weight"):
        inherit_neck_and_head(student, student)


@pytest.mark.parametrize(
    "make",
    [
        RetinaNetBuilder(width=0.25, fpn_channels=32, extra="none").build,
        FCOSBuilder(width=0.25, fpn_channels=32, extra="none").build,
        FasterRCNNBuilder(width=0.25, fpn_channels=32, representation_size=16).build,
        MaskRCNNBuilder(width=0.25, fpn_channels=32, representation_size=16).build,
        SSDLiteBuilder(width=0.25, size=96).build,
        detr,
    ],
    ids=["retinanet", "fcos", "faster_rcnn", "mask_rcnn", "ssdlite", "rt_detr"],
)
def test_rows_are_not_copied_onto_other_classes(make: Callable[[Sequence[str]], Detector]) -> None:
    student, turned, more = make(NAMES), make(NAMES[::-1]), make([*NAMES, "cup"])
    others = more.model.state_dict()
    of_classes = {name for name, value in student.model.state_dict().items() if others[name].shape != value.shape}
    everything = set(inherit_neck_and_head(student, make(NAMES)).copied)
    copied = set(inherit_neck_and_head(student, turned).copied)
    assert of_classes and of_classes <= everything and not of_classes & copied
    assert copied and any("backbone." not in name for name in copied)


def test_what_the_teacher_calls_its_classes_and_how_it_numbers_them_counts() -> None:
    builder = RetinaNetBuilder(width=0.25, fpn_channels=32, extra="none")
    student, head = builder.build(NAMES), "head.classification_head.cls_logits.weight"
    renamed = build_mapped(builder, NAMES, {"feline": "cat"})
    assert head in inherit_neck_and_head(student, renamed).copied
    assert head in inherit_neck_and_head(student, ResizedDetector(renamed, scale=2.0)).copied
    turned = ResizedDetector(builder.build(NAMES[::-1]), scale=2.0)
    assert head not in inherit_neck_and_head(student, turned).copied
    # As a saved detector that was trained with the classes in another order.
    numbered = builder.build(NAMES)
    numbered.label_ids = numbered.label_ids[::-1]
    assert head not in inherit_neck_and_head(student, numbered).copied


def test_a_model_of_your_own_with_other_classes_is_refused() -> None:
    student, teacher = own(), own()
    teacher.spec = replace(teacher.spec, class_names=tuple(NAMES[::-1]))
    with pytest.raises(DrkdError, match=r"inherit: .*not have the same classes in the same order"):
        inherit_neck_and_head(student, teacher)
