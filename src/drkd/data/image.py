"""Decodes an image file to an RGB tensor, whatever it is stored as."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from drkd.contracts import DrkdError, Size

_EXIF_ORIENTATION = 0x0112


def decode_image(path: Path, size: Size | None = None) -> Tensor:
    """Decode an image file.

    Grey, palette, CMYK, 16-bit and transparent images become 8-bit RGB (transparency is dropped, as COCO's own tools
    do). An EXIF orientation is obeyed only where the annotations say so: when the stored size differs from ``size``
    and the turned one does not. COCO's boxes are in px of the stored, unturned image.

    Args:
        path: The file.
        size: Height and width that the annotations give, px; ``None`` takes the image as a viewer shows it, turned.

    Returns:
        (3, H, W) uint8.

    Raises:
        DrkdError: If the file cannot be decoded or has another size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                turned = _turn(image, size)
                pixels = np.array(_to_rgb(turned, path))
    except FileNotFoundError:
        raise DrkdError(f"{path}: there is no such image file.") from None
    except UnidentifiedImageError:
        raise DrkdError(f"{path}: this is not an image, or of a kind that cannot be read.") from None
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DrkdError(f"{path}: the image cannot be decoded ({error}). The file may be damaged.") from None
    if size is not None and pixels.shape[:2] != tuple(size):
        raise DrkdError(
            f"{path}: the image is {pixels.shape[1]} x {pixels.shape[0]} px, but its annotations (fields 'width' and "
            f"'height') say {size[1]} x {size[0]}; the boxes would not fit."
        )
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_image_size(path: Path, expected: Size) -> Size:
    """Height and width from the file's header, px: turned by EXIF if only then it is as expected.

    Raises:
        DrkdError: If the header cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                sideways = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DrkdError(f"{path}: the image cannot be read ({error}).") from None
    turn = sideways and (height, width) != tuple(expected)
    return (width, height) if turn else (height, width)


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
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
