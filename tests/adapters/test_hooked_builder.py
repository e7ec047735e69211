"""Detectors of the user's own from a recipe, saved and loaded, and the worked example of the documentation."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tests.adapters import point_detector

from drkd.adapters import HookedBuilder, HookedDetector, load_detector, save_student, wrap_model
from drkd.adapters.import_path import import_function
from drkd.contracts import DetectionBatch, DetectorBuilder, DrkdError

CLASSES = ("cat", "dog", "cup")
SETTINGS = {"min_size": 64, "max_size": 96, "size_divisor": 32}
HOME = "tests.adapters.point_adapter"
BUILDER = HookedBuilder(
    factory=f"{HOME}:build",
    layers=("neck",),
    losses=f"{HOME}:losses",
    detections=f"{HOME}:detections",
    arguments={"channels": 8},
    image_size=(64, 64),
)
DOCUMENT = Path(__file__).parents[2] / "docs" / "adapters.md"


def block(language: str, opening: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    return next(text for text in blocks if opening in text)


def test_built_from_import_paths(make_batch):
    detector = BUILDER.build(CLASSES)
    assert isinstance(detector, HookedDetector) and detector.spec.levels[0].channels == 8
    assert detector(make_batch([(64, 96)]), want=frozenset({"losses"})).losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factory": "no_such_module:build"}, "factory: there is no module 'no_such_module'"),
        ({"factory": f"{HOME}:nothing"}, "has no function 'nothing'; it has .*build"),
        ({"losses": "build"}, "losses: expected an import path such as 'my_module:function'"),
        ({"arguments": {"colour": 1}}, r"factory: .*build\(class_names, \*\*arguments\) failed: .*colour"),
        ({"factory": "builtins:list", "arguments": {}}, "expected builtins:list to return a torch module, got list"),
    ],
)
def test_what_cannot_be_built(changes, message):
    with pytest.raises(DrkdError, match=message):
        replace(BUILDER, **changes).build(CLASSES)


def test_modules_beside_the_command_are_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_module_of_a_test.py").write_text("def four():\n    return 4\n")
    (tmp_path / "broken_module_of_a_test.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert import_function("my_own_module_of_a_test:four", field="x")() == 4
    assert import_function("my_own_module_of_a_test.four", field="x")() == 4
    with pytest.raises(DrkdError, match="fails to import: ZeroDivisionError"):
        import_function("broken_module_of_a_test:four", field="x")
    assert sys.path == before


def test_saved_files_call_nothing_unasked(tmp_path, make_batch):
    detector = BUILDER.build(CLASSES).eval()
    path = tmp_path / "student.pt"
    save_student(path, detector, builder=BUILDER, image_settings=SETTINGS)
    with pytest.raises(
        DrkdError,
        match=r"calls functions that the file names \(tests.*--trust-code of drkd evaluate, predict and inspect",
    ):
        load_detector(path)
    loaded = load_detector(path, class_names=("cup", "cat", "dog"), trust_code=True)
    batch = make_batch([(64, 96)])
    ours, theirs = detector.detect(batch)[0], loaded.detect(batch)[0]
    assert torch.equal(ours.boxes, theirs.boxes) and torch.equal((ours.labels + 1) % 3, theirs.labels)
    # Saved again from what was loaded, with whatever builder: it is the same file to the next reader.
    save_student(tmp_path / "again.pt", loaded, builder=None, image_settings=SETTINGS)
    again = load_detector(tmp_path / "again.pt", trust_code=True)
    assert again.spec == detector.spec and torch.equal(again.detect(batch)[0].labels, ours.labels)
    scope: dict[str, object] = {}
    exec(torch.load(path, weights_only=True)["code"].replace('"student.pt"', repr(str(path))), scope)
    assert isinstance(scope["model"], point_detector.PointDetector)


def test_as_weights_of_a_builder(tmp_path, make_batch):
    torch.manual_seed(3)
    path = tmp_path / "student.pt"
    save_student(path, BUILDER.build(CLASSES), builder=BUILDER, image_settings=SETTINGS)
    state = torch.load(path, weights_only=True)["state_dict"]
    filled = replace(BUILDER, weights=str(path)).build(CLASSES).model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in filled.items())


def test_a_wrapped_model_is_saved_without_a_way_back(tmp_path):
    own = BUILDER.build(CLASSES)
    detector = wrap_model(own.model, ["neck"], losses=own._losses, class_names=CLASSES)
    save_student(tmp_path / "own.pt", detector, builder=None, image_settings=SETTINGS)
    with pytest.raises(DrkdError, match="cannot rebuild"):
        load_detector(tmp_path / "own.pt", trust_code=True)


def test_the_documents_example_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_detector", point_detector)
    scope: dict[str, object] = {}
    exec(block("python", "def detections(model, batch)"), scope)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [30.0, 20.0, 60.0, 60.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 1])}] * 2
    scope["batch"] = DetectionBatch.from_lists(list(torch.rand(2, 3, 64, 96)), targets)
    exec(block("python", "Distiller(student"), scope)
    assert {name.partition("/")[0] for name in scope["losses_by_name"]} == {"task", "kd"}
    assert len(scope["found"]) == 2


def test_the_documents_recipe_is_one(tmp_path):
    from drkd.recipes.recipe import load_recipe

    text = block("yaml", "drkd.adapters.HookedBuilder").replace("my_adapter", HOME)
    content = yaml.safe_load(text)
    content["data"] = {"root": "unread"}
    content["training"] = {"steps": 1}
    content["output"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe([tmp_path / "recipe.yaml"])
    for builder in (recipe.student, recipe.teacher):
        assert isinstance(builder, DetectorBuilder)
        assert builder.build(CLASSES).spec.levels[0].stride == 8


def test_weights_of_a_file_keep_what_their_outputs_mean(tmp_path, make_batch):
    detector, path = BUILDER.build(CLASSES).eval(), tmp_path / "student.pt"
    save_student(path, detector, builder=BUILDER, image_settings=SETTINGS)
    turned = replace(BUILDER, weights=str(path)).build(("cup", "cat", "dog")).eval()
    assert turned.label_ids == tuple(detector.label_ids[place] for place in (2, 0, 1))
    batch = make_batch([(64, 96)])
    ours, theirs = detector.detect(batch)[0], turned.detect(batch)[0]
    assert torch.equal(ours.boxes, theirs.boxes) and torch.equal((ours.labels + 1) % 3, theirs.labels)
    with pytest.raises(DrkdError, match="was trained on cat, dog, cup, and not on cow"):
        replace(BUILDER, weights=str(path)).build(("cup", "cat", "cow"))
    # Saved again it is the same file to the next reader.
    save_student(tmp_path / "again.pt", turned, builder=BUILDER, image_settings=SETTINGS)
    again = load_detector(tmp_path / "again.pt", class_names=CLASSES, trust_code=True).detect(batch)[0]
    assert torch.equal(ours.boxes, again.boxes) and torch.equal(ours.labels, again.labels)
