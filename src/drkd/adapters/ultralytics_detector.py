"""An Ultralytics YOLO seen through drkd's eyes: our padded batch in, features, losses or detections out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from drkd.adapters.box_precision import without_autocast
from drkd.adapters.detection_options import check_detection_options
from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.adapters.ultralytics_losses import YoloLoss
from drkd.adapters.ultralytics_models import require_detection
from drkd.contracts import (
    DensePredictions,
    DetectionBatch,
    Detections,
    Detector,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    FeatureLevel,
    FeatureMap,
    PredictionLayout,
    Size,
    Want,
)

_PADDING = 114 / 255
"""The grey that Ultralytics pads images with, in training and prediction."""

OPTIONS = ("score_threshold", "nms_threshold", "detections_per_image", "several_labels")
"""What `UltralyticsDetector` takes besides the model and its classes, by name."""

_FEATURES = frozenset[Want]({"features"})
_ALL = frozenset[Want]({"features", "losses", "predictions", "assignment"})


class UltralyticsDetector(Detector):
    """Wraps a detection model of Ultralytics' (YOLOv8, 11 and their kin) without changing it.

    The pyramid is what enters the head. The head runs only where losses or predictions are wanted. Losses are the
    model's own, without the factor of the batch size (see `YoloLoss`). Padding is set to Ultralytics' grey.

    Models with two heads (YOLOv10, YOLO26) train both; their predictions and assignment are those of the one-to-many
    head, and `detect` uses the one that the model itself would use.

    Args:
        model: Ultralytics' ``DetectionModel``.
        class_names: Names of classes 0..K-1.
        label_ids: The model's own label of each class; -1 where the model does not know the class.
        score_threshold: Detections below this are dropped (Ultralytics' own value in validation).
        nms_threshold: Intersection over union above which the weaker of two detections is dropped.
        detections_per_image: At most so many detections an image.
        several_labels: Whether one place may detect several classes, as in Ultralytics' validation; its prediction
            keeps the best.

    Raises:
        DrkdError: If the model is of another kind, or a threshold or number of detections is out of range.
        ValueError: If the labels do not fit its head.
    """

    _to_model: Tensor
    _to_ours: Tensor
    _unasked: Tensor

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        *,
        label_ids: Sequence[int],
        score_threshold: float = 0.001,
        nms_threshold: float = 0.7,
        detections_per_image: int = 300,
        several_labels: bool = True,
    ) -> None:
        super().__init__()
        head = require_detection(model, source="model")
        if len(label_ids) != len(class_names) or max(label_ids, default=-1) >= head.nc:
            raise ValueError(
                f"expected one label below {head.nc} for each of {len(class_names)} classes, got {list(label_ids)}"
            )
        self.model = model
        untyped: Any = model
        self._fused = bool(untyped.is_fused())
        self.label_ids = tuple(label_ids)
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image
        self.several_labels = several_labels
        check_detection_options({name: getattr(self, name) for name in OPTIONS})
        self._losses: dict[torch.device, YoloLoss] = {}
        levels = _levels(head)
        missing = tuple(name for name, label in zip(class_names, label_ids, strict=True) if label < 0)
        layout = PredictionLayout(
            "points",
            tuple(((level.stride, level.stride),) for level in levels),
            box_bins=head.reg_max if head.reg_max > 1 else 0,
            missing_classes=missing,
            centre_offset=0.5,
        )
        self.spec = DetectorSpec(levels, tuple(class_names), "yolo", None if head.cv2 is None else layout)
        # Not persistent: the state dict stays the plain model's.
        device = next(model.parameters()).device
        to_ours = torch.full((head.nc,), -1, dtype=torch.int64)
        for ours, theirs in enumerate(label_ids):
            if theirs >= 0:
                to_ours[theirs] = ours
        self.register_buffer("_to_model", torch.tensor(label_ids, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("_to_ours", to_ours.to(device), persistent=False)
        others = sorted(set(range(head.nc)) - set(label_ids))
        self.register_buffer("_unasked", torch.tensor(others, dtype=torch.int64, device=device), persistent=False)
        self._others = bool(others)
        self._in_order = self.label_ids == tuple(range(head.nc))

    @property
    def missing_classes(self) -> tuple[str, ...]:
        """Classes of the spec that the model has no output for, and never detects."""
        names = zip(self.spec.class_names, self.label_ids, strict=True)
        return tuple(name for name, label in names if label < 0)

    @property
    def body_names(self) -> tuple[str, ...]:
        """Beginnings of the names in the model's state dict that belong to the backbone."""
        untyped: Any = self.model
        return tuple(f"model.{index}." for index in range(len(untyped.yaml["backbone"])))

    @property
    def _head(self) -> Any:
        untyped: Any = self.model
        return untyped.model[-1]

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """Compute what is wanted, in train or eval mode alike.

        Args:
            batch: The images, with targets where losses or the assignment are wanted.
            want: Fields of `DetectorOutput`.

        Raises:
            DrkdError: If the batch's sides are no multiples of the largest stride, or losses are wanted of a model
                that was fused before it was wrapped: it has no batch norms to train with.
            ValueError: If something is wanted that this model does not have, or that misses classes.
        """
        possible = _ALL if self.spec.predictions is not None else _FEATURES
        if want - possible:
            raise ValueError(f"want: expected any of {sorted(possible)} of this model, got {sorted(want)}")
        if want - _FEATURES and self.missing_classes:
            raise ValueError(f"this model can show features alone: it has no output for {list(self.missing_classes)}")
        if "losses" in want and self._fused:
            raise DrkdError("A YOLO that was fused for inference cannot be saved or trained: load it without fuse().")
        maps = self._pyramid(batch)
        found: dict[str, Any] = {}
        if "features" in want:
            found["features"] = _feature_maps(self.spec, maps, batch.image_size)
        if not want - _FEATURES:
            return DetectorOutput(**found)
        head = self._head
        raw = head.forward_head(maps, **head.one2many)
        if "predictions" in want:
            found["predictions"] = self._predictions(raw, maps)
        if want & {"losses", "assignment"}:
            second = None
            if getattr(head, "one2one_cv2", None) is not None and "losses" in want:
                # As Ultralytics trains it: the one-to-one head does not reach into the pyramid.
                second = head.forward_head([entry.detach() for entry in maps], **head.one2one)
            losses, assignment = self._criterion(maps[0].device)(raw, second, batch, self._to_model)
            if "losses" in want:
                found["losses"] = losses
            if "assignment" in want:
                found["assignment"] = assignment
        return DetectorOutput(**found)

    @torch.no_grad()
    @without_autocast
    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Detections in px of the original images, by the model's own decoding and Ultralytics' suppression.

        In the precision of the weights: autocast is left.

        Raises:
            DrkdError: If the batch's sides are no multiples of the largest stride.
            ValueError: In train mode, where batch norm would depend on the other images.
        """
        if self.training or self.model.training:
            raise ValueError("detect needs eval mode: call .eval() on the wrapped detector first")
        head = self._head
        with _kept_grid(head), _asked_for(head, self._unasked if self._others else None):
            decoded = head(self._pyramid(batch))[0]
        found = ultralytics_module("utils.nms").non_max_suppression(
            decoded.float(),
            self.score_threshold,
            self.nms_threshold,
            multi_label=self.several_labels,
            max_det=self.detections_per_image,
            # Its limit on time would drop the rest of a batch.
            max_time_img=math.inf,
            end2end=head.end2end,
        )
        return [
            self._to_original(entry, size, original)
            for entry, size, original in zip(found, batch.sizes, batch.original_sizes, strict=True)
        ]

    def _pyramid(self, batch: DetectionBatch) -> list[Tensor]:
        """What enters the head, finest first."""
        height, width = batch.image_size
        stride = int(max(level.stride for level in self.spec.levels))
        if height % stride or width % stride:
            raise DrkdError(
                f"A YOLO of this kind takes images whose sides are multiples of {stride} px, got {height} x {width}. "
                f"Set data.size_divisor to {stride}."
            )
        images = batch.images
        if any(size != (height, width) for size in batch.sizes):
            sizes = torch.tensor(batch.sizes).to(images.device, non_blocking=True)
            rows = torch.arange(height, device=images.device) < sizes[:, :1]
            columns = torch.arange(width, device=images.device) < sizes[:, 1:]
            images = images.where(rows[:, None, :, None] & columns[:, None, None, :], _PADDING)
        untyped: Any = self.model
        # The graph as the library's layers describe it: each knows its place and where its input comes from.
        kept: dict[int, Tensor] = {}
        current: Any = images
        *body, head = untyped.model
        for layer in body:
            current = layer(_input(layer, current, kept))
            if layer.i in untyped.save:
                kept[layer.i] = current
        return list(_input(head, current, kept))

    def _predictions(self, raw: Mapping[str, Tensor], maps: Sequence[Tensor]) -> DensePredictions:
        head = self._head
        logits = raw["scores"].transpose(1, 2)
        if not self._in_order:
            logits = logits.index_select(2, self._to_model)
        # (B, 4 * n, A): four sides, left, top, right, bottom, of n bins each, a bin a stride wide.
        bins = raw["boxes"].unflatten(1, (4, head.reg_max)).permute(0, 3, 1, 2)
        distances = bins.squeeze(3)
        if head.reg_max > 1:
            wide = bins if bins.dtype == torch.float64 else bins.float()
            distances = wide.softmax(dim=3) @ torch.arange(head.reg_max, device=bins.device, dtype=wide.dtype)
        anchors = [
            _cells(int(entry.shape[-2]), int(entry.shape[-1]), level.stride, entry.device)
            for entry, level in zip(maps, self.spec.levels, strict=True)
        ]
        return DensePredictions(
            logits,
            distances,
            torch.cat(anchors),
            tuple(len(entry) for entry in anchors),
            bins=bins if head.reg_max > 1 else None,
        )

    def _criterion(self, device: torch.device) -> YoloLoss:
        if device not in self._losses:
            self._losses[device] = YoloLoss(self.model, device)
        return self._losses[device]

    def _to_original(self, found: Tensor, size: Size, original: Size) -> Detections:
        """Scale boxes to the stored image, clip them to it; drop those outside it and classes not asked for."""
        boxes, scores, labels = found[:, :4], found[:, 4], self._to_ours[found[:, 5].long()]
        scale_y, scale_x = original[0] / size[0], original[1] / size[1]
        boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([original[1], original[0]] * 2))
        kept = (labels >= 0) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return Detections(boxes[kept], scores[kept], labels[kept])


def wrap_ultralytics(
    model: Any, class_names: Sequence[str] | None = None, *, label_ids: Sequence[int] | None = None, **options: Any
) -> UltralyticsDetector:
    """Wrap a YOLO that you have already built or loaded.

    Args:
        model: Ultralytics' ``YOLO`` object or its ``DetectionModel``. One whose parameters are all frozen, as
            Ultralytics' checkpoints are, is made trainable.
        class_names: Names of classes 0..K-1; None takes the model's. Found by name among the model's classes; where
            those have no names but numbers, in the same order.
        label_ids: The model's label of each class; None finds them by name.
        **options: ``score_threshold``, ``nms_threshold``, ``detections_per_image``, ``several_labels``.

    Raises:
        DrkdError: If the model is of another kind, or none of its classes has one of the names.
        ValueError: If labels are given that do not fit its head.
    """
    plain = model if not hasattr(model, "ckpt_path") else model.model
    require_detection(plain, source="model")
    own = model_names(plain)
    names = own if class_names is None else list(class_names)
    if label_ids is None:
        label_ids = match_names(own, names)
    if not any(parameter.requires_grad for parameter in plain.parameters()):
        make_trainable(plain)
    return UltralyticsDetector(plain, names, label_ids=label_ids, **options)


def model_names(model: nn.Module) -> list[str]:
    """Names of a model's outputs, in their order."""
    untyped: Any = model
    names = untyped.names if isinstance(untyped.names, Mapping) else dict(enumerate(untyped.names))
    return [str(names.get(index, index)) for index in range(untyped.model[-1].nc)]


def match_names(own: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """The model's label of each class by name, -1 where it has none; by order where the model only has numbers.

    Raises:
        DrkdError: If no class is found.
    """
    labels = find_names(own, wanted)
    if max(labels, default=-1) < 0:
        raise DrkdError(
            f"class_names: none of {list(wanted)[:5]} is a class of this YOLO, which knows {len(own)} "
            f"({', '.join(own[:5])}{', ...' if len(own) > 5 else ''}). Use its names, or give it a new head: head: new."
        )
    return labels


def find_names(own: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """As `match_names`, with no objection where nothing is found."""
    numbered = list(own) == [str(index) for index in range(len(own))]
    # Digits may be the names of classes, in another order.
    if len(own) == len(wanted) and numbered and set(own) != set(wanted):
        return list(range(len(own)))
    places = {name: label for label, name in reversed(list(enumerate(own)))}
    return [places.get(name, -1) for name in wanted]


def make_trainable(model: nn.Module) -> None:
    """Let every parameter train but the constants that turn bins into distances."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dfl." not in f".{name}")


def _input(layer: Any, current: Any, kept: Mapping[int, Tensor]) -> Any:
    """What a layer takes: the last layer's output (-1), or those of others by their numbers."""
    if isinstance(layer.f, int):
        return current if layer.f == -1 else kept[layer.f]
    return [current if place == -1 else kept[place] for place in layer.f]


def _levels(head: Any) -> tuple[FeatureLevel, ...]:
    """Name levels p3 for stride 8 and so on; their channels are what the head's first convolutions take."""
    branches = head.cv2 if head.cv2 is not None else head.one2one_cv2
    return tuple(
        FeatureLevel(f"p{round(math.log2(stride))}", int(branch[0].conv.in_channels), float(stride))
        for branch, stride in zip(branches, head.stride.tolist(), strict=True)
    )


def _feature_maps(spec: DetectorSpec, maps: Sequence[Tensor], image_size: Size) -> tuple[FeatureMap, ...]:
    height, width = image_size
    return tuple(
        FeatureMap(level.name, tensor, height / tensor.shape[-2], width / tensor.shape[-1])
        for level, tensor in zip(spec.levels, maps, strict=True)
    )


def _cells(height: int, width: int, stride: float, device: torch.device) -> Tensor:
    """(height * width, 4): the cells of a level row by row, xyxy px; predictions sit at their centres."""
    tops, lefts = torch.meshgrid(
        torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
    )
    corners = torch.stack([lefts, tops], dim=-1).reshape(-1, 2)
    return torch.cat([corners, corners + stride], dim=1)


@contextmanager
def _asked_for(head: Any, others: Tensor | None) -> Iterator[None]:
    """Have the head score no classes that would be dropped: it, and suppression, keep the best of all."""
    with ExitStack() as stack:
        for layer in (layer for name in ("cv3", "one2one_cv3") for layer in getattr(head, name, None) or ()):
            if others is not None:
                hook = layer.register_forward_hook(
                    lambda _module, _inputs, logits: logits.index_fill(1, others, -math.inf)
                )
                stack.callback(hook.remove)
        yield


@contextmanager
def _kept_grid(head: Any) -> Iterator[None]:
    """Let the head remember nothing of a detection: it keeps the grid of the last image size otherwise."""
    before = SimpleNamespace(shape=head.shape, anchors=head.anchors, strides=head.strides)
    try:
        yield
    finally:
        head.shape, head.anchors, head.strides = before.shape, before.anchors, before.strides
