"""A transformers detector as a file that plain transformers can load, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drkd.adapters.transformers_detector import TransformersDetector
from drkd.adapters.transformers_library import build_model
from drkd.adapters.weights import fill

LIBRARY = "transformers"

_CODE = """\
import torch
from transformers import AutoConfig, AutoModelForObjectDetection

saved = torch.load("student.pt", map_location="cpu", weights_only=True)
model = AutoModelForObjectDetection.from_config(AutoConfig.for_model(**saved["build"]["config"]))
model.load_state_dict(saved["state_dict"])
model.eval()
"""


def describe_transformers(detector: TransformersDetector, image_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the weights: configuration, code, classes and preprocessing, as plain values.

    The configuration alone rebuilds the model, whoever built it first.

    Args:
        detector: The detector.
        image_settings: "min_size", "max_size" and "size_divisor" of the evaluation images, px.
    """
    model: Any = detector.model
    config = model.config.to_dict()
    sizes = image_settings["min_size"]
    # In the order of the model's own labels, so that whoever loads the plain model can number them.
    labels = sorted(zip(detector.label_ids, detector.spec.class_names, strict=True), key=lambda pair: pair[0])
    return {
        "build": {
            "library": LIBRARY,
            "family": detector.spec.family,
            "config": {**config, "model_type": detector.spec.family},
            "detection": {
                "score_threshold": detector.score_threshold,
                "detections_per_image": detector.detections_per_image,
            },
        },
        "code": _CODE,
        "builder": {"class_path": "transformers.AutoModelForObjectDetection", "init_args": {}},
        "class_names": [name for _, name in labels],
        "label_ids": [label for label, _ in labels],
        "preprocessing": {
            "mean": detector.image_mean,
            "std": detector.image_std,
            "min_size": int(sizes) if isinstance(sizes, int) else max(map(int, sizes)),
            "max_size": int(image_settings["max_size"]),
            "size_divisor": int(image_settings["size_divisor"]),
            "color": "RGB",
        },
    }


def rebuild_transformers(
    path: str | Path, content: Mapping[str, Any], *, class_names: Sequence[str], label_ids: Sequence[int]
) -> TransformersDetector:
    """Build the detector that a file describes and fill it; in eval mode on the CPU.

    Raises:
        DrkdError: If transformers is not installed, does not know the configuration, or the weights do not fit.
    """
    build, preprocessing = content["build"], content["preprocessing"]
    entries = {name: value for name, value in build["config"].items() if name != "model_type"}
    version = build["config"].get("transformers_version", "unknown")
    model = build_model(str(build["family"]), entries, source=f"{path} (saved with transformers {version})")
    fill(model, content["state_dict"], path)
    return TransformersDetector(
        model,
        class_names,
        label_ids=label_ids,
        image_mean=preprocessing["mean"],
        image_std=preprocessing["std"],
        **build["detection"],
    ).eval()
