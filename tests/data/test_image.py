"""Decoding: every kind of image file becomes 8-bit RGB of the annotated size, or a clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drkd.contracts import DrkdError
from drkd.data.image import decode_image, read_image_size

_GREY = np.array([[0, 50, 100], [150, 200, 255]], dtype=np.uint8)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _save(path: Path, kind: str) -> Path:
    grey = Image.fromarray(_GREY)
    images = {
        "L": grey,
        "1": grey.point(lambda value: 255 * (value > 127)).convert("1"),
        "LA": grey.convert("LA"),
        "RGBA": Image.merge("RGBA", [grey, grey, grey, grey.point(lambda _: 0)]),
        "P": grey.convert("P"),
        "CMYK": grey.convert("RGB").convert("CMYK"),
        "I;16": Image.fromarray(_GREY.astype(np.uint16) * 257),
    }
    name = path / f"{kind.replace(';', '')}.{'tif' if kind == 'CMYK' else 'png'}"
    images[kind].save(name)
    return name


@pytest.mark.parametrize("kind", ["L", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, kind: str) -> None:
    pixels = decode_image(_save(tmp_path, kind), (2, 3))

    assert (pixels.shape, pixels.dtype) == ((3, 2, 3), torch.uint8)
    for channel in pixels:
        np.testing.assert_array_equal(channel.numpy(), _GREY)


def test_one_bit_images_become_black_and_white(tmp_path: Path) -> None:
    assert decode_image(_save(tmp_path, "1"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((2, 2, 3), (10, 20, 30), np.uint8)).quantize(2)
    image.save(tmp_path / "p.png", transparency=bytes([0]))

    assert decode_image(tmp_path / "p.png")[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("annotated", "turned"),
    [((2, 3), False), ((3, 2), True), (None, True)],
    ids=["annotated as stored", "annotated as shown", "not annotated"],
)
def test_exif_is_obeyed_only_where_the_annotation_says_so(
    tmp_path: Path, annotated: tuple[int, int] | None, turned: bool
) -> None:
    path = tmp_path / "turned.png"
    Image.fromarray(_GREY).save(path, exif=_exif(6))  # 6: shown turned clockwise

    pixels = decode_image(path, annotated)

    expected = np.rot90(_GREY, -1) if turned else _GREY
    np.testing.assert_array_equal(pixels[0].numpy(), expected)
    if annotated is not None:
        assert read_image_size(path, annotated) == annotated


def test_a_size_that_fits_neither_way_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    Image.fromarray(_GREY).save(path, exif=_exif(6))

    with pytest.raises(DrkdError, match=r"turned\.png: the image is 3 x 2 px.*'width'.*say 5 x 4"):
        decode_image(path, (4, 5))
    assert read_image_size(path, (2, 3)) == (2, 3)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _replace(path: Path) -> None:
    path.write_text("no image")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(_truncate, "cannot be decoded"), (_replace, "not an image"), (Path.unlink, "no such image file")],
    ids=["truncated", "text", "gone"],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path, spoil, message: str) -> None:
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    spoil(path)

    with pytest.raises(DrkdError, match=message) as caught:
        decode_image(path)
    assert str(path) in str(caught.value)


def test_a_floating_point_image_is_an_error(tmp_path: Path) -> None:
    Image.fromarray(_GREY.astype(np.float32)).save(tmp_path / "f.tif")

    with pytest.raises(DrkdError, match="no agreed range"):
        decode_image(tmp_path / "f.tif")
