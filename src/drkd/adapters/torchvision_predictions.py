"""What a torchvision detector predicts, inside and at the end of its heads, in drkd's classes and box codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.roi_heads import RoIHeads

from drkd.adapters.labels import TWO_STAGE
from drkd.contracts import DensePredictions, HeadFeatures, PredictionLayout, RegionPredictions

_FORWARDS = {
    branch.forward
    for branch in (FCOSClassificationHead, FCOSRegressionHead, RetinaNetClassificationHead, RetinaNetRegressionHead)
}


def describe_predictions(
    model: nn.Module, family: str, *, missing_classes: tuple[str, ...] = ()
) -> PredictionLayout | None:
    """Say what the model predicts and where; None where its anchors are not of torchvision's kind."""
    untyped: Any = model
    if family in TWO_STAGE:
        return PredictionLayout("regions", missing_classes=missing_classes)
    generator = untyped.anchor_generator
    if not isinstance(generator, AnchorGenerator):
        return None
    sides = tuple(
        tuple((float(x2 - x1), float(y2 - y1)) for x1, y1, x2, y2 in cell.tolist()) for cell in generator.cell_anchors
    )
    depth, channels = _cut(untyped.head)
    kind = "points" if family == "fcos" else "anchors"
    return PredictionLayout(kind, sides, channels, depth, missing_classes=missing_classes)  # type: ignore[arg-type]


class ClassOrder(nn.Module):
    """Puts a head's outputs into drkd's order of classes, and leaves out what is none of them.

    Args:
        label_ids: The head's output of each class.
        outputs: How many outputs the head has.
        background: Whether output 0 is the background, which then comes last.
    """

    _order: Tensor

    def __init__(self, label_ids: Sequence[int], outputs: int, *, background: bool, device: torch.device) -> None:
        super().__init__()
        order = [*label_ids, 0] if background else list(label_ids)
        self.missing = min(label_ids, default=-1) < 0
        self.as_it_is = order == list(range(outputs))
        self.count = len(label_ids)
        self.register_buffer("_order", torch.tensor(order, device=device).clamp_min(0), persistent=False)

    def logits(self, values: Tensor) -> Tensor:
        """(..., outputs) to (..., K), or (..., K + 1) with the background last."""
        return values if self.as_it_is else values.index_select(values.ndim - 1, self._order)

    def boxes(self, values: Tensor) -> Tensor:
        """(R, outputs, 4) to (R, K, 4)."""
        return values.index_select(1, self._order[: self.count])


class DenseHead:
    """A RetinaNet or FCOS head in one pass over a batch's pyramid.

    Args:
        model: The plain detector.
        order: Of its classes.
        maps: The pyramid, (B, C, h, w) each.
        keep_towers: Record what the branches compute after each convolution.
        run: False computes nothing; only the tail is of use then.
    """

    def __init__(
        self,
        model: nn.Module,
        order: ClassOrder,
        maps: Sequence[Tensor],
        *,
        keep_towers: bool = False,
        run: bool = True,
    ) -> None:
        untyped: Any = model
        self._head = untyped.head
        self._order = order
        self.cells = [int(entry.shape[-2] * entry.shape[-1]) for entry in maps]
        self.features: HeadFeatures | None = None
        self.outputs: dict[str, Tensor] = {}
        if keep_towers:
            self.features = self.climb(maps)
            classification, regression = self.features.classification, self.features.regression
            self.outputs = self._finish(classification[-1], regression[-1], after=len(classification))
        elif run:
            self.outputs = self._head(list(maps))

    @property
    def _branches(self) -> tuple[Any, Any]:
        return self._head.classification_head, self._head.regression_head

    def predictions(self, anchors: Sequence[Tensor]) -> DensePredictions:
        """The outputs of this pass; ``anchors`` are those of the model's generator, one (A, 4) an image."""
        return self._convert(self.outputs, anchors)

    def tail(self, anchors: Sequence[Tensor]) -> _Tail:
        """The end of the head, for maps of this batch's pyramid."""
        return _Tail(self, anchors)

    def climb(self, maps: Sequence[Tensor]) -> HeadFeatures:
        """What the branches compute on the way."""
        classification, regression = (_climb(branch, maps) for branch in self._branches)
        return HeadFeatures(classification, regression)

    def finish(
        self, classification: Sequence[Tensor], regression: Sequence[Tensor], anchors: Sequence[Tensor], *, after: int
    ) -> DensePredictions:
        """Run the rest of the head on maps as they are after so many convolutions."""
        return self._convert(self._finish(classification, regression, after=after), anchors)

    def _finish(
        self, classification: Sequence[Tensor], regression: Sequence[Tensor], *, after: int
    ) -> dict[str, Tensor]:
        classes, boxes = self._branches
        outputs = {"cls_logits": _run(classes, classification, after=after)}
        found = _run(boxes, regression, after=after)
        if isinstance(found, tuple):
            return {**outputs, "bbox_regression": found[0], "bbox_ctrness": found[1]}
        return {**outputs, "bbox_regression": found}

    def _convert(self, outputs: Mapping[str, Tensor], anchors: Sequence[Tensor]) -> DensePredictions:
        boxes = outputs["bbox_regression"]
        centerness = outputs.get("bbox_ctrness")
        if centerness is None:
            boxes = unit_offsets(boxes, self._branches[1].box_coder.weights)
        elif not self._head.box_coder.normalize_by_size:
            sides = anchors[0][:, 2:] - anchors[0][:, :2]
            boxes = boxes / sides.repeat(1, 2)
        per_cell = boxes.shape[1] // max(sum(self.cells), 1)
        return DensePredictions(
            self._order.logits(outputs["cls_logits"]),
            boxes,
            anchors[0],
            tuple(count * per_cell for count in self.cells),
            None if centerness is None else centerness.squeeze(2),
        )


class _Tail:
    """A `HeadTail`: holds what the rest of a head needs, and computes nothing until called."""

    def __init__(self, head: DenseHead, anchors: Sequence[Tensor]) -> None:
        self._head = head
        self._anchors = anchors

    def __call__(
        self, classification: Sequence[Tensor], regression: Sequence[Tensor], *, after: int
    ) -> DensePredictions:
        return self._head.finish(classification, regression, self._anchors, after=after)

    def climb(self, maps: Sequence[Tensor]) -> HeadFeatures:
        """The head's branches on pyramid maps."""
        return self._head.climb(maps)


class LossRecorder:
    """Stands for a one-stage model in its own ``compute_loss``, to see what each anchor is matched with.

    The matching is torchvision's, done once for the losses and for us.

    Args:
        model: The plain detector.
        losses: Whether the losses are wanted too.
    """

    def __init__(self, model: nn.Module, *, losses: bool) -> None:
        self._model: Any = model
        self._losses = losses
        self.head = _MatchRecorder(self)
        self.matched: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def compute_loss(self, *arguments: Any) -> dict[str, Tensor]:
        """The model's own, on this stand-in."""
        return dict(type(self._model).compute_loss(self, *arguments))

    def finish(self, *arguments: Any) -> dict[str, Tensor]:
        """The head's losses, or none where none are wanted."""
        return dict(self._model.head.compute_loss(*arguments)) if self._losses else {}


class _MatchRecorder:
    """Stands for the head, which the model hands the matching to."""

    def __init__(self, owner: LossRecorder) -> None:
        self._owner = owner

    def compute_loss(self, targets: Any, outputs: Any, anchors: Any, matched: list[Tensor]) -> dict[str, Tensor]:
        self._owner.matched = list(matched)
        return self._owner.finish(targets, outputs, anchors, matched)


class RegionRecorder:
    """Stands for the box heads in their own ``forward``, to see the sampled regions and what is predicted on them.

    Args:
        heads: torchvision's ``RoIHeads``.
        masks: Whether heads that predict masks shall do so.
    """

    def __init__(self, heads: Any, *, masks: bool = True) -> None:
        self._heads = heads
        self._masks = masks
        self.regions: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.outputs: tuple[Tensor, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._heads, name)

    def __call__(self, *arguments: Any) -> Any:
        """The heads' own pass, on this stand-in."""
        return type(self._heads).forward(self, *arguments)

    def has_mask(self) -> bool:
        """Whether masks are predicted and trained in this pass."""
        return self._masks and bool(self._heads.has_mask())

    def check_targets(self, targets: Any) -> None:
        """The heads' own check, of what this pass needs."""
        type(self._heads).check_targets(self, targets)

    def select_training_samples(self, proposals: list[Tensor], targets: Any) -> Any:
        """The regions that train, as the heads choose them."""
        chosen = type(self._heads).select_training_samples(self, proposals, targets)
        self.regions, _, self.labels, _ = chosen
        return chosen

    @property
    def matched_at_most(self) -> int | None:
        """Regions of an image that the sampler lets be matched with a box; None where it is not torchvision's own."""
        sampler = self._heads.fg_bg_sampler
        own = type(self._heads).select_training_samples is RoIHeads.select_training_samples
        if not own or type(sampler) is not BalancedPositiveNegativeSampler:
            return None
        return int(sampler.batch_size_per_image * sampler.positive_fraction)

    def box_predictor(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and box codes of the chosen regions."""
        self.outputs = self._heads.box_predictor(features)
        return self.outputs


def region_predictions(
    heads: Any,
    order: ClassOrder,
    regions: Sequence[Tensor],
    outputs: tuple[Tensor, Tensor],
    *,
    labels: Tensor | None = None,
    matched_at_most: int | None = None,
) -> RegionPredictions:
    """Turn what ``box_predictor`` returns into drkd's terms; labels are drkd's, the background K."""
    logits, codes = outputs
    boxes = order.boxes(codes.unflatten(1, (codes.shape[1] // 4, 4)))
    boxes = unit_offsets(boxes, heads.box_coder.weights)
    places = tuple(entry.detach() for entry in regions)
    return RegionPredictions(places, order.logits(logits), boxes, labels, matched_at_most)


def unit_offsets(codes: Tensor, weights: Sequence[float]) -> Tensor:
    """Offsets as they are without the weights that a box coder scales them by."""
    if all(weight == 1.0 for weight in weights):
        return codes
    return torch.stack([code / weight for code, weight in zip(codes.unbind(-1), weights, strict=True)], dim=-1)


def _cut(head: Any) -> tuple[int, int]:
    """Convolutions in both branches and the channels between them; zeros where the head is not torchvision's own."""
    branches = [getattr(head, name, None) for name in ("classification_head", "regression_head")]
    if any(branch is None or type(branch).forward not in _FORWARDS for branch in branches):
        return 0, 0
    depths = {len(_blocks(branch)) for branch in branches}
    channels = {
        (layer.in_channels, layer.out_channels)
        for branch in branches
        for layer in getattr(branch, "conv", nn.Identity()).modules()
        if isinstance(layer, nn.Conv2d)
    }
    if len(depths) != 1 or len(channels) != 1 or len(set(*channels)) != 1:
        return 0, 0
    return depths.pop(), channels.pop()[0]


def _blocks(branch: Any) -> list[list[nn.Module]]:
    """A branch's layers, grouped: each convolution with the norm and activation that follow it."""
    blocks: list[list[nn.Module]] = []
    for layer in branch.conv:
        if not blocks or any(isinstance(part, nn.Conv2d) for part in layer.modules()):
            blocks.append([])
        blocks[-1].append(layer)
    return blocks


def _climb(branch: Any, maps: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """The maps of each level after each convolution of a branch."""
    current = tuple(maps)
    reached = []
    for block in _blocks(branch):
        for layer in block:
            current = tuple(layer(entry) for entry in current)
        reached.append(current)
    return tuple(reached)


class _ShortBranch:
    """A branch of a head without its first convolutions, for the branch's own ``forward`` to run on."""

    def __init__(self, branch: Any, after: int) -> None:
        self._branch = branch
        self._rest = [layer for block in _blocks(branch)[after:] for layer in block]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._branch, name)

    def conv(self, feature: Tensor) -> Tensor:
        """The convolutions that are left."""
        for layer in self._rest:
            feature = layer(feature)
        return feature


def _run(branch: Any, maps: Sequence[Tensor], *, after: int) -> Any:
    return type(branch).forward(_ShortBranch(branch, after), list(maps))
