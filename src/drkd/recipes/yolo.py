"""Carry YOLOs between drkd's files, which hold plain tensors, and Ultralytics' own, which are pickled modules."""

from __future__ import annotations

from pathlib import Path

from drkd.adapters.checkpoint import load_detector, read_preprocessing, save_student
from drkd.adapters.ultralytics import UltralyticsDetector, open_ultralytics
from drkd.adapters.ultralytics_checkpoint import save_ultralytics
from drkd.contracts import DrkdError
from drkd.recipes.loading import find_checkpoint


def import_yolo(checkpoint: Path, *, output: Path, trust_pickle: bool = False, image_size: int | None = None) -> Path:
    """Turn a checkpoint of Ultralytics' into a file of drkd's: tensors and plain values, no pickled code.

    Args:
        checkpoint: A checkpoint of Ultralytics', such as yolo11n.pt.
        output: The file to write.
        trust_pickle: Let the code in the checkpoint run, this once.
        image_size: Long side that images are resized to, px; what the checkpoint was trained at by default.

    Returns:
        The file.

    Raises:
        DrkdError: If the pickle is not trusted, the file cannot be loaded, or the output exists.
    """
    _must_be_new(output)
    detector, side = open_ultralytics(checkpoint, trust_pickle=trust_pickle)
    chosen = image_size or side
    divisor = int(max(level.stride for level in detector.spec.levels))
    settings = {"min_size": chosen, "max_size": chosen, "size_divisor": divisor}
    save_student(output, detector, builder=None, image_settings=settings)
    return output


def export_yolo(checkpoint: Path, *, output: Path, half: bool = False, image_size: int | None = None) -> Path:
    """Write a YOLO that drkd trained as a checkpoint of Ultralytics', which its ``YOLO(path)`` loads and exports.

    Args:
        checkpoint: A student.pt that holds a YOLO, or a run folder with one.
        output: The file to write, ending in .pt.
        half: Store weights in 16 bits, as Ultralytics does.
        image_size: Long side that Ultralytics resizes images to by default, px; that of the checkpoint by default.

    Returns:
        The file.

    Raises:
        DrkdError: If the checkpoint holds no YOLO, or the output exists.
    """
    _must_be_new(output)
    file = find_checkpoint(checkpoint)
    detector = load_detector(file)
    if not isinstance(detector, UltralyticsDetector):
        raise DrkdError(f"{file}: holds a {detector.spec.family}, not a YOLO, so Ultralytics cannot load it.")
    chosen = image_size or int(read_preprocessing(file)["max_size"])
    divisor = int(max(level.stride for level in detector.spec.levels))
    save_ultralytics(output, detector, image_size=-(-chosen // divisor) * divisor, half=half)
    return output


def _must_be_new(output: Path) -> None:
    if output.exists():
        raise DrkdError(f"{output} exists already. Remove it, or choose another --output.")
