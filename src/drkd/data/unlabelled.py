"""Finds images without labels and makes records of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from drkd.contracts import DrkdError, ImageRecord, Size
from drkd.data.image import IMAGE_SUFFIXES, read_image_size
from drkd.data.image_files import find_image_files


def read_unlabelled(folder: Path, *, first_id: int) -> tuple[ImageRecord, ...]:
    """Records of all images below a folder, in the order of their paths; labels that lie there are not read.

    Args:
        folder: Searched with its sub-folders; hidden ones are left out.
        first_id: Id of the first record; the others follow.

    Raises:
        DrkdError: If there is no such folder, no image in it, or an image's header cannot be read.
    """
    if not folder.is_dir():
        raise DrkdError(f"data.unlabelled: {folder}: there is no such folder of images.")
    paths = find_image_files(folder)
    if not paths:
        raise DrkdError(
            f"data.unlabelled: {folder}: no image in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})."
        )
    return tuple(
        _without_labels(image_id, path, read_image_size(path)) for image_id, path in enumerate(paths, start=first_id)
    )


def put_labels_aside(records: Sequence[ImageRecord], *, first_id: int) -> tuple[ImageRecord, ...]:
    """The same images as if nobody had labelled them, under new ids."""
    return tuple(
        replace(_without_labels(image_id, record.path, record.size), turned=record.turned)
        for image_id, record in enumerate(records, start=first_id)
    )


def _without_labels(image_id: int, path: Path, size: Size) -> ImageRecord:
    return ImageRecord(
        image_id,
        path,
        size,
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0, dtype=torch.bool),
        torch.zeros(0),
        turned=True,
        labelled=False,
    )
