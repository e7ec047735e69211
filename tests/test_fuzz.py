"""Damaged and hostile input works or is refused in one paragraph; more in benchmarks/robustness/fuzz.py."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "robustness"))

from fuzz import KINDS, LACKING, campaign
from library_attacks import LibraryAttacks
from mutations import Watch, guarded, mutate_value

from drkd.contracts import DrkdError
from drkd.data.dataset import load_split
from drkd.data.formats.coco import read_coco
from drkd.recipes import prediction
from drkd.recipes.prediction import predict
from drkd.recipes.recipe import load_recipe

# What Pillow says of broken tags.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def _mostly(keys: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={key: value | _VALUES for key, value in keys.items()})


_IDS = st.integers(0, 3)
_DOCUMENTS = st.fixed_dictionaries(
    {
        "images": st.lists(
            _mostly({"id": _IDS, "file_name": st.just("1.png"), "width": st.just(8), "height": st.just(8)}), max_size=3
        ),
        "annotations": st.lists(
            _mostly({"id": _IDS, "image_id": _IDS, "category_id": _IDS, "bbox": st.lists(st.floats(0, 9), max_size=5)}),
            max_size=3,
        ),
        "categories": st.lists(_mostly({"id": _IDS, "name": st.text(max_size=3)}), max_size=3),
    }
)


# A kind whose inputs are runs, models or recipes has fewer of them: all take half a minute.
_CHEAP = ("coco", "yolo", "voc", "image", "checkpoint")
_DEAR = {
    **{"recipe": 10, "build": 6, "comparison": 4, "student": 15, "teacher": 15, "mmdetection": 4, "resume": 6},
    **{"transformers": 6, "ultralytics": 6, "hooks": 20},
}


def test_mutated_files_work_or_are_refused(tmp_path: Path) -> None:
    assert set(KINDS) == {*_CHEAP, *_DEAR}
    (tmp_path / "work").mkdir()
    shares = dict.fromkeys(_CHEAP, 1.0) | {kind: count / 40 for kind, count in _DEAR.items() if kind not in LACKING}
    outcomes = campaign(tmp_path / "work", count=40, seed=7, kinds=shares)
    assert {kind: set(counter) - {"works", "refused"} for kind, counter in outcomes.items()} == {
        kind: set() for kind in shares
    }
    assert all(outcomes[kind]["refused"] for kind in _CHEAP)
    assert outcomes["resume"]["works"] + outcomes["resume"]["refused"] == _DEAR["resume"]


def test_files_of_other_libraries_work_whole_and_are_not_trusted_unasked(tmp_path: Path) -> None:
    attacks = LibraryAttacks(tmp_path)
    for kind in {"transformers", "ultralytics", "hooks"} - LACKING:
        attacks.begin(kind, seed=0)
        shutil.copy(attacks.whole, tmp_path / f"{kind}.pt")
        found = predict(
            *(tmp_path / f"{kind}.pt", attacks.image),
            output=tmp_path / kind,
            threshold=0.0,
            device="cpu",
            trust_code=kind == "hooks",
        )
        assert found.images == 1
    with pytest.raises(DrkdError, match="calls functions that the file names"):
        predict(tmp_path / "hooks.pt", attacks.image, output=tmp_path / "no", device="cpu")


def test_the_watch_sees_what_is_written_and_started_outside(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    watch = Watch(tmp_path / "work")
    watch.active = True
    (tmp_path / "work" / "inside.txt").write_text("x")
    (tmp_path / "outside.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    subprocess.run([sys.executable, "-c", ""], check=True)
    watch.active = False
    (tmp_path / "after.txt").write_text("x")
    seen = [entry.partition(" ")[0] for entry in watch.seen]
    assert seen == ["open", "os.mkdir", "subprocess.Popen"]


def test_a_mutated_value_is_another_one_and_the_first_is_as_it_was() -> None:
    value = {"a": [1, {"b": torch.zeros(3)}], "c": "x"}
    for seed in range(60):
        mutate_value(random.Random(seed), value)
    assert value["a"][0] == 1 and torch.equal(value["a"][1]["b"], torch.zeros(3)) and value["c"] == "x"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=_DOCUMENTS)
def test_any_annotations_work_or_are_refused(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "1.png")
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert guarded(lambda: read_coco(tmp_path / "a.json", tmp_path / "images")) in ("works", "refused")


_WORDS = st.sampled_from(["0", "1", "0.5", "0.25", "-1", "nan", "1e400", "x", "\x00", "²", "1_0"]) | st.text(max_size=3)
_NAMES = st.lists(st.text(max_size=3), max_size=3) | st.dictionaries(st.integers(0, 3), st.text(max_size=3), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.lists(_WORDS, max_size=8), max_size=4),
    content=_mostly({"names": _NAMES, "train": st.just("images"), "nc": _IDS, "path": st.just("."), "kpt_shape": _IDS}),
)
def test_any_yolo_files_work_or_are_refused(lines: list[list[str]], content: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "1.png")
    (tmp_path / "labels" / "1.txt").write_text("\n".join(map(" ".join, lines)), encoding="utf-8", errors="replace")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    assert guarded(lambda: load_split(tmp_path, "train")) in ("works", "refused")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.tuples(st.sampled_from(["filename", "name", "difficult", "xmin", "width"]), _WORDS), max_size=6),
    listed=st.lists(_WORDS, max_size=3),
)
def test_any_voc_files_work_or_are_refused(words: list[tuple[str, str]], listed: list[str], tmp_path: Path) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "JPEGImages" / "1.png")
    fields = "".join(f"<{tag}>{word}</{tag}>" for tag, word in words)
    text = f"<annotation>{fields}<size>{fields}</size><object>{fields}<bndbox>{fields}</bndbox></object></annotation>"
    (tmp_path / "Annotations" / "1.xml").write_text(text, encoding="utf-8", errors="replace")
    lines = "\n".join(["1", *listed])
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text(lines, encoding="utf-8", errors="replace")
    assert guarded(lambda: load_split(tmp_path, "train")) in ("works", "refused")


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/passwd", "..\\x.png", "C:\\x.png\0"])
def test_file_names_do_not_climb_out(name: str, tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": name, "width": 8, "height": 8}]
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(DrkdError, match="leads out of the image folder"):
        read_coco(tmp_path / "a.json", tmp_path / "images")


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.mkdir [PLACE]",
        "seed: !!python/name:os.system",
        "seed: 2020-99-99",
        "[" * 5000,
        "? {a: b}\n: c",
        "seed: &a [*a]",
    ],
)
def test_yaml_is_loaded_safely(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text.replace("PLACE", str(tmp_path / "ran")))
    with pytest.raises(DrkdError, match=r"r\.yaml"):
        load_recipe([tmp_path / "r.yaml"])
    assert not (tmp_path / "ran").exists()


def _hostile(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (1, 1), (9, 9, 9)).save(folder / "one.png")
    Image.new("I;16", (20, 10), 40000).save(folder / "sixteen.png")
    Image.new("CMYK", (20, 10)).save(folder / "cmyk.jpg")
    Image.new("RGBA", (20, 10), (1, 2, 3, 0)).save(folder / "alpha.png")
    Image.new("RGB", (1, 900)).save(folder / "thin.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(folder / "turned.jpg", exif=exif)
    (folder / "text.png").write_text("no image")
    # Of noise: a black image is so few bytes that what is cut off need not be pixels.
    Image.effect_noise((60, 60), 60).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:1000])
    Image.new("RGB", (300, 300)).save(folder / "bomb.png")


def test_predict_on_hostile_images(tmp_path: Path, tiny_detector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hostile(tmp_path / "images")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # 300 x 300 px are then what 13,000 x 13,000 px are
    found = predict(tiny_detector, tmp_path / "images", output=tmp_path / "found", device="cpu")
    listed = json.loads((tmp_path / "found" / "images.json").read_text())["images"]
    assert {image["file_name"]: (image["width"], image["height"]) for image in listed} == {
        "alpha.png": (20, 10),
        "cmyk.jpg": (20, 10),
        "one.png": (1, 1),
        "sixteen.png": (20, 10),
        "thin.png": (1, 900),
        "turned.jpg": (10, 30),
    }
    assert sorted(Path(message.partition(":")[0]).name for message in found.unreadable) == [
        "bomb.png",
        "cut.png",
        "text.png",
    ]


def test_whatever_a_decoder_raises_is_a_paragraph(
    tmp_path: Path, tiny_detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def struck(path: Path) -> None:
        raise IndexError("index out of range")

    monkeypatch.setattr(prediction, "decode_image", struck)
    found = predict(tiny_detector, tmp_path / "a.png", output=tmp_path / "found", device="cpu")
    assert found.images == 0
    assert "a.png: the image cannot be decoded (index out of range)" in found.unreadable[0]
