"""Reads and validates YOLO data sets: a data.yaml, images, and a text file of boxes for each image."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drkd.contracts import DrkdError, Size
from drkd.data.formats.source import (
    BoxRows,
    Findings,
    SplitScan,
    SplitSource,
    is_file,
    is_folder,
    shorten,
    split_name,
)
from drkd.data.image import IMAGE_SUFFIXES, read_image_size
from drkd.data.image_files import find_image_files
from drkd.data.split import DatasetSplit
from drkd.data.unique_keys import load_yaml

EXPECTED = "YOLO: data.yaml with 'names', 'train' and 'val', and labels/*.txt beside images/"

_SUFFIXES = (".yaml", ".yml")
# Labels are rounded to a few digits; a box may overhang by this share of the image without being in px.
_SLACK = 0.01


@dataclass(frozen=True)
class DataYaml:
    """What a data.yaml says.

    Args:
        file: The file.
        base: The folder that its entries are relative to.
        names: Class name by class number, ascending.
        splits: By split, its entries: folders and text files of image paths.
        keypoint_values: Numbers that follow each box of a key-point data set; 0 where there are none.
        lost_path: What ``path`` says where that leads nowhere, so that ``base`` is the file's own folder.
    """

    file: Path
    base: Path
    names: dict[int, str]
    splits: dict[str, list[str]]
    keypoint_values: int = 0
    lost_path: str = ""


def find(root: Path) -> dict[str, SplitSource]:
    """Find the splits of a YOLO data set, given its folder or its data.yaml; none where there is no such file.

    Raises:
        DrkdError: If there are two such files, or the file is not as expected.
    """
    if root.is_file() and root.suffix.lower() in _SUFFIXES:
        file = root
    else:
        chosen = _list_data_files(root)
        if not chosen:
            return {}
        if len(chosen) > 1:
            raise DrkdError(f"{root}: two YOLO data files: {chosen[0].name} and {chosen[1].name}. Name one of them.")
        file = chosen[0]
    data = read_data_yaml(file)
    return {
        name: SplitSource("yolo", name, root, file, _image_folder(data, entries), _name_absent(data, name, entries))
        for name, entries in data.splits.items()
    }


def means_something_else(root: Path) -> bool:
    """Whether a folder's files that are called as YOLO's are (data.yaml) can be read and say nothing that YOLO's do."""
    files = _list_data_files(root) if root.is_dir() else []
    try:
        contents = [_load(file) for file in files]
    except DrkdError:
        return False
    return bool(files) and not any(
        isinstance(content, dict) and ("names" in content or any(split_name(str(key)) for key in content))
        for content in contents
    )


def _list_data_files(root: Path) -> list[Path]:
    candidates = [path for suffix in _SUFFIXES for path in sorted(root.glob(f"*{suffix}")) if _looks_like_data(path)]
    return [path for path in candidates if path.stem in ("data", "dataset")] or candidates


def read_data_yaml(file: Path) -> DataYaml:
    """Read a data.yaml.

    ``path`` is relative to the file; where it leads nowhere, the file's own folder is meant.

    Raises:
        DrkdError: Naming the file, the field and what was expected.
    """
    content = _load(file)
    if not isinstance(content, dict):
        raise DrkdError(f"{file}: expected a mapping with 'names', 'train' and 'val', got {shorten(content)}.")
    names = _read_names(file, content)
    splits: dict[str, list[str]] = {}
    for key, value in content.items():
        name = split_name(key) if isinstance(key, str) else None
        if name is None or value in (None, "", []):
            continue
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
            raise DrkdError(
                f"{file}: field '{key}': expected a folder, a text file or a list of such, got {shorten(value)}."
            )
        if name in splits:
            raise DrkdError(f"{file}: field '{key}': the split '{name}' is given twice.")
        splits[name] = [entry.replace("\\", "/") for entry in entries]
    if not splits:
        raise DrkdError(f"{file}: names no split; expected 'train' and 'val'.")
    base, lost = _base_folder(file, content)
    return DataYaml(file, base, names, splits, _keypoint_values(file, content), lost)


def scan(source: SplitSource) -> SplitScan:
    """Read a split of a YOLO data set and return all that is wrong with it beside all that could be read.

    Sizes come from the image files, as a viewer shows them (turned by EXIF): so do the boxes. Polygons and oriented
    boxes become their bounding boxes, key points are ignored. An image without a label file has no boxes.

    Raises:
        DrkdError: If the data.yaml cannot be read.
    """
    data = read_data_yaml(source.file)
    return _Scanner(data, source.name).scan()


def label_files(source: SplitSource) -> list[Path]:
    """The label files of a split's images, and the lists that name its images.

    Raises:
        DrkdError: If the data.yaml cannot be read.
    """
    data = read_data_yaml(source.file)
    lists = [_resolve(data, entry) for entry in data.splits.get(source.name, [])]
    images = _Scanner(data, source.name).list_images()
    labels = dict.fromkeys(_label_file(data, image) for image in images)
    return [file for file in (*lists, *labels) if is_file(file)]


def _load(file: Path) -> Any:
    try:
        return load_yaml(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DrkdError(f"{file}: the file cannot be read ({error}).") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise DrkdError(f"{file}: this is not valid YAML{where}: {getattr(error, 'problem', None) or error}.") from None


def _looks_like_data(path: Path) -> bool:
    """Whether a YAML file is a data.yaml rather than something else that lies about; a broken one called so counts."""
    if path.stem in ("data", "dataset"):
        return True
    try:
        content = _load(path)
    except DrkdError:
        return False
    return isinstance(content, dict) and "names" in content and any(split_name(str(key)) for key in content)


def _read_names(file: Path, content: dict[Any, Any]) -> dict[int, str]:
    names = content.get("names")
    if isinstance(names, list):
        pairs: Iterable[tuple[Any, Any]] = enumerate(names)
    elif isinstance(names, dict):
        pairs = names.items()
    else:
        raise DrkdError(
            f"{file}: field 'names': expected a list of class names or numbers with names, got {shorten(names)}."
        )
    found: dict[int, str] = {}
    for key, value in pairs:
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        if type(number) is not int or number < 0:
            raise DrkdError(f"{file}: field 'names': expected class numbers of at least 0, got {shorten(key)}.")
        # Numbers are names of digits; YAML reads an unquoted no, off or n as false.
        if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
            raise DrkdError(
                f"{file}: field 'names': class {number}: expected a name (in quotes), got {shorten(value)}."
            )
        if number in found or str(value) in found.values():
            raise DrkdError(f"{file}: field 'names': class {number} '{value}' is there twice.")
        found[number] = str(value)
    if not found:
        raise DrkdError(f"{file}: field 'names': expected at least one class, got none.")
    if content.get("nc", len(found)) != len(found):
        raise DrkdError(f"{file}: field 'nc': says {shorten(content['nc'])}, but 'names' has {len(found)} classes.")
    return dict(sorted(found.items()))


def _keypoint_values(file: Path, content: dict[Any, Any]) -> int:
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
        raise DrkdError(f"{file}: field 'kpt_shape': expected two positive integers, got {shorten(shape)}.")
    return int(shape[0] * shape[1])


def _base_folder(file: Path, content: dict[Any, Any]) -> tuple[Path, str]:
    """The folder that entries are relative to, and ``path`` where it leads nowhere."""
    path = content.get("path")
    if path is None or path == "":
        return file.parent, ""
    if not isinstance(path, str):
        raise DrkdError(f"{file}: field 'path': expected a folder, got {shorten(path)}.")
    folder = file.parent / path.replace("\\", "/")
    if is_folder(folder):
        return folder, ""
    if Path(path).is_absolute():
        raise DrkdError(f"{file}: field 'path': there is no folder {path}.")
    # Ultralytics looks in a folder of its settings, which we do not know.
    return file.parent, path


def _resolve(data: DataYaml, entry: str) -> Path:
    """An entry of a split. A leading "../" that leads nowhere is dropped: exports of Roboflow have one too many."""
    path, shorter = data.base / entry, data.base / entry.removeprefix("../")
    return shorter if not _is_there(path) and _is_there(shorter) else path


def _is_there(path: Path) -> bool:
    return is_file(path) or is_folder(path)


def _name_absent(data: DataYaml, name: str, entries: list[str]) -> str:
    """Of a split beside train and val that leads nowhere, where: exports of Roboflow name a test that may not be."""
    if name in ("train", "val") or any(_is_there(_resolve(data, entry)) for entry in entries):
        return ""
    return f"there is no folder or text file {_resolve(data, entries[0])}{_why(data)}"


def _why(data: DataYaml) -> str:
    return f"; the field 'path' ({data.lost_path}) leads nowhere too" if data.lost_path else ""


def _image_folder(data: DataYaml, entries: list[str]) -> Path:
    first = _resolve(data, entries[0])
    return first.parent if first.suffix == ".txt" else first


def _label_file(data: DataYaml, image: Path) -> Path:
    """``labels`` in place of the last folder called ``images``; beside the image where there is none.

    Folders above the data set count only where that leads to a file: the data set may lie in any folder. So do those
    that a linked folder leads to, where the data set has no labels for it of its own.
    """
    inside = image.is_relative_to(data.base)
    path = label_path(image.relative_to(data.base) if inside else image)
    path = data.base / path if inside else path
    if is_file(path):
        return path
    others = [label_path(Path(os.path.abspath(image)))]  # noqa: PTH100
    if not path.parent.is_dir():
        # A link of a single image leads elsewhere too, and what lies there are other labels.
        others.append(label_path(Path(os.path.realpath(image.parent)) / image.name))
    return next((other for other in others if other != path and is_file(other)), path)


def label_path(image: Path) -> Path:
    """The label file of an image: the rule that Ultralytics has, and that what is written follows too."""
    parts = list(image.parts)
    place = next((index for index in range(len(parts) - 2, -1, -1) if parts[index] == "images"), None)
    if place is not None:
        parts[place] = "labels"
    return Path(*parts).with_suffix(".txt")


class _Scanner:
    """Holds the findings of one split while it is read."""

    def __init__(self, data: DataYaml, name: str) -> None:
        self._data = data
        self._name = name
        self._found = Findings()
        self._labels = {number: label for label, number in enumerate(data.names)}
        self._rows = BoxRows()

    def scan(self) -> SplitScan:
        data = self._data
        images = self.list_images()
        if images and data.lost_path:
            text = f"there is no folder {data.lost_path}; the file's own, {data.base}, is taken for it"
            self._found.report(data.file, "", "path", text, severity="warning")
        paths: list[Path] = []
        sizes: list[Size] = []
        label_files: dict[Path, Path] = {}
        for path in images:
            size = self._size(path)
            paths.append(path)
            sizes.append(size or (0, 0))
            label_file = _label_file(self._data, path)
            if (other := label_files.setdefault(label_file, path)) != path:
                text = f"has the label file of {other.name} too"
                self._found.report(data.file, f"image {self._show(path)}", "", text, severity="warning")
            if is_file(label_file):
                self._read_labels(label_file, len(paths) - 1, size)
            else:
                self._found.without_labels.append(path)
        self._report_orphans(label_files)
        if images and len(self._found.without_labels) == len(images):
            self._found.report(
                data.file,
                "",
                self._name,
                f"none of the {len(images)} images has a label file; of {self._show(images[0])} it would be "
                f"{_label_file(self._data, images[0])}",
            )
        elif images and not self._rows.images and all(entry.severity == "warning" for entry in self._found.problems):
            self._found.report(data.file, "", self._name, "no image of the split has a box", severity="warning")
        records = self._found.make_records(paths, sizes, self._rows, box_field="box", turned=True)
        split = DatasetSplit(self._name, records, tuple(data.names.values()), tuple(data.names))
        return self._found.finish(split)

    def _show(self, path: Path) -> str:
        return str(path.relative_to(self._data.base)) if path.is_relative_to(self._data.base) else str(path)

    def list_images(self) -> list[Path]:
        """The images of the split; a finding for each entry that leads nowhere."""
        data, found = self._data, self._found
        images: dict[Path, None] = {}
        for entry in data.splits.get(self._name, []):
            path = _resolve(data, entry)
            if is_folder(path):
                listed = find_image_files(path)
            elif path.suffix.lower() == ".txt" and is_file(path):
                listed = self._read_list(path)
            else:
                found.report(data.file, "", self._name, f"there is no folder or text file {path}{_why(data)}")
                continue
            for image in listed:
                if image in images:
                    text = "is listed twice; it is used once"
                    found.report(data.file, f"image {self._show(image)}", self._name, text, severity="warning")
                images[image] = None
        if not images and not found.problems:
            found.report(data.file, "", self._name, "the split is empty: expected at least one image, found none")
        return list(images)

    def _read_list(self, file: Path) -> list[Path]:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self._found.report(file, "", "", f"the list of images cannot be read ({error})")
            return []
        listed = []
        for number, line in enumerate(lines, start=1):
            name = line.strip().replace("\\", "/")
            if not name:
                continue
            options = [Path(os.path.normpath(folder / name)) for folder in (file.parent, self._data.base)]
            inside = [
                path
                for path in options
                if "\0" not in name
                and any(path.is_relative_to(os.path.normpath(folder)) for folder in (file.parent, self._data.base))
            ]
            if Path(name).is_absolute() and Path(name).suffix.lower() in IMAGE_SUFFIXES and "\0" not in name:
                inside = options[:1]  # as a folder may be anywhere, if it is named in full
            if not inside:
                self._found.report(file, f"line {number}", "", f"'{name}' leads out of the data set {self._data.base}")
            elif (path := next((path for path in inside if is_file(path)), None)) is None:
                self._found.report(file, f"line {number}", "", f"there is no image file {inside[-1]}")
            else:
                listed.append(path)
        return listed

    def _size(self, path: Path) -> Size | None:
        try:
            return read_image_size(path)
        except DrkdError as error:
            self._found.report_unreadable(path, self._data.file, f"image {self._show(path)}", error)
            return None

    def _report_orphans(self, label_files: dict[Path, Path]) -> None:
        if any(_resolve(self._data, entry).suffix == ".txt" for entry in self._data.splits.get(self._name, [])):
            return  # a list chooses some of the images
        for folder in sorted({file.parent for file in label_files if "labels" in file.parts}):
            for file in sorted(folder.glob("*.txt")):
                if file not in label_files and file.name != "classes.txt" and not file.name.startswith("."):
                    self._found.report(
                        file, "", "", "there is no image for this label file; it is left out", severity="warning"
                    )

    def _read_labels(self, file: Path, image: int, size: Size | None) -> None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self._found.report(file, "", "", f"the label file cannot be read ({error})")
            return
        seen: dict[tuple[float, ...], int] = {}
        for number, line in enumerate(lines, start=1):
            if not (words := line.split()):
                continue
            parsed = self._parse(words, file, f"line {number}")
            if parsed is None:
                continue
            if (first := seen.setdefault(parsed, number)) != number:
                text = f"the same box as in line {first}; it is left out"
                self._found.report(file, f"line {number}", "", text, severity="warning")
                continue
            label, x, y, width, height = parsed
            rows, columns = size or (1, 1)
            box = [(x - width / 2) * columns, (y - height / 2) * rows, width * columns, height * rows]
            # What is written at the border comes back at the border, not 1e-17 beside it.
            box = [0.0 if abs(value) < 1e-9 else value for value in box]
            self._rows.add(image, int(label), box, file=file, place=f"line {number}")

    def _parse(self, words: list[str], file: Path, place: str) -> tuple[float, ...] | None:
        """Label, and centre and sides as shares of the image; None and a finding where the line is wrong."""
        try:
            values = [float(word) for word in words]
        except ValueError:
            wrong = next(word for word in words if not _is_number(word))
            self._found.report(file, place, "", f"expected numbers: class x y width height, got {shorten(wrong)}")
            return None
        number, coordinates = values[0], values[1:]
        label = self._labels.get(int(number)) if number.is_integer() else None
        if label is None:
            known = f"{min(self._labels)}..{max(self._labels)}"
            self._found.report(file, place, "class", f"there is no class {words[0]} in 'names' (classes {known})")
            return None
        expected = 4 + self._data.keypoint_values
        polygon = not self._data.keypoint_values and len(coordinates) >= 6 and len(coordinates) % 2 == 0
        if len(coordinates) != expected and not polygon:
            text = f"expected class x y width height ({expected + 1} numbers) or a polygon, got {len(words)} numbers"
            self._found.report(file, place, "", text)
            return None
        used = coordinates if polygon else coordinates[:4]
        if not all(math.isfinite(value) for value in used):
            self._found.report(file, place, "box", f"expected finite numbers, got {' '.join(words[1:5])}")
            return None
        if any(not -_SLACK <= value <= 1 + _SLACK for value in used):
            wrong = next(
                word for word, value in zip(words[1:], used, strict=False) if not -_SLACK <= value <= 1 + _SLACK
            )
            text = f"expected shares of the image in [0, 1], got {wrong}; are these px?"
            self._found.report(file, place, "box", text)
            return None
        if polygon:
            left, right = min(used[::2]), max(used[::2])
            top, bottom = min(used[1::2]), max(used[1::2])
            used = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        if used[2] < 0 or used[3] < 0:
            text = f"width and height must not be negative, got {words[3]} and {words[4]}"
            self._found.report(file, place, "box", text)
            return None
        return (label, *used)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
