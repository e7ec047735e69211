"""Saving a detector as a file that its own library can load without drkd, and loading it back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drkd.adapters.argument_types import find_mistyped, shown
from drkd.adapters.damage import explained_by_file
from drkd.adapters.hooked_builder import LIBRARY as HOOKS
from drkd.adapters.hooked_builder import describe_hooked, rebuild_hooked
from drkd.adapters.hooks import HookedDetector
from drkd.adapters.mask_rcnn import MaskRCNNBuilder
from drkd.adapters.plain_code import write_plain_code
from drkd.adapters.ssd import SSD300Builder, SSDLiteBuilder
from drkd.adapters.torchvision import FasterRCNNBuilder, FCOSBuilder, RetinaNetBuilder, ZooBuilder
from drkd.adapters.torchvision_detector import TorchvisionDetector
from drkd.adapters.transformers_checkpoint import LIBRARY as TRANSFORMERS
from drkd.adapters.transformers_checkpoint import describe_transformers, rebuild_transformers
from drkd.adapters.transformers_detector import TransformersDetector
from drkd.adapters.ultralytics_checkpoint import LIBRARY as ULTRALYTICS
from drkd.adapters.ultralytics_checkpoint import describe_ultralytics, rebuild_ultralytics
from drkd.adapters.ultralytics_detector import UltralyticsDetector
from drkd.adapters.weights import fill, load_state, read_checkpoint
from drkd.adapters.zoo import freeze_zoo
from drkd.contracts import LARGEST_SIDE, Detector, DetectorBuilder, DrkdError

__all__ = ["FORMAT", "SavedDetectorBuilder", "load_detector", "load_state", "save_student"]

FORMAT = "drkd-student-1"
_Builder = RetinaNetBuilder | FasterRCNNBuilder | FCOSBuilder | SSD300Builder | SSDLiteBuilder | ZooBuilder
# The only classes that a file may name: a checkpoint must not be able to run code of its choice.
_BUILDERS: dict[str, type[_Builder]] = {
    f"drkd.adapters.torchvision.{builder.__name__}": builder
    for builder in (RetinaNetBuilder, FasterRCNNBuilder, FCOSBuilder, ZooBuilder)
}
_BUILDERS |= {
    f"drkd.adapters.{builder.__name__}": builder for builder in (MaskRCNNBuilder, SSD300Builder, SSDLiteBuilder)
}
# Arguments of builders that say what training began with.
_STARTS = ("weights", "backbone_weights", "batch_norm_eps")
_KEYS = ("state_dict", "build", "builder", "class_names", "label_ids", "preprocessing")


@dataclass(frozen=True)
class SavedDetectorBuilder(DetectorBuilder):
    """A detector from a file that drkd saved, teacher or student.

    Args:
        path: The file, as ``save_student`` wrote it, or ``drkd:<name>`` for one that ships with the package.
        trust_code: Call the functions that a file with a detector of your own names.
        random_weights: Keep the architecture and leave the file's weights out, as a control: a teacher that knows
            nothing. The same random weights each time. For torchvision's detectors. A recipe's ``inherit`` still takes
            the file's, so that the student's start is not changed with the teacher.
    """

    path: str
    trust_code: bool = False
    random_weights: bool = False

    def own_class_names(self) -> tuple[str, ...]:
        """The file's classes."""
        return tuple(_read(self.path)["class_names"])

    def build(self, class_names: Sequence[str]) -> Detector:
        """Load the detector; its classes must be these, in any order.

        Raises:
            DrkdError: If the file cannot be read, its classes differ, or random weights are asked for of a detector
                that is not torchvision's.
        """
        if not self.random_weights:
            return load_detector(self.path, class_names=class_names, trust_code=self.trust_code)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(2302)  # no seed that a run is likely to have: its student would start as this teacher
            return load_detector(self.path, class_names=class_names, trust_code=self.trust_code, random_weights=True)


def save_student(
    path: str | Path,
    detector: Detector,
    *,
    builder: DetectorBuilder | None,
    image_settings: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write a detector alone: weights under its plain names, how to rebuild it, classes and preprocessing.

    The file holds tensors and plain values only, so ``torch.load(path, weights_only=True)`` reads it, and its entry
    "code" is the source that turns it into a plain model of its library without drkd.

    Args:
        path: File to write, replaced at once when all is written.
        detector: The detector.
        builder: What built it; None for a model of your own, which then only ``load_state`` can fill again.
        image_settings: "min_size", "max_size" and "size_divisor" of the evaluation images, px.
        extra: More plain values to keep.
        half: Store floating-point tensors in 16 bits (half the size; loading gives float32 again).

    Raises:
        ValueError: If the detector is of no library that is known here, or ``image_settings`` lacks an entry.
    """
    if not isinstance(detector, TorchvisionDetector | TransformersDetector | UltralyticsDetector | HookedDetector):
        raise ValueError(
            "expected a TorchvisionDetector, TransformersDetector, UltralyticsDetector or HookedDetector, got "
            f"{type(detector).__name__}"
        )
    file = Path(path)
    absent = {"min_size", "max_size", "size_divisor"} - set(image_settings)
    if absent:
        raise ValueError(f"image_settings: expected min_size, max_size and size_divisor, {sorted(absent)} are missing")
    if isinstance(detector, TransformersDetector):
        content = {"format": FORMAT, **_plain(describe_transformers(detector, image_settings))}
    elif isinstance(detector, UltralyticsDetector):
        content = {"format": FORMAT, **_plain(describe_ultralytics(detector, image_settings))}
    elif isinstance(detector, HookedDetector):
        content = {"format": FORMAT, **_plain(describe_hooked(detector, image_settings))}
    else:
        content = _describe(detector, builder, image_settings)
    content["state_dict"] = {
        name: _store(tensor.detach().cpu(), half=half) for name, tensor in detector.model.state_dict().items()
    }
    content["extra"] = _plain(dict(extra or {}))
    _write(file, content)


@explained_by_file
def load_detector(
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    trust_code: bool = False,
    random_weights: bool = False,
) -> Detector:
    """Load what ``save_student`` wrote, in eval mode on the CPU.

    Args:
        path: The file, or ``drkd:<name>`` for one that ships with the package.
        class_names: The classes that are expected, in the wanted order; None takes the file's.
        trust_code: Call the functions that a file with a detector of your own names (see `HookedBuilder`).
        random_weights: See `SavedDetectorBuilder`.

    Raises:
        DrkdError: If the file cannot be read, was not written by drkd, or holds other classes, or random weights are
            asked for of a detector that is not torchvision's.
    """
    content = _read(path)
    library = content["build"].get("library")
    if random_weights and library in (TRANSFORMERS, ULTRALYTICS, HOOKS):
        raise DrkdError(f"{path}: random_weights is for torchvision's detectors, and this one is of {library}.")
    saved_names = list(content["class_names"])
    if class_names is not None:
        _compare_classes(path, saved_names, class_names)
    names = saved_names if class_names is None else list(class_names)
    label_ids = [content["label_ids"][saved_names.index(name)] for name in names]
    if library == TRANSFORMERS:
        return rebuild_transformers(path, content, class_names=names, label_ids=label_ids)
    if library == ULTRALYTICS:
        return rebuild_ultralytics(path, content, class_names=names, label_ids=label_ids)
    if library == HOOKS:
        return rebuild_hooked(path, content, class_names=names, label_ids=label_ids, trusted=trust_code)
    builder = _read_builder(path, content["builder"])
    detector = builder.build(saved_names)
    build, settings = content["build"], content["preprocessing"]
    model: Any = detector.model
    if "batch_norm_eps" in build:
        freeze_zoo(model, build["batch_norm_eps"])
    if not random_weights:
        fill(model, content["state_dict"], path)
    if "size" not in build:
        model.transform.min_size, model.transform.max_size = (settings["min_size"],), settings["max_size"]
        model.transform.size_divisible = settings["size_divisor"]
    return TorchvisionDetector(model, names, label_ids=label_ids, plan=build).eval()


@explained_by_file
def read_preprocessing(path: str | Path) -> dict[str, Any]:
    """Mean, std, min_size, max_size, size_divisor and colour order of a saved detector.

    A ``min_size`` above ``max_size``, in files from before both were checked, is the latter: the images are the same.

    Raises:
        DrkdError: If the file cannot be read or was not written by drkd.
    """
    found = dict(_read(path)["preprocessing"])
    if found["min_size"] > found["max_size"]:
        found["min_size"] = found["max_size"]
    return found


def read_category_ids(path: str | Path) -> dict[str, int]:
    """The category id of each class in the data that a saved detector was trained on; empty where the file has none.

    Raises:
        DrkdError: If the file cannot be read or was not written by drkd.
    """
    extra = _read(path).get("extra", {})
    ids = extra.get("category_ids", {}) if isinstance(extra, Mapping) else None
    if not isinstance(ids, Mapping) or not all(type(number) is int for number in ids.values()):
        raise DrkdError(f"{path}: extra.category_ids: expected a number for each class, got {shown(ids)}.")
    return {str(name): number for name, number in ids.items()}


def _describe(
    detector: TorchvisionDetector, builder: DetectorBuilder | None, image_settings: Mapping[str, Any]
) -> dict[str, Any]:
    sizes = image_settings["min_size"]
    # Of several short sides, used in training, evaluation takes the largest.
    min_size = int(sizes) if isinstance(sizes, int) else max(map(int, sizes))
    max_size, divisor = int(image_settings["max_size"]), int(image_settings["size_divisor"])
    transform: Any = detector.model.transform
    # In the order of the model's own labels, so that whoever loads the plain model can number them.
    labels = sorted(zip(detector.label_ids, detector.spec.class_names, strict=True), key=lambda pair: pair[0])
    build = None
    if detector.plan is not None:
        build = _plain(detector.plan)
        # A model of one size resizes to it whatever comes.
        if "size" not in build:
            build["detector"].update({"min_size": min_size, "max_size": max_size, "size_divisible": divisor})
    return {
        "format": FORMAT,
        "build": build,
        "code": None if build is None else write_plain_code(build),
        "builder": None if builder is None else _describe_builder(builder, detector),
        "class_names": [name for _, name in labels],
        "label_ids": [label for label, _ in labels],
        "preprocessing": {
            "mean": [float(value) for value in transform.image_mean],
            "std": [float(value) for value in transform.image_std],
            "min_size": min_size,
            "max_size": max_size,
            "size_divisor": divisor,
            "color": "RGB",
        },
    }


def _describe_builder(builder: DetectorBuilder, detector: TorchvisionDetector) -> dict[str, Any] | None:
    """The builder as plain values; None for a class of the user's own, whose weights are saved all the same."""
    if isinstance(builder, SavedDetectorBuilder):
        return dict(_read(builder.path)["builder"])
    class_path = next((path for path, known in _BUILDERS.items() if known is type(builder)), None)
    if not isinstance(builder, _Builder) or class_path is None:
        return None
    arguments = dataclasses.asdict(builder)
    # The file's own weights replace those that training began with.
    arguments.update({name: None for name in _STARTS if name in arguments})
    if isinstance(builder, ZooBuilder) and builder.head == "new":
        # The weights may have decided it.
        arguments["first_label"] = min(detector.label_ids)
    for name in {"image_mean", "image_std"} & set(arguments):
        # So may they have decided these.
        arguments[name] = [float(value) for value in getattr(detector.model.transform, name)]
    return {"class_path": class_path, "init_args": _plain(arguments)}


def _read(path: str | Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT or any(key not in content for key in _KEYS):
        raise DrkdError(
            f"{path}: not a detector saved by drkd (expected format {FORMAT!r}). A bare state dict needs a builder: "
            f"give it as `weights` of {', '.join(builder.__name__ for builder in _BUILDERS.values())}."
        )
    if content["builder"] is None or content["build"] is None:
        raise DrkdError(
            f"{path}: holds a model of your own, which drkd cannot rebuild: build it, then fill it with "
            "drkd.adapters.load_state(model, path) and wrap it."
        )
    _check_content(path, content)
    return dict(content)


def _check_content(path: str | Path, content: Mapping[str, Any]) -> None:
    """Refuse a file whose plain values are of kinds that fail later, or far from here."""
    names, labels, settings = content["class_names"], content["label_ids"], content["preprocessing"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DrkdError(f"{path}: class_names: expected a list of names, got {shown(names)}.")
    if not isinstance(labels, list) or len(labels) != len(names) or not all(type(label) is int for label in labels):
        raise DrkdError(f"{path}: label_ids: expected a number for each of {len(names)} classes, got {shown(labels)}.")
    if not isinstance(settings, Mapping):
        raise DrkdError(f"{path}: preprocessing: expected keys with values, got {shown(settings)}.")
    for field in ("min_size", "max_size", "size_divisor"):
        value = settings.get(field)
        if type(value) is not int or not 1 <= value <= LARGEST_SIDE:
            raise DrkdError(f"{path}: preprocessing.{field}: expected px from 1 to {LARGEST_SIDE}, got {shown(value)}.")
    for field in ("build", "builder"):
        if not isinstance(content[field], Mapping):
            raise DrkdError(f"{path}: {field}: expected keys with values, got {shown(content[field])}.")


def _read_builder(path: str | Path, entry: Mapping[str, Any]) -> _Builder:
    class_path = entry.get("class_path")
    builder = _BUILDERS.get(str(class_path))
    if builder is None:
        raise DrkdError(f"{path}: asks for builder {class_path!r}; expected one of {', '.join(_BUILDERS)}.")
    try:
        arguments = {name: _tuples(value) for name, value in entry["init_args"].items()}
        # The file's own weights are what it is for: it has no business with other files, or with a network.
        arguments.update({name: None for name in _STARTS if name in arguments})
        if (wrong := find_mistyped(builder, arguments)) is not None:
            raise DrkdError(f"{path}: builder.init_args.{wrong}.")
        return builder(**arguments)
    except (TypeError, KeyError, AttributeError) as error:
        raise DrkdError(f"{path}: its builder does not fit this version of drkd ({error}).") from error


def _compare_classes(path: str | Path, saved: Sequence[str], wanted: Sequence[str]) -> None:
    if sorted(saved) != sorted(wanted):
        raise DrkdError(
            f"{path}: this detector knows {len(saved)} classes ({_shorten(saved)}), but {len(wanted)} are wanted "
            f"({_shorten(wanted)}). Of a teacher, class_map in the recipe (drkd init: --class_map) joins classes that "
            "differ."
        )


def _shorten(names: Sequence[str], limit: int = 20) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _store(tensor: Tensor, *, half: bool) -> Tensor:
    if half and tensor.dtype == torch.float32:
        short = tensor.to(torch.float16)
        # A value too large for 16 bits (a running variance, say) keeps its tensor whole.
        return short if bool(torch.isfinite(short).all()) else tensor.clone()
    return tensor.clone()


def _plain(value: Any) -> Any:
    """Lists and dicts of what ``weights_only`` loading and YAML both accept."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"expected plain values (numbers, strings, lists, dicts, tensors), got {type(value).__name__}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as stream:
            torch.save(dict(content), stream)
            stream.flush()
            # On the disk before the rename: a power cut leaves the old file or the new one.
            os.fsync(stream.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
