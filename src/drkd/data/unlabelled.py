"""Finds images without labels and makes records of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from drkd.contracts import DrkdError, ImageRecord, Size
from drkd.data.image import IMAGE_SUFFIXES, read_image_size
from drkd.data.image_files import find_image_files
from drkd.data.problem import LeaveOut, leave_out_some

_SHOWN = 20


def read_unlabelled(folder: Path, *, first_id: int, leave_out: LeaveOut | None = None) -> tuple[ImageRecord, ...]:
    """Records of all images below a folder, in the order of their paths; labels that lie there are not read.

    Args:
        folder: Searched with its sub-folders; hidden ones are left out.
        first_id: Id of the first record; the others follow.
        leave_out: Called for each image whose header cannot be read, which is then left out, unless those are
            many (`leave_out_some`). By default it is an error.

    Raises:
        DrkdError: If there is no such folder, no image in it, or headers of images cannot be read: it names them.
    """
    if not folder.is_dir():
        raise DrkdError(f"data.unlabelled: {folder}: there is no such folder of images.")
    paths = find_image_files(folder)
    if not paths:
        raise DrkdError(
            f"data.unlabelled: {folder}: no image in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})."
        )
    sizes: dict[Path, Size] = {}
    unreadable: dict[Path, str] = {}
    for path in paths:
        try:
            sizes[path] = read_image_size(path)
        except DrkdError as error:
            unreadable[path] = str(error).removeprefix(f"{path}: ")
    if unreadable and (leave_out is None or not sizes):
        shown = "; ".join(f"{path.relative_to(folder)}: {reason}" for path, reason in [*unreadable.items()][:_SHOWN])
        more = f"; and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
        raise DrkdError(
            f"data.unlabelled: {folder}: {len(unreadable)} of {len(paths)} images cannot be read: {shown}{more}. "
            "Remove them, or leave them out with data.unreadable: skip."
        )
    if leave_out is not None:
        leave_out_some(unreadable, len(paths), leave_out)
    return tuple(
        _without_labels(image_id, path, size) for image_id, (path, size) in enumerate(sizes.items(), start=first_id)
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
