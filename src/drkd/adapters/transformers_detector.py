"""A detector of Hugging Face transformers seen through drkd's eyes: our padded batch in, pyramid, losses, boxes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from drkd.adapters.box_precision import without_autocast
from drkd.adapters.detection_options import check_detection_options
from drkd.adapters.transformers_backbone import body_of
from drkd.adapters.transformers_encoder import EncoderTap, probe_maps
from drkd.adapters.transformers_labels import find_labels, model_labels
from drkd.adapters.transformers_library import FAMILIES, family_of, import_transformers
from drkd.adapters.transformers_losses import group_losses
from drkd.contracts import (
    DetectionBatch,
    Detections,
    Detector,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    FeatureLevel,
    FeatureMap,
    Want,
)

_PROBE_SIZE = 256
_POSSIBLE = frozenset[Want]({"features", "losses"})


class TransformersDetector(Detector):
    """Wraps RT-DETR, RT-DETRv2, D-FINE, DEIMv2 or Deformable DETR of transformers without changing it.

    The pyramid is what the encoder gives to the decoder: the hybrid encoder's fused maps, or the encoded positions of
    each level of Deformable DETR. Losses are the model's own. Images are normalised here as the model's image processor
    would, neither resized nor padded again. RT-DETR and its kin know no padding: their boxes are fractions of the
    padded tensor, Deformable DETR's of an image's valid part; both are converted here.

    Args:
        model: The plain detector.
        class_names: Names of classes 0..K-1.
        label_ids: The model's own label of each class; -1 where the model does not know the class.
        image_processor: Its image processor, for normalisation and post-processing; None takes the family's default.
        image_mean: Per channel, RGB in [0, 1]; None takes the processor's.
        image_std: The same for the standard deviation.
        score_threshold: Detections are above this.
        detections_per_image: At most so many detections an image.

    Raises:
        ValueError: If the model is of another kind, or the labels do not fit its head.
        DrkdError: If transformers is not installed, or a threshold or number of detections is out of range.
    """

    _mean: Tensor
    _std: Tensor
    _to_model: Tensor
    _to_ours: Tensor

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        *,
        label_ids: Sequence[int],
        image_processor: Any = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        score_threshold: float = 0.0,
        detections_per_image: int = 100,
    ) -> None:
        super().__init__()
        kind = family_of(model)
        self._family = FAMILIES[kind]
        config = _untyped(model).config
        outputs = int(config.num_labels)
        if len(label_ids) != len(class_names) or not -1 <= max(label_ids, default=-1) < outputs:
            raise ValueError(
                f"expected one label below {outputs} for each of {len(class_names)} classes, got {list(label_ids)}"
            )
        if getattr(config, "anchor_image_size", None) is not None:
            raise ValueError(
                f"expected a model for images of any size, got one with anchors for {config.anchor_image_size} px: "
                "set model.config.anchor_image_size = None first"
            )
        check_detection_options({"score_threshold": score_threshold, "detections_per_image": detections_per_image})
        self.model = model
        self.label_ids = tuple(label_ids)
        self.score_threshold = score_threshold
        self.detections_per_image = detections_per_image
        self._processor = image_processor or getattr(import_transformers(), self._family.processor)()
        maps = probe_maps(model, _PROBE_SIZE, flat=self._family.flat)
        self.spec = DetectorSpec(_levels(maps), tuple(class_names), kind)
        device = next(model.parameters()).device
        to_ours = torch.full((outputs,), -1, dtype=torch.int64)
        for ours, theirs in enumerate(label_ids):
            if theirs >= 0:
                to_ours[theirs] = ours
        mean, std = read_normalisation(self._processor)
        # Not persistent: the state dict stays the plain model's.
        for name, values in (("_mean", image_mean or mean), ("_std", image_std or std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("_to_model", torch.tensor(label_ids, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("_to_ours", to_ours.to(device), persistent=False)

    @property
    def missing_classes(self) -> tuple[str, ...]:
        """Classes of the spec that the model has no output for, and never detects."""
        names = zip(self.spec.class_names, self.label_ids, strict=True)
        return tuple(name for name, label in names if label < 0)

    @property
    def body_names(self) -> tuple[str, ...]:
        """Beginnings of the names in the model's state dict that belong to the backbone's network."""
        body = body_of(self.model)
        return tuple(f"{name}." for name, module in self.model.named_modules() if module is body)

    @property
    def image_mean(self) -> list[float]:
        """Per channel, RGB in [0, 1], subtracted from the images."""
        return [float(value) for value in self._mean.flatten()]

    @property
    def image_std(self) -> list[float]:
        """What the images are divided by afterwards."""
        return [float(value) for value in self._std.flatten()]

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """Compute what is wanted in one pass; the decoder runs for losses only.

        Args:
            batch: The images, with targets where losses are wanted.
            want: Any of "features" and "losses".

        Raises:
            DrkdError: If the batch's sides are no multiples of the coarsest stride or too small for the queries.
            ValueError: If something else is wanted, or the model misses classes (losses).
        """
        if want - _POSSIBLE:
            raise ValueError(f"want: expected any of {sorted(_POSSIBLE)} of this model, got {sorted(want)}")
        if not want:
            return DetectorOutput()
        tap = EncoderTap(self.model, flat=self._family.flat)
        inputs = self._inputs(batch, decode="losses" in want)
        if "losses" not in want:
            return DetectorOutput(features=self._features(tap.encode(**inputs), batch))
        output = tap.run(**inputs, labels=self._targets(batch))
        features = self._features(tap.maps, batch) if "features" in want else ()
        return DetectorOutput(features=features, losses=group_losses(self.model, output.loss_dict))

    @torch.no_grad()
    @without_autocast
    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Detections in px of the original images, by the library's own post-processing.

        In the precision of the weights: autocast is left.

        Raises:
            DrkdError: If the batch's sides do not suit the encoder.
            ValueError: In train mode.
        """
        if self.training or self.model.training:
            raise ValueError("detect needs eval mode: call .eval() on the wrapped detector first")
        output = self.model(**self._inputs(batch, decode=True))
        # Of the best of all classes those that nobody asked for would be dropped later.
        logits = output.logits.float().masked_fill(self._to_ours < 0, -math.inf)
        raw = SimpleNamespace(logits=logits, pred_boxes=output.pred_boxes.float())
        # Fractions of what become pixels of what: see the class.
        frames = [
            original if self._family.flat else tuple(o * b / s for o, b, s in zip(original, padded, size, strict=True))
            for size, original, padded in zip(
                batch.sizes, batch.original_sizes, [batch.image_size] * len(batch), strict=True
            )
        ]
        sizes = torch.tensor(frames, dtype=torch.float32, device=batch.images.device)
        options = {"top_k": self.detections_per_image} if self._family.flat else {}
        found = self._processor.post_process_object_detection(
            raw, threshold=self.score_threshold, target_sizes=sizes, **options
        )
        return [self._finish(entry, original) for entry, original in zip(found, batch.original_sizes, strict=True)]

    def _finish(self, found: dict[str, Tensor], original: tuple[int, int]) -> Detections:
        """Clip boxes to the stored image, and drop classes that were not asked for."""
        labels = self._to_ours[found["labels"]]
        kept = torch.where(labels >= 0)[0][: self.detections_per_image]
        boxes = found["boxes"][kept].clamp(min=0)
        boxes = torch.minimum(boxes, boxes.new_tensor([original[1], original[0]] * 2))
        return Detections(boxes, found["scores"][kept], labels[kept])

    def _inputs(self, batch: DetectionBatch, *, decode: bool) -> dict[str, Tensor]:
        """Normalised pixels with the padding set back to zero, and the mask of what is no padding."""
        images = batch.images
        height, width = batch.image_size
        self._check_size(height, width, decode=decode)
        sizes = torch.tensor(batch.sizes).to(images.device, non_blocking=True)
        rows = torch.arange(height, device=images.device) < sizes[:, :1]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]
        mask = rows[:, :, None] & columns[:, None, :]
        pixels = (images - self._mean.to(images.dtype)) / self._std.to(images.dtype) * mask[:, None]
        return {"pixel_values": pixels, "pixel_mask": mask.to(torch.int64)}

    def _check_size(self, height: int, width: int, *, decode: bool) -> None:
        """Refuse what a hybrid encoder fails at: sides that its upsampling misses, fewer places than queries."""
        if self._family.flat:
            return
        stride = round(self.spec.levels[-1].stride)
        if height % stride or width % stride:
            raise DrkdError(
                f"Expected images padded to multiples of {stride} px, which the encoder's upsampling needs, got "
                f"{height} x {width}: set data.size_divisor to a multiple of {stride}."
            )
        places = sum(round(height / level.stride) * round(width / level.stride) for level in self.spec.levels)
        queries = int(_untyped(self.model).config.num_queries)
        if decode and places < queries:
            raise DrkdError(
                f"Expected images with at least {queries} places in the pyramid, for the model's {queries} queries are "
                f"chosen from them, got {places} ({height} x {width} px): enlarge the images or lower num_queries."
            )

    def _targets(self, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """The library's labels: its own classes, boxes as fractions cx, cy, w, h, without ignored ones."""
        if self.missing_classes:
            raise ValueError(f"this model cannot compute losses: it has no output for {list(self.missing_classes)}")
        # One look for the whole batch: dropping boxes waits for the device.
        ignored = bool(torch.cat([target.ignore for target in batch.targets]).any())
        labels = []
        for target, size in zip(batch.targets, batch.sizes, strict=True):
            height, width = size if self._family.flat else batch.image_size
            boxes = target.boxes[~target.ignore] if ignored else target.boxes
            classes = target.labels[~target.ignore] if ignored else target.labels
            corners = boxes.float() / boxes.new_tensor([width, height, width, height], dtype=torch.float32)
            sides = corners[:, 2:] - corners[:, :2]
            centred = torch.cat([corners[:, :2] + sides / 2, sides], dim=1)
            labels.append({"class_labels": self._to_model[classes], "boxes": centred})
        return labels

    def _features(self, maps: Sequence[Tensor], batch: DetectionBatch) -> tuple[FeatureMap, ...]:
        height, width = batch.image_size
        return tuple(
            FeatureMap(level.name, tensor, height / tensor.shape[-2], width / tensor.shape[-1])
            for level, tensor in zip(self.spec.levels, maps, strict=True)
        )


def wrap_transformers(
    model: nn.Module,
    class_names: Sequence[str] | None = None,
    *,
    label_ids: Sequence[int] | None = None,
    image_processor: Any = None,
) -> TransformersDetector:
    """Wrap a detector of transformers that you already built or loaded.

    Args:
        model: A ...ForObjectDetection model with a multi-scale encoder.
        class_names: Names of classes 0..K-1, matched with ``model.config.id2label``; None takes the model's.
        label_ids: The model's label of each class, where names do not say it.
        image_processor: Its image processor; None takes the family's default. It decides mean and std.

    Raises:
        ValueError: If the model is of another kind, or the labels do not fit its head.
        DrkdError: If the model knows none of the classes.
    """
    kind = family_of(model)
    id2label = _untyped(model).config.id2label
    if class_names is None:
        names, found = model_labels(id2label)
        class_names = names if label_ids is None else [str(id2label[label]) for label in label_ids]
        label_ids = found if label_ids is None else label_ids
    elif label_ids is None:
        label_ids = find_labels(id2label, class_names, source=kind)
    return TransformersDetector(model, class_names, label_ids=label_ids, image_processor=image_processor)


def read_normalisation(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and std, RGB, for images in [0, 1], that do what an image processor does to bytes."""
    scale = 255.0 * (float(processor.rescale_factor) if processor.do_rescale else 1.0)
    if not processor.do_normalize:
        return [0.0] * 3, [1.0 / scale] * 3
    return [mean / scale for mean in processor.image_mean], [std / scale for std in processor.image_std]


def _levels(maps: Sequence[Tensor]) -> tuple[FeatureLevel, ...]:
    """Levels finest first, p3 for stride 8 and so on."""
    strides = [round(_PROBE_SIZE / entry.shape[-1]) for entry in maps]
    return tuple(
        FeatureLevel(f"p{stride.bit_length() - 1}", int(entry.shape[1]), float(stride))
        for stride, entry in zip(strides, maps, strict=True)
    )


def _untyped(model: object) -> Any:
    """The model, as a type checker must see it: nn.Module's attributes are not typed."""
    return model
