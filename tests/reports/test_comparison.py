"""The report of a comparison: statistics by hand, and honest words about what is not known."""

from __future__ import annotations

import json
import math
import re
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from drkd.contracts import DrkdError
from drkd.reports import write_comparison_report
from drkd.reports.comparison_answer import judge
from drkd.reports.comparison_rows import read_comparison, summarise_comparison
from drkd.reports.comparison_tables import tabulate_cost, tabulate_quality
from drkd.reports.matrix import draw_cost, draw_matrix
from drkd.reports.tables import format_count

# AP x 100 by method and seed.
SCORES = {
    "student": (40.0, 41.0, 42.0),
    "drkd": (50.0, 51.2, 52.4),
    "hint": (46.0, 50.2, 46.8),
    "paper": (39.0, 41.0, 43.0),
}


def write_cells(folder, *, scores=SCORES, pair="net", teacher=60.0, **changes):
    methods = list(scores)
    about = {"pairs": [pair], "methods": methods, "seeds": [0, 1, 2], "split": "val", "reference": "student", "jobs": 1}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps({**about, **changes}))
    cells = [("teacher", None, teacher)] if teacher else []
    cells += [(method, seed, value) for method in methods for seed, value in enumerate(scores[method])]
    for method, seed, value in cells:
        metrics = dict.fromkeys(("ap", "ap50", "ap75", "ap_small", "ap_medium"), value / 100) | {"ap_large": None}
        slow = {"student": 0.1, "teacher": None}.get(method, 0.12)
        extra = {"drkd": 1500, "student": 0}.get(method, 10)
        training = {
            "seconds_per_step": slow,
            "peak_memory_bytes": (512 + (seed or 0)) * 2**20,
            "peak_memory_kind": "resident",
            "trainable_parameters": {"student": 9, "method": extra},
        }
        cell = {
            "pair": pair,
            "method": method,
            "seed": seed,
            "metrics": metrics,
            "thresholds_px": [16.0, 48.0],
            "training": {} if method == "teacher" else training,
            "distillation": {}
            if method in ("student", "teacher")
            else {
                "t": {
                    "median_gradient_ratio": 0.5,
                    "first": 4.0,
                    "last": 1.0 + (seed or 0),
                    "target_first": 2.0,
                    "target_last": 1.5,
                },
                "t/p3": {"first": 1.0},
            },
            "recipe": {"student": {"class_path": "<b>Net</b>"}},
            "command": ["drkd", "distill", f"--seed={seed}"],
            "commit": "0123abc",
            "machine": {"cpu": "c"},
            "seconds": 9.0,
        }
        leaf = "teacher.json" if seed is None else f"{method}/seed{seed}.json"
        path = folder / "cells" / pair / leaf
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cell))
    return folder


def rows_of(folder):
    comparison = read_comparison(folder)
    return {row.method: row for row in summarise_comparison(comparison)}, comparison


def test_statistics_agree_with_those_by_hand(tmp_path):
    rows, _ = rows_of(write_cells(tmp_path))
    drkd = rows["drkd"]
    assert (drkd.scores["ap"].mean, drkd.scores["ap"].std) == pytest.approx((0.512, 0.012))
    # Differences 10.0, 10.2, 10.4: mean 10.2; t(2) = 4.3027, half width 4.3027 * 0.2 / sqrt(3).
    difference, half = drkd.to_reference["ap"], 4.3027 * 0.002 / math.sqrt(3)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.102, 0.102 - half, 0.102 + half))
    # The best other one is hint (mean 47.67); differences 4.0, 1.0, 5.6: mean 3.533, sample deviation 2.3352.
    assert drkd.rival == "hint"
    half = 4.3027 * 0.0233524 / math.sqrt(3)
    rival = drkd.to_rival["ap"]
    assert (rival.mean, rival.low, rival.high) == pytest.approx(
        (0.106 / 3, 0.106 / 3 - half, 0.106 / 3 + half), rel=1e-4
    )
    assert rows["hint"].rival == "drkd"
    # (51.2 - 41) / (60 - 41)
    assert drkd.share == pytest.approx(10.2 / 19)
    assert rows["paper"].share == pytest.approx(0.0)
    assert rows["student"].rival is None and not rows["student"].to_reference
    assert math.isnan(rows["student"].share)
    spread = {"target_first": 2.0, "target_last": 1.5}
    assert rows["drkd"].terms == {"t": {"median_gradient_ratio": 0.5, "first": 4.0, "last": 2.0, **spread}}
    assert (drkd.seconds_per_step, drkd.peak_memory, drkd.extra_parameters) == (0.12, 514 * 2**20, 1500)


def test_cost_shows_parameters_trained_and_held(tmp_path):
    write_cells(tmp_path)
    for seed in range(3):
        path = tmp_path / "cells" / "net" / "drkd" / f"seed{seed}.json"
        cell = json.loads(path.read_text())
        cell["training"]["held_parameters"] = {"student": 9, "method": 2500}
        path.write_text(json.dumps(cell))
    rows, comparison = rows_of(tmp_path)
    shown = {row[1]: row[-1] for row in tabulate_cost(list(rows.values()), comparison).rows}
    # Cells of earlier versions know only what is trained.
    assert shown == {
        "student": "0",
        "drkd": f"{format_count(1500)} / {format_count(2500)}",
        "hint": "10",
        "paper": "10",
    }


def test_tables_show_them(tmp_path):
    rows, comparison = rows_of(write_cells(tmp_path))
    table = tabulate_quality(list(rows.values()), comparison)
    shown = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert [row[1] for row in table.rows] == ["teacher", "student", "drkd", "hint", "paper"]
    assert shown["drkd"]["AP"] == "51.2 ± 1.2"
    assert shown["drkd"]["Δ AP to student (95 %)"] == "+10.2 [+9.7, +10.7]"
    assert shown["drkd"]["Δ AP to best rival (95 %)"] == "+3.5 [-2.3, +9.3] (hint)"
    assert shown["drkd"]["Gap recovered"] == "54 %"
    assert shown["drkd"]["AP_L"] == "-"
    assert shown["student"]["Δ AP to student (95 %)"] == ""
    assert shown["teacher"]["AP"] == "60.0" and shown["teacher"]["Seeds"] == ""
    assert "16² px" in " ".join(table.notes)
    cost = {row[1]: row[2:] for row in tabulate_cost(list(rows.values()), comparison).rows}
    assert cost["drkd"] == ("0.12 s", "1.20", "514 MiB", "1.50 k")
    assert cost["student"] == ("0.1 s", "1.00", "514 MiB", "0")
    assert "other work" not in " ".join(tabulate_cost(list(rows.values()), comparison).notes)
    answer = judge(list(rows.values()), "net", "student")
    assert "drkd has the highest mean AP, 51.2 ± 1.2: +10.2 [+9.7, +10.7] to student, beyond chance" in answer
    assert "+3.5 [-2.3, +9.3] to the next, hint, not beyond chance with 3 seeds." in answer


def test_a_pair_without_scores_of_its_teacher_says_why_the_gap_is_empty(tmp_path):
    for teacher, told in ((60.0, False), (None, True)):
        rows, comparison = rows_of(write_cells(tmp_path / str(teacher), teacher=teacher))
        table = tabulate_quality(list(rows.values()), comparison)
        shown = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
        assert (shown["drkd"]["Gap recovered"] == "-") == told
        assert (
            "Of net there are no scores of a teacher, so no gap to recover is known" in " ".join(table.notes)
        ) == told


def test_small_objects_have_a_best_rival_of_their_own(tmp_path):
    write_cells(tmp_path)
    for seed, value in enumerate((0.44, 0.45, 0.46)):
        cell = tmp_path / f"cells/net/paper/seed{seed}.json"
        content = json.loads(cell.read_text())
        content["metrics"]["ap_small"] = value + 0.05
        cell.write_text(json.dumps(content))
    rows, comparison = rows_of(tmp_path)
    drkd = rows["drkd"]
    assert (drkd.rival, drkd.small_rival) == ("hint", "paper")
    # 50 - 49, 51.2 - 50, 52.4 - 51
    assert drkd.to_small_rival.mean == pytest.approx(0.012)
    table = tabulate_quality(list(rows.values()), comparison)
    shown = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert shown["drkd"]["Δ AP_S to best rival (95 %)"] == "+1.2 [+0.7, +1.7] (paper)"
    assert shown["student"]["Δ AP_S to best rival (95 %)"] == ""
    answer = judge(list(rows.values()), "net", "student")
    assert "On small objects: +1.2 [+0.7, +1.7] AP_S to the best rival there, paper, beyond chance." in answer


def test_a_screened_method_does_not_win_with_its_one_seed(tmp_path):
    rows, _ = rows_of(write_cells(tmp_path, scores={**SCORES, "lucky": (58.0,)}))
    answer = judge(list(rows.values()), "net", "student")
    assert "drkd has the highest mean AP" in answer and answer.endswith("Left out, with fewer seeds: lucky.")
    assert rows["drkd"].rival == "hint" and rows["lucky"].rival == "drkd"
    # Left out means left out: it is no "next" either.
    rows, _ = rows_of(write_cells(tmp_path / "alone", scores={**SCORES, "hint": (58.0,), "paper": (39.0,)}))
    answer = judge(list(rows.values()), "net", "student")
    assert rows["drkd"].rival == "hint" and "to the next" not in answer and "best rival there" not in answer
    assert answer.endswith(" No other method has as many seeds. Left out, with fewer seeds: hint, paper.")


def test_every_rival_counts_and_not_the_best_alone(tmp_path):
    # Of the best one the difference is the same in each seed; the other's is larger and not beyond chance.
    scores = {**SCORES, "hint": (49.0, 50.2, 51.4), "paper": (49.0, 41.0, 43.0)}
    rows, _ = rows_of(write_cells(tmp_path, scores=scores))
    assert set(rows["drkd"].to_rivals) == {"hint", "paper"} and rows["student"].to_rivals == {}
    to_paper = rows["drkd"].to_rivals["paper"]["ap_small"]
    assert to_paper.mean == pytest.approx((0.01 + 0.102 + 0.094) / 3) and to_paper.low < 0
    assert rows["drkd"].to_rivals["hint"]["ap"].low > 0
    answer = judge(list(rows.values()), "net", "student")
    assert "+1.0 [+1.0, +1.0] to the next, hint, beyond chance" in answer
    assert answer.endswith("Beyond chance it is above 1 of 2 rival(s) in AP and 1 in AP_S.")


def test_data_without_small_objects_have_no_answer_about_them(tmp_path):
    folder = write_cells(tmp_path)
    for file in (folder / "cells" / "net").rglob("*.json"):
        cell = json.loads(file.read_text())
        cell["metrics"]["ap_small"] = None
        file.write_text(json.dumps(cell))
    rows, _ = rows_of(folder)
    answer = judge(list(rows.values()), "net", "student")
    assert "AP_S" not in answer and re.search(r"Beyond chance it is above \d of 2 rival\(s\) in AP\.$", answer)


def test_two_methods_with_all_seeds_lack_none(tmp_path):
    rows, _ = rows_of(write_cells(tmp_path, scores={name: SCORES[name] for name in ("student", "drkd")}))
    answer = judge(list(rows.values()), "net", "student")
    assert "of 1 method(s), drkd has the highest mean AP" in answer and "No other method" not in answer


def keep_seeds(folder, kept):
    """Leave of some methods only the cells of these seeds."""
    for method, seeds in kept.items():
        for cell in (folder / "cells" / "net" / method).iterdir():
            if int(cell.stem.removeprefix("seed")) not in seeds:
                cell.unlink()


def test_as_many_seeds_are_not_the_same_seeds(tmp_path):
    # By its mean AP good is best, by its gain over easier seeds lucky is.
    scores = {"student": (30, 31, 20, 21), "good": (36, 37, 0, 0), "lucky": (0, 0, 28, 29)}
    write_cells(tmp_path, scores=scores, seeds=[0, 1, 2, 3])
    keep_seeds(tmp_path, {"good": (0, 1), "lucky": (2, 3)})
    rows, _ = rows_of(tmp_path)
    assert rows["good"].to_rivals == {}
    assert judge(list(rows.values()), "net", "student") == (
        "net: of 2 method(s), lucky has the largest gain over student (on its seeds 2, 3): +8.0 [+8.0, +8.0], beyond "
        "chance. There is no seed that all of them have, so mean APs are not compared. No other method shares its "
        "seeds."
    )


def test_methods_are_ranked_over_the_seeds_that_all_have(tmp_path):
    # Seed 3 is an easy one, and lucky alone has it.
    scores = {"student": (30, 31, 32, 60), "good": (36, 38, 40, 0), "lucky": (0, 35, 37, 90)}
    write_cells(tmp_path, scores=scores, seeds=[0, 1, 2, 3])
    keep_seeds(tmp_path, {"good": (0, 1, 2), "lucky": (1, 2, 3)})
    rows, _ = rows_of(tmp_path)
    # 38 - 31, 40 - 32: mean 7.5, t(1) = 12.7062, half width 12.7062 * 0.7071 / sqrt(2).
    assert judge(list(rows.values()), "net", "student") == (
        "net: of 2 method(s), good has the highest mean AP over the seeds that all have (1, 2), 39.0 ± 1.4: +7.5 "
        "[+1.1, +13.9] to student, beyond chance; +3.0 [+3.0, +3.0] to the next, lucky, beyond chance. On small "
        "objects: +3.0 [+3.0, +3.0] AP_S to the best rival there, lucky, beyond chance. Beyond chance it is above 1 of "
        "1 rival(s) in AP and 1 in AP_S."
    )


def test_without_a_seed_common_to_all_the_rivals_that_share_some_still_count(tmp_path):
    scores = {"student": (30, 31, 32, 33), "a": (31, 32, 0, 0), "b": (0, 36, 37.5, 0), "c": (0, 0, 33, 34)}
    write_cells(tmp_path, scores=scores, seeds=[0, 1, 2, 3])
    keep_seeds(tmp_path, {"a": (0, 1), "b": (1, 2), "c": (2, 3)})
    rows, _ = rows_of(tmp_path)
    answer = judge(list(rows.values()), "net", "student")
    assert "b has the largest gain over student (on its seeds 1, 2): +5.2" in answer
    assert answer.endswith("so mean APs are not compared.")


def test_cells_that_are_not_asked_for_are_noted(tmp_path):
    write_cells(tmp_path, seeds=[1, 2], methods=["student", "drkd", "hint"])
    write_cells(tmp_path / "other", pair="gone")
    (tmp_path / "other" / "cells" / "gone").rename(tmp_path / "cells" / "gone")
    rows, comparison = rows_of(tmp_path)
    notes = " ".join(tabulate_quality(list(rows.values()), comparison).notes)
    for words in ("pairs gone", "methods paper", "seeds 0"):
        assert f"Cells of {words} lie in the folder and are not in this table" in notes
    rows, comparison = rows_of(write_cells(tmp_path / "whole"))
    assert comparison.aside == ()


def test_steps_of_two_machines_are_not_compared(tmp_path):
    write_cells(tmp_path)
    for method, seed, machine in (("drkd", 0, {"cpu": "fast"}), ("drkd", 1, None), ("hint", 0, {"cpu": "fast"})):
        cell = tmp_path / f"cells/net/{method}/seed{seed}.json"
        content = {**json.loads(cell.read_text()), "machine": machine}
        content["training"]["seconds_per_step"] = 0.01
        cell.write_text(json.dumps(content))
    for seed in (1, 2):
        (tmp_path / f"cells/net/hint/seed{seed}.json").unlink()
    rows, comparison = rows_of(tmp_path)
    # Of the one seed on the student's machine: 0.12 / 0.1.
    assert rows["drkd"].step_ratio == pytest.approx(1.2) and math.isnan(rows["hint"].step_ratio)
    table = tabulate_cost(list(rows.values()), comparison)
    assert {row[1]: row[3] for row in table.rows}["hint"] == "-"
    assert "Measured on 2 kinds of machine" in " ".join(table.notes)


def test_a_cell_that_began_with_another_commit_says_so(tmp_path):
    def notes():
        rows, comparison = rows_of(tmp_path)
        return " ".join(tabulate_quality(list(rows.values()), comparison).notes)

    file = write_cells(tmp_path) / "cells" / "net" / "drkd" / "seed1.json"
    assert "states of drkd" not in notes()
    file.write_text(json.dumps({**json.loads(file.read_text()), "earlier_commits": ["00ff", "0123abc"]}))
    assert "Measured with 2 states of drkd's code: 00ff, 0123abc." in notes()


def test_steps_are_compared_seed_by_seed(tmp_path):
    write_cells(tmp_path)
    for method, seconds in {"student": (0.1, 0.2, 0.1), "drkd": (0.12, 0.25, None)}.items():
        for seed, value in enumerate(seconds):
            cell = tmp_path / f"cells/net/{method}/seed{seed}.json"
            content = json.loads(cell.read_text())
            content["training"]["seconds_per_step"] = value
            cell.write_text(json.dumps(content))
    rows, comparison = rows_of(tmp_path)
    # Not 0.185 over 0.133, as means of unlike seeds would have it.
    assert rows["drkd"].step_ratio == pytest.approx((1.2 + 1.25) / 2)
    assert rows["student"].step_ratio == 1.0 and math.isnan(rows["teacher"].step_ratio)
    table = tabulate_cost(list(rows.values()), comparison)
    assert {row[1]: row[3] for row in table.rows}["drkd"] in ("1.22", "1.23")
    assert "from seed to seed (net): other work shared the machine" in " ".join(table.notes)


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    rows, comparison = rows_of(write_cells(tmp_path, scores={"student": (40.0,), "drkd": (45.0,)}))
    table = tabulate_quality(list(rows.values()), comparison)
    drkd = dict(zip(table.columns, table.rows[-1], strict=True))
    assert (drkd["AP"], drkd["Δ AP to student (95 %)"], drkd["Δ AP to best rival (95 %)"]) == ("45.0", "+5.0", "")
    notes = " ".join(table.notes)
    assert "One seed only, so no spread and no interval: net/student, net/drkd." in notes
    assert "Not all 3 seeds are measured of net/student (1), net/drkd (1)." in notes
    assert "from one seed, which says nothing about chance" in judge(list(rows.values()), "net", "student")


def test_a_method_without_any_cell_is_missed(tmp_path):
    methods = ["student", "drkd", "lost", "misfit"]
    folder = write_cells(tmp_path, scores={"student": (1.0, 2.0, 3.0), "drkd": (2.0, 3.0, 4.0)}, methods=methods)
    (folder / "cells" / "net" / "misfit").mkdir()
    for seed in range(3):
        reason = {"pair": "net", "method": "misfit", "not_applicable": "no bins"}
        (folder / "cells" / "net" / "misfit" / f"seed{seed}.json").write_text(json.dumps(reason))
    rows, comparison = rows_of(folder)
    notes = tabulate_quality(list(rows.values()), comparison).notes
    assert "Not measured: net/lost." in notes
    assert "net/misfit is not applicable: no bins" in notes


def test_a_method_is_missed_on_its_own_pairs_only(tmp_path):
    write_cells(tmp_path, methods=["student", "drkd", "hint", "lost"], limited={"hint": ["far"], "lost": ["far"]})
    rows, comparison = rows_of(tmp_path)
    notes = " ".join(tabulate_quality(list(rows.values()), comparison).notes)
    assert {*rows} == {"teacher", "student", "drkd"} and "Not measured" not in notes
    assert "Cells of methods paper lie in the folder" in notes
    assert "Cells of net/hint lie in the folder and are not in this table: `pairs` leaves them out." in notes


def test_many_methods_without_any_cell_are_counted(tmp_path):
    methods = ["student", "drkd", *(f"lost{number}" for number in range(20))]
    folder = write_cells(tmp_path, scores={"student": (1.0, 2.0, 3.0), "drkd": (2.0, 3.0, 4.0)}, methods=methods)
    rows, comparison = rows_of(folder)
    notes = tabulate_quality(list(rows.values()), comparison).notes
    (missed,) = (note for note in notes if note.startswith("Not measured"))
    assert missed == f"Not measured: {', '.join(f'net/lost{number}' for number in range(12))} and 8 more."


def test_a_term_without_a_number_does_not_end_the_report(tmp_path):
    folder = write_cells(tmp_path)
    for seed, first in enumerate((None, 3.0, 5.0)):
        file = folder / "cells" / "net" / "drkd" / f"seed{seed}.json"
        cell = json.loads(file.read_text())
        cell["distillation"]["t"] |= {"first": first, "last": None}
        file.write_text(json.dumps(cell))
    rows, _ = rows_of(folder)
    assert rows["drkd"].terms["t"]["first"] == 4.0 and "last" not in rows["drkd"].terms["t"]
    assert write_comparison_report(folder).exists()


def test_a_method_that_hurts_is_not_called_best(tmp_path):
    rows, _ = rows_of(write_cells(tmp_path, scores={"student": (40.0, 41.0), "drkd": (38.0, 39.0)}))
    assert judge(list(rows.values()), "net", "student").startswith("net: no method is better than student; the best")


def test_only_common_seeds_count(tmp_path):
    rows, _ = rows_of(write_cells(tmp_path, scores={"student": (40.0, 41.0), "drkd": (42.0, 44.0, 99.0)}))
    assert rows["drkd"].to_reference["ap"].mean == pytest.approx(0.025)
    assert rows["drkd"].share == pytest.approx((43.0 - 40.5) / (60.0 - 40.5))


def test_the_report_is_complete_and_escaped(tmp_path):
    page = write_comparison_report(write_cells(tmp_path / "out"))
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3
    for words in (
        "51.2&nbsp;±&nbsp;1.2",
        "beyond chance",
        "&lt;b&gt;Net&lt;/b&gt;",
        "0123abc",
        "drkd distill --seed=0",
        "1.50 k",
    ):
        assert words in text
    assert "<b>Net" not in text
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert "## Cost of training" in markdown and "| net | drkd | t | 0.50 | 4 | 2 | -50 % | -25 % |" in markdown
    content = json.loads((tmp_path / "out" / "table.json").read_text())
    drkd = next(row for row in content["rows"] if row["method"] == "drkd")
    assert drkd["to_reference"]["ap"]["mean"] == pytest.approx(0.102)
    assert drkd["values"]["ap"] == {"0": 0.5, "1": 0.512, "2": 0.524}
    assert drkd["scores"]["ap_large"]["mean"] is None
    for name in ("scores", "differences", "cost"):
        with Image.open(tmp_path / "out" / "figures" / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 5


def test_a_report_of_as_many_methods_as_an_ablation_has(tmp_path):
    scores = {"student": (40.0, 41.0), **{f"changed_{number}": (41.0 + number / 9, 42.0) for number in range(42)}}
    page = write_comparison_report(write_cells(tmp_path / "out", scores=scores))
    assert all(name in page.read_text() for name in scores)
    with Image.open(tmp_path / "out" / "figures" / "scores.png") as image:
        # One panel below the other.
        assert 1.5 * image.height < image.width < 5 * image.height


def written(figure):
    """Boxes of the names and numbers in a figure, px, by panel; the scales' own are matplotlib's."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        ticks = [text for text in axes.get_xticklabels() if not text.get_text().replace(".", "").isdigit()]
        shown = [text for text in (*axes.texts, *ticks, axes._left_title) if text.get_text() and text.get_visible()]
        # A slanted one's upright box covers more than it does.
        yield {text.get_text(): text.get_window_extent() for text in shown if not text.get_rotation()}


@pytest.mark.parametrize("methods", [("drkd", "pkd"), ("drkd", "drkd_cross_head", "pkd", "pkd_3", "pkd_adapter")])
def test_names_and_numbers_do_not_cover_each_other(methods):
    names = ("student", *methods)
    scores = {
        (pair, name): [first + 0.3 * place + 0.4 * seed for seed in range(3)]
        for pair, first in (("net", 44.0), ("other", 20.0))
        for place, name in enumerate(names)
    }
    cells = [
        {"detector": pair, "method": name, "seed": seed, "metrics": {"ap": value / 100, "ap_small": value / 200}}
        for (pair, name), values in scores.items()
        for seed, value in enumerate(values)
    ]
    cells += [{"detector": "net", "method": "teacher", "seed": None, "metrics": {"ap": 0.53, "ap_small": 0.4}}]
    # As close as three rivals are in fact.
    costs = {"net": {name: (1.6 + 0.05 * place, 0.449 - 0.0005 * place) for place, name in enumerate(names)}}
    for figure in (draw_matrix(cells), draw_cost(costs)):
        for boxes in written(figure):
            for (one, first), (two, second) in combinations(boxes.items(), 2):
                assert not first.padded(-1).overlaps(second.padded(-1)), (one, two)
            edge = figure.bbox.x1
            assert all(box.x1 <= edge for box in boxes.values())


def test_a_report_of_a_half_measured_comparison(tmp_path):
    write_cells(tmp_path, scores={"drkd": (45.0,)}, methods=["student", "drkd"])
    assert "Nothing to compare with student yet." in write_comparison_report(tmp_path).read_text()


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(DrkdError, match=r"comparison\.json is missing"):
        write_comparison_report(tmp_path)
    write_cells(tmp_path, scores={"student": (40.0,)})
    cell = tmp_path / "cells/net/student/seed0.json"
    content = json.loads(cell.read_text())
    del content["metrics"]["ap_small"]
    cell.write_text(json.dumps(content))
    with pytest.raises(DrkdError, match=r"seed0\.json: field metrics\.ap_small is missing"):
        write_comparison_report(tmp_path)
    (tmp_path / "cells/net/teacher.json").unlink()
    cell.unlink()
    with pytest.raises(DrkdError, match="no measured cell"):
        write_comparison_report(tmp_path)
