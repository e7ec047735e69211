"""Decodes an image file to an RGB tensor, whatever it is stored as."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from drkd.contracts import DrkdError, MachineError, Size

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    }
)
"""What image files end in, in lower case: all that Pillow knows for ``FORMATS``, but for PPM's floating-point kind."""

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")
"""What files are decoded, whatever their names end in, by Pillow's names: for EPS it would start another program."""

_T = TypeVar("_T")

_EXIF_ORIENTATION = 0x0112
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_DISK = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)
# By EXIF orientation, what makes the stored image of the one that a viewer shows.
_UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# By Pillow's name of the format, where that is not what its files end in.
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}


def decode_image(path: Path, size: Size | None = None, *, turned: bool = False) -> Tensor:
    """Decode an image file.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB. Of four channels the first three are taken: transparency
    is dropped and not composited, as COCO's own tools do, and so is a fourth channel of another kind (near infrared,
    say). Of several frames or pages the first is taken. An EXIF orientation is obeyed only where the annotations say
    so: when the stored size differs from ``size`` and the turned one does not. COCO's boxes are in px of the stored,
    unturned image.

    Args:
        path: The file.
        size: Height and width that the annotations give, px; ``None`` takes the image as a viewer shows it, turned.
        turned: The annotations are in px of the image as a viewer shows it, whatever its size (YOLO's are).

    Returns:
        (3, H, W) uint8.

    Raises:
        MachineError: If memory or open files ran out, which says nothing about the file.
        DrkdError: If the file cannot be decoded or has another size.
    """
    _refuse_special(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                pixels = np.array(_to_rgb(_load(image, size, turned=turned), path))
    except DrkdError:
        raise
    except FileNotFoundError:
        raise DrkdError(f"{path}: there is no such image file.") from None
    except UnidentifiedImageError:
        raise DrkdError(f"{path}: this is not an image, or of a kind that cannot be read.") from None
    except Image.DecompressionBombError as error:
        raise DrkdError(f"{path}: the image is too large to be one of a data set ({error}).") from None
    except Exception as error:
        _blame_machine(path, error)
        # Where the user has imported Ultralytics, it has replaced Pillow's open, and asks for a HEIC library here.
        if isinstance(error.__context__, UnidentifiedImageError):
            raise DrkdError(f"{path}: this is not an image, or of a kind that cannot be read.") from None
        # Pillow's plugins raise errors of many kinds on damaged files.
        raise DrkdError(f"{path}: the image cannot be decoded ({error}). The file may be damaged.") from None
    if size is not None and pixels.shape[:2] != tuple(size):
        raise DrkdError(f"{path}: {describe_other_size(pixels.shape[:2], size, turned=turned)}")
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_image_size(path: Path, expected: Size | None = None, *, turned: bool = True) -> Size:
    """Height and width from the file's header, px.

    Args:
        path: The file.
        expected: What the annotations say: the size is turned by EXIF if only then it is so.
        turned: With nothing expected: the size of the image as a viewer shows it, turned, or as it is stored.

    Raises:
        DrkdError: If the header cannot be read.
    """
    (height, width), orientation = read_orientation(path)
    turn = orientation >= 5 and (turned if expected is None else (height, width) != tuple(expected))
    return (width, height) if turn else (height, width)


def describe_other_size(found: tuple[int, ...], expected: Size, *, turned: bool) -> str:
    """What is wrong with an image of another height and width than expected, px.

    Args:
        found: Of the image.
        expected: Of its record.
        turned: The record has its size from the image itself, as YOLO's have, and not from annotations.
    """
    sizes = f"{expected[1]} x {expected[0]}"
    source = (
        f"was {sizes} px when the data set was read; did the file change?"
        if turned
        else f"its annotations (fields 'width' and 'height') say {sizes}; the boxes would not fit."
    )
    return f"the image is {found[1]} x {found[0]} px, but {source}"


def read_orientation(path: Path) -> tuple[Size, int]:
    """Height and width of the stored image, px, and its EXIF orientation, 1 to 8.

    Raises:
        DrkdError: If the header cannot be read.
    """
    return _open_header(path, lambda image: (_stored_size(image), _orientation(image)))


def choose_suffix(path: Path) -> str:
    """What an image file of this content should end in, one of ``IMAGE_SUFFIXES``; its name may end in anything.

    Raises:
        DrkdError: If the header cannot be read.
    """
    return _open_header(path, lambda image: _SUFFIXES.get(str(image.format), f".{str(image.format).lower()}"))


def _open_header(path: Path, read: Callable[[Image.Image], _T]) -> _T:
    _refuse_special(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return read(image)
    except Exception as error:
        _blame_machine(path, error)
        # Pillow's plugins raise errors of many kinds on damaged files.
        raise DrkdError(f"{path}: the image cannot be read ({error}).") from None


def _blame_machine(path: Path, error: Exception) -> None:
    if isinstance(error, MemoryError):
        raise MachineError(
            f"{path}: there was not enough memory to decode this image. Training, use fewer processes that decode "
            "(data.workers) or smaller batches (data.batch_size)."
        ) from None
    if isinstance(error, OSError) and error.errno in _MACHINE:
        raise MachineError(
            f"{path}: the machine cannot open this image ({error.strerror}). Raise its limit (ulimit -n); training, "
            "use fewer processes that decode (data.workers)."
        ) from None
    if isinstance(error, OSError) and error.errno in _DISK:
        raise MachineError(
            f"{path}: the disk or the network's file system does not give this image ({error.strerror}). It need not "
            "be damaged: see whether the disk is there and well, and start again."
        ) from None


def _refuse_special(path: Path) -> None:
    """A pipe or a device would be waited for, for ever."""
    if path.exists() and not path.is_file():
        raise DrkdError(f"{path}: this is no regular file, so no image.")


def _stored_size(image: Image.Image) -> Size:
    """Height and width of an image that is not decoded yet; of a TIFF Pillow gives those of the turned one."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(image.tag_v2[TiffImagePlugin.IMAGELENGTH]), int(image.tag_v2[TiffImagePlugin.IMAGEWIDTH])
    return image.height, image.width


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of an image that is not decoded yet: decoding, a TIFF loses it."""
    orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
    return orientation if 1 <= orientation <= 8 else 1


def _load(image: Image.Image, size: Size | None, *, turned: bool) -> Image.Image:
    """Decode an image as a viewer shows it where that is asked for or only then it has the size, else as stored."""
    stored = image
    if tiff := isinstance(image, TiffImagePlugin.TiffImageFile):
        # Pillow turns a TIFF while it decodes it, and any other image when it is asked to. Where it maps the file into
        # memory it takes the sides of the turned image for the stored one's rows; a file without a name is not mapped.
        image.filename = ""
        undo = _UNTURN.get(_orientation(image))
        image.load()
        stored = image if undo is None else image.transpose(undo)
    stored.load()
    if not turned and size is not None and (stored.height, stored.width) == tuple(size):
        return stored
    shown = image if tiff else ImageOps.exif_transpose(image)
    return shown if turned or size is None or (shown.height, shown.width) == tuple(size) else stored


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DrkdError(f"{path}: expected 8 or 16 bits a pixel, got values from {values.min()} to {values.max()}.")
        # 257 = 65535 / 255. 32-bit "I" is how some Pillow versions open 16-bit PNG.
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DrkdError(f"{path}: floating-point images have no agreed range; store it with 8 or 16 bits a pixel.")
    if image.mode in ("RGBa", "La") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    return image.convert("RGB")
