"""The embedded data set: the same bytes every time, nothing shared between splits, whole or absent."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drkd.contracts import DrkdError
from drkd.data import digits as module
from drkd.data.dataset import find_splits, load_split
from drkd.data.digits import (
    EMBEDDED,
    DigitsConfig,
    assign_photos,
    assign_scans,
    build_digits,
    default_cache,
    is_intact,
)
from drkd.data.glyphs import INK, draw_digit, load_scans

_SMALL = DigitsConfig(train=30, tune=9, val=10)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits(tmp_path_factory.mktemp("cache"), config=_SMALL)


def _annotations(root: Path) -> Iterator[tuple[str, dict]]:
    for split in ("train", "tune", "val"):
        yield split, json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def _bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_reads_as_coco_without_a_finding(built: Path) -> None:
    assert sorted(find_splits(built)) == ["train", "tune", "val"]
    for split, count in (("train", 30), ("tune", 9), ("val", 10)):
        loaded = load_split(built, split)
        assert len(loaded) == count
        assert loaded.class_names[3] == "three"
        assert loaded.category_ids == tuple(range(1, 11))


def test_is_the_same_every_time(built: Path, tmp_path: Path) -> None:
    again = build_digits(tmp_path, config=_SMALL)

    assert again.name == built.name
    assert _bytes(again) == _bytes(built)


def test_seed_and_every_other_setting_change_the_folder(built: Path, tmp_path: Path) -> None:
    other = build_digits(tmp_path, config=DigitsConfig(seed=1, train=1, tune=1, val=1))

    assert other.name != built.name
    assert (other / "train" / "000001.png").read_bytes() != (built / "train" / "000001.png").read_bytes()


def test_no_scan_serves_two_splits(built: Path) -> None:
    used = {split: {entry["scan"] for entry in document["annotations"]} for split, document in _annotations(built)}
    _, labels = load_scans()
    dealt = assign_scans(labels, seed=_SMALL.seed)

    assert sum(len(part) for part in dealt.values()) == len(set(np.concatenate(list(dealt.values())))) == 1797
    for split, scans in used.items():
        assert scans <= set(dealt[split].tolist())
        assert set(labels[dealt[split]].tolist()) == set(range(10))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(EMBEDDED["digits2"], train=30, tune=9, val=14)
    return build_digits(tmp_path_factory.mktemp("second"), config=config)


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_photograph_serves_two_splits_and_each_has_colour_and_grey(
    name: str, request: pytest.FixtureRequest
) -> None:
    photos = assign_photos(second=EMBEDDED[name].second)
    built = request.getfixturevalue({"digits": "built", "digits2": "second"}[name])
    names = [name for part in photos.values() for name in part]
    assert len(names) == len(set(names))
    for left in photos["train"]:  # two views of one scene count as one
        assert not any(left.split("_")[0] == right.split("_")[0] for s in ("tune", "val") for right in photos[s])
    for split, document in _annotations(built):
        assert {image["background"] for image in document["images"]} == set(photos[split])
        assert {image["grey"] for image in document["images"]} == {True, False}


def test_the_second_set_reports_on_other_photographs_and_sizes(built: Path, second: Path) -> None:
    first, other = (dict(_annotations(root))["val"] for root in (built, second))
    backgrounds = [{image["background"] for image in document["images"]} for document in (first, other)]
    assert not backgrounds[0] & backgrounds[1]
    longest = max(max(entry["bbox"][2:]) for entry in other["annotations"])
    assert longest <= 49 < max(max(entry["bbox"][2:]) for entry in first["annotations"])


def test_the_second_set_reports_on_nothing_that_the_firsts_teachers_and_settings_saw(second: Path) -> None:
    _, labels = load_scans()
    dealt, val = assign_scans(labels, seed=EMBEDDED["digits"].seed), dict(_annotations(second))["val"]
    photos = assign_photos()
    seen = {*dealt["train"].tolist(), *dealt["tune"].tolist()}
    assert not seen & {entry["scan"] for entry in val["annotations"]}
    assert not {*photos["train"], *photos["tune"]} & {image["background"] for image in val["images"]}


def test_the_first_set_keeps_its_place_in_the_cache() -> None:
    assert module.fingerprint(DigitsConfig()) == "0f2a6e796561"


def test_boxes_are_tight_and_inside_and_of_the_wanted_sizes(built: Path) -> None:
    ids = []
    for split, document in _annotations(built):
        sizes = {image["id"]: (image["width"], image["height"]) for image in document["images"]}
        assert set(sizes.values()) == {(128, 128), (128, 96), (96, 128)}
        for image in document["images"]:
            with Image.open(built / split / image["file_name"]) as file:
                assert (file.size, file.mode) == (sizes[image["id"]], "RGB")
        ids = [entry["id"] for entry in document["annotations"]]
        assert ids == list(range(1, len(ids) + 1))
        for entry in document["annotations"]:
            left, top, width, height = entry["bbox"]
            assert left >= 0 and top >= 0
            assert left + width <= sizes[entry["image_id"]][0] and top + height <= sizes[entry["image_id"]][1]
            assert 9 <= max(width, height) <= 68
            assert entry["area"] == width * height
            assert entry["visible"] >= 0.4


@pytest.mark.parametrize("size", [10, 23.7, 64])
def test_a_digit_is_drawn_to_size_and_cropped_to_its_ink(size: float) -> None:
    scans, _ = load_scans()
    for index in range(20):
        mask = draw_digit(scans[index], size, np.random.default_rng(index))
        ink = mask > INK
        assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()
        assert max(mask.shape) == pytest.approx(size, abs=max(1.5, 0.06 * size))
        assert mask.dtype == np.float32 and mask.min() >= 0 and mask.max() <= 1


def test_a_second_call_builds_nothing(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built again"))

    assert build_digits(built.parent, config=_SMALL) == built


_TINY = DigitsConfig(train=2, tune=1, val=1)


def _drop_image(root: Path) -> None:
    (root / "train" / "000002.png").unlink()


def _spoil_image(root: Path) -> None:
    path = root / "val" / "000001.png"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def _spoil_annotations(root: Path) -> None:
    (root / "annotations" / "instances_tune.json").write_text("{}")


def _drop_manifest(root: Path) -> None:
    (root / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [_drop_image, _spoil_image, _spoil_annotations, _drop_manifest])
def test_damage_is_noticed(built: Path, tmp_path: Path, damage) -> None:
    root = Path(shutil.copytree(built, tmp_path / built.name))
    assert is_intact(root, config=_SMALL)

    damage(root)

    assert not is_intact(root, config=_SMALL)


def test_a_damaged_folder_is_built_again(tmp_path: Path) -> None:
    root = build_digits(tmp_path, config=_TINY)
    whole = _bytes(root)
    _drop_image(root)

    assert _bytes(build_digits(tmp_path, config=_TINY)) == whole
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, document: dict) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_digits(tmp_path, config=_TINY)

    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_faster_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = module._build

    def slow(root: Path, config: DigitsConfig) -> None:
        build(root, config)
        shutil.copytree(root, tmp_path / f"digits-{module.fingerprint(config)}")

    monkeypatch.setattr(module, "_build", slow)
    root = build_digits(tmp_path, config=_TINY)

    assert is_intact(root, config=_TINY)
    assert list(tmp_path.iterdir()) == [root]


def test_an_unwritable_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DrkdError, match="set DRKD_CACHE"):
        build_digits(tmp_path / "file", config=_TINY)


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._PHOTOS, "train", ("no_such_package/x.png",))
    with pytest.raises(DrkdError, match=r"drkd\[digits\]"):
        build_digits(tmp_path, config=_TINY)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DrkdError, match=r"drkd\[digits\]"):
        build_digits(tmp_path, config=_TINY)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("DRKD_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own"
    monkeypatch.delenv("DRKD_CACHE")
    assert default_cache() == tmp_path / "xdg" / "drkd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "drkd"


@pytest.mark.parametrize("wrong", [{"train": 0}, {"min_size": 2}, {"min_size": 50, "max_size": 40}, {"max_size": 120}])
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        DigitsConfig(**wrong)
