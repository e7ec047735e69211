"""What `drkd inspect` says of models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.conftest import write_detector

from drkd.cli import main
from drkd.contracts import DrkdError
from drkd.recipes.inspection import inspect_model

HOME = "tests.adapters.point_adapter"


def test_a_saved_detector(tiny_detector: Path) -> None:
    (found,) = inspect_model(str(tiny_detector), size=(128, 128))
    levels = [row for row in found.layers if row.pyramid]
    assert [(row.stride, row.channels) for row in levels] == [(2.0**power, 32) for power in range(3, 8)]
    assert levels[0].size == (16, 16) and levels[0].name.startswith("backbone")
    inner = [row.flops for row in found.layers if row.flops is not None]
    assert max(inner) < found.flops and found.hidden > 0
    everything = inspect_model(str(tiny_detector), size=(128, 128), depth=0)[0]
    assert everything.hidden == 0 and len(everything.layers) > len(found.layers)
    assert yaml.safe_load(found.yaml)["teacher"]["init_args"] == {"path": str(tiny_detector)}


def test_a_module_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["inspect", f"{HOME}:build", "--forward", f"{HOME}:detections", "--size", "64", "96"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "neck[0]" in shown and "drkd.adapters.HookedBuilder" in shown and "- neck" in shown
    assert main([*arguments, "--json"]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in content["layers"]}
    assert rows["neck[1]"]["stride"] == 16 and rows["neck[1]"]["size"] == [4, 6] and rows["neck[1]"]["channels"] == 16
    # Lateral convolutions of 16, 32 and 64 channels on 8 x 12, 4 x 6 and 2 x 3 cells, two operations a product.
    assert rows["neck[0]"]["flops"] == 2 * 16 * (16 * 96 + 32 * 24 + 64 * 6)
    assert rows["neck[0]"]["parameters"] == (16 + 32 + 64) * 16 + 3 * 16
    assert not any(name.startswith("head") for name in rows), "what is called once a level cannot be hooked"


def test_what_fails_within_a_function_is_no_wrong_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_models.py").write_text(
        "def alone():\n    return 1 + 'a'\n\n\n"
        "def named(class_names):\n    return class_names + 1\n\n\n"
        "def pair(one, two):\n    return one\n\n\n"
        "def decorated(*arguments):\n    return named(*arguments)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DrkdError, match=r"alone: the function failed, called without arguments .*unsupported operand"):
        inspect_model("broken_models:alone")
    with pytest.raises(
        DrkdError, match=r"named: the function failed, called with a list of class names .*can only conc"
    ):
        inspect_model("broken_models:named")
    # One that takes anything says nothing of what it wants.
    with pytest.raises(DrkdError, match=r"decorated: .*missing 1 required.*; TypeError: can only conc"):
        inspect_model("broken_models:decorated")
    with pytest.raises(DrkdError, match="pair: cannot be called without arguments, nor with a list of class names"):
        inspect_model("broken_models:pair")


def test_a_recipe_shows_student_and_teacher(tmp_path: Path, tiny_coco: Path, tiny_detector: Path) -> None:
    content = {
        "student": {
            "class_path": "drkd.adapters.HookedBuilder",
            "init_args": {"factory": f"{HOME}:build", "losses": f"{HOME}:losses", "layers": ["neck"]},
        },
        "teacher": {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(tiny_detector)}},
        "data": {"root": str(tiny_coco)},
        "training": {"steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    student, teacher = inspect_model(str(tmp_path / "recipe.yaml"), size=(64, 64))
    assert (student.title, teacher.title) == ("student", "teacher")
    assert [row.name for row in student.layers if row.pyramid] == ["neck[0]", "neck[1]", "neck[2]"]
    assert yaml.safe_load(student.yaml) == {"method": {"init_args": {"levels": ["p3", "p4", "p5"]}}}


def test_several_teachers_and_their_class_maps_are_built_as_a_run_builds_them(tmp_path: Path, tiny_coco: Path) -> None:
    other = write_detector(tmp_path / "teacher.pt", classes=("horse", "dog"))
    saved = {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(other)}}
    content = {
        "student": {"class_path": "drkd.adapters.RetinaNetBuilder", "init_args": {"width": 0.25, "fpn_channels": 32}},
        "teachers": {
            "one": {"detector": saved, "class_map": "names"},
            "two": {"detector": saved, "class_map": "names"},
        },
        "data": {"root": str(tiny_coco)},
        "training": {"steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    found = inspect_model(str(tmp_path / "recipe.yaml"), size=(64, 64))
    assert [entry.title for entry in found] == ["student", "teacher one", "teacher two"]
    assert found[1].yaml.startswith("# levels of the teacher one: ")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (f"{HOME}:build", "cannot be run with images .* Give --forward"),
        ("no_such_module:build", "MODEL: there is no module 'no_such_module'"),
        ("builtins:dict", "expected a function that returns a torch module, got dict"),
        ("no/such/student.pt", "no such file"),
    ],
)
def test_what_cannot_be_inspected(model: str, message: str) -> None:
    with pytest.raises(DrkdError, match=message):
        inspect_model(model, size=(64, 64))
