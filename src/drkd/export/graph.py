"""A torchvision detector as a pure function of tensors, for any batch and image size, that can be exported."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from drkd.adapters import TorchvisionDetector
from drkd.contracts import Detector, DrkdError
from drkd.export.operators import pool_regions, suppress

SIZE_MULTIPLE = 32
"""The graph takes images whose sides are multiples of this, px: coarser levels round up, as in PyTorch."""

_SMALLEST_BOX = 1e-2
_SUPPORTED = ("retinanet", "fcos", "faster_rcnn")


def build_graph(detector: Detector, *, nms: bool) -> DetectorGraph:
    """The graph of a detector, a copy that shares nothing with it, in eval mode on the CPU.

    Args:
        detector: A torchvision RetinaNet, FCOS or Faster R-CNN, on any backbone.
        nms: Whether suppression and the choice of the best detections are part of the graph.

    Raises:
        DrkdError: If the detector is of another kind.
    """
    family = detector.spec.family
    if not isinstance(detector, TorchvisionDetector) or family not in _SUPPORTED:
        raise DrkdError(
            f"drkd export: expected torchvision's RetinaNet, FCOS or Faster R-CNN, got {type(detector).__name__} "
            f"({family or 'of no known family'}). Other libraries bring an exporter of their own: use it on "
            "detector.model."
        )
    own: Any = copy.deepcopy(detector).cpu().eval().requires_grad_(False)
    own.to(memory_format=torch.contiguous_format)
    _fix_same_padding(own.model)
    return (TwoStageGraph if family == "faster_rcnn" else DenseGraph)(own, nms=nms).eval()


class DetectorGraph(nn.Module):
    """What the graphs share: normalisation, padding, anchors, and the best detections of each image.

    Takes images (B, 3, H, W) float32, RGB in [0, 1], and sizes (B, 2) int64, height and width of each image's valid
    part, px. With ``nms`` returns boxes (B, D, 4) xyxy px of the input, scores (B, D) descending and labels (B, D)
    int64; places behind an image's last detection hold score 0 and label -1. Without it, see the subclasses.

    Args:
        detector: In eval mode; becomes part of the graph.
        nms: Whether suppression is part of the graph.
    """

    def __init__(self, detector: TorchvisionDetector, *, nms: bool) -> None:
        super().__init__()
        self.detector = detector
        self.nms = nms
        first = int(detector.spec.family == "faster_rcnn")
        # Of a model with COCO's 91 outputs, say, of which the data has ten classes.
        self._unknown_classes = bool((detector._to_ours[first:] < 0).any())

    def _enter(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, list[Tensor], list[str]]:
        """The normalised images, zero in their padding, and the pyramid with its names."""
        height, width = images.shape[-2:]
        values = (images - self.detector._mean) / self.detector._std
        rows = torch.arange(height, device=images.device) < sizes[:, :1]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]
        values = values * (rows[:, None, :, None] & columns[:, None, None, :])
        features = self.detector.model.backbone(values)  # type: ignore[operator]
        if isinstance(features, Tensor):
            return values, [features], ["0"]
        return values, list(features.values()), list(features)

    def _asked_for(self, scores: Tensor) -> Tensor:
        """Scores (..., outputs) with zeros for the model's classes that drkd does not know: they take no places."""
        return torch.where(self.detector._to_ours >= 0, scores, 0.0) if self._unknown_classes else scores

    def _best(self, boxes: Tensor, scores: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best of (B, N) candidates, in drkd's labels."""
        ours = self.detector._to_ours[labels]
        count = _smaller(most, scores.shape[1])
        values, places = scores.topk(count, dim=1)
        ours = ours.gather(1, places)
        empty = values <= 0
        chosen = boxes.gather(1, places[..., None].expand(-1, -1, 4))
        return torch.where(empty[..., None], 0.0, chosen), values, torch.where(empty, -1, ours)

    def _our_classes(self) -> list[int]:
        missing = self.detector.missing_classes
        if missing:
            raise DrkdError(
                f"drkd export --nms=outside: the model has no output for {list(missing)}, and raw scores have a column "
                "for each class. Use --nms=inside."
            )
        return list(self.detector.label_ids)


class DenseGraph(DetectorGraph):
    """RetinaNet or FCOS. Without ``nms`` returns boxes (B, A, 4), clipped, and scores (B, A, K) in [0, 1]."""

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect; see the class."""
        model: Any = self.detector.model
        values, maps, _ = self._enter(images, sizes)
        outputs = model.head(maps)
        anchors = model.anchor_generator(ImageList(values, [tuple(images.shape[-2:])]), maps)[0]
        scores = torch.sigmoid(outputs["cls_logits"])
        codes = outputs["bbox_regression"]
        count, classes = scores.shape[1:]
        if self.detector.spec.family == "fcos":
            scores = torch.sqrt(scores * torch.sigmoid(outputs["bbox_ctrness"]))
            flat = model.box_coder.decode(codes.reshape(-1, 4), anchors.repeat(images.shape[0], 1))
        else:
            flat = model.box_coder.decode_single(codes.reshape(-1, 4), anchors.repeat(images.shape[0], 1))
        boxes = _clip(flat.reshape(images.shape[0], count, 4), sizes)
        if not self.nms:
            return boxes, scores[..., self._our_classes()]
        scores = self._asked_for(scores)
        per_cell = model.anchor_generator.num_anchors_per_location()
        start: Any = 0
        found, places = [], []
        for level, anchors_per_cell in zip(maps, per_cell, strict=True):
            own = level.shape[-2] * level.shape[-1] * anchors_per_cell
            candidates = scores[:, start : start + own].flatten(1)
            best, index = candidates.topk(_smaller(model.topk_candidates, own * classes), dim=1)
            found.append(best)
            places.append(index + start * classes)
            start = start + own
        best, place = torch.cat(found, dim=1), torch.cat(places, dim=1)
        best = torch.where(best > model.score_thresh, best, 0.0)
        labels = place % classes
        chosen = boxes.gather(1, (place // classes)[..., None].expand(-1, -1, 4))
        kept = suppress(chosen, _by_group(best, labels, classes), model.nms_thresh, model.detections_per_img)
        return self._best(chosen, kept.amax(1), labels, model.detections_per_img)


class TwoStageGraph(DetectorGraph):
    """Faster R-CNN. Without ``nms`` returns, for P proposals, boxes (B, P, K, 4) and scores (B, P, K) in [0, 1].

    The suppression of proposals is always part of the graph; places without a proposal have scores of 0.
    """

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect; see the class."""
        heads: Any = self.detector.model.roi_heads
        values, maps, names = self._enter(images, sizes)
        regions, present = self._propose(values, maps, sizes)
        batch, places = present.shape
        logits, codes = self._classify(maps, names, regions)
        classes = logits.shape[-1]
        decoded = heads.box_coder.decode_single(codes, regions.reshape(-1, 4))
        boxes = _clip(decoded.reshape(batch, places * classes, 4), sizes).reshape(batch, places, classes, 4)
        scores = torch.softmax(logits, dim=-1).reshape(batch, places, classes)
        scores = torch.where(present[..., None], scores, 0.0)
        if not self.nms:
            ours = self._our_classes()
            return boxes[:, :, ours], scores[..., ours]
        # Class by class, as each has boxes of its own; the background is left out.
        boxes, scores = boxes[:, :, 1:].transpose(1, 2), self._asked_for(scores)[..., 1:].transpose(1, 2)
        usable = (scores > heads.score_thresh) & _at_least(boxes, _SMALLEST_BOX)
        kept = suppress(
            boxes.reshape(batch * (classes - 1), places, 4),
            torch.where(usable, scores, 0.0).reshape(batch * (classes - 1), 1, places),
            heads.nms_thresh,
            heads.detections_per_img,
        )
        labels = torch.arange(1, classes, device=images.device)[None, :, None].expand(batch, -1, places)
        return self._best(
            boxes.reshape(batch, -1, 4), kept.reshape(batch, -1), labels.reshape(batch, -1), heads.detections_per_img
        )

    def _propose(self, values: Tensor, maps: list[Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Proposed regions (B, P, 4), and whether there is one at each place (B, P)."""
        rpn: Any = self.detector.model.rpn
        batch = values.shape[0]
        objectness, deltas = rpn.head(maps)
        per_level = [entry.shape[1] * entry.shape[2] * entry.shape[3] for entry in objectness]
        anchors = rpn.anchor_generator(ImageList(values, [tuple(values.shape[-2:])]), maps)[0]
        flat, codes = concat_box_prediction_layers(objectness, deltas)
        boxes = rpn.box_coder.decode_single(codes, anchors.repeat(batch, 1)).reshape(batch, -1, 4)
        flat = flat.reshape(batch, -1)
        start: Any = 0
        found, places, levels = [], [], []
        for level, count in enumerate(per_level):
            best, index = flat[:, start : start + count].topk(_smaller(rpn.pre_nms_top_n(), count), dim=1)
            found.append(best)
            places.append(index + start)
            levels.append(torch.full_like(index, level))
            start = start + count
        chosen = _clip(boxes.gather(1, torch.cat(places, dim=1)[..., None].expand(-1, -1, 4)), sizes)
        scores = torch.sigmoid(torch.cat(found, dim=1))
        scores = torch.where((scores >= rpn.score_thresh) & _at_least(chosen, rpn.min_size), scores, 0.0)
        most = rpn.post_nms_top_n()
        kept = suppress(chosen, _by_group(scores, torch.cat(levels, dim=1), len(maps)), rpn.nms_thresh, most).amax(1)
        values, index = kept.topk(_smaller(most, kept.shape[1]), dim=1)
        return chosen.gather(1, index[..., None].expand(-1, -1, 4)), values > 0

    def _classify(self, maps: list[Tensor], names: list[str], regions: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B * P, outputs) and box codes of every region."""
        heads: Any = self.detector.model.roi_heads
        pool: Any = heads.box_roi_pool
        levels = zip(maps, self.detector.spec.levels, names, strict=True)
        used = [(entry, level.stride) for entry, level, name in levels if name in pool.featmap_names]
        batch, places = regions.shape[:2]
        flat = regions.reshape(-1, 4)
        image = torch.arange(batch, device=flat.device)[:, None].expand(-1, places).reshape(-1)
        pooled = pool_regions(
            [entry for entry, _ in used],
            flat,
            image,
            [1.0 / stride for _, stride in used],
            list(pool.output_size),
            pool.sampling_ratio,
            float(pool.canonical_scale),
            pool.canonical_level,
        )
        return tuple(heads.box_predictor(heads.box_head(pooled)))


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Cut boxes (B, N, 4) at the border of each image's valid part."""
    limit = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def _at_least(boxes: Tensor, side: float) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides[..., 0] >= side) & (sides[..., 1] >= side)


def _by_group(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """(B, N) scores as (B, G, N): each in the row of its group, 0 elsewhere."""
    rows = torch.arange(count, device=scores.device)[None, :, None]
    return torch.where(groups[:, None] == rows, scores[:, None], 0.0)


def _smaller(limit: int, count: Any) -> Any:
    """The smaller of a number and a size that may be symbolic."""
    return min(limit, count) if isinstance(count, int) else torch.sym_min(limit, count)


def _fix_same_padding(model: nn.Module) -> None:
    """Replace TensorFlow's padding, worked out from every input's size, by what it is for sides that are multiples.

    With symbolic sizes the arithmetic makes an export take minutes and adds nothing to the graph's use.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dSame):
                setattr(parent, name, _padded(child))


def _two(sides: tuple[int, ...]) -> tuple[int, int]:
    return sides[0], sides[1]


def _padded(layer: Conv2dSame) -> nn.Module:
    sides = []
    for kernel, stride, dilation in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True):
        total = max(dilation * (kernel - 1) + 1 - stride, 0)
        sides.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = sides
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        _two(layer.kernel_size),
        _two(layer.stride),
        dilation=_two(layer.dilation),
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    plain.weight, plain.bias = layer.weight, layer.bias
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), plain).eval()
