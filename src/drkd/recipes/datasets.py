"""Look a user's data set over, and build the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from drkd.data.check import DataReport, check_data
from drkd.data.convert import Converted, convert
from drkd.data.digits import EMBEDDED, build_digits
from drkd.data.formats.reading import FormatChoice
from drkd.data.formats.source import FormatName
from drkd.data.image_check import DECODED
from drkd.data.picture import DEFAULT_PICTURE

__all__ = ["Converted", "DataReport", "build_embedded", "check_dataset", "convert_dataset"]


def check_dataset(
    path: Path,
    *,
    picture: Path = Path(DEFAULT_PICTURE),
    format: FormatChoice = "auto",
    decode: int | Literal["all"] = DECODED,
) -> DataReport:
    """Find every problem of a data set at once, with counts and a picture of samples.

    Args:
        path: The data set's folder in COCO, YOLO or VOC format.
        picture: Write samples with their boxes to this PNG file; an earlier picture is replaced, nothing else is.
        format: The data's format; by default the one that its content shows.
        decode: So many images of each split, evenly spaced, or all, are decoded in full; of the others only the header
            is read.

    Raises:
        DrkdError: If there is no data set in the folder, or something else is where the picture is to be written.
    """
    return check_data(path, picture=picture, format=format, decode=decode)


def convert_dataset(
    source: Path,
    target: Path,
    *,
    to: FormatName,
    images: Literal["copy", "link"] = "copy",
    format: FormatChoice = "auto",
    classes: list[str] | None = None,
) -> Converted:
    """Write a data set in another format.

    Args:
        source: The data set's folder in COCO, YOLO or VOC format, or ``digits`` or ``digits2`` for an embedded one.
        target: Folder to write; must not exist, or be empty.
        to: The new format.
        images: Copy the images, or link to where they are now.
        format: The format of the source; by default the one that its content shows.
        classes: Keep the boxes of these classes only, in this order.

    Raises:
        DrkdError: If the source cannot be read or has errors, or the target cannot be written.
    """
    embedded = EMBEDDED.get(str(source))
    folder = source if embedded is None or source.exists() else build_digits(config=embedded)
    return convert(folder, target, to=to, images=images, format=format, classes=classes)


def build_embedded(*, output: Path | None = None, second: bool = False) -> Path:
    """Build the embedded data set of handwritten digits on photographs, or find it built already.

    Args:
        output: Folder to build it in; by default the cache, where ``data.root: digits`` looks for it.
        second: Build ``digits2``: other photographs, smaller and more digits an image.

    Returns:
        The data set's folder, in COCO format.

    Raises:
        DrkdError: If scikit-learn or scikit-image is missing, or the folder cannot be written to.
    """
    return build_digits(output, config=EMBEDDED["digits2" if second else "digits"])
