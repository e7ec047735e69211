"""Detectors trained in MMDetection, read from their checkpoints and rebuilt on torchvision's parts."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from drkd.adapters.damage import explained_by_file
from drkd.adapters.detection_options import check_detection_options
from drkd.adapters.labels import coco_categories
from drkd.adapters.mmdetection_parts import (
    AlignedRoIPool,
    ConvolvedLevels,
    DeformableConvolution,
    FixedStrideAnchors,
    put_stride_first,
)
from drkd.adapters.pyramid_detector import PyramidDetector
from drkd.adapters.torchvision_detector import TorchvisionDetector
from drkd.adapters.weights import read_checkpoint, read_state
from drkd.contracts import Detector, DetectorBuilder, DrkdError

# RGB in [0, 1]. Caffe's networks take BGR of 0 to 255 less a mean, which their first convolution is rewritten for.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CAFFE_MEAN, _CAFFE_STD = (123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255,) * 3
_RATIOS = (0.5, 1.0, 2.0)
_NAMED = 5
# Early releases had the offsets of a deformable convolution beside it, not within it.
_OLD_OFFSET = re.compile(r"(?<=\.)(conv\d)_offset\.")


@dataclass(frozen=True, kw_only=True)
class MMDetectionBuilder(DetectorBuilder):
    """A detector trained in MMDetection 2 or 3, from its checkpoint; what it is made of is read off the weights.

    With ``part: features`` any detector with a ResNet or ResNeXt (deformable convolutions too) and a plain feature
    pyramid will do, whatever its heads: Cascade and Mask R-CNN, ATSS, GFL, ... Its backbone and pyramid teach, the
    rest of the file is left alone, and every method that needs features only works with it. With ``part: detector``
    RetinaNet and Faster R-CNN also predict, as MMDetection's own configurations of them do: anchors of exact strides
    and sides, RoIAlign with exact alignment, box codes with MMDetection's scales, the background last in the file and
    first here. What differs is how images are resized (cv2 there, torchvision here).

    Args:
        path: Checkpoint: a state dict, bare or under ``state_dict``.
        part: ``detector`` or ``features``, see above.
        classes: Names of the head's classes, in its order; None takes those in the file, or COCO's where it has 80.
        style: ``pytorch``, or ``caffe`` for backbones that take BGR images of unit deviation and have their stride in
            the first convolution of a stage (configurations with ``caffe`` in their name).
        extra_convs: What the levels above the pyramid are computed from: ``input`` (the backbone's coarsest map) or
            ``output`` (the pyramid's); None decides by the width of the first. ``on_lateral`` is not supported.
        relu_before_extra_convs: As in MMDetection's pyramid.
        detections_per_image: At most so many detections an image.
    """

    path: str
    part: Literal["detector", "features"] = "detector"
    classes: tuple[str, ...] | None = None
    style: Literal["pytorch", "caffe"] = "pytorch"
    extra_convs: Literal["input", "output"] | None = None
    relu_before_extra_convs: bool = False
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        check_detection_options(vars(self))
        choices = {"part": ("detector", "features"), "style": ("pytorch", "caffe")}
        choices["extra_convs"] = ("input", "output", None)  # type: ignore[assignment]
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise DrkdError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}.")

    def build(self, class_names: Sequence[str]) -> Detector:
        """Build the detector; classes are matched by name, and one that the file lacks is never detected.

        Raises:
            DrkdError: If the file cannot be read, is of another kind of detector, or its weights do not fit.
        """
        return _build(self.path, self, class_names)

    def build_from(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> Detector:
        """Build the detector from tensors by MMDetection's names; see `build`."""
        state = {_OLD_OFFSET.sub(r"\1.conv_offset.", name): value for name, value in state.items()}
        plan = read_architecture(state, self.path)
        if self.part == "features":
            state = {name: value for name, value in state.items() if name.startswith(("backbone.", "neck."))}
            pyramid = self._pyramid(plan)
            named = nn.ModuleDict({"backbone": pyramid})
            fill_from_mmdetection(named, self._prepare(state), plan, self.path)
            mean, std = self._normalisation()
            return PyramidDetector(pyramid, class_names, mean=mean, std=std).eval()
        if not plan.family:
            heads = [name for name in state if not name.startswith(("backbone.", "neck."))][:_NAMED]
            raise DrkdError(
                f"{self.path}: its heads ({', '.join(heads) or 'none'}, ...) are not those of RetinaNet or Faster "
                "R-CNN as MMDetection 2 and 3 have them. Use part: features, which reads backbone and pyramid only."
            )
        known = self._known_classes(plan)
        model = self._detector(plan)
        fill_from_mmdetection(model, self._prepare(state), plan, self.path)
        offset = 1 if plan.family == "faster_rcnn" else 0
        labels = [known.index(name) + offset if name in known else -1 for name in class_names]
        if max(labels, default=-1) < 0:
            raise DrkdError(
                f"{self.path}: none of your classes ({', '.join(class_names[:5])}) is one of the teacher's "
                f"({', '.join(known[:5])}, ...). Name them with classes, or use part: features."
            )
        return TorchvisionDetector(model, class_names, label_ids=labels).eval()

    def _known_classes(self, plan: Architecture) -> list[str]:
        found = self.classes or _classes_in(self.path)
        if found is None:
            categories = [name for name in coco_categories() if name not in ("__background__", "N/A")]
            found = tuple(categories) if plan.classes == len(categories) else None
        if found is None or len(found) != plan.classes:
            named = "no class names" if found is None else f"{len(found)} class names"
            raise DrkdError(
                f"{self.path}: its head has {plan.classes} classes and there are {named}. Give classes, in the "
                "order of the head, or use part: features, which needs none."
            )
        return list(found)

    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (_CAFFE_MEAN, _CAFFE_STD) if self.style == "caffe" else (_MEAN, _STD)

    def _prepare(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Channels in RGB order, and the background before the classes."""
        prepared = dict(state)
        first, box_head = "backbone.conv1.weight", "roi_head.bbox_head."
        if self.style == "caffe" and first in prepared:
            prepared[first] = prepared[first].flip(1)
        for kind in ("weight", "bias"):
            scores, boxes = f"{box_head}fc_cls.{kind}", f"{box_head}fc_reg.{kind}"
            if scores in prepared:
                prepared[scores] = prepared[scores].roll(1, dims=0)
            if boxes in prepared:
                # torchvision's boxes have four more rows, for the background, which nothing reads.
                rows = prepared[boxes]
                prepared[boxes] = torch.cat([rows.new_zeros(4, *rows.shape[1:]), rows])
        return prepared

    def _pyramid(self, plan: Architecture) -> nn.Module:
        network = ResNet(
            Bottleneck if plan.bottleneck else BasicBlock,
            list(plan.blocks),
            groups=plan.groups,
            width_per_group=plan.group_width,
        )
        if self.style == "caffe":
            if not plan.bottleneck:
                raise DrkdError("style: Caffe's ResNets have bottlenecks, and this file's blocks are basic ones.")
            put_stride_first(network)
        for stage, block in plan.deformable:
            layer = getattr(network, f"layer{stage}")[block]
            layer.conv2 = DeformableConvolution(layer.conv2, modulated=plan.modulated)
        body = IntermediateLayerGetter(network, {f"layer{stage}": f"{stage}" for stage in plan.stages})
        extra: Any = LastLevelMaxPool()
        if plan.extra_inputs:
            on_input = self._extra_on_input(plan)
            extra = ConvolvedLevels(
                plan.extra_inputs, plan.channels, on_input=on_input, activation=self.relu_before_extra_convs
            )
        pyramid = FeaturePyramidNetwork(list(plan.widths), plan.channels, extra_blocks=extra)
        backbone = nn.Sequential(OrderedDict(body=body, fpn=pyramid))
        backbone.out_channels = plan.channels  # type: ignore[assignment]
        return backbone

    def _extra_on_input(self, plan: Architecture) -> bool:
        if plan.widths[-1] == plan.channels and self.extra_convs is None:
            raise DrkdError(f"{self.path}: give extra_convs, input or output: both have {plan.channels} channels here.")
        expected = plan.widths[-1] if self.extra_convs == "input" else plan.channels
        if self.extra_convs is not None and plan.extra_inputs[0] != expected:
            raise DrkdError(
                f"extra_convs: {self.extra_convs} has {expected} channels, and the first convolution above the pyramid "
                f"in {self.path} takes {plan.extra_inputs[0]}."
            )
        return self.extra_convs == "input" or (self.extra_convs is None and plan.extra_inputs[0] == plan.widths[-1])

    def _detector(self, plan: Architecture) -> nn.Module:
        mean, std = self._normalisation()
        shared: dict[str, Any] = {"image_mean": list(mean), "image_std": list(std)}
        strides = [2 ** (stage + 1) for stage in plan.stages]
        strides += [strides[-1] * 2**step for step in range(1, max(len(plan.extra_inputs), 1) + 1)]
        if plan.family == "retinanet":
            scales = tuple(4 * 2 ** (step / 3) for step in range(3))
            anchors = FixedStrideAnchors(strides, scales=scales, ratios=_RATIOS)
            count = self.detections_per_image
            model: nn.Module = RetinaNet(
                self._pyramid(plan), plan.classes, anchor_generator=anchors, detections_per_img=count, **shared
            )
            return model
        pool = AlignedRoIPool([str(stage) for stage in plan.stages], output_size=7, sampling_ratio=0)
        model = FasterRCNN(
            self._pyramid(plan),
            plan.classes + 1,
            rpn_anchor_generator=FixedStrideAnchors(strides, scales=(8.0,), ratios=_RATIOS),
            box_roi_pool=pool,
            box_detections_per_img=self.detections_per_image,
            **shared,
        )
        return model


@explained_by_file
def _build(path: str, builder: MMDetectionBuilder, class_names: Sequence[str]) -> Detector:
    return builder.build_from(read_state(path), class_names)


@dataclass(frozen=True)
class Architecture:
    """What the names and shapes of an MMDetection checkpoint say of the detector.

    Args:
        family: ``retinanet``, ``faster_rcnn``, or empty for any other.
        blocks: Blocks of each of the four stages.
        bottleneck: Whether blocks are bottlenecks.
        groups: Groups of their 3x3 convolutions.
        group_width: Channels of a group in the first stage.
        stages: Stages that feed the pyramid.
        widths: Channels of these.
        channels: Of every level of the pyramid.
        extra_inputs: Channels that each convolution above the pyramid takes; none where the level is subsampled.
        deformable: Stage and block of each deformable convolution.
        modulated: Whether these have weights.
        classes: Of the head, without the background.
    """

    family: str
    blocks: tuple[int, ...]
    bottleneck: bool
    groups: int
    group_width: int
    stages: tuple[int, ...]
    widths: tuple[int, ...]
    channels: int
    extra_inputs: tuple[int, ...]
    deformable: tuple[tuple[int, int], ...]
    modulated: bool
    classes: int


def read_architecture(state: Mapping[str, Tensor], source: str) -> Architecture:
    """Tell from names and shapes what detector a state dict belongs to.

    Args:
        state: Tensors by MMDetection's names.
        source: The file, for messages.

    Raises:
        DrkdError: If it has no ResNet or ResNeXt with a plain pyramid.
    """
    blocks = tuple(_count(state, rf"backbone\.layer{stage}\.(\d+)\.conv1\.weight") for stage in range(1, 5))
    laterals = _count(state, r"neck\.lateral_convs\.(\d+)\.conv\.weight")
    levels = _count(state, r"neck\.fpn_convs\.(\d+)\.conv\.weight")
    if "backbone.conv1.weight" not in state or 0 in blocks or not 1 <= laterals <= 4 or levels < laterals:
        raise DrkdError(
            f"{source}: this is no MMDetection checkpoint with a ResNet or ResNeXt and a feature pyramid. Expected "
            "backbone.conv1.weight, backbone.layer1..4.*, neck.lateral_convs.* and neck.fpn_convs.*, got "
            f"{', '.join(sorted(state)[:_NAMED])}, ..."
        )
    inner = state["backbone.layer1.0.conv2.weight"]
    bottleneck = "backbone.layer1.0.conv3.weight" in state
    # Basic blocks have no groups and no width of their own.
    groups = inner.shape[0] // inner.shape[1] if bottleneck else 1
    found = re.compile(r"backbone\.layer(\d)\.(\d+)\.conv2\.conv_offset\.weight")
    offsets = {
        (int(match[1]), int(match[2])): int(tensor.shape[0])
        for name, tensor in state.items()
        if (match := found.fullmatch(name))
    }
    if set(offsets.values()) - {18, 27} or len(set(offsets.values())) > 1:
        raise DrkdError(
            f"{source}: its deformable convolutions have {sorted(set(offsets.values()))} offset channels; expected 18 "
            "(DCN) or 27 (DCNv2) in all of them, one group of offsets."
        )
    family, classes = _read_head(state)
    return Architecture(
        family,
        blocks,
        bottleneck,
        groups,
        inner.shape[0] // groups if bottleneck else 64,
        tuple(range(5 - laterals, 5)),
        tuple(int(state[f"neck.lateral_convs.{index}.conv.weight"].shape[1]) for index in range(laterals)),
        int(state["neck.fpn_convs.0.conv.weight"].shape[0]),
        tuple(int(state[f"neck.fpn_convs.{index}.conv.weight"].shape[1]) for index in range(laterals, levels)),
        tuple(sorted(offsets)),
        27 in offsets.values(),
        classes,
    )


def _read_head(state: Mapping[str, Tensor]) -> tuple[str, int]:
    """The family and the number of classes; an empty family where the heads are of neither kind."""
    if (scores := state.get("bbox_head.retina_cls.weight")) is not None:
        boxes = state.get("bbox_head.retina_reg.weight")
        if boxes is not None and boxes.shape[0] == 36 and scores.shape[0] % 9 == 0:
            return "retinanet", int(scores.shape[0]) // 9
    scores = state.get("roi_head.bbox_head.fc_cls.weight")
    boxes = state.get("roi_head.bbox_head.fc_reg.weight")
    anchors = state.get("rpn_head.rpn_cls.weight")
    if scores is not None and boxes is not None and anchors is not None:
        classes = int(scores.shape[0]) - 1
        mask = any(name.startswith("roi_head.mask_head.") for name in state)
        if boxes.shape[0] == 4 * classes and anchors.shape[0] == 3 and not mask:
            return "faster_rcnn", classes
    return "", 0


def fill_from_mmdetection(model: nn.Module, state: Mapping[str, Tensor], plan: Architecture, source: str) -> None:
    """Fill a model from MMDetection's tensors; every name and shape must fit, and messages use the file's names.

    Args:
        model: Made for ``plan``.
        state: Tensors by MMDetection's names, the box head's rows in torchvision's order.
        plan: Of the file.
        source: The file, for messages.

    Raises:
        DrkdError: If something is missing, left over or of another shape.
    """
    names = _names(plan)
    wanted = model.state_dict()
    theirs = {ours: _rename(ours, names) for ours in wanted}
    missing = [name for name in theirs.values() if name not in state and not name.endswith("num_batches_tracked")]
    left = sorted(set(state) - set(theirs.values()))
    shapes = [
        f"{name} (expected {tuple(wanted[ours].shape)}, got {tuple(state[name].shape)})"
        for ours, name in theirs.items()
        if name in state and state[name].shape != wanted[ours].shape
    ]
    problems = [
        f"{len(entries)} {title}: {', '.join(entries[:_NAMED])}{', ...' if len(entries) > _NAMED else ''}"
        for title, entries in (("missing", missing), ("not understood", left), ("of another shape", shapes))
        if entries
    ]
    if problems:
        raise DrkdError(
            f"{source}: this is not the {plan.family or 'pyramid'} that drkd can rebuild ({len(wanted)} tensors): "
            f"{'; '.join(problems)}. Where the heads are the reason, use part: features."
        )
    model.load_state_dict({ours: state[name] for ours, name in theirs.items() if name in state}, strict=False)


def _names(plan: Architecture) -> list[tuple[str, str]]:
    """Beginnings of torchvision's names and of MMDetection's, the longer ones first."""
    count = len(plan.stages)
    pairs = [("backbone.body.", "backbone.")]
    for index in range(count):
        pairs.append((f"backbone.fpn.inner_blocks.{index}.0.", f"neck.lateral_convs.{index}.conv."))
        pairs.append((f"backbone.fpn.layer_blocks.{index}.0.", f"neck.fpn_convs.{index}.conv."))
    for index in range(len(plan.extra_inputs)):
        pairs.append((f"backbone.fpn.extra_blocks.convolutions.{index}.", f"neck.fpn_convs.{count + index}.conv."))
    for ours, branch, last, output in (
        ("classification_head", "cls_convs", "cls_logits", "retina_cls"),
        ("regression_head", "reg_convs", "bbox_reg", "retina_reg"),
    ):
        pairs += [(f"head.{ours}.conv.{index}.0.", f"bbox_head.{branch}.{index}.conv.") for index in range(4)]
        pairs.append((f"head.{ours}.{last}.", f"bbox_head.{output}."))
    pairs += [
        ("rpn.head.conv.0.0.", "rpn_head.rpn_conv."),
        ("rpn.head.cls_logits.", "rpn_head.rpn_cls."),
        ("rpn.head.bbox_pred.", "rpn_head.rpn_reg."),
        ("roi_heads.box_head.fc6.", "roi_head.bbox_head.shared_fcs.0."),
        ("roi_heads.box_head.fc7.", "roi_head.bbox_head.shared_fcs.1."),
        ("roi_heads.box_predictor.cls_score.", "roi_head.bbox_head.fc_cls."),
        ("roi_heads.box_predictor.bbox_pred.", "roi_head.bbox_head.fc_reg."),
    ]
    return pairs


def _rename(ours: str, names: Sequence[tuple[str, str]]) -> str:
    for beginning, theirs in names:
        if ours.startswith(beginning):
            return theirs + ours.removeprefix(beginning)
    return ours


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbered entries of this name there are, from 0 without a gap."""
    numbers = {int(match[1]) for name in state if (match := re.fullmatch(pattern, name))}
    return next(index for index in range(len(numbers) + 1) if index not in numbers)


def _classes_in(path: str) -> tuple[str, ...] | None:
    """Class names that MMDetection left in the file's ``meta``, where they are plain strings."""
    content = read_checkpoint(path)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    newer = meta.get("dataset_meta")
    found = newer.get("classes", newer.get("CLASSES")) if isinstance(newer, Mapping) else meta.get("CLASSES")
    if isinstance(found, list | tuple) and found and all(isinstance(name, str) for name in found):
        return tuple(found)
    return None
