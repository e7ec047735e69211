"""A transformers detector as a file that plain transformers can load, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drkd.adapters.transformers_detector import TransformersDetector
from drkd.adapters.transformers_library import build_model, check_family, import_transformers
from drkd.adapters.weights import fill
from drkd.contracts import DrkdError

LIBRARY = "transformers"

# What makes transformers look something up, run code from elsewhere or ask whether it may. A file is not trusted with
# it; the weights are the file's own, so nothing of it is missed.
_NOT_FROM_FILES = frozenset(
    {
        *("auto_map", "name_or_path", "attn_implementation", "experts_implementation", "quantization_config"),
        *("use_pretrained_backbone", "backbone_kwargs"),
    }
)
_TIMM_NAME = re.compile(r"[A-Za-z0-9_.]+")

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
        DrkdError: If transformers is not installed, does not know the configuration, the weights do not fit, or the
            configuration asks for more than networks that transformers and timm ship.
    """
    build, preprocessing = content["build"], content["preprocessing"]
    check_family(str(build["family"]), source=str(path))
    entries = _filter(build["config"], path)
    # At the top these would name a backbone that backbone_config describes.
    entries = {name: value for name, value in entries.items() if name not in ("model_type", "backbone")}
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


def _filter(config: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The entries of a file's configuration, and of those within it, that describe a network and do nothing else."""
    kept: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NOT_FROM_FILES or str(name).startswith("_"):
            continue
        kept[name] = _filter_part(value, path) if isinstance(value, Mapping) else value
    return kept


def _filter_part(part: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    known = import_transformers().models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES
    kind = part.get("model_type")
    if kind is not None and kind not in known:
        raise DrkdError(f"{path}: its configuration has a part of the type {kind!r}, which is no backbone.")
    name = part.get("backbone")
    if name is not None and not (isinstance(name, str) and _TIMM_NAME.fullmatch(name)):
        raise DrkdError(
            f"{path}: its configuration has the backbone {name!r}; expected the plain name of a timm network. drkd "
            "loads nothing but the file."
        )
    return _filter(part, path)
