"""Conversion: there and back is the same data, what is lost is said, and nothing half-written is left."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from drkd.contracts import DrkdError
from drkd.data.check import check_data
from drkd.data.convert import _WRITERS, convert
from drkd.data.dataset import load_split
from drkd.data.image import decode_image
from drkd.data.orientation import as_shown, as_stored, turn_boxes
from drkd.data.split import DatasetSplit

if TYPE_CHECKING:
    from tests.data.conftest import CocoFolder

FORMATS = ("coco", "yolo", "voc")


@pytest.fixture
def source(coco: CocoFolder) -> Path:
    """Two splits whose images have the same names; boxes of fractions; a crowd; sparse ids; a sub-folder."""
    coco.document["annotations"][0]["bbox"] = [10.3, 5.7, 20.123456, 9.87]
    del coco.document["annotations"][0]["area"]
    coco.document["images"].append({"id": 9, "file_name": "deep/c d.png", "height": 31, "width": 47})
    coco.write_image("deep/c d.png", size=(31, 47))
    coco.document["annotations"].append({"id": 9, "image_id": 9, "category_id": 2, "bbox": [0, 0, 47, 31]})
    coco.write()
    for name in ("a.png", "b.png"):
        coco.write_image(name, split="val")
    coco.write_image("deep/c d.png", size=(31, 47), split="val")
    coco.write(split="val")
    return coco.root


def content(split: DatasetSplit, *, crowds: bool = True) -> list[tuple[object, ...]]:
    """What must survive: pixels, boxes to the last bit, classes by name, crowds."""
    rows = []
    for record in split.records:
        kept = torch.ones_like(record.crowd) if crowds else ~record.crowd
        names = [split.class_names[label] for label in record.labels[kept].tolist()]
        pixels = decode_image(record.path, record.size, turned=record.turned)
        rows.append(
            (pixels.numpy().tobytes(), record.size, record.boxes[kept].tolist(), names, record.crowd[kept].tolist())
        )
    return sorted(rows)


@pytest.mark.parametrize("images", ["copy", "link"])
@pytest.mark.parametrize("to", FORMATS)
def test_there_and_back(source: Path, tmp_path: Path, to: str, images: str) -> None:
    there = convert(source, tmp_path / "there", to=to, images=images)
    assert there.images == {"train": 3, "val": 3} and there.boxes == {"train": 4, "val": 4}
    report = check_data(tmp_path / "there")
    assert not report.errors and {split.format for split in report.splits} == {to}
    convert(tmp_path / "there", tmp_path / "back", to="coco")
    crowds = to != "yolo"
    for name in ("train", "val"):
        original = load_split(source, name)
        for root in ("there", "back"):
            assert content(load_split(tmp_path / root, name)) == content(original, crowds=crowds)
    linked = [path for path in (tmp_path / "there").rglob("*.png") if path.is_symlink()]
    assert len(linked) == (6 if images == "link" else 0)


def test_coco_keeps_ids_areas_and_crowds(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "new", to="coco")
    ours, theirs = load_split(tmp_path / "new", "train"), load_split(source, "train")
    assert (ours.class_names, ours.category_ids) == (theirs.class_names, theirs.category_ids)
    assert [record.image_id for record in ours.records] == [7, 3, 9]
    for one, other in zip(ours.records, theirs.records, strict=True):
        assert torch.equal(one.areas, other.areas) and torch.equal(one.crowd, other.crowd)
        assert torch.equal(one.boxes, other.boxes)


def test_what_is_lost_is_said(source: Path, tmp_path: Path) -> None:
    document = json.loads((source / "annotations/instances_train.json").read_text())
    document["annotations"][0]["area"] = 3.0
    (source / "annotations/instances_train.json").write_text(json.dumps(document))
    assert len(convert(source, tmp_path / "coco", to="coco").lost) == 1
    yolo, voc = (convert(source, tmp_path / to, to=to).lost for to in ("yolo", "voc"))
    for lost in (yolo, voc):
        for part in (
            "masks, key points",
            "train: image ids",
            "train: category ids (2, 18, 90",
            "train: areas of 1 boxes",
        ):
            assert any(part in line for line in lost), part
    assert any("train: 1 crowd or difficult boxes" in line for line in yolo)
    assert not any("crowd or difficult" in line for line in voc)


def test_classes_are_kept_in_the_order_asked_for(source: Path, tmp_path: Path) -> None:
    converted = convert(source, tmp_path / "yolo", to="yolo", classes=["brush", "dog"])
    split = load_split(tmp_path / "yolo", "train")
    assert split.class_names == ("brush", "dog") and sorted(len(record.boxes) for record in split.records) == [0, 1, 1]
    assert any("boxes of other classes than brush, dog" in line for line in converted.lost)


def test_names_that_would_clash_are_made_different(source: Path, tmp_path: Path) -> None:
    document = json.loads((source / "annotations/instances_train.json").read_text())
    document["images"][1]["file_name"] = "A.jpg"
    (source / "annotations/instances_train.json").write_text(json.dumps(document))
    Image.new("RGB", (60, 40)).save(source / "train" / "A.jpg")
    convert(source, tmp_path / "yolo", to="yolo")
    assert sorted(path.name for path in (tmp_path / "yolo/labels/train").rglob("*.txt")) == [
        "A_2.txt",
        "a.txt",
        "c d.txt",
    ]
    convert(source, tmp_path / "voc", to="voc")
    names = sorted(path.name for path in (tmp_path / "voc/JPEGImages").iterdir())
    assert names == ["train_A_2.jpg", "train_a.png", "train_deep_c d.png", "val_a.png", "val_b.png", "val_deep_c d.png"]


@pytest.mark.parametrize("to", FORMATS)
def test_images_of_any_name_keep_their_boxes(coco: CocoFolder, tmp_path: Path, to: str) -> None:
    names = ["a.png", "b.jfif", "c.jp2", "d.JPE", ".hidden.png"]
    names += ["images/e.png", "deep/images/f.g/h.png", "labels/k.png"]
    for name in names:
        coco.write_image(name)
    kinds = {"frame.0001": "PNG", "plain": "JPEG", "camera.raw": "JPEG2000", ".png": "BMP"}
    for name, kind in kinds.items():
        Image.new("RGB", (60, 40), (9, 99, 199)).save(coco.images / name, format=kind)
    everything = [*names, *kinds]
    coco.document["images"] = [
        {"id": number, "file_name": name, "height": 40, "width": 60} for number, name in enumerate(everything, start=1)
    ]
    coco.document["annotations"] = [
        {"id": number, "image_id": number, "category_id": 18, "bbox": [number, 5, 20, 10]}
        for number in range(1, len(everything) + 1)
    ]
    coco.write()
    convert(coco.root, tmp_path / "new", to=to)
    assert content(load_split(tmp_path / "new", "train")) == content(load_split(coco.root, "train"))
    if to == "yolo":
        folder = tmp_path / "new/images/train"
        written = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert {"frame.0001.png", "plain.jpg", "camera.raw.jp2", "_.png", "_.hidden.png", "b.jfif"} <= written


def test_boxes_that_are_there_twice_are_written_once(coco: CocoFolder, tmp_path: Path) -> None:
    coco.document["annotations"].append({**coco.document["annotations"][2], "id": 4})
    coco.write()
    converted = convert(coco.root, tmp_path / "yolo", to="yolo")
    assert any("train: 1 boxes that an image has twice" in line for line in converted.lost)
    assert (tmp_path / "yolo/labels/train/b.txt").read_text().count("\n") == 1
    assert not any("twice" in line for line in convert(coco.root, tmp_path / "voc", to="voc").lost)


@pytest.mark.parametrize("to", FORMATS)
def test_what_does_not_read_back_is_not_kept(
    source: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setitem(_WRITERS, to, replace(_WRITERS[to], count=lambda record: 7))
    with pytest.raises(DrkdError, match=r"new: .*'train': expected 3 images and 21 boxes, found 3 and [34]"):
        convert(source, tmp_path / "new", to=to)
    monkeypatch.setitem(_WRITERS, to, replace(_WRITERS[to], write=lambda root, parts: None))
    with pytest.raises(DrkdError, match=f"does not read back.*new: no {to.upper()} annotations"):
        convert(source, tmp_path / "new", to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_trainval_of_voc_is_train_elsewhere(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "voc", to="voc")
    lists = tmp_path / "voc/ImageSets/Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    for to, name in (("yolo", "train"), ("coco", "train"), ("voc", "trainval")):
        convert(tmp_path / "voc", tmp_path / "new" / to, to=to)
        assert len(load_split(tmp_path / "new" / to, name)) == 3


def test_an_image_outside_of_its_folder_is_written_within_the_target(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for folder, name in (("images/a", "one.png"), ("payload", "two.png")):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(root / folder / name)
    (root / "labels/a").mkdir(parents=True)
    (root / "labels/a/one.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    folders = "[images/a, images/a/../../payload, images/a/../../../data/payload]"
    (root / "data.yaml").write_text(f"path: {root}\ntrain: {folders}\nval: images/a\nnames: [cat]\n")
    for to in FORMATS:
        target = tmp_path / "place" / to / "inner"
        convert(root, target, to=to)
        assert [entry.name for entry in target.parent.iterdir()] == ["inner"]
        assert list(target.rglob("*two*.png"))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_follow_the_turn_of_an_image(tmp_path: Path, orientation: int, suffix: str) -> None:
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[4:12, 6:18] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "coco/train").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / f"coco/train/a{suffix}", exif=exif)
    document = {
        "images": [{"id": 1, "file_name": f"a{suffix}", "height": 40, "width": 60}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [6, 4, 12, 8]}],
        "categories": [{"id": 1, "name": "patch"}],
    }
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "coco/annotations/instances_train.json").write_text(json.dumps(document))
    (stored,) = load_split(tmp_path / "coco", "train").records
    convert(tmp_path / "coco", tmp_path / "yolo", to="yolo")
    (shown,) = load_split(tmp_path / "yolo", "train").records
    picture = decode_image(shown.path, shown.size, turned=True)[0]
    left, top, right, bottom = (round(value) for value in shown.boxes[0].tolist())
    assert bool((picture[top:bottom, left:right] == 255).all()) and int((picture == 255).sum()) == 96
    assert (right - left) * (bottom - top) == 96
    again = as_stored(shown)
    assert torch.allclose(again.boxes, stored.boxes) and again.size == stored.size and not again.turned
    assert torch.equal(as_shown(stored).boxes, turn_boxes(stored.boxes, (40, 60), orientation))
    with pytest.raises(DrkdError, match=rf"a\{suffix}: the image is 60 x 40 px, but .* say 61 x 40"):
        as_shown(replace(stored, size=(40, 61)))


def test_the_target_is_written_at_once_or_not_at_all(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("drkd.data.convert.shutil.copyfile", fail)
    with pytest.raises(DrkdError, match="cannot be written there"):
        convert(source, tmp_path / "new", to="yolo")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_targets_that_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(DrkdError, match="exists already and is not empty"):
        convert(source, tmp_path / "full", to="yolo")
    with pytest.raises(DrkdError, match="lies within the data set"):
        convert(source, source / "new", to="yolo")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert convert(source, tmp_path / "empty", to="voc").target == tmp_path / "empty"
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o755


def test_a_source_with_errors_is_not_converted(coco: CocoFolder, tmp_path: Path) -> None:
    coco.document["images"][0]["file_name"] = "../a.png"
    coco.write()
    with pytest.raises(DrkdError, match="leads out of the image folder"):
        convert(coco.root, tmp_path / "new", to="yolo")
    assert not (tmp_path / "new").exists()


def test_a_source_whose_images_do_not_fit_their_annotations_is_not_converted(coco: CocoFolder, tmp_path: Path) -> None:
    for entry in coco.document["images"]:
        entry["width"], entry["height"] = 40, 60
    coco.document["annotations"] = coco.document["annotations"][2:]
    coco.write()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(check_data(coco.root).errors) == 2
    for to in FORMATS:
        with pytest.raises(DrkdError, match=r"has 2 errors: image 7: a\.png: .*60 x 40.*; image 3: b\.png: .*60 x 40"):
            convert(coco.root, tmp_path / "new", to=to)
    for entry in coco.document["images"]:
        entry["width"], entry["height"] = 60, 40
    coco.write()
    (coco.images / "b.png").write_bytes((coco.images / "b.png").read_bytes()[:3000])
    with pytest.raises(DrkdError, match=r"has 1 error: image 3: b\.png: the image cannot be decoded"):
        convert(coco.root, tmp_path / "new", to="yolo")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_class_name_that_voc_cannot_hold(coco: CocoFolder, tmp_path: Path) -> None:
    coco.document["categories"][0]["name"] = "a\nb"
    coco.write()
    with pytest.raises(DrkdError, match="VOC cannot hold the class name"):
        convert(coco.root, tmp_path / "new", to="voc")
    coco.document["categories"][0]["name"] = "<&> no"
    coco.write()
    convert(coco.root, tmp_path / "new", to="voc")
    assert "<&> no" in load_split(tmp_path / "new", "train").class_names


def test_files_of_several_formats_need_a_choice(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "yolo", to="yolo")
    # Of another tool.
    for text in ("owner: me\nversion: 3\n", "- one\n"):
        (source / "dataset.yaml").write_text(text)
        assert len(load_split(source, "train")) == 3
        with pytest.raises(DrkdError, match=r"dataset\.yaml"):
            load_split(source, "train", format="yolo")
    (source / "dataset.yaml").write_text("names: [x]\n")
    with pytest.raises(DrkdError, match=r"dataset\.yaml: names no split"):
        load_split(source, "train")
    (source / "dataset.yaml").unlink()
    (source / "data.yaml").write_text("train: train\nnames: [x]\n")
    with pytest.raises(DrkdError, match=r"files of several formats \(coco, yolo\).*data\.format"):
        load_split(source, "train")
    assert len(load_split(source, "train", format="coco")) == 3
    with pytest.raises(DrkdError, match="no VOC annotations found"):
        load_split(source, "train", format="voc")


def test_trainval_does_not_take_the_images_of_val_along(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "voc", to="voc")
    lists = tmp_path / "voc/ImageSets/Main"
    own, other = (lists / "train.txt").read_text(), (lists / "val.txt").read_text()
    (lists / "train.txt").unlink()
    (lists / "trainval.txt").write_text(own + other)
    converted = convert(tmp_path / "voc", tmp_path / "yolo", to="yolo")
    assert dict(converted.images) == {"train": 3, "val": 3}
    assert "train: 3 of the 6 images of trainval, which other splits have too" in converted.lost
    (lists / "trainval.txt").write_text(other)
    with pytest.raises(DrkdError, match=r"/voc: every image of its list trainval is in another split too"):
        convert(tmp_path / "voc", tmp_path / "coco", to="coco")


def test_a_split_may_lack_a_class_that_is_kept(source: Path, tmp_path: Path) -> None:
    file = source / "annotations/instances_val.json"
    document = json.loads(file.read_text())
    document["categories"] = [entry for entry in document["categories"] if entry["name"] != "dog"]
    document["annotations"] = [entry for entry in document["annotations"] if entry["category_id"] != 18]
    file.write_text(json.dumps(document))
    convert(source, tmp_path / "new", to="yolo", classes=["dog", "brush"])
    assert load_split(tmp_path / "new", "val").class_names == ("dog", "brush")


def test_classes_are_those_of_train_whatever_test_has(source: Path, tmp_path: Path) -> None:
    """`test` comes first by name; it may lack a class, and have others in another order."""
    shutil.copytree(source / "val", source / "test")
    train = load_split(source, "train").class_names
    document = json.loads((source / "annotations/instances_val.json").read_text())
    document["categories"] = [entry for entry in document["categories"] if entry["name"] != "dog"][::-1]
    document["annotations"] = [entry for entry in document["annotations"] if entry["category_id"] != 18]
    for record in document["categories"]:
        record["id"] += 100
    for box in document["annotations"]:
        box["category_id"] += 100
    (source / "annotations/instances_test.json").write_text(json.dumps(document))
    before = load_split(source, "test")
    convert(source, tmp_path / "new", to="yolo")
    for name in ("train", "val", "test"):
        assert load_split(tmp_path / "new", name).class_names == train
    assert content(load_split(tmp_path / "new", "test"), crowds=False) == content(before, crowds=False)
