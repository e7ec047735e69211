"""Finds the image files of a folder."""

from __future__ import annotations

from pathlib import Path

from drkd.data.image import IMAGE_SUFFIXES


def find_image_files(folder: Path) -> list[Path]:
    """The image files of a folder and its sub-folders, by their names' endings, in the order of their paths.

    Hidden files, and those in hidden folders below this one (``.ipynb_checkpoints``), are left out.
    """
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
