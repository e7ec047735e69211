"""What a checkpoint of a torchvision detector says of its classes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from drkd.adapters.weights import read_checkpoint, shipped_checkpoint, state_in, stored_labels


@dataclass(frozen=True)
class ZooFile:
    """A file of weights.

    Args:
        state: Its tensors by name.
        outputs: See `count_file_outputs`.
        first_label: The model's label of its first class, where drkd wrote the file; None where nothing says it.
        batch_norm_eps: What its batch norms ran with, where drkd wrote the file and says it, or torchvision published
            it; None where nothing says it.
        labels: The model's label of each class by name, where drkd wrote the file.
    """

    state: dict[str, Tensor]
    outputs: int | None
    first_label: int | None = None
    batch_norm_eps: float | None = None
    labels: Mapping[str, int] = field(default_factory=dict)


def read_zoo_file(path: str, published: str = "") -> ZooFile:
    """Read weights that drkd or torchvision wrote.

    Args:
        path: The file.
        published: Address of torchvision's weights, whose file may have been fetched by hand.

    Raises:
        DrkdError: If the file cannot be read, or holds no state dict.
    """
    content = read_checkpoint(path)
    state = state_in(content, path)
    labels: Any = content.get("label_ids") if isinstance(content, Mapping) else None
    first = min(labels) if isinstance(labels, list) and labels and all(type(x) is int for x in labels) else None
    build: Any = content.get("build") if isinstance(content, Mapping) else None
    epsilon = build.get("batch_norm_eps") if isinstance(build, Mapping) else None
    if is_published(path, published):
        first, epsilon = 0, 0.0
    epsilon = epsilon if isinstance(epsilon, float) else None
    return ZooFile(state, count_file_outputs(state), first, epsilon, stored_labels(content))


def is_published(path: str, address: str) -> bool:
    """Whether a file is the one at an address, whatever it is called: torchvision's names end in a content's hash."""
    found = re.search(r"-([0-9a-f]{8,})\.pth$", address)
    if found is None:
        return False
    with shipped_checkpoint(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest().startswith(found[1])


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
