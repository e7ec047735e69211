"""Looks whether the image files of a split are whole and of the size that its annotations give."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from drkd.contracts import DrkdError
from drkd.data.image import decode_image, describe_other_size, read_image_size
from drkd.data.problem import DataProblem
from drkd.data.split import DatasetSplit

DECODED = 2000
"""So many images of a split are decoded unless more are asked for: all of a data set would take hours."""


def count_decoded(images: int, decode: int | Literal["all"]) -> int:
    """How many of so many images are decoded in full.

    Raises:
        DrkdError: If a negative number was asked for.
    """
    if decode == "all":
        return images
    if decode < 0:
        raise DrkdError(f"decode: expected a number of images of at least 0, or all, got {decode}.")
    return min(images, decode)


def check_images(
    split: DatasetSplit, annotations: Path, *, decode: int | Literal["all"] = DECODED
) -> list[DataProblem]:
    """Find the images that cannot be decoded, or have another size than their record.

    Args:
        split: The split.
        annotations: Its file, for the findings.
        decode: So many images, evenly spaced, are decoded in full; of the others only the header is read.

    Returns:
        An error an image; images that are missing or have no size are left to the reader of the annotations.
    """
    problems = []
    total = len(split.records)
    count = count_decoded(total, decode)
    # Evenly spaced: what was added last is damaged as often as what was there first.
    chosen = {number * total // count for number in range(count)}
    for number, record in enumerate(split.records):
        if min(record.size) <= 0 or not record.path.is_file():
            continue
        try:
            if number in chosen:
                decode_image(record.path, record.size, turned=record.turned)
            elif (size := read_image_size(record.path, record.size)) != record.size:
                raise DrkdError(describe_other_size(size, record.size, turned=record.turned))
        except DrkdError as error:
            message = f"{record.path.name}: {str(error).removeprefix(f'{record.path}: ')}"
            problems.append(DataProblem("error", annotations, f"image {record.image_id}", "", message))
    return problems
