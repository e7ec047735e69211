"""The COCO reader: what it returns, and what it says of every way a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import pytest
import torch

from drkd.contracts import DrkdError
from drkd.data.dataset import load_split
from drkd.data.formats import source
from drkd.data.formats.coco import read_coco, scan_coco

if TYPE_CHECKING:
    from tests.data.conftest import CocoFolder

Change = Callable[[dict[str, Any]], None]


def test_reads_boxes_labels_and_crowds(coco: CocoFolder) -> None:
    split = read_coco(coco.annotations, coco.images)

    assert split.name == "train"
    assert split.class_names == ("bicycle", "dog", "brush")
    assert split.category_ids == (2, 18, 90)
    assert [record.image_id for record in split.records] == [7, 3]
    first, second = split.records
    assert first.path == coco.images / "a.png"
    assert first.size == (40, 60)
    assert first.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 60, 40]]
    assert first.labels.tolist() == [1, 0]
    assert first.crowd.tolist() == [False, True]
    assert first.areas.tolist() == [150, 2400.5]
    assert second.boxes.tolist() == [[1.5, 2.5, 4.5, 6.5]]
    assert second.areas.tolist() == [12.0]  # without "area" the box's own
    assert (first.boxes.dtype, first.labels.dtype, first.crowd.dtype, first.areas.dtype) == (
        torch.float32,
        torch.int64,
        torch.bool,
        torch.float32,
    )


def test_keeps_an_image_without_boxes(coco: CocoFolder) -> None:
    coco.document["annotations"] = coco.document["annotations"][:2]
    coco.write()

    second = read_coco(coco.annotations, coco.images).records[1]

    assert second.boxes.shape == (0, 4)
    assert second.labels.shape == second.crowd.shape == second.areas.shape == (0,)


def test_a_split_without_any_box_is_a_warning(coco: CocoFolder) -> None:
    coco.document["annotations"] = []
    coco.write()

    scan = scan_coco(coco.annotations, coco.images)

    assert [(p.severity, p.field) for p in scan.problems] == [("warning", "annotations")]
    assert [record.boxes.shape for record in scan.split.records] == [(0, 4), (0, 4)]


def test_ignores_polygons_and_masks(coco: CocoFolder) -> None:
    coco.document["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    coco.document["annotations"][1]["segmentation"] = {"counts": "xyz", "size": [40, 60]}
    coco.write()

    assert not scan_coco(coco.annotations, coco.images).problems


def test_reads_images_in_sub_folders(coco: CocoFolder) -> None:
    coco.write_image("deep/c.png")
    coco.document["images"][0]["file_name"] = "deep/c.png"
    coco.write()

    assert read_coco(coco.annotations, coco.images).records[0].path == coco.images / "deep" / "c.png"


@pytest.mark.parametrize(
    ("box", "kept", "dropped", "clipped"),
    [
        ([50, 30, 30, 30], [50, 30, 60, 40], 0, 1),
        ([-5, -5, 15, 15], [0, 0, 10, 10], 0, 1),
        ([50, 30, 10.5, 10.5], [50, 30, 60, 40], 0, 0),  # rounding: clipped without a word
        ([10, 10, 0, 5], None, 1, 0),
        ([10, 10, 5, 0.0], None, 1, 0),
        ([10, 10, 1e-9, 5], None, 1, 0),
    ],
)
def test_clips_overhanging_and_drops_flat_boxes(
    coco: CocoFolder, box: list[float], kept: list[float] | None, dropped: int, clipped: int
) -> None:
    coco.document["annotations"][2]["bbox"] = box
    coco.write()

    scan = scan_coco(coco.annotations, coco.images)

    assert scan.split.records[1].boxes.tolist() == ([] if kept is None else [kept])
    assert (scan.dropped, scan.clipped) == (dropped, clipped)
    assert [(p.severity, p.record, p.field) for p in scan.problems] == [("warning", "annotation 3", "bbox")] * (
        dropped + clipped
    )


def _set(section: str, index: int, field: str, value: object) -> Change:
    def change(document: dict[str, Any]) -> None:
        document[section][index][field] = value

    return change


def _remove(section: str, index: int, field: str) -> Change:
    def change(document: dict[str, Any]) -> None:
        del document[section][index][field]

    return change


def _put(section: str, value: object) -> Change:
    def change(document: dict[str, Any]) -> None:
        document[section] = value

    return change


_ERRORS: list[tuple[str, Change, str, str, str]] = [
    ("missing image file", _set("images", 0, "file_name", "gone.png"), "image 7", "file_name", "no image file"),
    ("climbs out", _set("images", 0, "file_name", "../x/a.png"), "image 7", "file_name", "leads out"),
    ("climbs out, backslash", _set("images", 0, "file_name", "..\\a.png"), "image 7", "file_name", "leads out"),
    ("absolute path", _set("images", 0, "file_name", "/etc/passwd"), "image 7", "file_name", "leads out"),
    ("too long in bytes", _set("images", 0, "file_name", "\u4e2d" * 100 + ".png"), "image 7", "file_name", "too long"),
    ("half a character", _set("images", 0, "file_name", "\ud800.png"), "image 7", "file_name", "that none can have"),
    ("null byte", _set("images", 0, "file_name", "a\0.png"), "image 7", "file_name", "leads out"),
    (
        "file name is a number",
        _set("images", 0, "file_name", 5),
        "image 7",
        "file_name",
        "expected a file name, got int 5",
    ),
    ("no file name", _remove("images", 0, "file_name"), "image 7", "file_name", "is missing"),
    ("no width", _remove("images", 0, "width"), "image 7", "width", "is missing"),
    ("width is text", _set("images", 0, "width", "60"), "image 7", "width", "positive integer, got str '60'"),
    ("height is zero", _set("images", 0, "height", 0), "image 7", "height", "positive integer, got int 0"),
    ("height is boolean", _set("images", 0, "height", True), "image 7", "height", "positive integer, got bool True"),
    ("image id is text", _set("images", 1, "id", "3"), "image at position 1", "id", "an integer, got str '3'"),
    ("no image id", _remove("images", 1, "id"), "image at position 1", "id", "is missing"),
    ("two images, one id", _set("images", 1, "id", 7), "image 7", "id", "used twice"),
    ("image id of 65 bits", _set("images", 0, "id", 2**64), "image at position 0", "id", "an integer of at most 2**62"),
    ("image is a list", _put("images", [[1]]), "image at position 0", "", "JSON object, got list [1]"),
    ("no images", _put("images", []), "", "images", "at least one image"),
    ("no categories", _put("categories", []), "", "categories", "at least one category"),
    ("two categories, one id", _set("categories", 0, "id", 2), "category 2", "id", "used twice"),
    ("two categories, one name", _set("categories", 0, "name", "dog"), "category 18", "name", "another category"),
    ("category without name", _remove("categories", 0, "name"), "category 90", "name", "expected a name"),
    ("category with empty name", _set("categories", 0, "name", " "), "category 90", "name", "expected a name"),
    ("two annotations, one id", _set("annotations", 1, "id", 1), "annotation 1", "id", "used twice"),
    ("no annotation id", _remove("annotations", 1, "id"), "annotation at position 1", "id", "is missing"),
    ("annotation is text", _put("annotations", ["x"]), "annotation at position 0", "", "JSON object, got str 'x'"),
    (
        "unknown category",
        _set("annotations", 0, "category_id", 5),
        "annotation 1",
        "category_id",
        "no category with id 5",
    ),
    (
        "category is text",
        _set("annotations", 0, "category_id", "18"),
        "annotation 1",
        "category_id",
        "an integer, got str",
    ),
    ("unknown image", _set("annotations", 0, "image_id", 99), "annotation 1", "image_id", "no image with id 99"),
    ("image of annotation missing", _remove("annotations", 0, "image_id"), "annotation 1", "image_id", "is missing"),
    ("no box", _remove("annotations", 0, "bbox"), "annotation 1", "bbox", "is missing"),
    (
        "box of three numbers",
        _set("annotations", 0, "bbox", [1, 2, 3]),
        "annotation 1",
        "bbox",
        "[x, y, width, height]",
    ),
    ("box of text", _set("annotations", 0, "bbox", [1, 2, 3, "4"]), "annotation 1", "bbox", "[x, y, width, height]"),
    ("box is null", _set("annotations", 0, "bbox", None), "annotation 1", "bbox", "[x, y, width, height]"),
    ("NaN", _set("annotations", 0, "bbox", [1, 2, float("nan"), 4]), "annotation 1", "bbox", "finite"),
    ("infinite", _set("annotations", 0, "bbox", [1, 2, float("inf"), 4]), "annotation 1", "bbox", "finite"),
    ("too long for a float", _set("annotations", 0, "bbox", [1, 2, 10**400, 4]), "annotation 1", "bbox", "finite"),
    ("negative width", _set("annotations", 0, "bbox", [1, 2, -3, 4]), "annotation 1", "bbox", "must not be negative"),
    (
        "outside, right",
        _set("annotations", 0, "bbox", [60, 2, 3, 4]),
        "annotation 1",
        "bbox",
        "outside its image of 60 x 40",
    ),
    (
        "outside, above",
        _set("annotations", 0, "bbox", [5, -9, 3, 4]),
        "annotation 1",
        "bbox",
        "outside its image of 60 x 40",
    ),
    ("area is negative", _set("annotations", 0, "area", -1), "annotation 1", "area", ">= 0"),
    ("area is NaN", _set("annotations", 0, "area", float("nan")), "annotation 1", "area", "finite"),
    ("area is text", _set("annotations", 0, "area", "9"), "annotation 1", "area", "got str '9'"),
    ("crowd is two", _set("annotations", 0, "iscrowd", 2), "annotation 1", "iscrowd", "expected 0 or 1, got int 2"),
]


@pytest.mark.parametrize(
    ("change", "record", "field", "message"), [e[1:] for e in _ERRORS], ids=[e[0] for e in _ERRORS]
)
def test_an_error_names_file_record_and_field(
    coco: CocoFolder, change: Change, record: str, field: str, message: str
) -> None:
    change(coco.document)
    coco.write()

    found = scan_coco(coco.annotations, coco.images).problems[0]

    assert (found.severity, found.file, found.record, found.field) == ("error", coco.annotations, record, field)
    assert message in found.message
    with pytest.raises(DrkdError) as caught:
        read_coco(coco.annotations, coco.images)
    assert str(coco.annotations) in str(caught.value)
    assert record in str(caught.value)
    assert message in str(caught.value)


_FATAL = [
    ("truncated", '{"images": [{"id": 1', "no complete JSON (line 1"),
    ("empty file", "", "no complete JSON"),
    ("not an object", "[]", "got a JSON list"),
    ("no images", '{"annotations": [], "categories": []}', "'images' is missing"),
    ("no annotations", '{"images": [], "categories": []}', "'annotations' is missing"),
    ("categories an object", '{"images": [], "annotations": [], "categories": {}}', "must be a list, got dict {}"),
]


def test_an_area_of_zero_is_that_of_the_clipped_box(coco: CocoFolder) -> None:
    coco.document["annotations"] = [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [10, 5, 20, 10], "area": 0},
        {"id": 2, "image_id": 7, "category_id": 18, "bbox": [50, 30, 20, 20], "area": 0.0},
        {"id": 3, "image_id": 3, "category_id": 90, "bbox": [50, 30, 20, 20]},
        {"id": 4, "image_id": 3, "category_id": 90, "bbox": [50, 30, 20, 20], "area": 7},
    ]
    coco.write()
    found = scan_coco(coco.annotations, coco.images)
    assert [record.areas.tolist() for record in found.split.records] == [[200, 100], [100, 7]]
    (warning,) = (problem for problem in found.problems if problem.field == "area")
    assert (warning.severity, warning.record) == ("warning", "annotation 1")
    assert "is 0 in 2 annotations whose boxes have an extent" in warning.message


@pytest.mark.parametrize(
    ("folder", "prefix"), [("train", "train/"), ("images", "images/"), ("images/train", "train/"), (".", "")]
)
def test_names_may_be_relative_to_any_of_the_folders(coco: CocoFolder, folder: str, prefix: str) -> None:
    names = [entry["file_name"] for entry in coco.document["images"]]
    for entry in coco.document["images"]:
        target = coco.root / folder / entry["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        (coco.images / entry["file_name"]).rename(target)
        entry["file_name"] = f"{prefix}{entry['file_name']}"
    coco.images.mkdir(exist_ok=True)
    coco.write()
    records = load_split(coco.root, "train").records
    assert [record.path for record in records] == [coco.root / folder / name for name in names]
    # Written on Windows.
    for entry in coco.document["images"]:
        entry["file_name"] = entry["file_name"].replace("/", "\\")
    coco.write()
    assert [record.path for record in load_split(coco.root, "train").records] == [record.path for record in records]


def test_one_stray_image_does_not_choose_the_folder(coco: CocoFolder) -> None:
    first, *others = [entry["file_name"] for entry in coco.document["images"]]
    (coco.images / first).rename(coco.root / first)
    with pytest.raises(DrkdError, match=f"{coco.images.name}/{first}"):
        load_split(coco.root, "train")
    assert others


def test_a_second_category_of_one_name_is_left_out_if_nothing_has_it(coco: CocoFolder) -> None:
    coco.document["categories"] = [{"id": number, "name": "dog"} for number in (0, 1)]
    for used in (0, 1):
        for entry in coco.document["annotations"]:
            entry["category_id"] = used
        coco.write()
        found = scan_coco(coco.annotations, coco.images)
        assert (found.split.class_names, found.split.category_ids) == (("dog",), (used,))
        (warning,) = found.problems
        assert (warning.severity, warning.record, warning.field) == ("warning", "category 1", "name")
        assert f"category {1 - used}, which no annotation has, is left out" in warning.message
    coco.document["annotations"][0]["category_id"] = 0
    coco.write()
    (error,) = scan_coco(coco.annotations, coco.images).problems
    assert error.severity == "error" and "is the name of another category too" in error.message


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in _FATAL], ids=[case[0] for case in _FATAL])
def test_an_unreadable_file_is_one_error(coco: CocoFolder, text: str, message: str) -> None:
    coco.write_text(text)

    with pytest.raises(DrkdError) as caught:
        read_coco(coco.annotations, coco.images)

    assert str(coco.annotations) in str(caught.value)
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_an_error(coco: CocoFolder) -> None:
    coco.annotations.write_bytes(b"\xff\xfe\x00\x80 junk")

    with pytest.raises(DrkdError, match="instances_train"):
        read_coco(coco.annotations, coco.images)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match="no such annotation file"):
        read_coco(tmp_path / "x.json", tmp_path)


def test_all_errors_are_found_at_once_and_counted(coco: CocoFolder) -> None:
    for index, box in enumerate(([0, 0, -1, 1], [70, 0, 2, 2], [0, 0])):
        coco.document["annotations"][index]["bbox"] = box
    coco.document["images"][1]["file_name"] = "gone.png"
    coco.write()

    with pytest.raises(DrkdError, match=r"has 4 errors.*and 1 more.*drkd data check"):
        read_coco(coco.annotations, coco.images)


def test_two_images_of_one_file_are_a_warning(coco: CocoFolder) -> None:
    coco.document["images"][1]["file_name"] = "a.png"
    coco.write()

    (found,) = scan_coco(coco.annotations, coco.images).problems

    assert (found.severity, found.record) == ("warning", "image 3")


def test_true_counts_as_a_crowd_flag(coco: CocoFolder) -> None:
    coco.document["annotations"][0]["iscrowd"] = True
    coco.write_text(json.dumps(coco.document))

    assert read_coco(coco.annotations, coco.images).records[0].crowd.tolist() == [True, True]


@pytest.mark.parametrize(("name", "leads"), [("C:x.png", True), ("x.png", False), ("deep\\x.png", False)])
def test_a_drive_alone_leads_out_of_the_folder_on_windows(
    name: str, leads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "Path", PureWindowsPath)
    assert source.leads_out(name) is leads
