"""Reads and validates Pascal VOC data sets: an XML file an image, and lists of the images of each split."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from drkd.contracts import DrkdError, Size
from drkd.data.formats.source import BoxRows, Findings, SplitScan, SplitSource, is_file, leads_out, shorten, split_name
from drkd.data.formats.xml import Element, parse_xml
from drkd.data.image import IMAGE_SUFFIXES, read_image_size
from drkd.data.split import DatasetSplit

EXPECTED = (
    "VOC: ImageSets/Main/train.txt with Annotations/*.xml and JPEGImages/, or train/*.xml beside the images, and the "
    "same for val"
)

_CLASS_FILES = ("classes.txt", "labels.txt")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_HUGE = 10**9


def find(root: Path) -> dict[str, SplitSource]:
    """Find the splits of a VOC folder; none where the folder is of another format.

    Two layouts are known: that of the challenge (``ImageSets/Main/SPLIT.txt``, also inside one folder ``VOC*``), and
    ``SPLIT/*.xml`` beside the images (Roboflow). SPLIT is train, tune, val, test or trainval.

    Raises:
        DrkdError: If there are several years below the folder, or two lists or folders of one split.
    """
    if not root.is_dir():
        return {}
    years = [folder for folder in sorted(root.glob("VOC*")) if (folder / "ImageSets" / "Main").is_dir()]
    if len(years) > 1 and not (root / "ImageSets").is_dir():
        raise DrkdError(
            f"{root}: holds several VOC data sets ({', '.join(folder.name for folder in years)}). Name one of them."
        )
    base = years[0] if years and not (root / "ImageSets").is_dir() else root
    found: dict[str, SplitSource] = {}
    classes = next((file for place in (base, root) for name in _CLASS_FILES if (file := place / name).is_file()), None)
    for file in sorted((base / "ImageSets" / "Main").glob("*.txt")):
        name = _split_name(file.stem)
        if name is not None:
            _refuse_second(found, name, file)
            found[name] = SplitSource("voc", name, base, file, base / "JPEGImages", class_file=classes)
    if found:
        return found
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        name = _split_name(folder.name)
        if name is not None and _list_xml(folder):
            _refuse_second(found, name, folder)
            found[name] = SplitSource("voc", name, root, folder, folder, class_file=classes)
    return found


def _refuse_second(found: Mapping[str, SplitSource], name: str, file: Path) -> None:
    if name in found:
        raise DrkdError(f"{found[name].file} and {file} are both the split '{name}'; expected one of them.")


def _split_name(stem: str) -> str | None:
    return "trainval" if stem == "trainval" else split_name(stem)


def scan(source: SplitSource) -> SplitScan:
    """Read a split of a VOC data set and return all that is wrong with it beside all that could be read.

    Pixel coordinates count from 1 and include the last one: ``xmin`` 1 and ``xmax`` W are an image of width W. They
    may be fractions. Objects that are ``difficult`` neither train nor count, as in VOC's own evaluation; they are
    matched as COCO matches crowds. Classes are those of ``classes.txt`` (or ``labels.txt``) in the data set's folder
    (the one that was named, or the ``VOC*`` in it), a name a line, or else all that its splits name, sorted.
    """
    return _Scanner(source).scan()


@dataclass(frozen=True)
class _Annotation:
    """An XML file that could be parsed."""

    file: Path
    tree: Element


def label_files(source: SplitSource) -> list[Path]:
    """The XML files of a split."""
    return _Scanner(source).list_files()


class _Scanner:
    """Holds the findings of one split while it is read."""

    def __init__(self, source: SplitSource) -> None:
        self._source = source
        self._found = Findings()
        self._rows = BoxRows()

    def scan(self) -> SplitScan:
        source, found = self._source, self._found
        annotations = [annotation for file in self.list_files() if (annotation := self._parse(file)) is not None]
        listed = None if source.class_file is None else _read_classes(source.class_file)
        names = listed if listed is not None else self._collect_names(annotations)
        labels = {name: label for label, name in enumerate(names)}
        paths: list[Path] = []
        sizes: list[Size] = []
        owners: dict[Path, Path] = {}
        for annotation in annotations:
            image = self._image(annotation)
            size = self._size(annotation, image)
            paths.append(image or source.images)
            sizes.append(size or (0, 0))
            if image is not None and (other := owners.setdefault(image, annotation.file)) != annotation.file:
                text = f"'{image.name}' is the image of {other.name} too"
                found.report(annotation.file, "", "filename", text, severity="warning")
            for number, entry in enumerate(annotation.tree.all("object"), start=1):
                self._read_object(entry, number, annotation.file, len(paths) - 1, labels)
        if not annotations and not found.problems:
            found.report(source.file, "", "", "the split is empty: expected at least one image, found none")
        elif annotations and not self._rows.images and not found.problems:
            found.report(source.file, "", "object", "no image of the split has a box", severity="warning")
        if not names and not found.problems:
            found.report(source.file, "", "name", "no class: no image has an object and there is no classes.txt")
        records = found.make_records(paths, sizes, self._rows, box_field="bndbox", turned=False)
        return found.finish(DatasetSplit(source.name, records, names))

    def list_files(self) -> list[Path]:
        """The XML files of the split; a finding for each that is not there."""
        source, found = self._source, self._found
        if source.file.is_dir():
            files = _list_xml(source.file)
            known = {file.stem for file in files}
            for image in sorted(source.file.iterdir()):
                if image.name.startswith("."):
                    continue
                if image.suffix.lower() in IMAGE_SUFFIXES and image.stem not in known:
                    text = "there is no XML file beside this image; it is left out"
                    found.report(source.file, image.name, "", text, severity="warning")
            return files
        listed: dict[Path, None] = {}
        for line, identifier in _read_list(source.file):
            if leads_out(identifier):
                text = f"'{identifier}' leads out of the folder {source.root / 'Annotations'}"
                found.report(source.file, f"line {line}", "", text)
                continue
            file = source.root / "Annotations" / f"{identifier}.xml"
            # Lists of one class have a flag after the name; names themselves may have spaces.
            if not is_file(file) and (match := re.fullmatch(r"(.+?)\s+(-1|0|1)", identifier)):
                file = source.root / "Annotations" / f"{match[1]}.xml"
            if not is_file(file):
                found.report(source.file, f"line {line}", "", f"there is no annotation file {file}")
            elif file in listed:
                text = f"'{identifier}' is listed twice; it is used once"
                found.report(source.file, f"line {line}", "", text, severity="warning")
            else:
                listed[file] = None
        return list(listed)

    def _parse(self, file: Path) -> _Annotation | None:
        try:
            tree = parse_xml(file)
        except DrkdError as error:
            self._found.report(file, "", "", str(error).removeprefix(f"{file}: "))
            return None
        if tree.tag != "annotation":
            self._found.report(file, f"line {tree.line}", "", f"expected <annotation>, got <{tree.tag}>")
            return None
        return _Annotation(file, tree)

    def _collect_names(self, annotations: list[_Annotation]) -> tuple[str, ...]:
        """All class names of the data set, sorted: those of the other splits too, so that all agree."""
        own = {annotation.file for annotation in annotations}
        names = {name for annotation in annotations for name in _names(annotation.tree)}
        for other in find(self._source.root).values():
            files = _list_xml(other.file) if other.file.is_dir() else self._listed_elsewhere(other.file)
            for file in files:
                if file in own or not is_file(file):
                    continue
                own.add(file)
                try:
                    names.update(_names(parse_xml(file)))
                except DrkdError:
                    continue  # reported where its own split is read
        return tuple(sorted(names))

    def _listed_elsewhere(self, list_file: Path) -> list[Path]:
        folder = self._source.root / "Annotations"
        return [folder / f"{name}.xml" for _, name in _read_list(list_file) if not leads_out(name)]

    def _image(self, annotation: _Annotation) -> Path | None:
        entry = annotation.tree.first("filename")
        folder = self._source.images
        name = entry.text if entry is not None else ""
        where = f"line {entry.line}" if entry is not None else ""
        # Labelling tools write where the image was on their machine: only its last part can mean anything here.
        own = PurePosixPath(name.replace("\\", "/"))
        short = own.name if own.is_absolute() or PureWindowsPath(name).drive else name
        if name and (leads_out(short) or (own.is_absolute() and not is_file(folder / short))):
            self._found.report(annotation.file, where, "filename", f"'{name}' leads out of the image folder {folder}")
            return None
        if short and is_file(folder / short):
            return folder / short
        # Renamed images keep the name of their XML file.
        path = self._images_by_stem.get(annotation.file.stem)
        if path is None:
            expected = short or f"{annotation.file.stem}.jpg"
            self._found.report(annotation.file, where, "filename", f"there is no image file {folder / expected}")
        return path

    @cached_property
    def _images_by_stem(self) -> dict[str, Path]:
        """The image files of the folder by their names without the ending, which may be in capitals; first JPEGs."""
        found: dict[str, Path] = {}
        files = (path for path in self._source.images.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        for path in sorted(files, key=lambda path: (path.suffix != ".jpg", path.suffix.lower(), path.name)):
            if not path.name.startswith(".") and is_file(path):
                found.setdefault(path.stem, path)
        return found

    def _size(self, annotation: _Annotation, image: Path | None) -> Size | None:
        """What the XML says; from the image's header where it says nothing."""
        entry = annotation.tree.first("size")
        values = []
        for field in ("height", "width"):
            child = entry.first(field) if entry is not None else None
            value = _number(child.text) if child is not None else 0.0
            if child is not None and (value is None or not value.is_integer() or not 0 <= value < _HUGE):
                text = f"expected a positive integer, got {shorten(child.text)}"
                self._found.report(annotation.file, f"line {child.line}", field, text)
                return None
            values.append(int(value or 0))
        if all(values):
            return values[0], values[1]
        if image is None:
            return None
        try:
            return read_image_size(image, turned=False)
        except DrkdError as error:
            self._found.report_unreadable(image, annotation.file, image.name, error)
            return None

    def _read_object(self, entry: Element, number: int, file: Path, image: int, labels: dict[str, int]) -> None:
        record = f"object {number} (line {entry.line})"
        name = entry.first("name")
        label = labels.get(name.text) if name is not None else None
        if label is None:
            shown = "is missing" if name is None else f"there is no class {name.text!r} in the data set's class file"
            shown = "expected a class name, got nothing" if name is not None and not name.text else shown
            self._found.report(file, record, "name", shown)
        difficult = self._flag(entry, "difficult", file, record)
        crowd = self._flag(entry, "iscrowd", file, record)
        corners = self._corners(entry, file, record)
        if label is None or difficult is None or crowd is None or corners is None:
            return
        left, top, right, bottom = corners
        box = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        self._rows.add(image, label, box, file=file, place=record, ignored=difficult or crowd)

    def _flag(self, entry: Element, field: str, file: Path, record: str) -> bool | None:
        child = entry.first(field)
        text = child.text.lower() if child is not None else ""
        if text in ("", "0", "false", "1", "true", "unspecified"):
            return text in ("1", "true")
        self._found.report(file, record, field, f"expected 0 or 1, got {shorten(text)}")
        return None

    def _corners(self, entry: Element, file: Path, record: str) -> tuple[float, ...] | None:
        box = entry.first("bndbox")
        if box is None:
            self._found.report(file, record, "bndbox", "is missing")
            return None
        values = []
        for field in _CORNERS:
            child = box.first(field)
            value = _number(child.text) if child is not None else None
            if child is None or value is None or not abs(value) < _HUGE:
                shown = "is missing" if child is None else f"expected a finite number of px, got {shorten(child.text)}"
                self._found.report(file, f"{record}, line {(child or box).line}", field, shown)
                return None
            values.append(value)
        # In whole px a box of one px has equal corners.
        if values[2] < values[0] - 1 or values[3] < values[1] - 1:
            text = f"expected xmin <= xmax and ymin <= ymax, got {', '.join(f'{value:g}' for value in values)}"
            self._found.report(file, record, "bndbox", text)
            return None
        return tuple(values)


def _list_xml(folder: Path) -> list[Path]:
    """The XML files of a folder, hidden ones left out: macOS writes a ``._a.xml`` beside each on foreign disks."""
    return [file for file in sorted(folder.glob("*.xml")) if not file.name.startswith(".")]


def _names(tree: Element) -> list[str]:
    return [name.text for entry in tree.all("object") if (name := entry.first("name")) is not None and name.text]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DrkdError(f"{file}: the file cannot be read ({error}).") from None


def _read_list(file: Path) -> list[tuple[int, str]]:
    """Line number and name of the images of a list."""
    return [(number, line.strip()) for number, line in enumerate(_read_lines(file), start=1) if line.strip()]


def _read_classes(file: Path) -> tuple[str, ...]:
    """The classes of the data set's class file."""
    names = [line.strip() for line in _read_lines(file) if line.strip()]
    if not names or len(set(names)) != len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        wrong = f"'{twice}' is there twice" if twice else "it is empty"
        raise DrkdError(f"{file}: expected a class name a line, each once; {wrong}.")
    return tuple(names)
