"""Which output of a torchvision detector stands for which class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision.models import get_model_weights
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead

from drkd.adapters.outer_model import describe_model
from drkd.contracts import DrkdError

TWO_STAGE = ("faster_rcnn", "mask_rcnn")
SSD_FAMILIES = ("ssd", "ssdlite")
# Families whose output 0 is the background, so that the first class is output 1.
WITH_BACKGROUND = TWO_STAGE + SSD_FAMILIES
_NOT_A_CLASS = ("__background__", "N/A")


def family_of(model: nn.Module) -> str:
    """The detector's kind by its class.

    Raises:
        ValueError: If it is none of those that are supported.
    """
    if isinstance(model, MaskRCNN):
        return "mask_rcnn"
    if isinstance(model, FasterRCNN) and not isinstance(model, KeypointRCNN):
        return "faster_rcnn"
    if isinstance(model, SSD):
        return "ssdlite" if isinstance(model.head, SSDLiteHead) else "ssd"
    if isinstance(model, RetinaNet):
        return "retinanet"
    if isinstance(model, FCOS):
        return "fcos"
    raise ValueError(
        f"expected torchvision's RetinaNet, FCOS, SSD, FasterRCNN or MaskRCNN, got {describe_model(model)}"
    )


def count_outputs(model: nn.Module) -> int:
    """Outputs of the classification head, background included where there is one."""
    untyped: Any = model
    family = family_of(model)
    if family in TWO_STAGE:
        return int(untyped.roi_heads.box_predictor.cls_score.out_features)
    if family in SSD_FAMILIES:
        return int(untyped.head.classification_head.num_columns)
    return int(untyped.head.classification_head.num_classes)


def infer_labels(model: nn.Module, class_names: Sequence[str] | None) -> tuple[list[str], list[int]]:
    """Names of the classes and the model's label of each, from the number of outputs.

    The labels of the R-CNNs and SSDs are 1..K, with the background at 0. The others' are 0..K-1 if there are K
    outputs, or 1..K if there are K + 1, as torchvision's own models have it: without names nobody can tell which. A
    model of COCO's 91 outputs is matched by name.

    Raises:
        ValueError: If the number of classes does not fit the outputs, or names are needed and there are none.
    """
    outputs = count_outputs(model)
    background = int(family_of(model) in WITH_BACKGROUND)
    categories = coco_categories()
    if outputs == len(categories) and (class_names is None or len(class_names) < outputs - 1):
        names = [name for name in categories if name not in _NOT_A_CLASS] if class_names is None else list(class_names)
        return names, coco_labels(names)
    if class_names is None and not background:
        raise ValueError(
            f"class_names: expected the names of the classes, got none. The head of this {family_of(model)} has "
            f"{outputs} outputs, and only names tell whether they are {outputs} classes with labels 0..{outputs - 1}, "
            f"or {outputs - 1} with labels 1..{outputs - 1} after a background that nothing is trained on, as "
            "torchvision's num_classes counts them"
        )
    names = [str(index) for index in range(outputs - background)] if class_names is None else list(class_names)
    offset = outputs - len(names)
    if not background <= offset <= 1:
        raise ValueError(
            f"the head of this {family_of(model)} has {outputs} outputs{', background included' * background}, got "
            f"{len(names)} class names: expected {outputs - background} names, or label_ids"
        )
    return names, list(range(offset, outputs))


def coco_categories() -> list[str]:
    """The 91 slots of torchvision's COCO models by name, background and gaps included."""
    return list(get_model_weights("retinanet_resnet50_fpn")["COCO_V1"].meta["categories"])


def coco_labels(class_names: Sequence[str]) -> list[int]:
    """The slot of each class among the 91 of torchvision's COCO models, -1 where COCO has no such class.

    Raises:
        DrkdError: If COCO has none of the classes.
    """
    slots = {name: slot for slot, name in enumerate(coco_categories()) if name not in _NOT_A_CLASS}
    labels = [slots.get(name, -1) for name in class_names]
    if max(labels, default=-1) < 0:
        raise DrkdError(
            f"class_names: none of {list(class_names)[:5]} is a COCO category, so a model with COCO's outputs detects "
            "none of them; give it a new head (head: new), or use COCO's class names."
        )
    return labels
