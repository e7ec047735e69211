"""The YOLO reader: layouts, what lines mean, and what it says of every way that a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drkd.contracts import DrkdError
from drkd.data.check import check_data
from drkd.data.convert import convert
from drkd.data.dataset import DetectionDataset, find_splits, load_split
from drkd.data.formats.reading import find_sources, read_source, scan_source
from drkd.data.formats.source import SplitScan
from drkd.data.module import DetectionDataModule
from drkd.data.transforms import eval_transforms

_YAML = "train: images/train\nval: images/val\nnames: [cat, dog]\n"


def write_image(path: Path, size: tuple[int, int] = (40, 60), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Two training images of 60 x 40 px, one with two boxes, and a validation image."""
    root = tmp_path / "data"
    for name in ("train/a.png", "train/b.png", "val/c.png"):
        write_image(root / "images" / name)
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "labels/train/a.txt").write_text("1 0.5 0.25 0.5 0.5\n0 0.25 0.5 0.1 0.2\n")
    (root / "labels/val/c.txt").write_text("0 0.5 0.5 1 1\n")
    (root / "data.yaml").write_text(_YAML)
    return root


def scan(root: Path, split: str = "train") -> SplitScan:
    return scan_source(find_sources(root)[split])


def test_reads_boxes_labels_and_images_without_any(yolo: Path) -> None:
    split = load_split(yolo, "train")
    assert (split.class_names, split.category_ids) == (("cat", "dog"), (0, 1))
    first, second = split.records
    assert (first.image_id, first.path, first.size) == (1, yolo / "images/train/a.png", (40, 60))
    assert first.boxes.tolist() == [[15, 0, 45, 20], [12, 16, 18, 24]]
    assert first.labels.tolist() == [1, 0] and not first.crowd.any()
    assert first.areas.tolist() == [600, 48]
    assert second.boxes.shape == (0, 4)
    assert not scan(yolo).problems


@pytest.mark.parametrize(
    ("names", "expected", "ids"),
    [
        ("{0: cat, 1: dog}", ("cat", "dog"), (0, 1)),
        ("{1: dog, 0: cat}", ("cat", "dog"), (0, 1)),
        ("{'0': cat, '1': dog}", ("cat", "dog"), (0, 1)),
        ("{0: cat, 1: dog, 7: owl}", ("cat", "dog", "owl"), (0, 1, 7)),
        ("[0, 1]", ("0", "1"), (0, 1)),
    ],
)
def test_class_names_as_list_or_numbers(
    yolo: Path, names: str, expected: tuple[str, ...], ids: tuple[int, ...]
) -> None:
    (yolo / "data.yaml").write_text(f"train: images/train\nnames: {names}\n")
    split = load_split(yolo, "train")
    assert (split.class_names, split.category_ids) == (expected, ids)


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("path: .\ntrain: images/train\nnames: [cat, dog]", "data.yaml"),
        ("path: ../data\ntrain: [images/train]\nnames: [cat, dog]", "data.yaml"),
        ("path: not-here\ntrain: images/train\nnames: [cat, dog]", "data.yaml"),
        ("train: ../images/train\nnames: [cat, dog]", "data.yaml"),  # Roboflow's exports
        ("train: train.txt\nnames: [cat, dog]", "data.yaml"),
        ("train: images\\train\nnames: [cat, dog]", "pets.yml"),
    ],
)
def test_splits_as_folders_lists_and_relative_paths(yolo: Path, text: str, file: str) -> None:
    (yolo / "train.txt").write_text("./images/train/a.png\n\nimages/train/b.png\n")
    (yolo / "data.yaml").unlink()
    (yolo / file).write_text(text)
    assert [record.path.name for record in load_split(yolo, "train").records] == ["a.png", "b.png"]
    assert len(load_split(yolo, "train").records[0].boxes) == 2


def test_an_absolute_path_and_the_file_itself_as_root(yolo: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "pets.yaml"
    file.parent.mkdir()
    file.write_text(f"path: {yolo}\n{_YAML}test:\n")
    assert sorted(find_splits(file)) == ["train", "val"]
    assert len(load_split(file, "train").records[0].boxes) == 2


def test_labels_beside_images_where_no_folder_is_called_so(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("train: train\nnames: [cat]\n")
    assert load_split(tmp_path, "train").records[0].boxes.tolist() == [[15, 10, 45, 30]]


@pytest.mark.parametrize("suffix", [".jp2", ".jfif", ".JPE"])
def test_images_of_rarer_endings_are_found(yolo: Path, suffix: str) -> None:
    before = len(scan(yolo).split)
    write_image(yolo / "images" / "train" / f"rare{suffix}")
    assert len(scan(yolo).split) == before + 1


def test_hidden_folders_hold_no_background(yolo: Path) -> None:
    write_image(yolo / "images/train/.ipynb_checkpoints/a-checkpoint.png")
    (yolo / "labels/train/._a.txt").write_bytes(b"\0\5\x16\7")  # what macOS leaves on other systems' disks
    found = scan(yolo)
    assert [record.path.name for record in found.split.records] == ["a.png", "b.png"] and not found.problems


def test_images_without_a_label_file_are_counted(yolo: Path) -> None:
    report = check_data(yolo)
    (warning,) = report.problems
    assert (warning.severity, warning.file, warning.field) == ("warning", yolo / "data.yaml", "train")
    assert f"1 of 2 images have no label file (first: {yolo / 'images/train/b.png'})" in warning.message
    assert "2 images (1 without boxes, 1 of them without a label file)" in str(report)
    (yolo / "labels/train/b.txt").touch()
    assert not check_data(yolo).problems and "2 images (1 without boxes)" in str(check_data(yolo))


def test_unreadable_images_are_left_out_where_that_is_asked_for(yolo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = yolo / "images/train/0.png"
    broken.write_bytes(b"no picture")
    (yolo / "labels/train/0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DrkdError, match=r"image images/train/0\.png: the image cannot be read"):
        _ = DetectionDataModule(str(yolo)).train_split
    data = DetectionDataModule(str(yolo), unreadable="skip")
    records = data.train_split.records
    # The others are what they are without it being left out: their ids too.
    assert [(record.image_id, record.path.name) for record in records] == [(2, "a.png"), (3, "b.png")]
    assert records[0].boxes.tolist() == [[15, 0, 45, 20], [12, 16, 18, 24]]
    assert data.unreadable_files() == [str(broken)] == data.state_dict()["unreadable"]
    assert f"drkd: left out (1): {broken}: the image cannot be read" in capsys.readouterr().err
    # Nothing but what cannot be read is skipped, and not all of it.
    (yolo / "labels/train/b.txt").write_text("9 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DrkdError, match=r"has 1 error: .*no class 9"):
        _ = DetectionDataModule(str(yolo), unreadable="skip").train_split
    for name in ("a", "b"):
        (yolo / f"images/train/{name}.png").write_bytes(b"no picture")
    with pytest.raises(DrkdError, match="has 4 errors"):
        _ = DetectionDataModule(str(yolo), unreadable="skip").train_split
    # Evaluation fails whatever is done in training.
    (yolo / "images/val/c.png").write_bytes(b"no picture")
    with pytest.raises(DrkdError, match=r"c\.png"):
        _ = DetectionDataModule(str(yolo), unreadable="skip", class_names=("cat", "dog")).val_split


def test_many_unreadable_images_are_no_matter_of_single_files(yolo: Path) -> None:
    """A disk that is gone, or half a copy: not what skipping is for."""
    picture = (yolo / "images/train/a.png").read_bytes()
    for number in range(17):
        (yolo / f"images/train/bad{number:02}.png").write_bytes(b"no picture")
    with pytest.raises(DrkdError, match=r"bad00\.png: .*So it is with 17 of 19 images: data\.unreadable: skip is for"):
        _ = DetectionDataModule(str(yolo), unreadable="skip").train_split
    for number in range(160):
        (yolo / f"images/train/good{number:03}.png").write_bytes(picture)
    assert len(DetectionDataModule(str(yolo), unreadable="skip").train_split) == 162


def test_a_test_split_that_is_not_there_is_left_out_with_a_word(yolo: Path, tmp_path: Path) -> None:
    (yolo / "data.yaml").write_text(f"{_YAML}test: ../test/images\n")
    (yolo / "labels/train/b.txt").touch()
    assert sorted(find_splits(yolo)) == ["train", "val"]
    (warning,) = check_data(yolo).problems
    assert (warning.severity, warning.field) == ("warning", "test") and "no folder or text file" in warning.message
    converted = convert(yolo, tmp_path / "coco", to="coco")
    assert set(converted.images) == {"train", "val"}
    assert any(line.startswith("test: the split: there is no folder or text file") for line in converted.lost)
    # Where it is asked for it is an error, and so is a training split that is not there.
    assert check_data(yolo, splits=["test"]).errors
    with pytest.raises(DrkdError, match=r"'test': there is no folder or text file"):
        load_split(yolo, "test")
    (yolo / "data.yaml").write_text("train: nowhere\nval: images/val\nnames: [cat, dog]\n")
    assert check_data(yolo).errors
    (yolo / "data.yaml").write_text("test: nowhere\nnames: [cat, dog]\n")
    with pytest.raises(DrkdError, match="no split that its files name is there"):
        convert(yolo, tmp_path / "none", to="coco")


def test_marks_of_the_byte_order_are_no_content(yolo: Path) -> None:
    for file, text in (
        (yolo / "data.yaml", "train: train.txt\nnames: [cat, dog]\n"),
        (yolo / "train.txt", "images/train/a.png\n"),
        (yolo / "labels/train/a.txt", "1 0.5 0.25 0.5 0.5\n"),
    ):
        file.write_text(text, encoding="utf-8-sig")
    (record,) = load_split(yolo, "train").records
    assert record.boxes.tolist() == [[15, 0, 45, 20]]


def test_labels_are_found_where_path_itself_is_the_folder_of_images(yolo: Path) -> None:
    (yolo / "data.yaml").write_text("path: images\ntrain: train\nval: val\nnames: [cat, dog]\n")
    assert [len(record.boxes) for record in load_split(yolo, "train").records] == [2, 0]
    assert not scan(yolo).problems


def test_a_folder_called_images_above_the_data_set_means_nothing(tmp_path: Path) -> None:
    root = tmp_path / "images" / "data"
    write_image(root / "train" / "a.png")
    (root / "train" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "data.yaml").write_text("train: train\nnames: [cat]\n")
    assert load_split(root, "train").records[0].boxes.tolist() == [[15, 10, 45, 30]]


def test_a_list_may_name_images_elsewhere_in_full_as_entries_may_folders(yolo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "images" / "z.png"
    write_image(other)
    (tmp_path / "other" / "labels").mkdir()
    (tmp_path / "other" / "labels" / "z.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (yolo / "data.yaml").write_text("train: train.txt\nnames: [cat, dog]\n")
    (yolo / "train.txt").write_text(f"{other}\nimages/train/a.png\n{tmp_path / 'gone.png'}\n")
    found = scan(yolo)
    assert [record.path for record in found.split.records] == [other, yolo / "images/train/a.png"]
    assert found.split.records[0].boxes.tolist() == [[15, 10, 45, 30]]
    (error,) = found.problems
    assert error.record == "line 3" and f"there is no image file {tmp_path / 'gone.png'}" in error.message


def test_polygons_become_their_boxes_and_key_points_are_ignored(yolo: Path) -> None:
    (yolo / "labels/train/a.txt").write_text("0 0.25 0.25 0.75 0.25 0.5 0.75\n1 0.5 0.5 0.5 0.5 0.6 0.5 0.5 0.9\n")
    assert load_split(yolo, "train").records[0].boxes.tolist() == [[15, 10, 45, 30], [30, 20, 36, 36]]
    (yolo / "data.yaml").write_text(f"{_YAML}kpt_shape: [1, 2]\n")
    (yolo / "labels/train/a.txt").write_text("0 0.5 0.5 0.5 0.5 0.1 0.1\n")
    (yolo / "labels/val/c.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    assert load_split(yolo, "train").records[0].boxes.tolist() == [[15, 10, 45, 30]]
    assert "6 numbers" not in str(scan(yolo).problems)
    assert "(7 numbers)" in str(scan(yolo, "val").problems[0])


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_boxes_are_those_of_the_image_as_viewers_show_it(tmp_path: Path, orientation: int) -> None:
    # A bright patch whose box is right only on the image turned as its EXIF data say.
    pixels = np.zeros((40, 60), dtype=np.uint8)
    pixels[4:12, 6:18] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png", exif=exif)
    shown = {1: pixels, 3: np.rot90(pixels, 2), 6: np.rot90(pixels, -1)}[orientation]
    rows, columns = np.nonzero(shown)
    height, width = shown.shape
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text(f"0 {x} {y} {(box[2] - box[0]) / width} {(box[3] - box[1]) / height}\n")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [patch]\n")

    split = load_split(tmp_path, "train")
    sample = DetectionDataset(split, eval_transforms(min_size=min(height, width)))[0]

    assert split.records[0].size == (height, width)
    left, top, right, bottom = (round(value) for value in sample.targets.boxes[0].tolist())
    assert (left, top, right, bottom) == box
    assert bool((sample.image[:, top:bottom, left:right] == 1).all()) and int((sample.image[0] == 1).sum()) == 96


_LINES = [
    ("1 0.5 0.5 0.5", "line 1", "", "expected class x y width height (5 numbers) or a polygon, got 4 numbers"),
    ("1 0.5 0.5 0.5 0.5 0.9", "line 1", "", "got 6 numbers"),
    ("\n1 0.5 x 0.5 0.5", "line 2", "", "expected numbers: class x y width height, got str 'x'"),
    ("5 0.5 0.5 0.5 0.5", "line 1", "class", "there is no class 5 in 'names' (classes 0..1)"),
    ("-1 0.5 0.5 0.5 0.5", "line 1", "class", "there is no class -1"),
    ("0.5 0.5 0.5 0.5 0.5", "line 1", "class", "there is no class 0.5"),
    ("nan 0.5 0.5 0.5 0.5", "line 1", "class", "there is no class nan"),
    ("1 nan 0.5 0.5 0.5", "line 1", "box", "expected finite numbers"),
    ("1 0.5 0.5 inf 0.5", "line 1", "box", "expected finite numbers"),
    ("1 30 20 15 15", "line 1", "box", "shares of the image in [0, 1], got 30; are these px?"),
    ("1 0.5 0.5 -0.005 0.5", "line 1", "box", "must not be negative"),
    ("1 1.005 0.5 0.001 0.5", "line 1", "box", "lies outside its image of 60 x 40 px"),
]


@pytest.mark.parametrize(("text", "record", "field", "message"), _LINES, ids=[case[0].strip() for case in _LINES])
def test_a_wrong_line_is_an_error_that_names_it(yolo: Path, text: str, record: str, field: str, message: str) -> None:
    file = yolo / "labels/train/a.txt"
    file.write_text(f"{text}\n")
    (found,) = scan(yolo).problems
    assert (found.severity, found.file, found.record, found.field) == ("error", file, record, field)
    assert message in found.message
    with pytest.raises(DrkdError) as caught:
        load_split(yolo, "train")
    assert str(file) in str(caught.value) and record in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kept", "counts", "message"),
    [
        ("0 0.5 0.5 0 0.5", 0, (1, 0), "has no area; it is left out"),
        ("0 1 0.5 0.5 0.5", 1, (0, 1), "overhangs its image of 60 x 40 px; it is clipped"),
        ("0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5", 1, (0, 0), "the same box as in line 1; it is left out"),
    ],
)
def test_what_can_be_handled_is_a_warning(
    yolo: Path, text: str, kept: int, counts: tuple[int, int], message: str
) -> None:
    (yolo / "labels/train/a.txt").write_text(f"{text}\n")
    found = scan(yolo)
    assert len(found.split.records[0].boxes) == kept
    assert (found.dropped, found.clipped) == counts
    assert [problem.severity for problem in found.problems] == ["warning"] and message in found.problems[0].message


_FILES = [
    ("names: [cat]\n", "names no split"),
    ("train: images/train\n", "field 'names': expected a list of class names or numbers with names, got NoneType"),
    ("train: images/train\nnames: []\n", "field 'names': expected at least one class"),
    ("train: images/train\nnames: [cat, cat]\n", "field 'names': class 1 'cat' is there twice"),
    ("train: images/train\nnames: {x: cat}\n", "field 'names': expected class numbers"),
    ("train: images/train\nnames: [yes, no]\n", "expected a name (in quotes), got bool True"),
    ("train: images/train\nnames: [cat, dog]\nnc: 3\n", "field 'nc': says int 3, but 'names' has 2 classes"),
    ("train: 5\nnames: [cat]\n", "field 'train': expected a folder, a text file or a list of such, got int 5"),
    ("train: images/train\ntraining: x\nnames: [cat]\n", "the split 'train' is given twice"),
    ("train: images/train\nnames: [cat]\nkpt_shape: 3\n", "field 'kpt_shape': expected two positive integers"),
    ("path: /no/such/folder\ntrain: images/train\nnames: [cat]\n", "field 'path': there is no folder"),
    ("path: 3\ntrain: images/train\nnames: [cat]\n", "field 'path': expected a folder"),
    ("train: [\n", "this is not valid YAML (line 2"),
    ("train: images/train\nnames: {0: cat, 1: dog, 1: bird}\n", "the key '1' is there twice"),
    ("- 1\n", "expected a mapping with 'names', 'train' and 'val', got list"),
]


@pytest.mark.parametrize(("text", "message"), _FILES, ids=[case[1][:40] for case in _FILES])
def test_a_wrong_data_yaml_is_one_error(yolo: Path, text: str, message: str) -> None:
    (yolo / "data.yaml").write_text(text)
    with pytest.raises(DrkdError) as caught:
        find_sources(yolo)
    assert str(yolo / "data.yaml") in str(caught.value) and message in str(caught.value)


def test_a_split_that_leads_nowhere_and_an_empty_one(yolo: Path) -> None:
    (yolo / "data.yaml").write_text("train: images/gone\nval: images/empty\nnames: [cat]\n")
    (yolo / "images/empty").mkdir()
    assert "there is no folder or text file" in str(scan(yolo).problems[0])
    (found,) = scan(yolo, "val").problems
    assert found.severity == "error" and "the split is empty" in found.message


@pytest.mark.parametrize("line", ["../other.png", "/etc/passwd", "images/../../other.png", "a\0.png"])
def test_a_list_must_stay_in_the_data_set(yolo: Path, line: str) -> None:
    write_image(yolo.parent / "other.png")
    (yolo / "lists").mkdir()
    (yolo / "data.yaml").write_text("path: .\ntrain: train.txt\nnames: [cat, dog]\n")
    (yolo / "train.txt").write_text(f"{line}\nimages/train/gone.png\n")
    outside, gone = scan(yolo).problems[:2]
    assert (outside.severity, outside.record) == ("error", "line 1") and "leads out of the data set" in outside.message
    assert (gone.severity, gone.record) == ("error", "line 2") and "there is no image file" in gone.message


def test_label_files_and_images_that_do_not_go_together(yolo: Path) -> None:
    (yolo / "labels/train/z.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (yolo / "labels/train/classes.txt").write_text("cat\ndog\n")
    write_image(yolo / "images/train/a.jpg")
    (yolo / "images/train/broken.png").write_bytes(b"no picture")
    found = {problem.message[:30]: problem for problem in scan(yolo).problems}
    assert found["there is no image for this lab"].file == yolo / "labels/train/z.txt"
    assert any("has the label file of a.jpg too" in problem.message for problem in found.values())
    (error,) = (problem for problem in found.values() if problem.severity == "error")
    assert "broken.png" in error.record and "cannot be read" in error.message
    assert len(found) == 3


def test_no_label_file_at_all_is_an_error_and_no_box_a_warning(yolo: Path) -> None:
    (yolo / "labels/train/a.txt").write_text("\n")
    (found,) = scan(yolo).problems
    assert (found.severity, found.message) == ("warning", "no image of the split has a box")
    (yolo / "labels/train/a.txt").unlink()
    (found,) = scan(yolo).problems
    assert found.severity == "error" and "none of the 2 images has a label file" in found.message
    assert str(yolo / "labels/train/a.txt") in found.message


def test_an_image_listed_twice_is_used_once(yolo: Path) -> None:
    (yolo / "data.yaml").write_text("train: [images/train, images/train]\nnames: [cat, dog]\n")
    found = scan(yolo)
    assert len(found.split) == 2
    assert [problem.severity for problem in found.problems] == ["warning"] * 2


def test_two_data_files_are_an_error_unless_one_is_called_so(yolo: Path) -> None:
    (yolo / "more.yaml").write_text(_YAML)
    assert sorted(find_splits(yolo)) == ["train", "val"]
    (yolo / "data.yaml").rename(yolo / "other.yaml")
    with pytest.raises(DrkdError, match=r"two YOLO data files: more\.yaml and other\.yaml"):
        find_sources(yolo)


def test_a_label_file_of_bytes_that_are_no_text(yolo: Path) -> None:
    (yolo / "labels/train/a.txt").write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read" in str(scan(yolo).problems[0])
    with pytest.raises(DrkdError, match="has 1 error"):
        read_source(find_sources(yolo)["train"])


@pytest.mark.parametrize("field", ["train", "path"])
def test_a_name_too_long_for_a_file_is_no_file(yolo: Path, field: str) -> None:
    name = "a" * 3000
    text = f"{_YAML}path: {name}\n" if field == "path" else _YAML.replace("images/train", name)
    (yolo / "data.yaml").write_text(text)
    if field == "path":
        assert len(load_split(yolo, "train").records) == 2
        return
    with pytest.raises(DrkdError, match="there is no folder or text file"):
        load_split(yolo, "train")


def test_a_data_set_of_a_name_too_long_for_a_file_is_none(tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match="there is no such folder"):
        find_sources(tmp_path / ("a" * 3000))


def test_a_split_of_no_folder_is_none(yolo: Path) -> None:
    (yolo / "data.yaml").write_text(_YAML.replace("images/val", "[]"))
    assert list(find_sources(yolo)) == ["train"]


def test_folders_that_are_links_count_too_and_each_once(yolo: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk"
    write_image(elsewhere / "images" / "d.png")
    (yolo / "images/train/part").symlink_to(elsewhere / "images", target_is_directory=True)
    (yolo / "labels/train/part").mkdir()
    (yolo / "labels/train/part/d.txt").write_text("0 0.5 0.5 1 1\n")
    (elsewhere / "images" / "back").symlink_to(yolo / "images/train", target_is_directory=True)
    names = [record.path.relative_to(yolo / "images/train").as_posix() for record in load_split(yolo, "train").records]
    assert names == ["a.png", "b.png", "part/d.png"]


def test_a_path_that_leads_nowhere_is_said(yolo: Path) -> None:
    (yolo / "data.yaml").write_text("path: ../datasets/birds\n" + _YAML)
    (problem,) = scan(yolo).problems
    assert (problem.severity, problem.field) == ("warning", "path")
    assert "there is no folder ../datasets/birds; the file's own" in problem.message
    (yolo / "data.yaml").write_text("path: ../datasets/birds\n" + _YAML.replace("images/train", "images/trai"))
    with pytest.raises(DrkdError, match=r"no folder or text .*images/trai; the field 'path' \(\.\./datasets/birds\)"):
        load_split(yolo, "train")


@pytest.mark.parametrize(("link", "target", "boxes"), [("extra", "", 1), ("far.png", "far.png", 0)])
def test_images_behind_a_link_have_the_labels_there_if_the_folder_is_the_link(
    link: str, target: str, boxes: int, yolo: Path, tmp_path: Path
) -> None:
    """A linked image without a label file is background here, whatever it is where the link leads."""
    elsewhere = tmp_path / "disk" / "set"
    write_image(elsewhere / "images" / "far.png")
    (elsewhere / "labels").mkdir()
    (elsewhere / "labels" / "far.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (yolo / "images/train" / link).symlink_to(elsewhere / "images" / target)
    (record,) = (record for record in scan(yolo).split.records if record.path.stem == "far")
    assert len(record.labels) == boxes


def test_a_lost_path_does_not_hide_that_nothing_is_labelled(yolo: Path) -> None:
    for file in (yolo / "labels/train").iterdir():
        file.write_text("")
    text = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").write_text("path: ../datasets/birds\n" + text)
    messages = [problem.message for problem in scan(yolo).problems]
    assert any("there is no folder" in message for message in messages)
    assert "no image of the split has a box" in messages
