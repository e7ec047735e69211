"""Tables: right numbers, written alike as Markdown, HTML and text."""

from __future__ import annotations

import math

import pytest

from drkd.contracts import DrkdError
from drkd.reports.files import METRICS, Evaluation
from drkd.reports.tables import Model, Table, compare_models, describe_evaluation, format_count, format_score

COST = {"parameters": 4_321_000, "flops": 1.5e9, "latency_ms": 12.34, "threads": 2, "image_size": [160, 128]}


def make_model(name, ap, *, sides=(16.0, 48.0), cost=COST):
    metrics = {**dict.fromkeys(METRICS, 0.1), "ap": ap, "ap_large": math.nan}
    return Model(name, Evaluation(metrics, {}, sides), cost)


def test_comparison_states_quality_cost_and_share():
    table = compare_models(make_model("teacher", 0.6), make_model("student", 0.4), make_model("student + DRKD", 0.45))
    row = dict(zip(table.columns, table.rows[2], strict=True))
    assert row["AP"] == "45.0"
    assert row["AP_L"] == "-"
    assert row["Parameters"] == "4.32 M"
    assert row["FLOPs"] == "1.50 G"
    assert row["CPU latency"] == "12.3 ms"
    assert row["Gap recovered"] == "25 %"
    assert [line[-1] for line in table.rows[:2]] == ["", ""]
    notes = " ".join(table.notes)
    assert "16² px" in notes and "48² px" in notes and "scaled" in notes
    assert "160 x 128 px" in notes and "2 thread" in notes


def test_a_teacher_that_is_no_better_leaves_no_gap():
    table = compare_models(make_model("teacher", 0.3), make_model("student", 0.4), make_model("student + DRKD", 0.45))
    assert table.rows[2][-1] == "-"
    assert any("no gap" in note for note in table.notes)


def test_coco_thresholds_are_not_called_scaled():
    models = [make_model(name, ap, sides=(32.0, 96.0)) for name, ap in (("teacher", 0.6), ("a", 0.4), ("b", 0.5))]
    assert "as COCO" in " ".join(compare_models(*models).notes)


def test_evaluations_with_different_thresholds_are_not_compared():
    with pytest.raises(DrkdError, match="different sizes"):
        compare_models(make_model("teacher", 0.6, sides=(32.0, 96.0)), make_model("a", 0.4), make_model("b", 0.5))


def test_cost_may_be_missing():
    models = [make_model(name, ap, cost={}) for name, ap in (("teacher", 0.6), ("a", 0.4), ("b", 0.5))]
    assert compare_models(*models).rows[0][6:9] == ("-", "-", "-")


def test_all_three_forms_hold_the_same_cells():
    table = Table(("Name", "AP"), (("<b>|x", "1.0"), ("plain", "2.0")), ("A note.",), emphasis=1)
    assert table.html() == (
        '<table><thead><tr><th class="word">Name</th><th>AP</th></tr></thead><tbody>'
        '<tr><td class="word">&lt;b&gt;|x</td><td>1.0</td></tr>'
        '<tr class="best"><td class="word">plain</td><td>2.0</td></tr></tbody></table>'
    )
    assert table.markdown() == "| Name | AP |\n| :-- | --: |\n| <b>\\|x | 1.0 |\n| **plain** | **2.0** |\n\nA note.\n"
    text = table.text()
    assert "<b>|x" in text and "2.0" in text and "A note." in text


@pytest.mark.parametrize("split", ["tune", ""])
def test_scores_are_called_by_their_split(split):
    scores = Evaluation(dict.fromkeys(METRICS, 0.1), {}, split=split)
    assert describe_evaluation(scores).rows[0][:2] == (split, "10.0")


def test_number_formats():
    assert [format_score(value) for value in (0.1234, 0.0, math.nan)] == ["12.3", "0.0", "-"]
    counts = [format_count(value) for value in (12, 4_321, 43_210, 432_100, 4.3e9)]
    assert counts == ["12", "4.32 k", "43.2 k", "432 k", "4.30 G"]
