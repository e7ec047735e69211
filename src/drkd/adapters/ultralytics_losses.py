"""Ultralytics' own detection losses on drkd's batches, and what they match each prediction with."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from drkd.adapters.box_precision import float32_likes
from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.contracts import DetectionBatch

_GAINS = ("box", "cls", "dfl")


class YoloLoss:
    """The loss that Ultralytics trains a model with: overlap, classes, and distances or their distributions.

    The components carry Ultralytics' gains (7.5, 0.5 and 1.5, or the model's own), so their sum is the task loss. Of a
    model with two heads each component is the sum over both, with Ultralytics' first weights (0.8 for the one-to-many
    head, 0.2 for the other), which it changes in the course of a run and drkd does not.

    Deviation: Ultralytics multiplies the sum by the number of images in the batch; drkd does not, so that a loss is of
    the same size whatever the batch, as it is of all its detectors.

    Args:
        model: The plain model.
        device: Where it lies.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        untyped: Any = model
        self._device = device
        # Stands for the model, so that the user's keeps its own arguments.
        stand_in = SimpleNamespace(
            args=SimpleNamespace(**_gains(getattr(untyped, "args", None))),
            model=untyped.model,
            parameters=untyped.parameters,
            class_weights=getattr(untyped, "class_weights", None),
        )
        losses = ultralytics_module("utils.loss")
        self._heads: list[tuple[Any, float]] = []
        if getattr(untyped.model[-1], "one2one_cv2", None) is not None:
            both = losses.E2ELoss(stand_in)
            self._heads = [(both.one2many, both.o2m), (both.one2one, both.o2o)]
        else:
            self._heads = [(losses.v8DetectionLoss(stand_in), 1.0)]
        self._names = tuple(self._heads[0][0].loss_names)

    def __call__(
        self, raw: Mapping[str, Tensor], second: Mapping[str, Tensor] | None, batch: DetectionBatch, to_model: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the losses and the assignment.

        Args:
            raw: What the head, of two the one-to-many head, puts out.
            second: The same of the one-to-one head; None where there is none, or its losses are not wanted.
            batch: With targets.
            to_model: (K,) the model's label of each class.

        Returns:
            0-d tensors by Ultralytics' names; and (B, A) int64, the box of its image's targets that each prediction is
            matched with, -1 for none.
        """
        targets, kept = self._targets(batch, to_model)
        parts = []
        assignment: Tensor | None = None
        with torch.autocast(self._device.type, enabled=False):
            for outputs, (criterion, weight) in zip((raw, second), self._heads, strict=False):
                if outputs is None:
                    continue
                # The maps give the cells' places their precision, and nothing else.
                wide: dict[str, Any] = {name: outputs[name].float() for name in ("boxes", "scores")}
                wide = {**outputs, **wide, "feats": float32_likes(list(outputs["feats"]))}
                assigned, components, _ = criterion.get_assigned_targets_and_loss(wide, targets)
                parts.append(components * weight)
                if assignment is None:
                    assignment = _assignment(assigned[0], assigned[1], kept)
        assert assignment is not None  # the first head always runs
        return dict(zip(self._names, torch.stack(parts).sum(dim=0).unbind(), strict=True)), assignment

    def _targets(self, batch: DetectionBatch, to_model: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Ultralytics' targets, without ignored boxes; and of each image, which boxes are left."""
        height, width = batch.image_size
        kept = [torch.where(~target.ignore)[0] for target in batch.targets]
        boxes = torch.cat([target.boxes[own] for target, own in zip(batch.targets, kept, strict=True)]).float()
        labels = torch.cat([target.labels[own] for target, own in zip(batch.targets, kept, strict=True)])
        counts = torch.tensor([len(own) for own in kept])
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2
        scale = boxes.new_tensor([width, height, width, height])
        return {
            "batch_idx": torch.repeat_interleave(torch.arange(len(kept)), counts).to(boxes),
            "cls": to_model[labels].to(boxes),
            "bboxes": torch.cat([middles, boxes[:, 2:] - boxes[:, :2]], dim=1) / scale,
        }, kept


def _assignment(matched: Tensor, places: Tensor, kept: list[Tensor]) -> Tensor:
    """(B, A): Ultralytics numbers the boxes that it was given; we number those of the batch."""
    found = [
        torch.where(own, torch.cat([numbers, numbers.new_zeros(1)])[place.long().clamp(0, len(numbers))], -1)
        for own, place, numbers in zip(matched, places, kept, strict=True)
    ]
    return torch.stack(found)


def _gains(arguments: Any) -> dict[str, float]:
    """The gains of a model's own arguments, which are a mapping, a namespace or absent; else the defaults."""
    defaults = ultralytics_module("utils").DEFAULT_CFG_DICT
    own = arguments if isinstance(arguments, Mapping) else vars(arguments) if arguments is not None else {}
    return {name: float(own.get(name, defaults[name])) for name in _GAINS}
