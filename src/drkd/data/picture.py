"""Draws annotated samples of a data set as one picture."""

from __future__ import annotations

import colorsys
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.v2 import functional

from drkd.contracts import DrkdError, ImageRecord
from drkd.data.image import decode_image
from drkd.data.split import DatasetSplit

DEFAULT_PICTURE = "drkd-samples.png"
# Text in the PNG, by which a later check knows its own picture and may replace it.
_MARK = ("Software", "drkd data check")


def draw_samples(
    splits: Sequence[DatasetSplit], *, per_split: int = 8, columns: int = 4, cell: int = 256
) -> Image.Image:
    """Draw images with their boxes and class names, drawn from each split.

    Args:
        splits: At least one, with images.
        per_split: Images of each split.
        columns: Images a row.
        cell: Side of the square that an image is fitted into, px.

    Returns:
        An RGB picture, a row of the grid after the other, split by split. Crowds have a double outline;
        an image that cannot be decoded leaves its square grey.
    """
    chosen: list[tuple[DatasetSplit, ImageRecord]] = []
    for split in splits:
        count = min(per_split, len(split.records))
        # Drawn at random: an even step may fall in with a pattern in the data's order.
        order = Random(0).sample(range(len(split.records)), count)
        chosen.extend((split, split.records[position]) for position in sorted(order))
    if not chosen:
        raise ValueError("expected at least one image to draw, got none")
    rows = -(-len(chosen) // columns)
    gap = 4
    picture = Image.new("RGB", (columns * (cell + gap), rows * (cell + gap)), (32, 32, 32))
    for number, (split, record) in enumerate(chosen):
        drawn = _draw(record, split, cell)
        picture.paste(drawn, ((number % columns) * (cell + gap), (number // columns) * (cell + gap)))
    return picture


def check_picture(path: Path) -> None:
    """Refuse to write a picture onto anything but an earlier one.

    Args:
        path: Where it is to be written.

    Raises:
        DrkdError: If something is there that `save_picture` did not write: an image of the data set, say.
    """
    if os.path.lexists(path) and not _is_ours(path):
        raise DrkdError(
            f"{path}: exists already and is no picture that `drkd data check` wrote, so it is not replaced. Choose "
            "another file with --picture, or remove it."
        )


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a picture as PNG, aside first and then renamed; it says who wrote it.

    Raises:
        DrkdError: If it cannot be written, or something else is there (`check_picture`).
    """
    check_picture(path)
    mark = PngInfo()
    mark.add_text(*_MARK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                picture.save(file, format="PNG", pnginfo=mark)
            Path(aside).replace(path)
        finally:
            Path(aside).unlink(missing_ok=True)
    except OSError as error:
        raise DrkdError(f"{path}: the picture cannot be written ({error}).") from None
    return path


def _is_ours(path: Path) -> bool:
    try:
        # A pipe would be waited for, for ever.
        if not path.is_file() or path.is_symlink():
            return False
        with Image.open(path, formats=["PNG"]) as image:
            # Those of earlier versions have the name alone.
            return image.info.get(_MARK[0]) == _MARK[1] or path.name == DEFAULT_PICTURE
    except Exception:  # Pillow's plugins raise errors of many kinds on damaged files
        return False


def _draw(record: ImageRecord, split: DatasetSplit, cell: int) -> Image.Image:
    try:
        image = functional.to_pil_image(decode_image(record.path, record.size, turned=record.turned))
    except DrkdError:
        return Image.new("RGB", (cell, cell), (96, 96, 96))
    scale = cell / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    pen = ImageDraw.Draw(image)
    for box, label, crowd in zip(record.boxes.tolist(), record.labels.tolist(), record.crowd.tolist(), strict=True):
        left, top, right, bottom = (round(value * scale) for value in box)
        colour = _colour(label, len(split.class_names))
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        if crowd:
            pen.rectangle((left + 4, top + 4, max(left + 4, right - 5), max(top + 4, bottom - 5)), outline=colour)
        name = split.class_names[label].encode("latin-1", "replace").decode("latin-1")
        frame = pen.textbbox((left + 2, max(0, top - 12)), name)
        pen.rectangle(frame, fill=(0, 0, 0))
        pen.text((left + 2, max(0, top - 12)), name, fill=colour)
    pen.text((3, image.height - 13), f"{split.name} {record.image_id}", fill=(255, 255, 255))
    return image


def _colour(label: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(label / max(count, 1), 0.7, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
