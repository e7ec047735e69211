"""Finds the image files of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from drkd.data.image import IMAGE_SUFFIXES


def find_image_files(folder: Path) -> list[Path]:
    """The image files of a folder and its sub-folders, by their names' endings, in the order of their paths.

    Sub-folders may be links. Hidden files, and those in hidden folders below this one (``.ipynb_checkpoints``), are
    left out.
    """
    return [path for path in sorted(_list(folder)) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]


def _list(folder: Path) -> Iterator[Path]:
    """All files that are not hidden; each folder once, by its own path before that of a link."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        for place, folders, files in os.walk(waiting.pop(0)):
            here = Path(place)
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [here / name for name in folders if (here / name).is_symlink()]
            yield from (here / name for name in files if not name.startswith("."))
