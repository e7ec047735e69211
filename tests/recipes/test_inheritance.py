"""Inheriting the teacher's neck and head: what is copied, and what cannot be."""

from __future__ import annotations

import pytest
import torch

from drkd.adapters import FasterRCNNBuilder, RetinaNetBuilder
from drkd.contracts import DrkdError
from drkd.recipes.inheritance import inherit_neck_and_head

NAMES = ["cat", "dog"]


def test_what_fits_is_copied_and_the_body_is_left_alone() -> None:
    student = RetinaNetBuilder(width=0.25, fpn_channels=32, extra="none").build(NAMES)
    teacher = RetinaNetBuilder(width=0.5, fpn_channels=32, extra="none").build(NAMES)
    body = student.model.state_dict()["backbone.body.conv1.weight"].clone()
    copied = inherit_neck_and_head(student, teacher)
    ours, theirs = student.model.state_dict(), teacher.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in copied)
    assert "head.classification_head.cls_logits.weight" in copied
    assert any(name.startswith("backbone.fpn.layer_blocks") for name in copied)
    # Lateral convolutions read the body's channels, which differ.
    assert not any(name.startswith("backbone.body") or "inner_blocks.0.0.weight" in name for name in copied)
    assert torch.equal(ours["backbone.body.conv1.weight"], body)
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
