"""The embedded data set: real handwritten digits on real photographs, built on this machine, in COCO format."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from drkd.contracts import DrkdError
from drkd.data.glyphs import load_scans
from drkd.data.scene import Photo, Scene, compose_scene

_VERSION = "1"
"""Part of the cache key: raise it whenever the code that draws changes what it draws."""

_SPLITS = ("train", "tune", "val")
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Whole photographs to a split, so that no split has seen another's background; colour and grey in each.
# The two views of one motorcycle stay together. Left out: pictures with print in them, drawings and blank ones.
_PHOTOS: dict[str, tuple[str, ...]] = {
    "train": (
        "skimage/astronaut.png",
        "skimage/motorcycle_left.png",
        "skimage/motorcycle_right.png",
        "skimage/hubble_deep_field.jpg",
        "skimage/coffee.png",
        "sklearn/china.jpg",
        "skimage/camera.png",
        "skimage/brick.png",
        "skimage/cell.png",
        "skimage/clock_motion.png",
    ),
    "tune": ("skimage/chelsea.png", "skimage/ihc.png", "skimage/grass.png"),
    "val": (
        "skimage/rocket.jpg",
        "skimage/retina.jpg",
        "sklearn/flower.jpg",
        "skimage/coins.png",
        "skimage/gravel.png",
    ),
}
# The second set trains on what the first one keeps from its teachers, and reports on photographs of neither.
_SECOND_PHOTOS: dict[str, tuple[str, ...]] = {
    "train": (*_PHOTOS["tune"], *_PHOTOS["val"]),
    "tune": ("skimage/astronaut.png", "skimage/brick.png", "skimage/clock_motion.png"),
    "val": ("matplotlib/grace_hopper.jpg", "skimage/moon.png", "skimage/microaneurysms.png"),
}
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}
# Shares of the scans of every digit.
_SCAN_SHARES = (0.6, 0.15, 0.25)


@dataclass(frozen=True)
class DigitsConfig:
    """What the embedded data set holds; each configuration has a cache folder of its own.

    Args:
        seed: Of everything random.
        train: Number of training images.
        tune: Number of images to choose settings on.
        val: Number of images to report on.
        long_side: Longer side of every image, px; images are square, 4:3 or 3:4.
        min_size: Lower limit of the longer side of a digit's box, px.
        max_size: Upper limit, px; sizes are log-uniform between the two.
        max_digits: Most digits an image; 1 to this many, uniformly.
        empty: Share of the images that have none.
        second: Other photographs in each split; the scans are dealt as in the first set with seed 0, so that what is
            reported on is unknown to teachers and backbones that were trained on the first.
    """

    seed: int = 0
    train: int = 1600
    tune: int = 300
    val: int = 500
    long_side: int = 128
    min_size: float = 10.0
    max_size: float = 64.0
    max_digits: int = 8
    empty: float = 0.02
    second: bool = False

    def __post_init__(self) -> None:
        if min(self.train, self.tune, self.val, self.max_digits, self.long_side) <= 0:
            raise ValueError(f"expected positive counts and sizes, got {self}")
        if not 4 <= self.min_size <= self.max_size <= 0.7 * self.long_side:
            raise ValueError(
                f"expected 4 <= min_size <= max_size <= 0.7 * long_side = {0.7 * self.long_side}, "
                f"got {self.min_size} and {self.max_size}"
            )


EMBEDDED = {
    "digits": DigitsConfig(),
    "digits2": DigitsConfig(seed=1, min_size=8.0, max_size=48.0, max_digits=10, second=True),
}
"""What ``data.root`` may name. ``digits2`` confirms what was chosen on ``digits``: other photographs in each split,
smaller and more digits an image, drawn anew from the scans that the same split of ``digits`` has. Nothing of what it
reports on was in an image that the shipped teachers and backbones were trained on. Its images were used to choose
nothing; the scans of digits in its ``val`` are those of the ``val`` of ``digits``."""


def build_digits(cache_dir: Path | None = None, *, config: DigitsConfig = DigitsConfig()) -> Path:
    """Return the folder of the embedded data set, building it on first use or if it is damaged.

    Args:
        cache_dir: Where to keep it; ``$DRKD_CACHE``, else ``drkd`` under ``$XDG_CACHE_HOME`` or ``~/.cache``.
        config: What it holds.

    Returns:
        A folder in COCO layout with the splits train, tune and val, and a ``manifest.json``.

    Raises:
        DrkdError: If scikit-learn or scikit-image is missing, or the cache folder cannot be written.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    target = cache / f"digits-{fingerprint(config)}"
    if is_intact(target, config=config):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    except OSError as error:
        raise DrkdError(f"{cache}: cannot write the embedded data set there ({error}); set DRKD_CACHE.") from None
    try:
        _build(aside, config)
        _publish(aside, target, config)
    except OSError as error:
        raise DrkdError(f"{cache}: cannot write the embedded data set ({error}); set DRKD_CACHE.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def default_cache() -> Path:
    """The folder that built data is kept in: ``$DRKD_CACHE``, else ``drkd`` in the user's cache folder."""
    if chosen := os.environ.get("DRKD_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drkd"


def is_intact(root: Path, *, config: DigitsConfig) -> bool:
    """Whether the folder holds this configuration's data, every byte of it as its manifest says."""
    try:
        manifest = json.loads((root / "manifest.json").read_text("utf-8"))
        return bool(manifest == _manifest(root, config))
    except (OSError, ValueError):
        return False


def assign_scans(labels: npt.NDArray[np.int64], *, seed: int) -> dict[str, npt.NDArray[np.int64]]:
    """Deal the scans to the splits, each digit in the same shares, none twice.

    Args:
        labels: What each scan shows, (N,), 0..9.
        seed: Of the deal.

    Returns:
        By split, the indices of its scans, ascending.
    """
    random = np.random.default_rng([seed, 1])
    dealt: dict[str, list[npt.NDArray[np.int64]]] = {split: [] for split in _SPLITS}
    for digit in range(10):
        members = random.permutation(np.flatnonzero(labels == digit))
        cuts = np.rint(np.cumsum(_SCAN_SHARES[:-1]) * len(members)).astype(int)
        for split, part in zip(_SPLITS, np.split(members, cuts), strict=True):
            dealt[split].append(part)
    return {split: np.sort(np.concatenate(parts)) for split, parts in dealt.items()}


def assign_photos(*, second: bool = False) -> dict[str, tuple[str, ...]]:
    """Which photographs each split cuts its backgrounds from; no photograph serves two splits.

    Args:
        second: Of the second set, see `DigitsConfig`.
    """
    return dict(_SECOND_PHOTOS if second else _PHOTOS)


def _load_photos(names: Sequence[str]) -> list[Photo]:
    photos = []
    for name in names:
        package, file = name.split("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise DrkdError(
                f"The embedded data set 'digits' needs the photographs of the package that is imported as '{package}'; "
                "install them with `pip install 'drkd[digits]'`."
            )
        path = Path(spec.origin).parent / _FOLDERS[package] / file
        try:
            with Image.open(path) as image:
                photos.append(Photo(name, np.array(image.convert("RGB")), grey=image.mode == "L"))
        except OSError as error:
            raise DrkdError(
                f"{path}: the photograph cannot be read ({error}); install the package '{package}' again."
            ) from None
    return photos


def _build(root: Path, config: DigitsConfig) -> None:
    scans, labels = load_scans()
    pools = assign_scans(labels, seed=DigitsConfig.seed if config.second else config.seed)
    (root / "annotations").mkdir()
    photographs = assign_photos(second=config.second)
    for number, split in enumerate(_SPLITS):
        photos = _load_photos(photographs[split])
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(getattr(config, split)):
            random = np.random.default_rng([config.seed, 2, number, index])
            # In turn rather than at random: every background gets its share of a small split.
            photo = photos[index % len(photos)]
            shape = _shape(config.long_side, random)
            empty = random.random() < config.empty
            scene = compose_scene(
                photo,
                shape,
                0 if empty else int(random.integers(1, config.max_digits + 1)),
                scans=scans,
                labels=labels,
                pool=pools[split],
                sizes=(config.min_size, config.max_size),
                random=random,
            )
            name = f"{index + 1:06d}.png"
            Image.fromarray(scene.pixels).save(root / split / name)
            images.append(_image_entry(index + 1, name, scene, photo))
            annotations.extend(_annotation_entries(index + 1, len(annotations) + 1, scene))
        _write_json(root / "annotations" / f"instances_{split}.json", _document(images, annotations))
    _write_json(root / "manifest.json", _manifest(root, config))


def _shape(long_side: int, random: np.random.Generator) -> tuple[int, int]:
    short = long_side * 3 // 4
    return ((long_side, long_side), (short, long_side), (long_side, short))[int(random.integers(3))]


def _image_entry(image_id: int, name: str, scene: Scene, photo: Photo) -> dict[str, Any]:
    height, width = scene.pixels.shape[:2]
    return {
        "id": image_id,
        "file_name": name,
        "height": height,
        "width": width,
        "background": photo.name,
        "grey": photo.grey,
    }


def _annotation_entries(image_id: int, first: int, scene: Scene) -> list[dict[str, Any]]:
    return [
        {
            "id": first + offset,
            "image_id": image_id,
            # COCO's ids start at 1: digit 0 has category 1.
            "category_id": digit.label + 1,
            "bbox": list(digit.box),
            "area": digit.box[2] * digit.box[3],
            "iscrowd": 0,
            "scan": digit.scan,
            "visible": digit.visible,
        }
        for offset, digit in enumerate(scene.digits)
    ]


def _document(images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": {"description": "drkd digits: scikit-learn's handwritten digits on photographs", "version": _VERSION},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": digit + 1, "name": name} for digit, name in enumerate(_NAMES)],
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


def fingerprint(config: DigitsConfig) -> str:
    """Digest of what an embedded data set is built from: 12 hexadecimal digits."""
    text = json.dumps({"version": _VERSION, **_plain(config)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(config: DigitsConfig) -> dict[str, Any]:
    """As version 1 wrote it before there was a second set, so that what is built already stays good."""
    content = asdict(config)
    deal = content.pop("second")
    # The second set was dealt in another way once.
    return {**content, "second": 2} if deal else content


def _manifest(root: Path, config: DigitsConfig) -> dict[str, Any]:
    """The configuration and a checksum of every annotation file and of each split's images, from what is on disk."""
    checksums = {}
    for split in _SPLITS:
        annotations = root / "annotations" / f"instances_{split}.json"
        checksums[f"annotations/{annotations.name}"] = hashlib.sha256(annotations.read_bytes()).hexdigest()
        tree = hashlib.sha256()
        for image in sorted((root / split).iterdir()):
            tree.update(f"{image.name} {hashlib.sha256(image.read_bytes()).hexdigest()}\n".encode())
        checksums[split] = tree.hexdigest()
    return {"name": "digits", "version": _VERSION, "config": _plain(config), "sha256": checksums}


def _publish(aside: Path, target: Path, config: DigitsConfig) -> None:
    """Move the finished folder into place; if another process was faster, keep its result."""
    aside.chmod(0o755)
    if target.exists() and not is_intact(target, config=config):
        damaged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        target.replace(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        aside.rename(target)
    except OSError:
        if not is_intact(target, config=config):
            raise
