"""What drkd's file of a YOLO says, how it is rebuilt from that, and how it becomes a checkpoint of Ultralytics' own."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drkd.adapters.ultralytics_detector import OPTIONS, UltralyticsDetector, model_names
from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.adapters.ultralytics_models import new_model
from drkd.adapters.weights import fill, read_checkpoint
from drkd.contracts import DrkdError

LIBRARY = "ultralytics"

_CODE = """\
import torch
from ultralytics.nn.tasks import DetectionModel

saved = torch.load("student.pt", map_location="cpu", weights_only=True)
model = DetectionModel(saved["build"]["yaml"], verbose=False)
model.names = dict(enumerate(saved["build"]["names"]))
model.load_state_dict(saved["state_dict"])
model.eval()
"""


def describe_ultralytics(detector: UltralyticsDetector, image_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that drkd's file holds of a YOLO, but its tensors.

    Raises:
        DrkdError: If the model's layers were fused, so that its description does not fit it any more.
    """
    model: Any = detector.model
    if model.is_fused():
        raise DrkdError("A YOLO that was fused for inference cannot be saved or trained: load it without fuse().")
    labels = sorted(zip(detector.label_ids, detector.spec.class_names, strict=True), key=lambda pair: pair[0])
    sizes = image_settings["min_size"]
    return {
        "build": {
            "library": LIBRARY,
            "yaml": {**model.yaml, "nc": model.model[-1].nc},
            "names": output_names(detector),
            "options": {name: getattr(detector, name) for name in OPTIONS},
        },
        "code": _CODE,
        "builder": {"class_path": "drkd.adapters.ultralytics.UltralyticsBuilder", "init_args": {}},
        "class_names": [name for _, name in labels],
        "label_ids": [label for label, _ in labels],
        "preprocessing": {
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            # Of several short sides, used in training, evaluation takes the largest.
            "min_size": int(sizes) if isinstance(sizes, int) else max(map(int, sizes)),
            "max_size": int(image_settings["max_size"]),
            "size_divisor": int(image_settings["size_divisor"]),
            "color": "RGB",
        },
    }


def rebuild_ultralytics(
    path: str | Path, content: Mapping[str, Any], *, class_names: Sequence[str], label_ids: Sequence[int]
) -> UltralyticsDetector:
    """The detector of a file of drkd's, in eval mode on the CPU.

    Raises:
        DrkdError: If Ultralytics is not installed, or the file describes no model that it can build.
    """
    build = _checked(path, content["build"])
    model = new_model(build["yaml"], build["names"], source=str(path))
    fill(model, content["state_dict"], path)
    options = {name: value for name, value in build["options"].items() if name in OPTIONS}
    return UltralyticsDetector(model, class_names, label_ids=label_ids, **options).eval()


def read_plain(path: str | Path) -> tuple[Mapping[str, Any], list[str], dict[str, Tensor]] | None:
    """Description, names of the outputs and tensors of a file of drkd's that holds a YOLO; None for other files.

    Raises:
        DrkdError: If the file cannot be read, or is a pickle of Ultralytics'.
    """
    content = read_checkpoint(path)
    build = content.get("build") if isinstance(content, Mapping) else None
    if not isinstance(build, Mapping) or build.get("library") != LIBRARY:
        return None
    return _checked(path, build)["yaml"], list(build["names"]), dict(content["state_dict"])


def _checked(path: str | Path, build: Mapping[str, Any]) -> Mapping[str, Any]:
    whole = {
        "yaml": isinstance(build.get("yaml"), Mapping),
        "names": isinstance(build.get("names"), list),
        "options": isinstance(build.get("options"), Mapping),
    }
    wrong = [name for name, found in whole.items() if not found]
    if wrong:
        raise DrkdError(f"{path}: this file of a YOLO lacks {', '.join(wrong)}, so drkd cannot rebuild the model.")
    return build


def output_names(detector: UltralyticsDetector) -> list[str]:
    """Names of the model's outputs in its own order: drkd's where it has one, else the model's."""
    names = model_names(detector.model)
    for name, label in zip(detector.spec.class_names, detector.label_ids, strict=True):
        if label >= 0:
            names[label] = name
    return names


def save_ultralytics(
    path: str | Path, detector: UltralyticsDetector, *, image_size: int = 640, half: bool = False
) -> None:
    """Write a checkpoint that Ultralytics' ``YOLO(path)`` loads, predicts with and exports.

    Like all of Ultralytics' checkpoints it is a pickled module, to be loaded by those who trust it, and refers to code
    under AGPL-3.0.

    Args:
        path: File to write, ending in .pt; replaced at once when all is written.
        detector: The detector; not changed.
        image_size: Long side of images that Ultralytics assumes where none is said, px.
        half: Store weights in 16 bits, as Ultralytics does; its detections then differ in the last digits.

    Raises:
        DrkdError: If the name does not end in .pt, or the model was fused for inference.
    """
    file = Path(path)
    if file.suffix != ".pt":
        raise DrkdError(f"{file}: Ultralytics loads checkpoints whose names end in .pt.")
    described = describe_ultralytics(detector, {"min_size": image_size, "max_size": image_size, "size_divisor": 32})
    build = described["build"]
    # A fresh module: the user's own may carry hooks, caches or another layout in memory.
    model: Any = new_model(build["yaml"], build["names"], source=str(file))
    model.load_state_dict({name: value.detach().cpu() for name, value in detector.model.state_dict().items()})
    arguments = {"task": "detect", "mode": "train", "imgsz": image_size, "model": build["yaml"].get("yaml_file")}
    model.args = {**ultralytics_module("utils").DEFAULT_CFG_DICT, **arguments}
    content = {
        "epoch": -1,
        "best_fitness": None,
        "ema": None,
        "optimizer": None,
        "model": (model.half() if half else model).eval().requires_grad_(False),
        "train_args": arguments,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": metadata.version("ultralytics"),
        "license": "AGPL-3.0 License (https://ultralytics.com/license)",
    }
    _write(file, content)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        torch.save(dict(content), aside)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
