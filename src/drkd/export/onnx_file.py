"""Writes a detector's graph as an ONNX file that says of itself how it is to be used."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from drkd.adapters import TorchvisionDetector
from drkd.contracts import Detector, DrkdError, Size
from drkd.export.graph import SIZE_MULTIPLE, build_graph
from drkd.export.operators import OPSET, translations

Dynamic = Literal["all", "batch", "none"]
FORMAT = "drkd-onnx-1"


@dataclass(frozen=True)
class ImageSize:
    """How images are made to fit a detector.

    Args:
        min_size: Short side that images are resized to, px.
        max_size: Limit of the long side, px.
        size_divisor: Batches are padded to multiples of it, px.
    """

    min_size: int
    max_size: int
    size_divisor: int

    @property
    def multiple(self) -> int:
        """Sides of the graph's input are multiples of it, px."""
        return math.lcm(self.size_divisor, SIZE_MULTIPLE)

    @property
    def fixed(self) -> Size:
        """Height and width, px, that hold every image in whichever orientation."""
        side = -(-self.max_size // self.multiple) * self.multiple
        return side, side


def require_onnx() -> None:
    """Say what to install.

    Raises:
        DrkdError: If onnx, onnxruntime or onnxscript is missing.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise DrkdError(f'drkd export needs {error.name}: pip install "drkd[export]".') from error
    del onnx, onnxruntime, onnxscript


def write_onnx(detector: Detector, path: Path, *, nms: bool, dynamic: Dynamic, image_size: ImageSize) -> None:
    """Write the detector's graph with ``torch.onnx.export(dynamo=True)``.

    That exporter handles all three families with symbolic batch and image sizes. The older one, based on TorchScript,
    is not used: it unrolls torchvision's loop over images, so that the batch would be fixed.

    Args:
        detector: RetinaNet, FCOS or Faster R-CNN.
        path: The file.
        nms: Whether suppression is part of the graph.
        dynamic: Which sizes the graph leaves open: "all", the "batch", or "none".
        image_size: Of the images; written into the file, and the size of a fixed graph.

    Raises:
        DrkdError: If the detector cannot be exported.
    """
    graph = build_graph(detector, nms=nms)
    multiple = image_size.multiple
    height, width = _example_size(detector, multiple) if dynamic == "all" else image_size.fixed
    # A batch of one would be taken for a constant.
    count = 1 if dynamic == "none" else 2
    example = torch.rand(count, 3, height, width), torch.tensor([[height, width]] * count)
    names = ["boxes", "scores", "labels"] if nms else ["boxes", "scores"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                example,
                dynamo=True,
                dynamic_shapes=_open_sizes(dynamic, multiple),
                input_names=["images", "sizes"],
                output_names=names,
                opset_version=OPSET,
                custom_translation_table=translations(),
                verbose=False,
            )
    except DrkdError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[-300:]
        raise DrkdError(
            f"PyTorch cannot write this detector as ONNX with open sizes '{dynamic}' ({type(error).__name__}: "
            f"{reason}). Try --dynamic=none, or another backbone."
        ) from error
    if program is None:
        raise DrkdError("PyTorch's exporter returned nothing.")
    program.model.metadata_props.update(describe(detector, nms=nms, dynamic=dynamic, image_size=image_size))
    program.save(str(path))


def _example_size(detector: Detector, multiple: int) -> Size:
    """Large enough for two cells of the coarsest level each way: one would be traced as a size that never changes."""
    cells = math.ceil(2 * max(level.stride for level in detector.spec.levels) / multiple)
    return cells * multiple, (cells + 1) * multiple


def describe(detector: Detector, *, nms: bool, dynamic: Dynamic, image_size: ImageSize) -> dict[str, str]:
    """What the file says of itself (ONNX ``metadata_props``): classes, preprocessing, meaning of the outputs."""
    if not isinstance(detector, TorchvisionDetector):
        raise DrkdError(f"expected a torchvision detector, got {type(detector).__name__}")
    model: Any = detector.model
    end = model.roi_heads if detector.spec.family == "faster_rcnn" else model
    preprocessing: Mapping[str, Any] = {
        "color": "RGB",
        "range": [0.0, 1.0],
        "min_size": image_size.min_size,
        "max_size": image_size.max_size,
        "size_multiple": image_size.multiple,
        "fixed_size": None if dynamic == "all" else list(image_size.fixed),
        "resize": "bilinear, antialiased, keeping the ratio",
        "pad": "zeros, right and bottom",
        "normalisation": "inside the graph",
        "mean": [float(value) for value in model.transform.image_mean],
        "std": [float(value) for value in model.transform.image_std],
    }
    postprocessing = {
        "nms": "inside" if nms else "outside",
        "score_threshold": float(end.score_thresh),
        "nms_threshold": float(end.nms_thresh),
        "detections_per_image": int(end.detections_per_img),
        "boxes": "xyxy, px of the input image; divide by the resize's scale",
    }
    return {
        "format": FORMAT,
        "family": detector.spec.family,
        "class_names": json.dumps(list(detector.spec.class_names)),
        "preprocessing": json.dumps(dict(preprocessing)),
        "postprocessing": json.dumps(postprocessing),
    }


def _open_sizes(dynamic: Dynamic, multiple: int) -> Any:
    from torch.export import Dim

    if dynamic == "none":
        return None
    batch = Dim("batch")
    images: dict[int, Any] = {0: batch}
    if dynamic == "all":
        images.update({2: multiple * Dim("height"), 3: multiple * Dim("width")})
    return {"images": images, "sizes": {0: batch}}
