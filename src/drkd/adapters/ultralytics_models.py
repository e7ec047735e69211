"""Builds Ultralytics' detection models from their YAML descriptions, of layers that Ultralytics itself has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from drkd.adapters.outer_model import describe_model
from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.contracts import DrkdError

_LAYERS = "ultralytics.nn.modules."
# Ultralytics evaluates this entry of a description as Python.
_ACTIVATION = re.compile(r"(?:torch\.)?nn\.[A-Za-z0-9]+\((?:inplace=(?:True|False))?\)")
# Builds a model of torchvision's, with weights from the network if told so.
_REFUSED = ("TorchVision",)


def read_description(name: str) -> dict[str, Any]:
    """A model's description by the name of a YAML file: one of Ultralytics' ("yolo11n.yaml") or a path of your own.

    Raises:
        DrkdError: If there is none.
    """
    if "://" in name or not name.lower().endswith((".yaml", ".yml")):
        raise DrkdError(f"model: expected the name or path of a YAML file, such as yolo11n.yaml, got {name!r}.")
    tasks = ultralytics_module("nn.tasks")
    try:
        description: dict[str, Any] = tasks.yaml_model_load(name)
    except (OSError, ValueError, TypeError) as error:
        raise DrkdError(
            f"model: there is no {name}. Expected a path, or a model that the installed Ultralytics describes: "
            "yolov8n.yaml, yolov9t.yaml, yolov10n.yaml, yolo11n.yaml, yolo12n.yaml, yolo26n.yaml; n, s, m, l or x "
            "says how large."
        ) from error
    # A path says nothing about the model, and does not belong into a file for others.
    return {**description, "yaml_file": Path(str(description.get("yaml_file", name))).name}


def new_model(description: Mapping[str, Any], names: Sequence[str], *, source: str) -> nn.Module:
    """A detection model with fresh weights, in training mode.

    Args:
        description: As Ultralytics' YAML files have it, with the scale.
        names: Names of the model's outputs.
        source: Where the description comes from, for messages.

    Raises:
        DrkdError: If the description is no detection model of Ultralytics' own layers.
    """
    check_layers(description, source=source)
    tasks = ultralytics_module("nn.tasks")
    try:
        model: Any = tasks.DetectionModel({**description, "nc": len(names)}, ch=3, verbose=False)
    except Exception as error:
        raise DrkdError(f"{source}: Ultralytics cannot build this model ({type(error).__name__}: {error}).") from error
    model.names = dict(enumerate(names))
    model.task = "detect"
    require_detection(model, source=source)
    built: nn.Module = model
    return built


def check_layers(description: Mapping[str, Any], *, source: str) -> None:
    """Refuse a description that names anything but layers: Ultralytics calls by name whatever it is told to.

    Raises:
        DrkdError: If there is such an entry.
    """
    tasks = ultralytics_module("nn.tasks")
    rows = [*description.get("backbone", ()), *description.get("head", ())]
    if not rows or any(not isinstance(row, list | tuple) or len(row) != 4 for row in rows):
        raise DrkdError(f"{source}: expected backbone and head as lists of [from, repeats, layer, arguments].")
    for _, _, layer, _ in rows:
        if not _is_layer(tasks, str(layer)):
            raise DrkdError(f"{source}: expected layers of Ultralytics or torch.nn, got {layer!r}.")
    activation = description.get("activation")
    if activation is not None and not _ACTIVATION.fullmatch(str(activation)):
        raise DrkdError(f"{source}: activation: expected the like of 'nn.SiLU()', got {activation!r}.")


def require_detection(model: nn.Module, *, source: str) -> Any:
    """The model's head, which must be one that detects boxes.

    Raises:
        DrkdError: If it is a model of another task, or of another library.
    """
    heads = ultralytics_module("nn.modules.head")
    tasks = ultralytics_module("nn.tasks")
    untyped: Any = model
    head = untyped.model[-1] if isinstance(untyped, tasks.DetectionModel) else None
    if type(head) not in (heads.Detect, heads.v10Detect):
        found = describe_model(model) if head is None else f"one with a {type(head).__name__} head"
        raise DrkdError(
            f"{source}: expected a detection model of Ultralytics' (YOLOv8, 11 and their kin), got {found}."
        )
    return head


def _is_layer(tasks: Any, name: str) -> bool:
    if name.startswith("nn."):
        found = getattr(nn, name[3:], None)
        return isinstance(found, type) and issubclass(found, nn.Module)
    found = getattr(tasks, name, None)
    return (
        isinstance(found, type)
        and issubclass(found, nn.Module)
        and found.__module__.startswith(_LAYERS)
        and name not in _REFUSED
    )
