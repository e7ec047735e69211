"""A small detector of each builder in `drkd.adapters`: a new builder needs an entry here, and its tests are there.

The key is the class's import path, so that an optional library is imported only where its case runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from drkd.contracts import DetectorBuilder

CLASSES = ("cat", "dog", "cup")
SETTINGS = {"min_size": 64, "max_size": 96, "size_divisor": 32}


@dataclass(frozen=True)
class Example:
    """One builder.

    Args:
        arguments: Of the builder, such that the detector is small and detects something untrained (threshold 0); or a
            function of an empty folder that returns them, for what reads files.
        needs: Optional package without which the case is skipped.
        learning_rate: Of Adam, with which the task losses fall in 20 steps.
        load: More arguments of `load_detector`, and of `SavedDetectorBuilder`, for its saved file.
    """

    arguments: dict[str, Any] | Callable[[Path], dict[str, Any]]
    needs: str | None = None
    learning_rate: float = 2e-3
    load: dict[str, Any] | None = None


def make_builder(path: str, folder: Path) -> DetectorBuilder:
    """Import a builder and give it the example's arguments."""
    module, _, name = path.rpartition(".")
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


_TORCHVISION = "drkd.adapters.torchvision"
_SMALL = {"backbone": "resnet18", "width": 0.25, "score_threshold": 0.0}
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
        }
    ),
    "drkd.adapters.zoo.ZooBuilder": Example(_zoo, learning_rate=5e-4),
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
