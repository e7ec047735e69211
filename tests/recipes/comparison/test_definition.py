"""What a comparison file says, and what is refused in one readable sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from drkd.cli import main
from drkd.contracts import DrkdError
from drkd.recipes.comparison.cell import make_cells
from drkd.recipes.comparison.definition import Arm, Pair, flatten, load_comparison


def _changed(file: Path, **changes: object) -> Path:
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return file


def test_short_forms_are_spelled_out(comparison_file: Path) -> None:
    comparison = load_comparison(comparison_file, ["--jobs=3", "--seeds=[4, 7]"])
    assert comparison.pairs == {"tiny": Pair(str(comparison_file.parent / "recipe.yaml"))}
    assert list(comparison.methods) == ["student", "hint", "drkd"]
    assert comparison.methods["student"] == Arm()
    assert comparison.methods["hint"] == Arm("drkd.methods.FeatureHint")
    assert comparison.methods["drkd"].arguments == {"nodes": 4, "states": 8}
    assert (comparison.jobs, comparison.seeds, comparison.reference) == (3, [4, 7], "student")


def test_overrides_of_the_command_line_add_up(comparison_file: Path) -> None:
    file = _changed(comparison_file, overrides={"training": {"steps": 5, "clip_norm": 1.0}, "inherit": True})
    options = ["--overrides.training.steps=7", "--overrides.training.optimization.learning_rate", "0.5"]
    assert load_comparison(file, options).overrides == {
        "training.steps": 7,
        "training.clip_norm": 1.0,
        "inherit": True,
        "training.optimization.learning_rate": 0.5,
    }


@pytest.mark.parametrize("value", ["[", "{a: 1", "2024-13-45", pytest.param("[" * 5000, id="deep")])
def test_an_override_that_is_no_yaml_is_named_with_its_value(
    value: str, comparison_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", f"--config={comparison_file}", "--dry-run", f"--overrides.training.steps={value}"]) == 2
    message = capsys.readouterr().err
    assert f"--overrides.training.steps: expected a value in YAML, got '{value}'" in message
    assert "Traceback" not in message and message.count("\n") == 1


def test_a_class_in_the_overrides_of_the_file_survives_one_on_the_command_line(comparison_file: Path) -> None:
    builder = {"class_path": "drkd.adapters.RetinaNetBuilder", "init_args": {"norm": "off", "width": 0.5}}
    file = _changed(comparison_file, overrides={"teacher": builder})
    assert load_comparison(file, ["--overrides.inherit=true"]).overrides == {"teacher": builder, "inherit": True}


def test_a_class_on_the_command_line_is_what_it_is_in_the_file(comparison_file: Path) -> None:
    given = "{class_path: drkd.adapters.FCOSBuilder, init_args: {backbone: resnet34}}"
    builder = {"class_path": "drkd.adapters.FCOSBuilder", "init_args": {"backbone": "resnet34"}}
    assert load_comparison(comparison_file, [f"--overrides.student={given}"]).overrides == {"student": builder}


def test_null_is_the_lone_student_and_shipped_recipes_keep_their_names(comparison_file: Path) -> None:
    file = _changed(comparison_file, pairs={"a": "digits/retinanet"}, methods={"student": None})
    comparison = load_comparison(file)
    assert comparison.pairs["a"].recipe == "digits/retinanet"
    assert comparison.methods == {"student": Arm()}


@pytest.mark.parametrize("how", ["train", None])
def test_the_lone_student_may_have_overrides(comparison_file: Path, how: str | None) -> None:
    arms = {"student": "train", "short": {"class_path": how, "overrides": {"training": {"epochs": 1}}}}
    comparison = load_comparison(_changed(comparison_file, methods=arms))
    assert comparison.methods["short"] == Arm(overrides={"training": {"epochs": 1}})


def test_a_comparison_may_have_a_base(comparison_file: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    more = tmp_path / "deep" / "more.yaml"
    more.write_text("base: ../comparison.yaml\nmethods: {student: train, paper: drkd.methods.PaperDRKD}\nseeds: [3]\n")
    comparison = load_comparison(more)
    assert list(comparison.methods) == ["student", "hint", "drkd", "paper"]
    assert Path(comparison.pairs["tiny"].recipe).samefile(tmp_path / "recipe.yaml")
    assert comparison.seeds == [3]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("train", Arm()),
        (None, Arm()),
        ({"class_path": "train"}, Arm()),
        ({"class_path": None, "overrides": {"inherit": True}}, Arm(overrides={"inherit": True})),
        ("drkd.methods.PKD", Arm("drkd.methods.PKD")),
        ({"class_path": "drkd.methods.PKD", "init_args": {"weight": 2}}, Arm("drkd.methods.PKD", {"weight": 2})),
        (
            {"init_args": {"nodes": 5}, "overrides": {"inherit": True}},
            Arm(
                "drkd.methods.DRKD",
                {"nodes": 5, "states": 8},
                {"training.calibration_steps": 2, "inherit": True},
            ),
        ),
    ],
)
def test_an_entry_that_says_what_it_is_replaces_that_of_the_base(
    entry: object, expected: Arm, comparison_file: Path, tmp_path: Path
) -> None:
    derived = tmp_path / "derived.yaml"
    derived.write_text(yaml.safe_dump({"base": "comparison.yaml", "methods": {"drkd": entry}}))
    comparison = load_comparison(derived)
    assert comparison.methods["drkd"] == expected
    assert list(comparison.methods) == ["student", "hint", "drkd"]


def test_a_method_may_be_for_some_pairs(comparison_file: Path) -> None:
    pairs = {"tiny": "recipe.yaml", "other": "recipe.yaml"}
    methods = {"student": None, "hint": {"class_path": "drkd.methods.FeatureHint", "pairs": ["other"]}}
    comparison = load_comparison(_changed(comparison_file, pairs=pairs, methods=methods, seeds=[0]))
    assert comparison.methods["hint"] == Arm("drkd.methods.FeatureHint", pairs=["other"])
    names = [cell.name for cell in make_cells(comparison, source="file")]
    assert names == ["tiny/teacher", "other/teacher", "tiny/student/0", "other/student/0", "other/hint/0"]
    derived = comparison_file.with_name("derived.yaml")
    derived.write_text(yaml.safe_dump({"base": "comparison.yaml", "methods": {"hint": {"pairs": None}}}))
    assert load_comparison(derived).methods["hint"] == Arm("drkd.methods.FeatureHint")
    numbered = _changed(comparison_file, pairs={7: "recipe.yaml"}, methods={"student": None, "hint": {"pairs": [7]}})
    assert load_comparison(numbered).methods["hint"].pairs == ["7"]


def test_a_pair_of_a_derived_comparison_takes_nothing_from_that_of_the_base(
    comparison_file: Path, tmp_path: Path
) -> None:
    _changed(comparison_file, pairs={"tiny": {"recipe": "recipe.yaml", "overrides": {"inherit": True}}})
    derived = tmp_path / "derived.yaml"
    derived.write_text(yaml.safe_dump({"base": "comparison.yaml", "pairs": {"tiny": "recipe.yaml"}}))
    assert load_comparison(derived).pairs == {"tiny": Pair(str(tmp_path / "recipe.yaml"))}


def test_nested_and_dotted_keys_are_one_and_classes_stay_whole() -> None:
    builder = {"class_path": "a.B", "init_args": {"c": 1}}
    assert flatten({"training": {"steps": 3}, "data.root": "x", "student": builder}) == {
        "training.steps": 3,
        "data.root": "x",
        "student": builder,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sedes": [1]}, "there is no such key as 'sedes'; did you mean 'seeds'?"),
        ({"pairs": {"a": {"recpie": "recipe.yaml"}}}, "pairs.a: there is no such key as 'recpie'; did you mean"),
        ({"pairs": {"a": "nowhere.yaml"}}, "pairs.a.recipe: There is no recipe file"),
        ({"pairs": {"a": 3}}, "pairs.a: expected the name of a recipe"),
        ({"pairs": {}}, "pairs: expected names"),
        ({"methods": {"student": {"clas_path": "x"}}}, "methods.student: there is no such key as 'clas_path'"),
        ({"methods": {"student": {"init_args": {"a": 1}}}}, "methods.student.init_args: given without a class_path"),
        ({"methods": {"student": {"overrides": 3}}}, "methods.student.overrides: expected keys with values"),
        ({"methods": {"student": None, "a": {"pairs": "tiny"}}}, "methods.a.pairs: expected a list of names of pairs"),
        ({"methods": {"student": None, "a": {"pairs": []}}}, "methods.a.pairs: expected a list of names of pairs"),
        (
            {"methods": {"student": None, "a": {"pairs": ["tiyn"]}}},
            "pairs: there is no pair 'tiyn'; did you mean 'tiny'?",
        ),
        (
            {"methods": {"student": {"class_path": None, "pairs": ["tiny"]}}},
            "methods.student.pairs: the others are comp",
        ),
        ({"methods": {"teacher": None}}, "methods.teacher: expected a name"),
        ({"methods": {"a/b": None}, "reference": "a/b"}, "methods.a/b: expected a name"),
        ({"reference": "studnet"}, "reference: there is no method 'studnet'; did you mean 'student'?"),
        ({"seeds": [1, 1]}, "seeds: expected different numbers"),
        ({"seeds": "x"}, "seeds: expected list"),
        ({"jobs": 0}, "jobs: expected at least 1"),
        ({"overrides": {"seed": 3}}, "overrides.seed: the comparison decides this by seeds"),
        ({"overrides": {"evaluation": {"split": "x"}}}, "overrides.evaluation.split: the comparison decides this by"),
        ({"overrides": {"method": {"warmup_steps": 3}}}, "overrides.method.warmup_steps: say this in the init_args"),
        ({"student": {"class_path": "x"}}, "this is a recipe, not a comparison"),
    ],
)
def test_mistakes_name_file_and_field(changes: dict[str, object], expected: str, comparison_file: Path) -> None:
    with pytest.raises(DrkdError) as error:
        load_comparison(_changed(comparison_file, **changes))
    message = str(error.value)
    assert expected in message
    assert "comparison.yaml" in message
    assert "\n" not in message
    assert len(message) < 900


def test_a_missing_file_lists_what_ships(tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match="compare/digits"):
        load_comparison(tmp_path / "nowhere.yaml")


def test_the_example_of_the_documentation_is_a_comparison(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of its steps, from where a reader runs them: the recipe is the one that `drkd init` writes."""
    text = (Path(__file__).parents[3] / "docs" / "compare.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL) if "pairs:" in block)
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(tiny_coco), f"--teacher={tiny_detector}", "--output=birds.yaml"]) == 0
    Path("comparison.yaml").write_text(block)
    comparison = load_comparison(Path("comparison.yaml"))
    cells = {cell.name: cell for cell in make_cells(comparison, source="docs")}
    assert len(cells) == 2 + 2 * 4 * 3
    assert cells["birds/drkd/0"].settings["student"]["init_args"]["backbone"] == "resnet18"
    assert cells["deeper/drkd/0"].settings["student"]["init_args"]["backbone"] == "resnet34"
    assert cells["birds/short/0"].settings["training"]["epochs"] == 6
    assert cells["birds/pkd/2"].settings["method"]["init_args"]["weight"] == 0.5


@pytest.mark.parametrize(("key", "value"), [("reference", None), ("seeds", [0, None]), ("jobs", None)])
def test_null_is_no_number_and_no_method(key: str, value: object, comparison_file: Path) -> None:
    content = yaml.safe_load(comparison_file.read_text())
    comparison_file.write_text(yaml.safe_dump({**content, key: value}))
    with pytest.raises(DrkdError, match=key):
        load_comparison(comparison_file)
