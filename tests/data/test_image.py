"""Decoding: every kind of image file becomes 8-bit RGB of the annotated size, or a clear error."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo

from drkd.contracts import DrkdError, ImageRecord, MachineError
from drkd.data.dataset import DatasetSplit, DetectionDataset
from drkd.data.image import FORMATS, IMAGE_SUFFIXES, choose_suffix, decode_image, read_image_size, read_orientation
from drkd.data.sampler import aspect_group
from drkd.data.transforms import train_transforms
from drkd.data.unlabelled import read_unlabelled
from drkd.recipes.prediction import find_images

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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_any_other_image_is(tmp_path: Path, orientation: int) -> None:
    """Pillow turns a TIFF by itself while it decodes it, and swaps its sides before."""
    paths = [tmp_path / "a.png", tmp_path / "a.tif"]
    for path in paths:
        Image.fromarray(_GREY).save(path, exif=_exif(orientation))
    assert len({read_orientation(path) for path in paths}) == 1
    for size, turned in (((2, 3), False), ((3, 2), False), (None, False), (None, True)):
        if size == (3, 2) and orientation < 5:
            continue
        png, tiff = (decode_image(path, size, turned=turned) for path in paths)
        assert torch.equal(png, tiff)
        assert len({read_image_size(path, size, turned=turned) for path in paths}) == 1
    assert torch.equal(decode_image(paths[1], (2, 3))[0], torch.from_numpy(_GREY))


def test_a_size_that_fits_neither_way_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    Image.fromarray(_GREY).save(path, exif=_exif(6))

    with pytest.raises(DrkdError, match=r"turned\.png: the image is 3 x 2 px.*'width'.*say 5 x 4"):
        decode_image(path, (4, 5))
    # Formats without annotations of the size have none that could be wrong.
    with pytest.raises(DrkdError, match=r"turned\.png: the image is 2 x 3 px, but was 5 x 4 px when the data set was"):
        decode_image(path, (4, 5), turned=True)
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


@pytest.mark.parametrize("read", [decode_image, read_image_size])
def test_no_image_starts_another_program(read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would have Ghostscript run what an EPS file says, whatever the file is called."""
    started = tmp_path / "started"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {started}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "photo.jpg"
    Image.fromarray(_GREY).save(path, format="EPS")
    with pytest.raises(DrkdError, match=r"photo\.jpg"):
        read(path)
    assert not started.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("read", [decode_image, read_image_size])
def test_a_pipe_is_not_waited_for(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.jpg")
    with pytest.raises(DrkdError, match=r"1\.jpg: this is no regular file"):
        read(tmp_path / "1.jpg")


def test_a_floating_point_image_is_an_error(tmp_path: Path) -> None:
    Image.fromarray(_GREY.astype(np.float32)).save(tmp_path / "f.tif")

    with pytest.raises(DrkdError, match="no agreed range"):
        decode_image(tmp_path / "f.tif")


def _tiff(path: Path, pixels: np.ndarray, *, extra: int) -> Path:
    """An uncompressed little-endian TIFF of four channels; ``extra`` says what the fourth is (0: unspecified)."""
    height, width, _ = pixels.shape
    bits = 8 * pixels.dtype.itemsize
    data = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    start = 8 + len(data)
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 4, start + 2 + 12 * 10 + 4),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (277, 3, 1, 4),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (338, 3, 1, extra),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    tail = struct.pack("<I", 0) + struct.pack("<4H", *[bits] * 4)
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + data + directory + tail)
    return path


@pytest.mark.parametrize("extra", [0, 1, 2], ids=["near infrared", "associated alpha", "alpha"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_first_three_of_four_channels_are_taken(tmp_path: Path, extra: int, dtype: type) -> None:
    colours = np.array([[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [100, 110, 120]]], dtype=np.uint8)
    fourth = np.full((2, 2, 1), 255, dtype=np.uint8)  # opaque, so that associated alpha changes nothing
    if extra != 1:
        fourth[0, 0] = 3
    pixels = np.concatenate([colours, fourth], axis=2).astype(dtype) * (257 if dtype == np.uint16 else 1)

    found = decode_image(_tiff(tmp_path / "four.tif", pixels, extra=extra), (2, 2))

    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), colours)


def test_transparency_is_dropped_and_not_composited(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).save(tmp_path / "clear.png")

    assert decode_image(tmp_path / "clear.png")[:, 0, 0].tolist() == [200, 100, 50]


def test_a_viewers_turn_is_taken_whatever_the_size(tmp_path: Path) -> None:
    square = np.array([[1, 2], [3, 4]], dtype=np.uint8)
    Image.fromarray(square).save(tmp_path / "half.png", exif=_exif(3))

    assert decode_image(tmp_path / "half.png", (2, 2))[0].tolist() == [[1, 2], [3, 4]]
    assert decode_image(tmp_path / "half.png", (2, 2), turned=True)[0].tolist() == [[4, 3], [2, 1]]
    assert read_image_size(_save(tmp_path, "L")) == (2, 3)
    Image.fromarray(_GREY).save(tmp_path / "quarter.png", exif=_exif(8))
    assert read_image_size(tmp_path / "quarter.png") == (3, 2)
    assert read_image_size(tmp_path / "quarter.png", turned=False) == (2, 3)


def test_a_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (20, 20)).save(tmp_path / "bomb.png")

    with pytest.raises(DrkdError, match=r"bomb\.png: the image is too large"):
        decode_image(tmp_path / "bomb.png")
    with pytest.raises(DrkdError, match=r"bomb\.png"):
        read_image_size(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert decode_image(tmp_path / "bomb.png").shape == (3, 20, 20)  # large, but below twice the limit: no warning


def test_a_bomb_in_the_text_of_an_image_is_an_error(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    Image.new("L", (2, 2)).save(tmp_path / "text.png", pnginfo=text)

    for read in (decode_image, read_image_size):
        with pytest.raises(DrkdError, match=r"text\.png"):
            read(tmp_path / "text.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 300)])
def test_the_smallest_images_go_through_training(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", (size[1], size[0]), (9, 9, 9)).save(tmp_path / "dot.png")
    box = torch.tensor([[0.0, 0.0, float(size[1]), float(size[0])]])
    label, no_crowd = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)
    record = ImageRecord(1, tmp_path / "dot.png", size, box, label, no_crowd, box[:, 2])
    transforms = train_transforms(min_size=64, max_size=128, photometric=True, zoom_out=1.0)

    sample = DetectionDataset(DatasetSplit("train", (record,), ("dot",)), transforms, minimum_side=1.0)[0]

    assert bool(sample.image.isfinite().all()) and max(sample.image.shape) <= 128
    assert aspect_group(record) == (0 if size == (1, 1) else 16)


def test_what_pillow_gives_such_images_is_what_folders_are_searched_for(tmp_path: Path) -> None:
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert known - {".pfm"} == IMAGE_SUFFIXES
    for suffix in (".jp2", ".jfif", ".jpe", ".dib"):
        Image.new("RGB", (60, 40)).save(tmp_path / f"a{suffix}")
    expected = {path.name for path in tmp_path.iterdir()}
    assert {record.path.name for record in read_unlabelled(tmp_path, first_id=1)} == expected
    assert set(find_images(tmp_path, output=tmp_path / "found")) == expected


def test_hidden_files_and_folders_are_no_images_of_a_folder(tmp_path: Path) -> None:
    # Where the folder itself lies does not matter.
    folder = tmp_path / ".cache" / "images"
    for name in ("a.png", "deep/b.png", ".hidden.png", ".ipynb_checkpoints/a-checkpoint.png", "deep/.trash/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40)).save(folder / name)
    assert [record.path.name for record in read_unlabelled(folder, first_id=1)] == ["a.png", "b.png"]
    assert list(find_images(folder, output=tmp_path / "found")) == ["a.png", "deep/b.png"]
    assert list(find_images(folder / ".hidden.png", output=tmp_path / "found")) == [".hidden.png"]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_of_any_kind_has_a_suffix_of_its_own(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "image", format=kind)
    assert choose_suffix(tmp_path / "image") in IMAGE_SUFFIXES
    (tmp_path / "image").write_bytes(b"none")
    with pytest.raises(DrkdError, match="image: the image cannot be read"):
        choose_suffix(tmp_path / "image")


def test_an_image_of_several_pictures_is_a_jpeg(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    pictures[0].save(tmp_path / "image", format="MPO", save_all=True, append_images=pictures[1:])
    assert choose_suffix(tmp_path / "image") == ".jpg" and decode_image(tmp_path / "image").shape == (3, 40, 60)


@pytest.mark.parametrize("read", [decode_image, read_image_size])
@pytest.mark.parametrize(
    ("lack", "message"),
    [
        (MemoryError(), r"one\.png: there was not enough memory"),
        (OSError(errno.EMFILE, "Too many open files"), r"one\.png: the machine cannot open .*Too many open files"),
        (OSError(errno.EIO, "Input/output error"), r"one\.png: the disk or the network's file system does not give"),
    ],
)
def test_what_the_machine_lacks_is_no_damage_of_the_file(
    read, lack: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "one.png")

    def fail(*_: object, **__: object) -> None:
        raise lack

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MachineError, match=message):
        read(tmp_path / "one.png")


def test_no_other_image_stands_in_for_one_that_the_machine_could_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = []
    for number in range(3):
        Image.new("RGB", (4, 3)).save(tmp_path / f"{number}.png")
        nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), torch.zeros(0)
        records.append(ImageRecord(number, tmp_path / f"{number}.png", (3, 4), torch.zeros(0, 4), *nothing))
    (tmp_path / "0.png").write_bytes(b"")
    dataset = DetectionDataset(DatasetSplit("train", records, ("cat",)), train_transforms(), substitutes=2)
    real = Image.open

    def fail(path: Path, **options: object) -> Image.Image:
        if Path(path).name == "1.png":
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, **options)

    monkeypatch.setattr(Image, "open", fail)
    for position in (0, 1):
        with pytest.raises(MachineError, match=r"1\.png"):
            dataset[position]
    assert dataset.unreadable.tolist() == [1, 0, 0]
