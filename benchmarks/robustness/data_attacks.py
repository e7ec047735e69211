"""Damaged and hostile data sets (COCO, YOLO, VOC) and images."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml
from attacks import Attacks
from mutations import ODD, guarded, mutate_bytes, mutate_lines, mutate_value
from PIL import Image

from drkd.data.check import check_data
from drkd.data.dataset import DetectionDataset, load_split
from drkd.data.transforms import eval_transforms
from drkd.recipes.prediction import _read_pixels

# Each leads to an image, which is there, outside the data set.
CLIMBING = ("../secret.png", "../../data/../secret.png", "images/../../secret.png", "..\\secret.png", "a/../../secret")
_BOMB = '<!DOCTYPE a [<!ENTITY b "cccc"><!ENTITY d "&b;&b;&b;"><!ENTITY e SYSTEM "file:///etc/passwd">]>\n'


def small_coco() -> dict[str, Any]:
    """A COCO document of two images and three boxes with masks."""
    outline = [[1, 1, 9, 1, 9, 9]]
    masks = [outline, {"counts": [0, 40, 1160], "size": [30, 40]}, {"counts": "0X1T4", "size": [30, 40]}]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2)],
        "annotations": [
            {"id": n, "image_id": 1 + n % 2, "category_id": 3, "bbox": [n, 2, 9.5, 8], "area": 76.0, "iscrowd": 0}
            | {"segmentation": masks[n - 1]}
            for n in (1, 2, 3)
        ],
        "categories": [{"id": 3, "name": "cat"}],
    }


class DataAttacks(Attacks):
    """One kind a format of data sets, and images."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        Image.new("RGB", (40, 30), (9, 9, 9)).save(folder / "secret.png")
        self._whole = {name: folder / "whole" / name for name in ("coco", "yolo", "voc")}
        self._coco = small_coco()
        _write_coco(self._whole["coco"], self._coco)
        _write_yolo(self._whole["yolo"])
        _write_voc(self._whole["voc"])
        self._odd = (*ODD, *CLIMBING)

    def try_coco(self) -> str:
        """A COCO file with other values, or other bytes."""
        chance, root = self._chance, self._copy("coco")
        if chance.random() < 0.6:
            changed: Any = self._coco
            for _ in range(chance.choice((1, 1, 2, 5))):
                changed = mutate_value(chance, changed, self._odd)
            content = json.dumps(changed).encode()
        else:
            content = mutate_bytes(chance, json.dumps(self._coco).encode())
        (root / "annotations" / "instances_train.json").write_bytes(content)
        masks = chance.random() < 0.3
        return guarded(lambda: self._read(root, masks=masks))

    def try_yolo(self) -> str:
        """A data.yaml, a label file or a list of images with other values, words or bytes."""
        chance, root = self._chance, self._copy("yolo")
        what = chance.choice(("data.yaml", "labels/train/1.txt", "train.txt"))
        file = root / what
        inside = True
        if chance.random() < 0.4:
            file.write_bytes(mutate_bytes(chance, file.read_bytes()))
            inside = what != "data.yaml"  # which may name folders elsewhere
        elif what == "data.yaml":
            changed: Any = yaml.safe_load(file.read_text())
            for _ in range(chance.choice((1, 1, 2))):
                changed = mutate_value(chance, changed, self._odd)
            file.write_text(yaml.safe_dump(changed))
            inside = False
        else:
            file.write_text(mutate_lines(chance, file.read_text().splitlines(), self._odd))
        return guarded(lambda: self._read(root, inside=inside))

    def try_voc(self) -> str:
        """An annotation, a list of images or a class file with other elements, words or bytes."""
        chance, root = self._chance, self._copy("voc")
        annotation, listed = root / "Annotations" / "1.xml", root / "ImageSets" / "Main" / "train.txt"
        if chance.random() < 0.2:
            (root / "classes.txt").write_text("cat\ndog\n")
        draw = chance.random()
        if draw < 0.4:
            annotation.write_text(_mutate_tree(chance, annotation.read_text(), self._odd))
        elif draw < 0.5:
            annotation.write_text(_BOMB + annotation.read_text().replace("cat", chance.choice(("&d;", "&e;", "cat"))))
        elif draw < 0.7:
            annotation.write_bytes(mutate_bytes(chance, annotation.read_bytes()))
        elif draw < 0.85:
            listed.write_text(mutate_lines(chance, listed.read_text().splitlines(), self._odd))
        else:
            file = chance.choice((listed, root / "classes.txt"))
            file.write_bytes(mutate_bytes(chance, listed.read_bytes()))
        return guarded(lambda: self._read(root))

    def try_image(self) -> str:
        """An image of some format with other bytes."""
        kind = self._chance.choice(("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM", "EPS"))
        mode = "RGB" if kind in ("JPEG", "PPM", "EPS") else self._chance.choice(("RGB", "L", "P"))
        file = self._folder / "input.jpg"
        Image.effect_noise((31, 17), 60).convert(mode).save(file, format=kind)
        file.write_bytes(mutate_bytes(self._chance, file.read_bytes()))
        return guarded(lambda: _read_pixels(file))

    def _copy(self, name: str) -> Path:
        root = self._folder / "data"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self._whole[name], root)
        return root

    def _read(self, root: Path, *, masks: bool = False, inside: bool = True) -> None:
        """Load the training split and its samples, or look the data set over, as `drkd data check` does."""
        if self._chance.random() < 0.2:
            check_data(root, picture=self._folder / "picture.png")
            return
        split = load_split(root, "train", masks=masks)
        for record in split.records:
            if inside and root.resolve() not in record.path.resolve().parents:
                raise RuntimeError(f"climbed out of the folder: {record.path}")
        dataset = DetectionDataset(split, eval_transforms(min_size=32, max_size=64), keep_crowds=True)
        for index in range(min(4, len(dataset))):
            dataset[index]


def _mutate_tree(chance: random.Random, text: str, odd: tuple[Any, ...]) -> str:
    """Change text, remove, repeat, rename or nest elements of an XML file."""
    root = ElementTree.fromstring(text)
    for _ in range(chance.choice((1, 1, 2, 5))):
        elements = list(root.iter())
        parent = chance.choice([element for element in elements if len(element)] or elements)
        child = chance.choice(list(parent) or elements)
        actions: tuple[Callable[[], Any], ...] = (
            lambda child=child: setattr(child, "text", _printable(chance.choice(odd))),
            lambda child=child, parent=parent: parent.remove(child) if child in list(parent) else None,
            lambda child=child, parent=parent: parent.append(child) if child is not parent else None,
            lambda child=child: setattr(child, "tag", chance.choice(("object", "name", "size", "x", "bndbox"))),
            lambda child=child: child.extend([ElementTree.Element("xmin"), ElementTree.Element("object")]),
        )
        # Setting text is what finds most.
        chance.choice((actions[0], actions[0], *actions))()
    return ElementTree.tostring(root, encoding="unicode")


def _printable(value: Any) -> str:
    return str(value).replace("\0", "\ufffd")


def _write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("1", "2"):
        Image.new("RGB", (40, 30), (90, 20, 200)).save(folder / f"{name}.png")


def _write_coco(root: Path, document: dict[str, Any]) -> None:
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        _write_images(root / split)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def _write_yolo(root: Path) -> None:
    for split in ("train", "val"):
        _write_images(root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        for name in ("1", "2"):
            lines = ["0 0.5 0.5 0.25 0.25", "1 0.25 0.5 0.2 0.3", "0 0.1 0.1 0.4 0.1 0.4 0.6 0.1 0.6"]
            (root / "labels" / split / f"{name}.txt").write_text("\n".join(lines) + "\n")
    (root / "train.txt").write_text("./images/train/1.png\nimages/train/2.png\n")
    content = {"path": ".", "train": "train.txt", "val": ["images/val"], "nc": 2, "names": {0: "cat", 1: "dog"}}
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def _write_voc(root: Path) -> None:
    _write_images(root / "JPEGImages")
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("1\n2\n")
    for name in ("1", "2"):
        objects = "".join(
            f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>3</ymin>"
            f"<xmax>{x + 9}</xmax><ymax>20</ymax></bndbox></object>"
            for label, x in (("cat", 2), ("dog", 20))
        )
        size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}.png</filename>{size}{objects}</annotation>"
        (root / "Annotations" / f"{name}.xml").write_text(text)
