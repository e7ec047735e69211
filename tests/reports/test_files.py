"""Reading run folders: every damage is named with its file and field; writing is whole or not at all."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from drkd.contracts import DrkdError
from drkd.reports.files import read_arrays, read_curves, read_evaluation, read_run, write_atomically


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_run_is_read(run):
    content = read_run(run)
    assert content.facts["seed"] == 7
    assert content.evaluation.metrics["ap"] == 0.4
    assert math.isnan(content.evaluation.metrics["ap_large"])
    assert content.evaluation.thresholds_px == (16.0, 48.0)
    assert content.cost["parameters"] == 4_321_000
    assert content.curves["val/ap"].steps == (90, 190, 290, 390, 490, 590)
    assert len(content.curves["task/box"].values) == 60


def test_only_run_json_must_be_there(run):
    for name in ("recipe.yaml", "metrics.csv", "evaluation.json", "cost.json"):
        (run / name).unlink()
    content = read_run(run)
    assert (content.recipe, content.curves, content.evaluation, content.cost) == ("", {}, None, {})
    (run / "run.json").unlink()
    with pytest.raises(DrkdError, match=r"run\.json is missing"):
        read_run(run)
    with pytest.raises(DrkdError, match="does not exist"):
        read_run(run / "nowhere")


def test_the_split_is_that_of_the_scores_else_of_the_recipe(run):
    assert read_run(run).evaluation.split == ""
    (run / "recipe.yaml").write_text("evaluation: {split: tune}\n")
    assert read_run(run).evaluation.split == "tune"
    edit(run / "evaluation.json", split="test")
    assert read_run(run).evaluation.split == "test"


@pytest.mark.parametrize("nothing", [None, -1, math.nan])
def test_empty_buckets_are_nan(run, nothing):
    edit(run / "evaluation.json", ap_small=nothing)
    assert math.isnan(read_evaluation(run / "evaluation.json").metrics["ap_small"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("evaluation.json", {"ap": 40.0}, r"evaluation\.json: field ap should be a score"),
        ("evaluation.json", {"ap": "high"}, r"evaluation\.json: field ap should be a score"),
        ("evaluation.json", {"per_class": [1]}, "field per_class"),
        ("evaluation.json", {"thresholds_px": [32]}, "field thresholds_px"),
        ("evaluation.json", {"split": 3}, r"evaluation\.json: field split should be the name of a split, got 3"),
        ("cost.json", {"flops": None}, r"cost\.json: field flops"),
        ("cost.json", {"latency_ms": -1}, "field latency_ms"),
    ],
)
def test_wrong_fields_are_named(run, name, changes, message):
    edit(run / name, **changes)
    with pytest.raises(DrkdError, match=message):
        read_run(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b'{"seed": 1', r"run\.json is no valid JSON"),
        ("run.json", b"[]", "should hold an object, got list"),
        ("evaluation.json", b"{}", "field ap is missing"),
        ("recipe.yaml", b"a: [", r"recipe\.yaml is no valid YAML"),
        ("recipe.yaml", b"- a", r"recipe\.yaml should hold a recipe's settings, got list"),
        ("recipe.yaml", b"\xff\xfe\xff", r"recipe\.yaml cannot be read"),
        ("metrics.csv", b"epoch,val/ap\n1,0.5\n", "column named step"),
        ("metrics.csv", b"step,val/ap\n1,half\n", r"line 2: column val/ap should hold a number, got 'half'"),
    ],
)
def test_damaged_files_are_named(run, name, content, message):
    (run / name).write_bytes(content)
    with pytest.raises(DrkdError, match=message):
        read_run(run)


def test_curves_are_sorted_and_the_last_value_of_a_step_counts(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,20,2.0,\n0,10,1.0,5\n0,20,3.0,nan\n")
    curves = read_curves(path)
    assert curves["a"].steps == (10, 20)
    assert curves["a"].values == (1.0, 3.0)
    assert math.isnan(curves["b"].values[1])


def test_arrays_must_agree_in_shape(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(DrkdError, match="missing"):
        read_arrays(path, {})
    np.savez(path, a=np.zeros((2, 3)), b=np.zeros((4, 2)))
    assert read_arrays(path, {"a": "n 3", "b": "m n"})["a"].shape == (2, 3)
    with pytest.raises(DrkdError, match="array b should be"):
        read_arrays(path, {"a": "n 3", "b": "n 2"})
    with pytest.raises(DrkdError, match="array c is missing"):
        read_arrays(path, {"c": "n"})
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(DrkdError, match="no readable NumPy archive"):
        read_arrays(path, {"a": "n"})
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DrkdError, match="no readable NumPy archive"):
        read_arrays(path, {"a": "n"})


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = write_atomically(tmp_path / "new/page.html", b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]
