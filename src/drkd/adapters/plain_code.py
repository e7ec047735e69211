"""The few lines of plain torchvision and timm that rebuild a saved detector without drkd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CLASSES = {"retinanet": "RetinaNet", "fcos": "FCOS", "faster_rcnn": "FasterRCNN", "mask_rcnn": "MaskRCNN"}
_HEADS = {
    "retinanet": 'RetinaNetHead(**build["head"], norm_layer=partial(nn.GroupNorm, 32))',
    "fcos": 'FCOSHead(**build["head"])',
}
_IMPORTS = {
    "partial(": "from functools import partial",
    "OrderedDict(": "from collections import OrderedDict",
    "timm.": "import timm",
    "torch.": "import torch",
    "nn.": "from torch import nn",
    "get_model(": "from torchvision.models import get_model",
    "IntermediateLayerGetter(": "from torchvision.models._utils import IntermediateLayerGetter",
    " RetinaNet(": "from torchvision.models.detection import RetinaNet",
    " FCOS(": "from torchvision.models.detection import FCOS",
    " MaskRCNN(": "from torchvision.models.detection import MaskRCNN",
    " FasterRCNN(": "from torchvision.models.detection import FasterRCNN",
    "AnchorGenerator(": "from torchvision.models.detection.anchor_utils import AnchorGenerator",
    "FastRCNNPredictor(": "from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead",
    "MaskRCNNHeads(": "from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor",
    "FCOSHead(": "from torchvision.models.detection.fcos import FCOSHead",
    "RetinaNetHead(": "from torchvision.models.detection.retinanet import RetinaNetHead",
    "FeaturePyramidNetwork(": "from torchvision.ops import FeaturePyramidNetwork",
    "MultiScaleRoIAlign(": "from torchvision.ops import MultiScaleRoIAlign",
    "LastLevelMaxPool(": "from torchvision.ops.feature_pyramid_network import LastLevelMaxPool",
    "LastLevelP6P7(": "from torchvision.ops.feature_pyramid_network import LastLevelP6P7",
}


def write_plain_code(plan: Mapping[str, Any], *, file_name: str = "student.pt") -> str:
    """Python source that loads a saved detector into ``model`` with torchvision (and timm) alone.

    Args:
        plan: The detector's plan, as it is saved under "build".
        file_name: Path of the checkpoint as the code reads it.
    """
    body = [f'saved = torch.load("{file_name}", map_location="cpu", weights_only=True)', 'build = saved["build"]']
    body += _pyramid_lines(plan) if plan["family"] in _CLASSES else _zoo_lines(plan)
    body += ['model.load_state_dict(saved["state_dict"])', "model.eval()"]
    text = "\n".join(body)
    imports = [line for word, line in _IMPORTS.items() if word in text]
    return "\n".join([*imports, "", text, ""])


def _zoo_lines(plan: Mapping[str, Any]) -> list[str]:
    lines = ['model = get_model(**build["detector"])']
    if plan.get("batch_norm_eps") is not None:
        lines += [
            "for layer in model.modules():",
            "    if isinstance(layer, nn.BatchNorm2d):",
            '        layer.eps = build["batch_norm_eps"]',
        ]
    if "size" in plan:
        lines.append('model.transform.fixed_size = tuple(build["size"])')
    if plan.get("narrow"):
        lines += [
            'for name, value in saved["state_dict"].items():',
            '    layer, _, last = name.rpartition(".")',
            "    setattr(model.get_submodule(layer), last, nn.Parameter(value.float()))",
        ]
    return lines


def _pyramid_lines(plan: Mapping[str, Any]) -> list[str]:
    body = 'timm.create_model(**build["body"])'
    if plan["library"] == "torchvision":
        body = 'IntermediateLayerGetter(get_model(**build["body"]), build["return_layers"])'
    extra = {
        "none": "",
        "pool": ", extra_blocks=LastLevelMaxPool()",
        "p6p7": ', extra_blocks=LastLevelP6P7(**build["p6p7"])',
    }[plan["extra"]]
    pyramid = f'FeaturePyramidNetwork(**build["fpn"]{extra})'
    family = plan["family"]
    anchors = 'anchor_generator=AnchorGenerator(**build["anchors"])'
    if family in ("faster_rcnn", "mask_rcnn"):
        parts = [
            f"rpn_{anchors}",
            'box_roi_pool=MultiScaleRoIAlign(**build["box_roi_pool"])',
            'box_head=TwoMLPHead(**build["box_head"])',
            'box_predictor=FastRCNNPredictor(**build["box_predictor"])',
        ]
        if family == "mask_rcnn":
            parts += [
                'mask_roi_pool=MultiScaleRoIAlign(**build["mask_roi_pool"])',
                'mask_head=MaskRCNNHeads(**build["mask_head"])',
                'mask_predictor=MaskRCNNPredictor(**build["mask_predictor"])',
            ]
    else:
        parts = [anchors] + ([f"head={_HEADS[family]}"] if "head" in plan else [])
    arguments = ", ".join(["backbone", *parts, '**build["detector"]'])
    return [
        f"body = {body}",
        f"backbone = nn.Sequential(OrderedDict(body=body, fpn={pyramid}))",
        'backbone.out_channels = build["fpn"]["out_channels"]',
        f"model = {_CLASSES[family]}({arguments})",
    ]
