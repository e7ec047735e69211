"""`check_data`: every finding at once, counts, and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from PIL import Image

from drkd.contracts import DrkdError
from drkd.data.check import check_data
from drkd.data.dataset import load_split
from drkd.data.picture import DEFAULT_PICTURE, draw_samples

if TYPE_CHECKING:
    from pathlib import Path

    from tests.data.conftest import CocoFolder


def _add_val(coco: CocoFolder, *, prefix: str = "") -> None:
    for image in coco.document["images"]:
        image["file_name"] = prefix + image["file_name"]
        coco.write_image(image["file_name"], split="val")
    coco.write(split="val")


def test_counts(coco: CocoFolder) -> None:
    coco.document["annotations"] += [
        {"id": 4, "image_id": 3, "category_id": 2, "bbox": [1, 1, 0, 3]},
        {"id": 5, "image_id": 3, "category_id": 2, "bbox": [50, 1, 30, 3]},
    ]
    coco.document["images"].append({"id": 8, "file_name": "c.png", "height": 40, "width": 60, "background": "sky"})
    coco.write_image("c.png")
    coco.write()

    report = check_data(coco.root)

    (split,) = report.splits
    assert (split.name, split.images, split.empty_images, split.boxes, split.crowds) == ("train", 3, 1, 4, 1)
    assert (split.dropped, split.clipped) == (1, 1)
    assert split.boxes_per_class == {"bicycle": 2, "dog": 1, "brush": 1}
    assert split.boxes_per_size == {"small": 3, "medium": 1, "large": 0}
    assert split.boxes_per_image == {0: 1, 2: 2}
    assert split.backgrounds == {"sky": 1}
    assert not report.errors
    assert len(report.warnings) == 2
    text = str(report)
    for part in ("3 images (1 without boxes)", "bicycle 2", "0 errors, 2 warnings", "annotation 4, field 'bbox'"):
        assert part in text


def test_lists_problems_of_annotations_and_images_together(coco: CocoFolder) -> None:
    coco.document["annotations"][0]["category_id"] = 4
    coco.document["images"].append({"id": 8, "file_name": "c.png", "height": 40, "width": 60})
    coco.write()
    coco.write_image("c.png", size=(40, 61))
    (coco.images / "a.png").write_bytes((coco.images / "a.png").read_bytes()[:3000])

    report = check_data(coco.root)

    assert [problem.record for problem in report.errors] == ["annotation 1", "image 7", "image 8"]
    assert "a.png: the image cannot be decoded" in report.errors[1].message
    assert "61 x 40 px" in report.errors[2].message


def test_sizes_are_checked_beyond_the_decoded_images_too(coco: CocoFolder) -> None:
    coco.write_image("b.png", size=(40, 61))

    (problem,) = check_data(coco.root, decode=0).errors

    assert (problem.record, "say 60 x 40" in problem.message) == ("image 3", True)


def test_the_decoded_images_are_spread_and_counted(coco: CocoFolder) -> None:
    for number, name in enumerate(("c.jpg", "d.jpg"), start=8):
        coco.document["images"].append({"id": number, "file_name": name, "height": 40, "width": 60})
        coco.write_image(name)
    coco.write()
    # Half of it: a JPEG's header is whole still.
    (coco.images / "c.jpg").write_bytes((coco.images / "c.jpg").read_bytes()[:1500])

    for decode, found in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 1), ("all", 1)):
        report = check_data(coco.root, decode=decode)  # type: ignore[arg-type]
        assert len(report.errors) == found
        count = 4 if decode == "all" else decode
        assert report.splits[0].decoded == count
        assert (f"decoded {count} of 4 images, of the others the headers" in str(report)) is (count != 4)
    with pytest.raises(DrkdError, match="decode: expected a number of images of at least 0, or all, got -1"):
        check_data(coco.root, decode=-1)


def test_a_broken_file_does_not_hide_the_other_splits(coco: CocoFolder) -> None:
    coco.write_text("{", split="val")

    report = check_data(coco.root)

    assert [split.name for split in report.splits] == ["train"]
    assert [problem.file.name for problem in report.errors] == ["instances_val.json"]
    assert "no complete JSON" in report.errors[0].message


def test_classes_that_differ_between_splits(coco: CocoFolder) -> None:
    coco.document["categories"][0]["name"] = "comb"
    _add_val(coco, prefix="v")

    (problem,) = check_data(coco.root).errors

    assert (problem.file.name, problem.field) == ("instances_val.json", "categories")
    assert "'comb': not among the classes of 'train'" in problem.message


def test_fewer_classes_are_a_warning(coco: CocoFolder) -> None:
    coco.document["categories"] = coco.document["categories"][:1]
    coco.document["annotations"] = coco.document["annotations"][2:]
    _add_val(coco, prefix="v")

    report = check_data(coco.root)

    assert not report.errors
    assert "mapped by name" in report.warnings[0].message


def test_an_image_in_two_splits_is_a_warning(coco: CocoFolder) -> None:
    (coco.root / "images").mkdir()
    (coco.images).rename(coco.root / "images" / "all")
    for image in coco.document["images"]:
        image["file_name"] = "all/" + image["file_name"]
    coco.write()
    coco.write(split="val")

    report = check_data(coco.root)

    assert not report.errors
    assert [problem.record for problem in report.warnings] == ["image 7", "image 3"]
    assert "in the split 'train' too" in report.warnings[0].message


def test_chosen_splits(coco: CocoFolder) -> None:
    coco.write_text("{", split="val")

    assert not check_data(coco.root, splits=["train"]).problems
    with pytest.raises(DrkdError, match="no split 'tune'"):
        check_data(coco.root, splits=["tune"])


def test_no_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match="no COCO, YOLO or VOC annotations found"):
        check_data(tmp_path)


def test_draws_a_picture_of_samples(coco: CocoFolder, tmp_path: Path) -> None:
    (coco.images / "b.png").write_bytes(b"junk")  # a bad image leaves a grey square

    report = check_data(coco.root, picture=tmp_path / "new" / "samples.png")

    assert report.picture == tmp_path / "new" / "samples.png"
    with Image.open(report.picture) as picture:
        assert picture.size == (4 * 260, 260)
    assert [path.name for path in report.picture.parent.iterdir()] == ["samples.png"]


def test_a_picture_that_nobody_asked_for_loses_no_finding(
    coco: CocoFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drkd.data.picture.tempfile.mkstemp", refuse)
    found = check_data(coco.root, picture=DEFAULT_PICTURE)
    assert found.picture is None and len(found.splits) == len(check_data(coco.root).splits) > 0
    assert "the picture cannot be written" in str(found.problems[-1]) and found.problems[-1].severity == "warning"


def test_a_picture_replaces_an_earlier_one_and_nothing_else(coco: CocoFolder, tmp_path: Path) -> None:
    own = tmp_path / "samples.png"
    for _ in range(2):
        assert check_data(coco.root, picture=own).picture == own
    # An earlier version's has no mark, but the name.
    Image.new("RGB", (4, 4)).save(tmp_path / DEFAULT_PICTURE)
    assert check_data(coco.root, picture=tmp_path / DEFAULT_PICTURE).picture is not None
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.png").symlink_to(own)
    for path in (coco.images / "a.png", coco.annotations, tmp_path / "notes.txt", tmp_path / "link.png", tmp_path):
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(DrkdError, match=f"{path.name}: exists already and is no picture that `drkd data check`"):
            check_data(coco.root, picture=path)
        assert (path.read_bytes() if path.is_file() else b"") == before


def test_boxes_are_drawn_where_they_are(coco: CocoFolder) -> None:
    coco.document["annotations"] = coco.document["annotations"][:1]
    coco.document["images"] = coco.document["images"][:1]
    coco.document["images"][0]["width"] = 60
    coco.write()
    Image.new("RGB", (60, 40)).save(coco.images / "a.png")

    picture = draw_samples([load_split(coco.root, "train")], cell=240)

    assert picture.getpixel((40 + 60, 5 * 4)) == (77, 255, 77) or sum(picture.getpixel((110, 59))) > 300  # four times
    assert sum(picture.getpixel((80, 40))) == 0  # the inside stays as it is


def test_an_unwritable_picture_is_an_error(coco: CocoFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DrkdError, match="picture cannot be written"):
        check_data(coco.root, picture=tmp_path / "file" / "x.png")


def test_classes_without_a_box_to_train_on_and_near_names_are_said(coco: CocoFolder) -> None:
    coco.document["categories"] += [{"id": 8, "name": "Dog "}, {"id": 9, "name": "owl"}]
    coco.write()
    report = check_data(coco.root)
    assert not report.errors
    texts = [problem.message for problem in report.warnings if problem.field == "categories"]
    assert texts == [
        "'Dog ' and 'dog' are classes of their own; is one misspelt?",
        "no box to train on: 'Dog ', 'owl'",
    ]
