"""Look a user's data set over, and build the embedded one."""

from __future__ import annotations

from pathlib import Path

from drkd.data.check import DataReport, check_data
from drkd.data.digits import EMBEDDED, build_digits

__all__ = ["DataReport", "build_embedded", "check_dataset"]


def check_dataset(path: Path, *, picture: Path = Path("drkd-samples.png")) -> DataReport:
    """Find every problem of a COCO-format folder at once, with counts and a picture of samples.

    Args:
        path: The data set's folder.
        picture: Write samples with their boxes to this PNG file.

    Raises:
        DrkdError: If there is no data set in the folder.
    """
    return check_data(path, picture=picture)


def build_embedded(*, output: Path | None = None, second: bool = False) -> Path:
    """Build the embedded data set of handwritten digits on photographs, or find it built already.

    Args:
        output: Folder to build it in; by default the cache, where ``data.root: digits`` looks for it.
        second: Build ``digits2``: another deal of scans and photographs, smaller and more digits an image.

    Returns:
        The data set's folder, in COCO format.

    Raises:
        DrkdError: If scikit-learn or scikit-image is missing, or the folder cannot be written to.
    """
    return build_digits(output, config=EMBEDDED["digits2" if second else "digits"])
