"""Finds a trained detector where the user says it is, with the image size that it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from drkd.adapters.checkpoint import load_detector, read_category_ids, read_preprocessing
from drkd.adapters.ultralytics import open_ultralytics
from drkd.adapters.ultralytics_files import is_ultralytics_file
from drkd.contracts import Detector, DetectorBuilder, DrkdError

_DEFAULT_MIN_SIZE, _DEFAULT_MAX_SIZE, _DEFAULT_DIVISOR = 800, 1333, 32


@dataclass(frozen=True)
class LoadedDetector:
    """A detector ready to detect.

    Args:
        detector: In eval mode, on the CPU.
        min_size: Short side that images are resized to, px.
        max_size: Limit of the long side, px.
        size_divisor: Batches are padded to multiples of it, px.
        category_ids: Of each class in its order, the id that it has in the data that the detector was trained on; 1..K
            where that is not known.
    """

    detector: Detector
    min_size: int
    max_size: int
    size_divisor: int
    category_ids: tuple[int, ...] = ()


def find_checkpoint(path: Path) -> Path:
    """The detector's file: the path itself, or ``student.pt`` of a run folder; "drkd:<name>" names one that ships.

    Raises:
        DrkdError: If there is none.
    """
    if str(path).startswith("drkd:"):
        return path
    if path.is_dir():
        student = path / "student.pt"
        if not student.is_file():
            what = "the run has not finished" if (path / "run.json").is_file() else "it is no run folder"
            raise DrkdError(f"{path}: this folder holds no student.pt; {what}. Expected a run folder or a student.pt.")
        return student
    if not path.is_file():
        raise DrkdError(f"{path}: there is no such file. Expected a student.pt or a run folder that holds one.")
    return path


def open_detector(
    checkpoint: Path | None,
    *,
    builder: DetectorBuilder | None = None,
    class_names: Sequence[str] = (),
    min_size: int | None = None,
    max_size: int | None = None,
    trust_pickle: bool = False,
    trust_code: bool = False,
) -> LoadedDetector:
    """Load a checkpoint, or build a detector that is described otherwise.

    Args:
        checkpoint: A ``student.pt`` or a run folder.
        builder: Builds the detector where there is no such checkpoint.
        class_names: Classes for the builder.
        min_size: Short side, px; the checkpoint's own by default, 800 for a builder.
        max_size: Limit of the long side, px; the checkpoint's own by default, 1333 for a builder. Raised with
            ``min_size`` in proportion where only that is given.
        trust_pickle: Let the code in a checkpoint of Ultralytics' run.
        trust_code: Call the functions that a checkpoint with a detector of the user's own names.

    Raises:
        DrkdError: If both or neither of checkpoint and builder are given, or the checkpoint cannot be used.
    """
    if (checkpoint is None) == (builder is None):
        raise DrkdError("Expected either a checkpoint (student.pt or a run folder) or --detector, and not both.")
    if builder is not None:
        detector = builder.build(class_names).eval()
        own = (_DEFAULT_MIN_SIZE, _DEFAULT_MAX_SIZE, _DEFAULT_DIVISOR)
        known: dict[str, int] = {}
    else:
        file = find_checkpoint(Path(str(checkpoint)))
        if trust_pickle and is_ultralytics_file(file):
            detector, side = open_ultralytics(file, trust_pickle=True)
            known = {}
            own = (side, side, int(max(level.stride for level in detector.spec.levels)))
        else:
            detector = load_detector(file, trust_code=trust_code)
            settings = read_preprocessing(file)
            known = read_category_ids(file)
            own = (int(settings["min_size"]), int(settings["max_size"]), int(settings["size_divisor"]))
    short = min_size or own[0]
    long = max_size or (own[1] if min_size is None else round(own[1] * short / own[0]))
    if short < 1 or long < short:
        raise DrkdError(f"min_size and max_size: expected 1 <= min_size <= max_size, got {short} and {long}.")
    names = detector.spec.class_names
    ids = tuple(known[name] for name in names) if set(names) <= set(known) else tuple(range(1, len(names) + 1))
    return LoadedDetector(detector, short, long, own[2], ids)


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" takes a GPU where there is one.

    Raises:
        DrkdError: If the name is none, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DrkdError(f"device: {name!r} cannot be used ({str(error).splitlines()[0]}). Try auto or cpu.") from error
    return device
