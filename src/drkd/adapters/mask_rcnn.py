"""torchvision's Mask R-CNN on any ResNet or timm backbone, described by plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from drkd.adapters.backbones import BackbonePlan
from drkd.adapters.torchvision import FasterRCNNBuilder
from drkd.contracts import DrkdError


@dataclass(frozen=True, kw_only=True)
class MaskRCNNBuilder(FasterRCNNBuilder):
    """Mask R-CNN with a feature pyramid (He et al., ICCV 2017, arXiv:1703.06870), torchvision's.

    As a student it keeps its mask loss, for which the data must hold masks (``data.masks: true``); what is distilled is
    the pyramid and the box part.

    Args:
        mask_roi_size: Side of the pooled mask features, cells.
        mask_layers: Channels of the convolutions of the mask head.
        mask_channels: Channels before the mask head's last layer.
    """

    family: ClassVar[str] = "mask_rcnn"

    mask_roi_size: int = 14
    mask_layers: tuple[int, ...] = (256, 256, 256, 256)
    mask_channels: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mask_layers or min(*self.mask_layers, self.mask_channels, self.mask_roi_size) < 1:
            raise DrkdError(
                "mask_layers, mask_channels and mask_roi_size: expected positive numbers, got "
                f"{tuple(self.mask_layers)}, {self.mask_channels} and {self.mask_roi_size}."
            )

    def _head_plan(self, num_classes: int, pyramid: BackbonePlan, anchors: int) -> dict[str, Any]:
        plan = super()._head_plan(num_classes, pyramid, anchors)
        plan["mask_roi_pool"] = {**plan["box_roi_pool"], "output_size": self.mask_roi_size}
        plan["mask_head"] = {"in_channels": self.fpn_channels, "layers": list(self.mask_layers), "dilation": 1}
        plan["mask_predictor"] = {
            "in_channels": self.mask_layers[-1],
            "dim_reduced": self.mask_channels,
            "num_classes": num_classes + 1,
        }
        return plan

    def _assemble(self, backbone: nn.Module, plan: dict[str, Any]) -> nn.Module:
        model: nn.Module = MaskRCNN(
            backbone,
            rpn_anchor_generator=AnchorGenerator(**plan["anchors"]),
            box_roi_pool=MultiScaleRoIAlign(**plan["box_roi_pool"]),
            box_head=TwoMLPHead(**plan["box_head"]),
            box_predictor=FastRCNNPredictor(**plan["box_predictor"]),
            mask_roi_pool=MultiScaleRoIAlign(**plan["mask_roi_pool"]),
            mask_head=MaskRCNNHeads(**plan["mask_head"]),
            mask_predictor=MaskRCNNPredictor(**plan["mask_predictor"]),
            **plan["detector"],
        )
        return model
