"""What a checkpoint of a torchvision detector says of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from drkd.adapters.weights import read_checkpoint, state_in


@dataclass(frozen=True)
class ZooFile:
    """A file of weights.

    Args:
        state: Its tensors by name.
        outputs: See `count_file_outputs`.
        first_label: The model's label of its first class, where drkd wrote the file; None where nothing says it.
    """

    state: dict[str, Tensor]
    outputs: int | None
    first_label: int | None = None


def read_zoo_file(path: str) -> ZooFile:
    """Read weights that drkd or torchvision wrote.

    Raises:
        DrkdError: If the file cannot be read, or holds no state dict.
    """
    content = read_checkpoint(path)
    state = state_in(content, path)
    labels: Any = content.get("label_ids") if isinstance(content, Mapping) else None
    first = min(labels) if isinstance(labels, list) and labels and all(type(x) is int for x in labels) else None
    return ZooFile(state, count_file_outputs(state), first)


def count_file_outputs(state: Mapping[str, Tensor]) -> int | None:
    """Outputs of the classifier, background included where there is one; None if this is no torchvision detector."""
    if (layer := state.get("roi_heads.box_predictor.cls_score.weight")) is not None:
        return int(layer.shape[0])
    for place in ("0", "0.1"):
        classes, boxes = (
            state.get(f"head.{branch}_head.module_list.{place}.weight") for branch in ("classification", "regression")
        )
        if classes is not None and boxes is not None:
            return int(classes.shape[0]) // max(1, int(boxes.shape[0]) // 4)
    if (layer := state.get("head.classification_head.cls_logits.weight")) is None:
        return None
    anchors = state.get("head.regression_head.bbox_reg.weight")
    return None if anchors is None else int(layer.shape[0]) // max(1, int(anchors.shape[0]) // 4)
