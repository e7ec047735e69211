"""Decodes an image file to an RGB tensor, whatever it is stored as."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
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
                image.load()
                pixels = np.array(_to_rgb(ImageOps.exif_transpose(image) if turned else _turn(image, size), path))
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
        raise DrkdError(
            f"{path}: the image is {pixels.shape[1]} x {pixels.shape[0]} px, but its annotations (fields 'width' and "
            f"'height') say {size[1]} x {size[0]}; the boxes would not fit."
        )
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


def read_orientation(path: Path) -> tuple[Size, int]:
    """Height and width of the stored image, px, and its EXIF orientation, 1 to 8.

    Raises:
        DrkdError: If the header cannot be read.
    """

    def read(image: Image.Image) -> tuple[Size, int]:
        orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
        return (image.height, image.width), orientation if 1 <= orientation <= 8 else 1

    return _open_header(path, read)


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


def _refuse_special(path: Path) -> None:
    """A pipe or a device would be waited for, for ever."""
    if path.exists() and not path.is_file():
        raise DrkdError(f"{path}: this is no regular file, so no image.")


def _turn(image: Image.Image, size: Size | None) -> Image.Image:
    if size is not None and (image.height, image.width) == tuple(size):
        return image
    turned = ImageOps.exif_transpose(image)
    if size is None or (turned.height, turned.width) == tuple(size):
        return turned
    return image


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
