"""The VOC reader: layouts, pixel coordinates, difficult objects, and what it says of every way a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drkd.contracts import DrkdError
from drkd.data.dataset import find_splits, load_split
from drkd.data.formats.reading import find_sources, scan_source
from drkd.data.formats.source import SplitScan
from drkd.data.formats.xml import parse_xml

_OBJECT = """
  <object>
    <name>dog</name>
    <pose>Left</pose>
    <difficult>0</difficult>
    <bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>15</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  </object>"""
_HARD = """
  <object>
    <name>cat</name>
    <difficult>1</difficult>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>60</xmax><ymax>40</ymax></bndbox>
  </object>"""
_SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"


def document(name: str, objects: str = _OBJECT, *, size: str = _SIZE) -> str:
    return f"<annotation>\n  <filename>{name}</filename>\n  {size}{objects}\n</annotation>\n"


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """The challenge's layout: two training images of 60 x 40 px, one with an ordinary and a difficult object."""
    root = tmp_path / "data"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, objects in (("a", _OBJECT + _HARD), ("b", ""), ("c", _OBJECT)):
        write_image(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(document(f"{name}.jpg", objects))
    (root / "ImageSets/Main/train.txt").write_text("a\nb\n")
    (root / "ImageSets/Main/val.txt").write_text("c\n")
    (root / "ImageSets/Main/trainval.txt").write_text("a\nb\nc\n")
    (root / "ImageSets/Main/dog_train.txt").write_text("a  1\nb -1\n")
    return root


def scan(root: Path, split: str = "train") -> SplitScan:
    return scan_source(find_sources(root)[split])


def change(root: Path, old: str, new: str, *, name: str = "a") -> Path:
    file = root / "Annotations" / f"{name}.xml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return file


def test_reads_boxes_that_count_from_one_and_ignores_difficult_objects(voc: Path) -> None:
    split = load_split(voc, "train")
    assert (split.class_names, split.category_ids) == (("cat", "dog"), ())
    first, second = split.records
    assert first.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 60, 40]]
    assert first.labels.tolist() == [1, 0]
    assert first.crowd.tolist() == [False, True]
    assert first.areas.tolist() == [200, 2400]
    assert (first.size, first.path) == ((40, 60), voc / "JPEGImages/a.jpg")
    assert second.boxes.shape == (0, 4)
    assert not scan(voc).problems
    assert sorted(find_splits(voc)) == ["train", "trainval", "val"]
    assert len(load_split(voc, "trainval")) == 3


def test_fractions_and_single_pixels(voc: Path) -> None:
    change(voc, "<xmin>11</xmin><ymin>6</ymin><xmax>30</xmax>", "<xmin>11.5</xmin><ymin>15</ymin><xmax>30.25</xmax>")
    assert load_split(voc, "train").records[0].boxes[0].tolist() == [10.5, 14, 30.25, 15]


def test_classes_agree_between_splits_and_a_class_file_orders_them(voc: Path) -> None:
    # No image of val shows a cat.
    assert load_split(voc, "val").class_names == ("cat", "dog")
    (voc / "classes.txt").write_text("dog\n\nowl\ncat\n")
    split = load_split(voc, "train")
    assert split.class_names == ("dog", "owl", "cat") and split.records[0].labels.tolist() == [0, 2]
    (voc / "classes.txt").write_text("dog\n")
    (found,) = scan(voc).problems
    assert (found.severity, found.record, found.field) == ("error", "object 2 (line 11)", "name")
    assert "there is no class 'cat'" in found.message
    (voc / "classes.txt").write_text("dog\ndog\n")
    with pytest.raises(DrkdError, match=r"classes\.txt.*'dog' is there twice"):
        scan(voc)


def test_a_year_below_the_folder_and_annotations_beside_images(voc: Path, tmp_path: Path) -> None:
    kit = tmp_path / "VOCdevkit"
    kit.mkdir()
    voc.rename(kit / "VOC2007")
    assert len(load_split(kit, "train")) == 2
    (kit / "VOC2012/ImageSets/Main").mkdir(parents=True)
    with pytest.raises(DrkdError, match=r"several VOC data sets \(VOC2007, VOC2012\)"):
        find_sources(kit)
    flat = tmp_path / "flat"
    for split in ("train", "valid", "trainval"):
        write_image(flat / split / "a.jpg")
        (flat / split / "a.xml").write_text(document("a.jpg"))
    write_image(flat / "train" / "lonely.png")
    assert len(load_split(flat, "val").records[0].boxes) == len(load_split(flat, "trainval").records[0].boxes) == 1
    (found,) = scan(flat).problems
    assert (found.severity, found.record) == ("warning", "lonely.png")


def test_the_size_comes_from_the_image_where_the_file_says_none(voc: Path) -> None:
    change(voc, _SIZE, "<size><width>0</width><height>0</height></size>")
    change(voc, _SIZE, "", name="b")
    assert [record.size for record in load_split(voc, "train").records] == [(40, 60), (40, 60)]


def test_a_renamed_image_is_found_by_the_name_of_its_file(voc: Path) -> None:
    change(voc, "a.jpg", "camera-0001.jpg")
    assert load_split(voc, "train").records[0].path.name == "a.jpg"


@pytest.mark.parametrize("name", ["/somewhere/me/a.jpg", "C:\\me\\a.jpg", "C:/me/a.jpg", "\\\\server\\me\\a.jpg"])
def test_of_a_path_on_another_machine_the_last_part_counts(voc: Path, name: str) -> None:
    change(voc, "a.jpg", name)
    file = voc / "Annotations/a.xml"
    file.rename(file.with_name("z.xml"))
    (voc / "ImageSets/Main/train.txt").write_text("z\n")
    assert load_split(voc, "train").records[0].path == voc / "JPEGImages/a.jpg"
    change(voc, "a.jpg", "b_.jpg", name="z")
    (found,) = scan(voc).problems
    assert (found.severity, found.field) == ("error", "filename")


@pytest.mark.parametrize("ending", [".JPG", ".Png", ".TIF"])
def test_an_image_is_found_by_the_name_of_its_file_whatever_its_ending(voc: Path, ending: str) -> None:
    change(voc, "a.jpg", "a")
    (voc / "JPEGImages/a.jpg").rename(voc / f"JPEGImages/a{ending}")
    assert load_split(voc, "train").records[0].path.name == f"a{ending}"


def test_what_macos_leaves_beside_files_is_none_of_them(voc: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    write_image(flat / "a.jpg")
    (flat / "a.xml").write_text(document("a.jpg"))
    for name in ("._a.jpg", "._a.xml", "._b.png"):
        (flat / name).write_bytes(b"\0\5\x16\7")
    found = scan(flat.parent)
    assert len(found.split) == 1 and not found.problems
    assert load_split(flat.parent, "train").class_names == ("dog",)


def test_marks_of_the_byte_order_are_no_content(voc: Path) -> None:
    (voc / "ImageSets/Main/train.txt").write_text("a\nb\n", encoding="utf-8-sig")
    (voc / "classes.txt").write_text("dog\ncat\n", encoding="utf-8-sig")
    split = load_split(voc, "train")
    assert len(split) == 2 and split.class_names == ("dog", "cat")


_XML = [
    ("<name>dog</name>", "<name></name>", "object 1 (line 4)", "name", "expected a class name, got nothing"),
    ("<name>dog</name>", "", "object 1 (line 4)", "name", "is missing"),
    ("<difficult>0<", "<difficult>2<", "object 1 (line 4)", "difficult", "expected 0 or 1, got str '2'"),
    (">11<", ">nan<", "object 1 (line 4), line 8", "xmin", "expected a finite number of px, got str 'nan'"),
    (">11<", ">1e400<", "object 1 (line 4), line 8", "xmin", "expected a finite number of px"),
    (">11<", "><", "object 1 (line 4), line 8", "xmin", "got str ''"),
    ("<xmax>30</xmax>", "", "object 1 (line 4), line 8", "xmax", "is missing"),
    (">11<", ">40<", "object 1 (line 4)", "bndbox", "expected xmin <= xmax and ymin <= ymax, got 40, 6, 30, 15"),
    (">11<", ">61<", "object 1 (line 4)", "bndbox", "expected xmin <= xmax"),
    ("<width>60<", "<width>sixty<", "line 3", "width", "expected a positive integer, got str 'sixty'"),
    (">a.jpg<", ">../a.jpg<", "line 2", "filename", "'../a.jpg' leads out of the image folder"),
    (">a.jpg<", ">/etc/passwd<", "line 2", "filename", "leads out of the image folder"),
    ("annotation>", "thing>", "line 1", "", "expected <annotation>, got <thing>"),
    ("</object>", "", "", "", "no well-formed XML (line 1"),
]


@pytest.mark.parametrize(("old", "new", "record", "field", "message"), _XML, ids=[case[4][:40] for case in _XML])
def test_a_wrong_xml_is_an_error_that_names_its_line(
    voc: Path, old: str, new: str, record: str, field: str, message: str
) -> None:
    file = voc / "Annotations/a.xml"
    file.write_text(file.read_text().replace(old, new, 2 if old == "annotation>" else 1))
    found = next(problem for problem in scan(voc).problems if problem.severity == "error")
    assert (found.file, found.record, found.field) == (file, record, field)
    assert message in found.message
    with pytest.raises(DrkdError, match=r"a\.xml"):
        load_split(voc, "train")


def test_boxes_outside_overhanging_and_of_no_area(voc: Path) -> None:
    file = change(voc, "<xmin>11</xmin><ymin>6</ymin><xmax>30</xmax>", "<xmin>70</xmin><ymin>6</ymin><xmax>80</xmax>")
    assert [(p.severity, p.file, p.field) for p in scan(voc).problems] == [("error", file, "bndbox")]
    assert "lies outside its image of 60 x 40 px" in scan(voc).problems[0].message
    change(voc, "<xmin>70</xmin>", "<xmin>50</xmin>")
    assert (scan(voc).clipped, scan(voc).problems[0].severity) == (1, "warning")
    change(voc, "<xmin>50</xmin>", "<xmin>81</xmin>")
    assert (scan(voc).dropped, scan(voc).problems[0].severity) == (1, "warning")


def test_lists_that_name_nothing_twice_or_something_outside(voc: Path) -> None:
    (voc / "ImageSets/Main/train.txt").write_text("a 1\n../Annotations/b\ngone\na\n")
    outside, gone, twice = scan(voc).problems
    assert (outside.severity, outside.record) == ("error", "line 2") and "leads out" in outside.message
    assert (gone.severity, gone.record) == ("error", "line 3") and "no annotation file" in gone.message
    assert (twice.severity, twice.record) == ("warning", "line 4") and "listed twice" in twice.message
    (voc / "ImageSets/Main/train.txt").write_text("\n")
    (empty,) = scan(voc).problems
    assert empty.severity == "error" and "the split is empty" in empty.message


def test_missing_images_and_two_files_of_one_image(voc: Path) -> None:
    (voc / "JPEGImages/b.jpg").unlink()
    (found,) = scan(voc).problems
    assert (found.severity, found.field) == ("error", "filename") and "no image file" in found.message
    change(voc, "b.jpg", "a.jpg", name="b")
    (found,) = scan(voc).problems
    assert found.severity == "warning" and "is the image of a.xml too" in found.message


_BOMB = """<?xml version="1.0"?>
<!DOCTYPE lolz [
  <!ENTITY a "lol">
  <!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
]>
<annotation><filename>&b;</filename></annotation>
"""
_LOOK = '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]>\n<annotation><filename>&f;</filename></annotation>'


@pytest.mark.parametrize("text", [_BOMB, _LOOK], ids=["bomb", "other file"])
def test_entities_are_never_expanded(voc: Path, text: str) -> None:
    file = voc / "Annotations/a.xml"
    file.write_text(text)
    with pytest.raises(DrkdError, match=r"a\.xml: line \d: the file declares a document type") as caught:
        parse_xml(file)
    assert "root:" not in str(caught.value)
    assert scan(voc).problems[0].severity == "error"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no element found"),
        (b"<a>" * 100, "nested too deeply"),
        (b"\xff\xfe<", "XML"),
        (b'<?xml version="1.0" encoding="nonsense"?><a/>', "encoding"),
        (b"<a>&undefined;</a>", "undefined entity"),
    ],
)
def test_other_hostile_xml(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.xml").write_bytes(content)
    with pytest.raises(DrkdError, match=message):
        parse_xml(tmp_path / "x.xml")


def test_elements_know_their_lines(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text("<a>\n<b> one\n</b>\n<b>&lt;two</b><c/>\n</a>", encoding="utf-8")
    tree = parse_xml(tmp_path / "x.xml")
    assert [(child.tag, child.line, child.text) for child in tree.children] == [
        ("b", 2, "one"),
        ("b", 4, "<two"),
        ("c", 4, ""),
    ]
    assert tree.first("b") is tree.all("b")[0] and tree.first("d") is None


def test_a_name_too_long_for_a_file_is_no_file(voc: Path) -> None:
    (voc / "Annotations/a.xml").write_text(document("a" * 3000))
    (voc / "ImageSets/Main/train.txt").write_text(f"a\nb\n{'c' * 3000}\n")
    found = [problem.message for problem in scan(voc).problems]
    assert len(found) == 1 and "there is no annotation file" in found[0]


def test_two_lists_of_one_split_are_refused(voc: Path) -> None:
    (voc / "ImageSets/Main/validation.txt").write_text("b\n")
    with pytest.raises(DrkdError, match=r"val\.txt and .*validation\.txt are both the split 'val'"):
        find_sources(voc)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "a.jpg")
        (tmp_path / name / "a.xml").write_text(document("a.jpg"))
    with pytest.raises(DrkdError, match=r"val and .*valid are both the split 'val'"):
        find_sources(tmp_path)


def test_the_class_file_may_lie_in_the_folder_that_was_named(voc: Path) -> None:
    (voc.parent / "kit").mkdir()
    voc.rename(voc.parent / "kit/VOC2012")
    (voc.parent / "kit/classes.txt").write_text("dog\nowl\ncat\n")
    assert load_split(voc.parent / "kit", "train").class_names == ("dog", "owl", "cat")
    assert load_split(voc.parent / "kit/VOC2012", "train").class_names == ("cat", "dog")
