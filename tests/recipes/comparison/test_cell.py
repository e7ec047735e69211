"""Cells: their commands and settings, what counts as a change, and what is kept of a run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from fake_cell import write_run

from drkd.contracts import DrkdError
from drkd.data.convert import convert
from drkd.data.formats.reading import find_sources, list_label_files
from drkd.recipes import run_folder
from drkd.recipes.comparison import inputs
from drkd.recipes.comparison.cell import (
    Cell,
    collect,
    forget,
    is_finished,
    look_up,
    make_cells,
    summarise_terms,
)
from drkd.recipes.comparison.definition import load_comparison
from drkd.recipes.comparison.inputs import Fingerprints, changed_inputs
from drkd.recipes.setting_changes import differences


def _cells(file: Path, *overrides: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in make_cells(load_comparison(file, overrides), source=str(file))}


def _measure(cell: Cell, tmp_path: Path) -> None:
    recipe = tmp_path / "settings.json"
    recipe.write_text(json.dumps(dict(cell.settings)))
    write_run(cell.run_folder, recipe, 0)
    collect(cell)


def test_teachers_come_first_and_seeds_are_the_outer_loop(comparison_file: Path) -> None:
    arms = [f"tiny/{method}/{seed}" for seed in (0, 1) for method in ("student", "hint", "drkd")]
    assert list(_cells(comparison_file)) == ["tiny/teacher", *arms]


def test_a_cell_runs_what_the_comparison_says(comparison_file: Path) -> None:
    cells = _cells(comparison_file, "--overrides.training.clip_norm=3")
    assert cells["tiny/student/1"].command()[:2] == ("drkd", "train")
    assert {"--seed=1", "--evaluation.split=val", "--overwrite=true"} <= set(cells["tiny/student/1"].command())
    # A recipe may say resume or overwrite itself, and a run that is told both is refused.
    assert cells["tiny/drkd/1"].command("overwrite")[-2:] == ("--resume=false", "--overwrite=true")
    assert cells["tiny/drkd/1"].command("resume")[-2:] == ("--overwrite=false", "--resume=true")
    drkd = cells["tiny/drkd/1"].settings
    # Nothing of the recipe's own DRKD (warmup_steps: 77) is left.
    assert drkd["method"]["init_args"]["warmup_steps"] != 77
    assert (drkd["method"]["init_args"]["nodes"], drkd["training"]["calibration_steps"]) == (4, 2)
    assert drkd["training"]["clip_norm"] == 3.0
    assert drkd["seed"] == 1
    assert cells["tiny/student/0"].settings["method"] is None


def test_a_date_is_no_value_of_a_setting(comparison_file: Path) -> None:
    with pytest.raises(DrkdError, match="clip_norm"):
        _cells(comparison_file, "--overrides.training.clip_norm=2026-11-30")


def test_a_sum_of_methods_reaches_its_cell(comparison_file: Path) -> None:
    members = {"relations": {"class_path": "drkd.methods.DRKD", "init_args": {"nodes": 4, "relation_filter": "off"}}}
    content = yaml.safe_load(comparison_file.read_text())
    content["methods"]["sum"] = {"class_path": "drkd.methods.Combination", "init_args": {"methods": members}}
    comparison_file.write_text(yaml.safe_dump(content, sort_keys=False))
    comparison = load_comparison(comparison_file)
    assert comparison.methods["sum"].arguments == {"methods": members}
    cells = [cell for cell in make_cells(comparison, source="x") if cell.method == "sum"]
    member = cells[0].settings["method"]["init_args"]["methods"]["relations"]["init_args"]
    assert (member["nodes"], member["relation_filter"]) == (4, "off")


def test_a_method_that_does_not_fit_is_named(comparison_file: Path) -> None:
    content = yaml.safe_load(comparison_file.read_text())
    content["methods"]["hint"] = {"class_path": "drkd.methods.FeatureHint", "init_args": {"wieght": 1}}
    comparison_file.write_text(yaml.safe_dump(content))
    with pytest.raises(DrkdError, match=r"comparison\.yaml: pairs\.tiny with methods\.hint: .*wieght"):
        _cells(comparison_file)
    content["methods"]["hint"] = "drkd.methods.NoSuch"
    comparison_file.write_text(yaml.safe_dump(content))
    with pytest.raises(DrkdError, match=r"methods\.hint: .*NoSuch"):
        _cells(comparison_file)


def test_a_pair_without_teacher_has_no_teachers_cell(comparison_file: Path) -> None:
    none = "--overrides.teacher=null"
    content = yaml.safe_load(comparison_file.read_text())
    comparison_file.write_text(yaml.safe_dump({**content, "methods": {"student": None}}))
    assert list(_cells(comparison_file, none)) == ["tiny/student/0", "tiny/student/1"]
    comparison_file.write_text(yaml.safe_dump(content))
    with pytest.raises(DrkdError, match="names no teacher"):
        _cells(comparison_file, none)


def test_a_pair_of_several_teachers_has_its_methods_and_no_teachers_cell(comparison_file: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    teacher = recipe.pop("teacher")
    recipe["teachers"] = {"one": {"detector": teacher}, "two": {"detector": teacher, "weight": 0.5}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cells = _cells(comparison_file)
    assert "tiny/teacher" not in cells and cells["tiny/hint/0"].verb == "distill"
    assert set(cells["tiny/hint/0"].settings["teachers"]) == {"one", "two"}


def test_a_changed_setting_is_found_wherever_it_was_changed(comparison_file: Path, tmp_path: Path) -> None:
    for cell in _cells(comparison_file).values():
        _measure(cell, tmp_path)
    assert {look_up(cell)[0] for cell in _cells(comparison_file).values()} == {"done"}
    # In the comparison:
    cells = _cells(comparison_file, "--overrides.training.steps=3")
    assert look_up(cells["tiny/hint/0"]) == ("changed", ["training.steps was 2, is 3"])
    assert look_up(cells["tiny/teacher"])[0] == "done"
    # In the recipe that it names:
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["data"]["max_size"] = 128
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    cells = _cells(comparison_file)
    for name in ("tiny/hint/0", "tiny/teacher"):
        assert look_up(cells[name]) == ("changed", ["data.max_size was 96, is 128"])


def test_another_file_of_the_same_name_is_a_change(
    comparison_file: Path, tmp_path: Path, tiny_coco: Path, tiny_detector: Path
) -> None:
    data, teacher = tmp_path / "data", tmp_path / "teacher.pt"
    shutil.copytree(tiny_coco, data)
    shutil.copy(tiny_detector, teacher)
    settings = (f"--overrides.data.root={data}", f"--overrides.teacher.init_args.path={teacher}")
    before = _cells(comparison_file, *settings)
    assert set(before["tiny/drkd/0"].inputs) == {"teacher.init_args.path", "data.root train", "data.root val"}
    names = ("tiny/drkd/0", "tiny/teacher", "tiny/drkd/1")
    for name in names:
        _measure(before[name], tmp_path)
        before[name].inputs_file.write_text(json.dumps(dict(before[name].inputs)))
    # As if the parent had been killed before it collected this one.
    before["tiny/drkd/1"].file.unlink()
    again = _cells(comparison_file, *settings)
    assert [look_up(again[name])[0] for name in names] == ["done", "done", "missing"]
    assert is_finished(again["tiny/drkd/1"])
    with teacher.open("ab") as file:
        file.write(b"0")
    changed = _cells(comparison_file, *settings)
    for name in names[:2]:
        assert look_up(changed[name]) == ("changed", ["teacher.init_args.path is another file"])
    assert not is_finished(changed["tiny/drkd/1"])
    shutil.copy(tiny_detector, teacher)
    labels = next(data.rglob("*val*.json"))
    labels.write_text(labels.read_text() + " ")
    assert look_up(_cells(comparison_file, *settings)["tiny/teacher"])[1] == ["data.root val is another file"]
    # What was measured before files were recorded says nothing about them.
    content = json.loads(before["tiny/teacher"].file.read_text())
    del content["inputs"]
    before["tiny/teacher"].file.write_text(json.dumps(content))
    assert look_up(_cells(comparison_file, *settings)["tiny/teacher"]) == ("done", [])


def test_embedded_data_and_shipped_teachers_have_digests() -> None:
    settings = {"teacher.init_args.path": "drkd:digits_retinanet", "data.root": "digits", "student.weights": None}
    found = Fingerprints().of(settings)
    assert set(found) == {"teacher.init_args.path", "data.root"}
    other = Fingerprints().of({"teacher.init_args.path": "drkd:digits_faster_rcnn", "data.root": "digits2"})
    assert not set(found.values()) & set(other.values())
    assert Fingerprints().of({"teacher.init_args.path": "no/such.pt", "data.root": "no/such"}) == {}


def _label_of(split: str, settings: dict[str, str]) -> Path:
    """A label file of an image of the split."""
    return list_label_files(find_sources(Path(settings["data.root"]))[split])[-1]


@pytest.mark.parametrize("layout", ["yolo", "yolo-list", "yolo-beside", "voc"])
def test_another_label_of_an_image_is_a_change(layout: str, tiny_coco: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    convert(tiny_coco, root, to="voc" if layout == "voc" else "yolo")
    if layout == "yolo-list":
        (root / "val.txt").write_text(
            "".join(f"./images/val/{file.name}\n" for file in (root / "images/val").iterdir())
        )
        content = yaml.safe_load((root / "data.yaml").read_text()) | {"val": "val.txt"}
        (root / "data.yaml").write_text(yaml.safe_dump(content))
    if layout == "yolo-beside":
        for split in ("train", "val"):
            shutil.move(root / "images" / split, root / split)
            for file in (root / "labels" / split).iterdir():
                shutil.move(file, root / split / file.name)
        content = yaml.safe_load((root / "data.yaml").read_text()) | {"train": "train", "val": "val"}
        (root / "data.yaml").write_text(yaml.safe_dump(content))
    settings = {"data.root": str(root), "data.train_split": "train", "evaluation.split": "val"}
    before = Fingerprints().of(settings)
    assert set(before) == {"data.root train", "data.root val", "data.root train labels", "data.root val labels"}
    label = _label_of("val", settings)
    label.write_text(label.read_text() + "\n")
    now = Fingerprints().of(settings)
    assert changed_inputs(before, now) == ["data.root val labels is another file"]
    # One that is gone is a change too.
    label.unlink()
    assert changed_inputs(now, Fingerprints().of(settings)) == ["data.root val labels is another file"]


def test_files_that_did_not_change_are_read_once(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    convert(tiny_coco, root, to="yolo")
    settings = {"data.root": str(root), "evaluation.split": "val", "teacher.init_args.path": str(tiny_detector)}
    before = Fingerprints().of(settings)
    assert set(before) == {"data.root val", "data.root val labels", "teacher.init_args.path"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
        patch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("a file was read again"))
        assert Fingerprints().of(settings) == before
        # Nor looked for, before and after each cell.
        patch.setattr(inputs, "list_label_files", lambda source: pytest.fail(f"{source} was searched again"))
        assert Fingerprints(same_files=True).of(settings) == before
    label = _label_of("val", settings)
    label.write_text(label.read_text().replace("0", "1"))
    for same_files in (False, True):
        now = Fingerprints(same_files=same_files).of(settings)
        assert changed_inputs(before, now) == ["data.root val labels is another file"]


def test_a_teacher_that_is_a_folder_has_a_digest(tiny_detector: Path, tmp_path: Path) -> None:
    run, saved = tmp_path / "run", tmp_path / "saved"
    run.mkdir()
    saved.mkdir()
    shutil.copy(tiny_detector, run / "student.pt")
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "training_args.bin"):
        (saved / name).write_bytes(b"1")
    settings = {"teacher.init_args.path": str(run), "student.init_args.weights": str(saved), "class_map": str(tmp_path)}
    before = Fingerprints().of(settings)
    assert set(before) == {"teacher.init_args.path", "student.init_args.weights"}
    assert before["teacher.init_args.path"] == Fingerprints().of({"x": str(tiny_detector)})["x"]
    (saved / "training_args.bin").write_bytes(b"2")
    assert Fingerprints().of(settings) == before
    for name in ("preprocessor_config.json", "model.safetensors"):
        now = Fingerprints().of(settings)
        (saved / name).write_bytes(b"2")
        assert changed_inputs(now, Fingerprints().of(settings)) == ["student.init_args.weights is another file"]


def test_a_cell_says_with_which_commits_it_began(comparison_file: Path, tmp_path: Path) -> None:
    cell = _cells(comparison_file)["tiny/hint/0"]
    _measure(cell, tmp_path)
    file = cell.run_folder / "run.json"
    sessions = [{"commit": "b"}, {"commit": "a"}, {"commit": "b"}, {"status": "unreadable"}, {"commit": None}]
    file.write_text(json.dumps({**json.loads(file.read_text()), "sessions": sessions}))
    content = collect(cell)
    assert (content["earlier_sessions"], content["earlier_commits"]) == (5, ["a", "b"])


def test_what_is_forgotten_is_not_collected_again(
    comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = _cells(comparison_file)["tiny/hint/0"]
    _measure(cell, tmp_path)
    # As if it had been killed in the middle.
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    forget(cell)
    assert not cell.file.exists() and cell.run_folder.exists()
    assert not is_finished(cell)


def test_an_option_that_drkd_got_since_counts_only_where_it_is_stated() -> None:
    then, now = {"training": {"steps": 2}}, {"training": {"steps": 2, "new": 1}}
    assert differences(then, now, stated=["training.steps"]) == []
    assert differences(then, now, stated=["training.new"]) == ["training.new is new: 1"]
    assert differences(now, then, stated=[]) == ["training.new was 1, is gone"]
    student = {"student": {"class_path": "a.B", "init_args": {"width": 1}}}
    assert differences({"student": {"class_path": "a.B"}}, student, stated=["student.width"]) == [
        "student.width is new: 1"
    ]


def test_a_damaged_file_is_named(comparison_file: Path) -> None:
    cell = _cells(comparison_file)["tiny/hint/0"]
    cell.file.parent.mkdir(parents=True)
    cell.file.write_text('{"pair": "ti')
    with pytest.raises(DrkdError, match=r"seed0\.json: no valid JSON .*Remove the file"):
        look_up(cell)


def test_a_cells_file_is_whole_or_not_there(
    comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = _cells(comparison_file)["tiny/hint/0"]
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(DrkdError, match="cannot be written"):
            _measure(cell, tmp_path)
    assert not cell.file.exists()
    _measure(cell, tmp_path)
    content = json.loads(cell.file.read_text())
    assert content["metrics"]["ap"] == 0.25
    assert content["recipe"]["training"]["steps"] == 2
    assert (content["seconds"], content["commit"], content["seed"]) == (3.0, "abc", 0)


def test_terms_are_summarised_by_median_and_by_tenths(tmp_path: Path) -> None:
    rows = [f"{step},{1 + step % 3},{20 - step}" for step in range(20)]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,ratio/hint,bare/hint", *rows, "20,,"]) + "\n")
    # Ratios 1, 2, 3, 1, 2, ...: 7, 7 and 6 of them, so the 11th of 20 is 2. First two: 20, 19; last two: 2, 1.
    assert summarise_terms(tmp_path / "metrics.csv") == {
        "hint": {"median_gradient_ratio": 2.0, "first": 19.5, "last": 1.5}
    }
    # While weights are being set a ratio is what it was asked to be.
    late = tmp_path / "late.csv"
    late.write_text(
        "\n".join(["step,ratio/hint,bare/hint", *(f"{k},{7.0 if k < 10 else 0.5},1" for k in range(20))]) + "\n"
    )
    assert summarise_terms(late)["hint"]["median_gradient_ratio"] == 3.75
    few = tmp_path / "few.csv"
    few.write_text("step,ratio/hint\n0,0.01\n50,4.0\n")
    assert summarise_terms(few)["hint"]["median_gradient_ratio"] == pytest.approx(2.005)
    assert summarise_terms(late, calibration_steps=10)["hint"]["median_gradient_ratio"] == 0.5
    # A run that ends before has nothing else to show.
    assert summarise_terms(late, calibration_steps=99)["hint"]["median_gradient_ratio"] == 3.75


def test_the_targets_spread_is_summarised_beside_its_term(tmp_path: Path) -> None:
    rows = [f"{step},{20 - step},{2.0 if step < 10 else 1.0}" for step in range(20)]
    file = tmp_path / "metrics.csv"
    file.write_text("\n".join(["step,bare/pixel,target/pixel", *rows]) + "\n")
    assert summarise_terms(file) == {"pixel": {"first": 19.5, "last": 1.5, "target_first": 2.0, "target_last": 1.0}}


def test_a_term_is_summarised_within_its_span(tmp_path: Path) -> None:
    rows = [f"{step},{20 - step if 5 <= step < 15 else 0.0},0.0" for step in range(20)]
    file = tmp_path / "metrics.csv"
    file.write_text("\n".join(["step,bare/response,bare/silent", *rows]) + "\n")
    silent = {"first": 0.0, "last": 0.0}
    assert summarise_terms(file, spans=True) == {"response": {"first": 15.0, "last": 6.0}, "silent": silent}
    # Where passes are left out by turns, a term counts as much more in the others: the mean has them all.
    assert summarise_terms(file) == {"response": silent, "silent": silent}


def test_a_skipped_steps_term_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,bare/pixel,target/pixel\n0,inf,nan\n1,4,nan\n2,2,nan\n")
    assert summarise_terms(file) == {"pixel": {"first": 4.0, "last": 2.0}}
