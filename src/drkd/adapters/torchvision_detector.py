"""A torchvision detector seen through drkd's eyes: our padded batch in, features, losses or detections out."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from drkd.adapters.backbones import probe_features
from drkd.adapters.box_precision import float32_likes, widen, without_autocast
from drkd.adapters.labels import SSD_FAMILIES, TWO_STAGE, WITH_BACKGROUND, count_outputs, family_of, infer_labels
from drkd.adapters.normalisation import normalise_images
from drkd.adapters.torchvision_modes import heads_mode, uncut
from drkd.adapters.torchvision_predictions import (
    ClassOrder,
    DenseHead,
    LossRecorder,
    RegionRecorder,
    describe_predictions,
    region_predictions,
)
from drkd.adapters.torchvision_ssd import (
    default_box_predictions,
    describe_default_boxes,
    fixed_frame,
    match_default_boxes,
)
from drkd.contracts import (
    DetectionBatch,
    Detections,
    Detector,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    FeatureLevel,
    FeatureMap,
    RegionPredictions,
    Size,
    Want,
)

_PROBE_SIZE = 256
_ALWAYS = frozenset[Want]({"features", "losses"})
_DENSE = _ALWAYS | frozenset[Want]({"predictions", "assignment"})
_CUT = _DENSE | frozenset[Want]({"head_features", "head_tail"})
_TWO_STAGE = _ALWAYS | frozenset[Want]({"regions", "region_head"})


class TorchvisionDetector(Detector):
    """Wraps torchvision's RetinaNet, FCOS, SSD, Faster R-CNN or Mask R-CNN without changing it.

    The model's own resize, normalise and pad step is bypassed, so that images, boxes, features and losses share the
    pixel frame of the batch. Losses equal those of the plain model on the same pixels. Labels are shifted here.

    An SSD resizes to its one size all the same, inside: the padded batch as a whole for features and losses, each image
    by itself in ``detect``, as torchvision does. Its strides are declared for batches of its own size until
    ``expect_image_size`` says otherwise. A Mask R-CNN's mask loss needs targets with masks; its detections are boxes.

    Args:
        model: The plain detector.
        class_names: Names of classes 0..K-1.
        label_ids: The model's own label of each class; -1 where the model does not know the class.
        plan: How to rebuild the model with plain calls (see ``checkpoint.save_student``), where that is known.

    Raises:
        ValueError: If the model is of another kind, or the labels do not fit its head.
    """

    _mean: Tensor
    _std: Tensor
    _to_model: Tensor
    _to_ours: Tensor
    _unasked: Tensor

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        *,
        label_ids: Sequence[int],
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        family = family_of(model)
        outputs = count_outputs(model)
        if len(label_ids) != len(class_names) or max(label_ids, default=-1) >= outputs:
            raise ValueError(
                f"expected one label below {outputs} for each of {len(class_names)} classes, got {list(label_ids)}"
            )
        known = [label for label in label_ids if label >= 0]
        first = int(family in WITH_BACKGROUND)
        if len(set(known)) != len(known) or min(known, default=first) < first:
            background = ", from 1 since output 0 is the background" if first else ""
            raise ValueError(
                f"label_ids: expected a different label for each of {len(class_names)} classes{background}, got "
                f"{list(label_ids)}"
            )
        self.model = model
        self.plan = None if plan is None else dict(plan)
        self.label_ids = tuple(label_ids)
        self._frame = fixed_frame(model) if family in SSD_FAMILIES else None
        probe = _PROBE_SIZE if self._frame is None else self._frame.size[0]
        features = probe_features(_backbone(model), probe)
        self._level_keys = tuple(features)
        missing = tuple(name for name, label in zip(class_names, label_ids, strict=True) if label < 0)
        if self._frame is None:
            predictions = describe_predictions(model, family, missing_classes=missing)
        else:
            predictions = describe_default_boxes(model, self._frame.size, missing_classes=missing)
        self._declared = 1.0
        self.spec = DetectorSpec(_levels(features, probe), tuple(class_names), family, predictions)
        # Not persistent: the state dict stays the plain model's.
        device = next(model.parameters()).device
        to_ours = torch.full((outputs,), -1, dtype=torch.int64)
        for ours, theirs in enumerate(label_ids):
            if theirs >= 0:
                to_ours[theirs] = ours
        # What the model knows and nobody asked for; output 0 may be the background.
        others = [label for label in range(family in WITH_BACKGROUND, outputs) if label not in set(label_ids)]
        self._others = bool(others)
        transform = _parts(model).transform
        self.register_buffer("_to_model", torch.tensor(label_ids, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("_to_ours", to_ours.to(device), persistent=False)
        unasked = torch.tensor(others, dtype=torch.int64, device=device)
        self.register_buffer("_unasked", unasked, persistent=False)
        self._order = ClassOrder(label_ids, outputs, background=family in WITH_BACKGROUND, device=device)
        for name, values in (("_mean", transform.image_mean), ("_std", transform.image_std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)

    @property
    def missing_classes(self) -> tuple[str, ...]:
        """Classes of the spec that the model has no output for, and never detects."""
        names = zip(self.spec.class_names, self.label_ids, strict=True)
        return tuple(name for name, label in names if label < 0)

    @property
    def body_names(self) -> tuple[str, ...]:
        """Beginnings of the names in the model's state dict that belong to the backbone's body."""
        if self.spec.family in SSD_FAMILIES:
            # What is left of the backbone is SSD's own layers, its pyramid.
            return ("backbone.features.", "backbone.scale_weight")
        has_body = any(name.startswith("backbone.body.") for name in self.model.state_dict())
        return ("backbone.body.",) if has_body else ("backbone.",)

    def expect_image_size(self, side: int) -> None:
        """Declare strides and anchors for batches of this side, where the model resizes them to a size of its own."""
        if self._frame is not None:
            factor = side / self._frame.size[0]
            self.spec = scale_spec(self.spec, factor / self._declared)
            self._declared = factor

    @property
    def _possible(self) -> frozenset[Want]:
        """What can be wanted of this model."""
        layout = self.spec.predictions
        if layout is None:
            return _ALWAYS
        if layout.kind == "regions":
            return _TWO_STAGE
        return _CUT if layout.head_depth else _DENSE

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """Compute what is wanted from one pass of the backbone and one of the heads, in train or eval mode alike.

        Args:
            batch: The images, with targets where losses, the assignment or regions are wanted.
            want: Fields of `DetectorOutput`.

        Raises:
            ValueError: If something is wanted that this kind of detector has not, or losses of a model that misses
                classes. What it predicts for those classes means nothing.
        """
        if want - self._possible:
            raise ValueError(f"want: expected any of {sorted(self._possible)} of this model, got {sorted(want)}")
        images = self._normalise(batch)
        if self._frame is not None:
            images = self._frame.whole(images)
        features = self._pyramid(images.tensors)
        found: dict[str, Any] = {}
        if "features" in want:
            found["features"] = self._feature_maps(features, batch.image_size)
        if want - {"features"}:
            see = self._two_stage if self.spec.family in TWO_STAGE else self._dense
            found.update(see(batch, images, features, want))
        return DetectorOutput(**found)

    @torch.no_grad()
    @without_autocast
    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Detections in px of the original images, in the precision of the weights: autocast is left.

        Raises:
            ValueError: In train mode, where batch norm would depend on the other images.
        """
        if self.training or self.model.training:
            raise ValueError("detect needs eval mode: call .eval() on the wrapped detector first")
        images = self._normalise(batch)
        if self._frame is not None:
            images = self._frame.each(images)
        features = self._pyramid(images.tensors)
        if self.spec.family in TWO_STAGE:
            box_heads = _parts(self.model).roi_heads
            most = int(box_heads.detections_per_img)
            with heads_mode(self.model, features, images, training=False), uncut(box_heads, when=self._others):
                proposals, _ = _parts(self.model).rpn(images, features)
                # Of a Mask R-CNN the boxes alone: nobody asks for the masks here.
                found, _ = RegionRecorder(box_heads, masks=False)(features, proposals, images.image_sizes)
        else:
            most = int(_parts(self.model).detections_per_img)
            found = self._dense_detections(images, features)
        return [
            self._to_original(entry, size, original, most=most)
            for entry, size, original in zip(found, images.image_sizes, batch.original_sizes, strict=True)
        ]

    def _normalise(self, batch: DetectionBatch) -> ImageList:
        """Normalise as the model's transform does, and set the padding back to zero."""
        return ImageList(normalise_images(batch, self._mean, self._std), list(batch.sizes))

    def _pyramid(self, images: Tensor) -> OrderedDict[str, Tensor]:
        features = _backbone(self.model)(images)
        return OrderedDict([("0", features)]) if isinstance(features, Tensor) else features

    def _feature_maps(self, features: Mapping[str, Tensor], image_size: Size) -> tuple[FeatureMap, ...]:
        height, width = image_size
        return tuple(
            FeatureMap(level.name, tensor, height / tensor.shape[-2], width / tensor.shape[-1])
            for level, tensor in zip(self.spec.levels, (features[key] for key in self._level_keys), strict=True)
        )

    def _targets(self, batch: DetectionBatch, *, masks: bool = False) -> list[dict[str, Tensor]]:
        """Torchvision's targets: the model's labels and frame, without ignored boxes."""
        targets = batch.targets
        labels = [target.labels for target in targets]
        if self.missing_classes:
            raise ValueError(f"this model cannot compute losses: it has no output for {list(self.missing_classes)}")
        boxes = [target.boxes for target in targets]
        if _any_ignored(batch):
            boxes = [b[~target.ignore] for b, target in zip(boxes, targets, strict=True)]
            labels = [entry[~target.ignore] for entry, target in zip(labels, targets, strict=True)]
        if self._frame is not None:
            boxes = [self._frame.to_model(entry, batch.image_size) for entry in boxes]
        found = [{"boxes": b, "labels": self._to_model[entry]} for b, entry in zip(boxes, labels, strict=True)]
        if masks:
            for entry, own in zip(found, _masks(batch), strict=True):
                entry["masks"] = own
        return found

    def _dense(
        self, batch: DetectionBatch, images: ImageList, features: OrderedDict[str, Tensor], want: frozenset[Want]
    ) -> dict[str, Any]:
        """Everything but features of a one-stage detector, from one pass of its head."""
        maps = list(features.values())
        if self._frame is not None:
            return self._default_boxes(batch, images, maps, want)
        found: dict[str, Any] = {}
        if want <= {"features", "head_tail"}:
            head = DenseHead(self.model, self._order, maps, run=False)
        else:
            head = DenseHead(self.model, self._order, maps, keep_towers="head_features" in want)
        anchors = _parts(self.model).anchor_generator(images, float32_likes(maps))
        if want & {"losses", "assignment"}:
            model = LossRecorder(self.model, losses="losses" in want) if "assignment" in want else self.model
            cells = (head.cells,) if self.spec.family == "fcos" else ()
            # The logits too: of one minus a small probability, which the focal loss takes, 16 bits keep little.
            losses = dict(_parts(model).compute_loss(self._targets(batch), widen(head.outputs), anchors, *cells))
            if "losses" in want:
                found["losses"] = losses
            if isinstance(model, LossRecorder):
                found["assignment"] = self._assignment(model.matched, batch)
        if "predictions" in want:
            found["predictions"] = head.predictions(anchors)
        if "head_features" in want:
            found["head_features"] = head.features
        if "head_tail" in want:
            found["head_tail"] = head.tail(anchors)
        return found

    def _default_boxes(
        self, batch: DetectionBatch, images: ImageList, maps: list[Tensor], want: frozenset[Want]
    ) -> dict[str, Any]:
        """Everything but features of an SSD, from one pass of its head."""
        assert self._frame is not None  # only called with one
        found: dict[str, Any] = {}
        outputs = _parts(self.model).head(maps)
        anchors = _parts(self.model).anchor_generator(images, float32_likes(maps))
        if want & {"losses", "assignment"}:
            targets = self._targets(batch)
            matched = match_default_boxes(self.model, targets, anchors)
            if "losses" in want:
                found["losses"] = dict(_parts(self.model).compute_loss(targets, widen(outputs), anchors, matched))
            if "assignment" in want:
                found["assignment"] = self._assignment(matched, batch)
        if "predictions" in want:
            ours = self._frame.to_batch(anchors[0], batch.image_size)
            found["predictions"] = default_box_predictions(self.model, self._order, outputs, ours, maps)
        return found

    def _assignment(self, matched: list[Tensor], batch: DetectionBatch) -> Tensor:
        """(B, A): torchvision numbers the boxes that it was given; we number those of the batch."""
        found = torch.stack(matched)
        if _any_ignored(batch):
            kept = [torch.where(~target.ignore)[0] for target in batch.targets]
            found = torch.stack(
                [
                    torch.where(own >= 0, torch.cat([places, places.new_zeros(1)])[own.clamp_min(0)], own)
                    for own, places in zip(found, kept, strict=True)
                ]
            )
        return found

    def _two_stage(
        self, batch: DetectionBatch, images: ImageList, features: OrderedDict[str, Tensor], want: frozenset[Want]
    ) -> dict[str, Any]:
        """Everything but features of a two-stage detector; the regions are those that the losses are computed on."""
        model = self.model
        found: dict[str, Any] = {}
        if want & {"losses", "regions"}:
            masks = "losses" in want and bool(_parts(model).roi_heads.has_mask())
            targets = self._targets(batch, masks=masks)
            with heads_mode(model, features, images, training=True):
                proposals, rpn = _parts(model).rpn(images, features, targets)
                heads = _parts(model).roi_heads
                if "regions" in want:
                    recorder = RegionRecorder(heads, masks=masks)
                    _, roi = recorder(features, proposals, images.image_sizes, targets)
                    found["regions"] = self._regions(recorder)
                else:
                    _, roi = heads(features, proposals, images.image_sizes, targets)
            if "losses" in want:
                found["losses"] = {**roi, **rpn}
        if "region_head" in want:
            found["region_head"] = partial(self._see_regions, images, features)
        return found

    def _regions(self, recorder: RegionRecorder) -> RegionPredictions:
        labels = self._to_ours[torch.cat(recorder.labels)]
        labels = torch.where(labels < 0, self.spec.num_classes, labels)
        if recorder.outputs is None:
            raise ValueError("expected box heads that call their box_predictor, as torchvision's RoIHeads do")
        return region_predictions(
            recorder,
            self._order,
            recorder.regions,
            recorder.outputs,
            labels=labels,
            matched_at_most=recorder.matched_at_most,
        )

    def _see_regions(
        self, images: ImageList, features: OrderedDict[str, Tensor], regions: Sequence[Tensor]
    ) -> RegionPredictions:
        """Pool the given regions from this pass's features and classify them (a `RegionHead`)."""
        heads = _parts(self.model).roi_heads
        with heads_mode(self.model, features, images, training=False):
            pooled = heads.box_roi_pool(features, list(regions), images.image_sizes)
        return region_predictions(heads, self._order, regions, heads.box_predictor(heads.box_head(pooled)))

    def _dense_detections(self, images: ImageList, features: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        maps = list(features.values())
        outputs = _parts(self.model).head(maps)
        anchors = _parts(self.model).anchor_generator(images, maps)
        if self._frame is not None:
            with uncut(self.model, when=self._others):
                return list(_parts(self.model).postprocess_detections(outputs, anchors, images.image_sizes))
        if self._others:
            # Before the best are chosen, level by level and of all classes.
            outputs = {**outputs, "cls_logits": outputs["cls_logits"].index_fill(2, self._unasked, -math.inf)}
        cells = [entry.shape[-2] * entry.shape[-1] for entry in maps]
        per_cell = outputs["cls_logits"].shape[1] // sum(cells)
        counts = [count * per_cell for count in cells]
        split = {name: list(values.split(counts, dim=1)) for name, values in outputs.items()}
        split_anchors = [list(entry.split(counts)) for entry in anchors]
        found = _parts(self.model).postprocess_detections(split, split_anchors, images.image_sizes)
        return list(found)

    def _to_original(self, found: Mapping[str, Tensor], size: Size, original: Size, *, most: int) -> Detections:
        """Scale boxes to the stored image, clip them to it, drop classes not asked for, and keep the best others."""
        boxes, scores, labels = found["boxes"].float(), found["scores"].float(), self._to_ours[found["labels"]]
        scale_y, scale_x = original[0] / size[0], original[1] / size[1]
        boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([original[1], original[0]] * 2))
        if not self._others:
            return Detections(boxes, scores, labels)
        known = torch.where(labels >= 0)[0][:most]
        return Detections(boxes[known], scores[known], labels[known])


def wrap_torchvision(
    model: nn.Module, class_names: Sequence[str] | None = None, *, label_ids: Sequence[int] | None = None
) -> TorchvisionDetector:
    """Wrap a RetinaNet, FCOS, SSD, Faster R-CNN or Mask R-CNN that you already built.

    Args:
        model: The plain torchvision detector.
        class_names: Names of classes 0..K-1 without background. None numbers them (two-stage detectors and SSDs, whose
            output 0 is the background), or names them (COCO's 91 outputs: its 80 classes); any other head needs them.
        label_ids: The model's label of each class; None infers them (see ``labels.infer_labels``). A batch counts its
            labels as ``class_names`` does: for COCO's raw category ids as labels give ``label_ids=range(1, 91)``.

    Raises:
        ValueError: If the model is of another kind, the number of classes does not fit its head, or names are needed.
    """
    if isinstance(class_names, str):
        raise ValueError(f"class_names: expected a list of names, got one string, {class_names!r}")
    if label_ids is None:
        class_names, label_ids = infer_labels(model, class_names)
    elif class_names is None:
        class_names = [str(index) for index in range(len(label_ids))]
    return TorchvisionDetector(model, class_names, label_ids=label_ids)


def _parts(model: object) -> Any:
    """The model, as a type checker must see it: torchvision's detectors are not typed."""
    return model


def _any_ignored(batch: DetectionBatch) -> bool:
    """One look for the whole batch: training batches hold no ignored boxes, and dropping boxes waits for the device."""
    return bool(batch.targets) and bool(torch.cat([target.ignore for target in batch.targets]).any())


def _masks(batch: DetectionBatch) -> list[Tensor]:
    """The instance masks (N, h, w) of each image's boxes that are not ignored."""
    found = []
    for target, size in zip(batch.targets, batch.sizes, strict=True):
        masks = target.masks
        if masks is None and len(target.boxes):
            raise DrkdError(
                "This Mask R-CNN trains its masks too, but the batch's targets have none: expected the mask of every "
                "box. Set data.masks: true (COCO files with a segmentation for every box), or train a Faster R-CNN."
            )
        found.append(target.boxes.new_zeros(0, *size, dtype=torch.bool) if masks is None else masks[~target.ignore])
    return found


def scale_spec(spec: DetectorSpec, factor: float) -> DetectorSpec:
    """The spec of a detector that is shown images so many times smaller than the batch's: strides and anchors grow."""
    levels = tuple(replace(level, stride=level.stride * factor) for level in spec.levels)
    layout = spec.predictions
    if layout is not None:
        anchors = tuple(tuple((w * factor, h * factor) for w, h in cell) for cell in layout.anchors)
        layout = replace(layout, anchors=anchors)
    return replace(spec, levels=levels, predictions=layout)


def _backbone(model: nn.Module) -> nn.Module:
    backbone = _parts(model).backbone
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"expected {type(model).__name__}.backbone to be a module, got {type(backbone).__name__}")
    return backbone


def _levels(features: Mapping[str, Tensor], size: int) -> tuple[FeatureLevel, ...]:
    """Name levels p3 for stride 8 and so on where strides are distinct powers of two, else by the backbone's keys."""
    strides = [size / tensor.shape[-2] for tensor in features.values()]
    exponents = [math.log2(stride) for stride in strides]
    names = list(features)
    if len(set(strides)) == len(strides) and all(exponent.is_integer() for exponent in exponents):
        names = [f"p{int(exponent)}" for exponent in exponents]
    return tuple(
        FeatureLevel(name, tensor.shape[1], stride)
        for name, tensor, stride in zip(names, features.values(), strides, strict=True)
    )
