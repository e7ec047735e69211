"""A small detector of each builder in `drkd.adapters`: a new builder needs an entry here, and its tests are there.

The key is the class's import path, so that an optional library is imported only where its case runs; after a sign #
it says which of several examples of one builder it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from tests.adapters import mmdetection_states as states

from drkd.contracts import DetectorBuilder

CLASSES = ("cat", "dog", "cup")
SETTINGS = {"min_size": 64, "max_size": 96, "size_divisor": 32}
Ability = Literal["losses", "detections", "loading"]


@dataclass(frozen=True)
class Example:
    """One builder.

    Args:
        arguments: Of the builder, such that the detector is small and detects something untrained (threshold 0); or a
            function of an empty folder that returns them, for what reads files.
        needs: Optional package without which the case is skipped.
        learning_rate: Of Adam, with which the task losses fall in these steps.
        steps: How many; more for a detector whose losses rise at first, or where 20 steps depend on the CPU's rounding.
        images: How many images these steps are on; fewer for a detector that is large whatever its arguments.
        load: More arguments of `load_detector`, and of `SavedDetectorBuilder`, for its saved file.
        lacks: What a detector of this builder cannot do by its nature, and why: no losses (it only teaches), no
            detections (it has no heads), no loading of a file that drkd saved. The cases that need it are skipped with
            the reason, and one case checks that it is refused in so many words.
        square: It resizes every batch to a square, so that its strides hold for batches that are square themselves.
    """

    arguments: dict[str, Any] | Callable[[Path], dict[str, Any]]
    needs: str | None = None
    learning_rate: float = 2e-3
    steps: int = 20
    images: int = 8
    load: dict[str, Any] | None = None
    lacks: dict[Ability, str] = field(default_factory=dict)
    square: bool = False


def make_builder(path: str, folder: Path) -> DetectorBuilder:
    """Import a builder and give it the example's arguments."""
    module, _, name = path.partition("#")[0].rpartition(".")
    arguments = EXAMPLES[path].arguments
    return getattr(import_module(module), name)(**(arguments(folder) if callable(arguments) else arguments))


def _saved(folder: Path) -> dict[str, Any]:
    from drkd.adapters import save_student

    builder = make_builder(f"{_TORCHVISION}.RetinaNetBuilder", folder)
    torch.manual_seed(5)
    save_student(folder / "saved.pt", builder.build(CLASSES), builder=builder, image_settings=SETTINGS)
    return {"path": str(folder / "saved.pt")}


def _zoo(folder: Path) -> dict[str, Any]:
    from drkd.adapters import ZooBuilder

    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.manual_seed(5)
    torch.save(ZooBuilder(name=name, head="new").build(CLASSES).model.state_dict(), folder / "zoo.pth")
    return {"name": name, "head": "new", "weights": str(folder / "zoo.pth")}


def _published(folder: Path) -> dict[str, Any]:
    """A folder as the Hub has it, of another class."""
    torch.manual_seed(5)
    model = make_builder("drkd.adapters.transformers.DetrBuilder", folder).build(("bird",)).model
    model.save_pretrained(folder / "published")  # type: ignore[operator]
    return {"name": str(folder / "published"), "head": "new"}


def _mmdetection(folder: Path) -> dict[str, Any]:
    """A checkpoint of a RetinaNet on a small ResNeXt, as MMDetection names its tensors."""
    names = states.backbone_names((1, 1, 1, 1), groups=8, base_width=4)
    names |= states.neck_names((512, 1024, 2048), channels=32, extra=(2048, 32))
    state = states.draw_state(names | states.retinanet_names(len(CLASSES), channels=32))
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    torch.save({"meta": {"CLASSES": CLASSES}, "state_dict": state}, folder / "mmdetection.pth")
    return {"path": str(folder / "mmdetection.pth")}


_TORCHVISION = "drkd.adapters.torchvision"
_SMALL = {"backbone": "resnet18", "width": 0.25, "score_threshold": 0.0}
_NOT_LOADED = "a teacher stays in MMDetection's file; what drkd saves is a student"
EXAMPLES: dict[str, Example] = {
    f"{_TORCHVISION}.RetinaNetBuilder": Example(
        {**_SMALL, "fpn_channels": 16, "extra": "none", "anchor_sizes": ((12, 16), (24, 32), (48, 64))}
    ),
    f"{_TORCHVISION}.FCOSBuilder": Example(
        {**_SMALL, "fpn_channels": 64, "extra": "none", "anchor_sizes": ((8,), (16,), (32,)), "num_convs": 1}
    ),
    f"{_TORCHVISION}.FasterRCNNBuilder": Example(
        {
            **_SMALL,
            "fpn_channels": 16,
            "representation_size": 32,
            "anchor_sizes": ((8,), (16,), (32,), (64,), (96,)),
            "rpn_post_nms_train": 50,
            "rpn_post_nms_test": 50,
            "roi_batch_size": 32,
        }
    ),
    "drkd.adapters.mask_rcnn.MaskRCNNBuilder": Example(
        {
            **_SMALL,
            "width": 0.125,
            "fpn_channels": 16,
            "representation_size": 16,
            "anchor_sizes": ((8,), (16,), (32,), (64,), (96,)),
            "rpn_post_nms_train": 50,
            "rpn_post_nms_test": 50,
            "roi_batch_size": 32,
            "mask_layers": (8,),
            "mask_channels": 8,
        }
    ),
    "drkd.adapters.ssd.SSD300Builder": Example(
        {"width": 0.0625, "image_std": (0.25, 0.25, 0.25), "score_threshold": 0.0}, images=4, square=True
    ),
    "drkd.adapters.ssd.SSDLiteBuilder": Example({"width": 0.25, "size": 96, "score_threshold": 0.0}, square=True),
    "drkd.adapters.transformers.DetrBuilder": Example(
        {
            "backbone": "timm/resnet10t",
            "config": {
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_hidden_dim": 32,
                "encoder_ffn_dim": 32,
                "decoder_in_channels": [32, 32, 32],
                "decoder_layers": 2,
                "decoder_ffn_dim": 32,
                "num_queries": 20,
                "num_denoising": 5,
            },
        },
        needs="transformers",
        learning_rate=3e-3,
        steps=60,
        images=4,
    ),
    "drkd.adapters.transformers.PretrainedDetrBuilder": Example(_published, needs="transformers"),
    "drkd.adapters.ultralytics.UltralyticsBuilder": Example(
        {"model": "yolo11n.yaml", "score_threshold": 0.0}, needs="ultralytics", learning_rate=1e-2, steps=60, images=4
    ),
    "drkd.adapters.mmdetection.MMDetectionBuilder": Example(_mmdetection, lacks={"loading": _NOT_LOADED}),
    "drkd.adapters.mmdetection.MMDetectionBuilder#features": Example(
        lambda folder: {**_mmdetection(folder), "part": "features"},
        lacks={
            "losses": "part: features leaves the heads in the file",
            "detections": "part: features leaves the heads in the file",
            "loading": _NOT_LOADED,
        },
    ),
    "drkd.adapters.zoo.ZooBuilder": Example(_zoo, learning_rate=5e-4, images=2),
    "drkd.adapters.checkpoint.SavedDetectorBuilder": Example(_saved),
    "drkd.adapters.hooked_builder.HookedBuilder": Example(
        {
            "factory": "tests.adapters.point_adapter:build",
            "losses": "tests.adapters.point_adapter:losses",
            "detections": "tests.adapters.point_adapter:detections",
            "layers": ("neck",),
        },
        learning_rate=1e-2,
        load={"trust_code": True},
    ),
}
