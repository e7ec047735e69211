"""The demo as a newcomer runs it, in its quick form."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from drkd.cli import main
from drkd.contracts import DrkdError
from drkd.recipes.demo import clear_demo, run_demo
from drkd.recipes.lock import locked_folder


@pytest.mark.slow
def test_the_quick_demo_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRKD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "demo"
    assert main(["demo", "--quick", "--output", str(folder)]) == 0
    table = (folder / "table.md").read_text()
    assert [name in table for name in ("| teacher |", "| student |", "student + DRKD")] == [True] * 3
    assert "16² px" in table
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 6
    steps = json.loads((folder / "drkd" / "run.json").read_text())["steps"]
    assert f"A quick run of {steps} steps" in page
    assert len(list((folder / "images").glob("*.png"))) == 6
    with np.load(folder / "explain.npz") as arrays:
        count = len(arrays["boxes"])
        assert count >= 2
        for name in ("relation_matrix_student", "relation_matrix_teacher"):
            assert arrays[name].shape == (count, count)
            np.testing.assert_allclose(arrays[name].sum(axis=1), 1.0, rtol=1e-4)
        np.testing.assert_allclose(arrays["relation_filter"].mean(axis=1), 1.0, rtol=1e-4)
        assert arrays["plain_student"].shape == arrays["images"].shape[:3]
    costs = {name: json.loads((folder / name / "cost.json").read_text()) for name in ("teacher", "student", "drkd")}
    assert {tuple(cost["image_size"]) for cost in costs.values()} == {(128, 128)}
    assert costs["student"]["parameters"] == costs["drkd"]["parameters"] < costs["teacher"]["parameters"]
    assert all(cost["latency_ms"] > 0 for cost in costs.values())
    assert (folder / "student" / "student.pt").is_file()
    assert (folder / "drkd" / "student.pt").is_file()


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DrkdError, match=r"holds something that is no demo \(thesis\.tex\)"):
        run_demo(tmp_path, quick=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_runs_that_are_called_as_the_demos_are_are_not_replaced(tmp_path: Path) -> None:
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.pt").write_text("weeks of training")
    with pytest.raises(DrkdError, match=r"holds something that is no demo \(student, teacher\)"):
        run_demo(tmp_path, quick=True)
    assert (tmp_path / "teacher" / "student.pt").read_text() == "weeks of training"


@pytest.mark.parametrize("marks", [("demo.json",), ("detections.json", "explain.npz")])
def test_an_earlier_demo_is_replaced(marks: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "run.json").write_text("{}")
    for name in marks:
        (tmp_path / name).write_text("{}")
    clear_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DrkdError, match=r"no demo \(notes\.txt\)"):
        clear_demo(tmp_path)


def test_a_demo_at_work_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clear_demo(tmp_path)
    (tmp_path / "student").mkdir()
    with locked_folder(tmp_path, worker="drkd demo"):
        monkeypatch.setattr("drkd.recipes.demo.locked_folder", partial(locked_folder, patience=0.0))
        with pytest.raises(DrkdError, match="another drkd demo is at work in this folder"):
            run_demo(tmp_path, quick=True)
    assert (tmp_path / "student").is_dir()
