"""The board: what it shows of every state, and how long it says that it will take."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from drkd.recipes.comparison import progress
from drkd.recipes.comparison.cell import Cell
from drkd.recipes.comparison.progress import Board, Task


def _task(
    method: str, seed: int | None, tmp_path: Path, *, pair: str = "a", state: str = "queued", **more: object
) -> Task:
    cell = Cell(pair, method, seed, "train", (), {}, frozenset(), tmp_path)
    return Task(cell, state, **more)  # type: ignore[arg-type]


def _done(method: str, seed: int | None, tmp_path: Path, seconds: float, *, pair: str = "a") -> Task:
    content = {"metrics": {"ap": 0.123, "ap_small": None}, "seconds": seconds}
    return _task(method, seed, tmp_path, pair=pair, state="done", content=content)


@pytest.mark.parametrize("terminal", [True, False])
def test_every_state_is_shown(terminal: bool, tmp_path: Path) -> None:
    running = _task("drkd", 1, tmp_path, state="running", step=30, steps=400, epoch=1)
    tasks = [
        _done("teacher", None, tmp_path, 1.0),
        _done("student", 0, tmp_path, 10.0),
        running,
        _task("student", 1, tmp_path),
        _task("drkd", 0, tmp_path, state="failed"),
    ]
    output = StringIO()
    console = Console(file=output, force_terminal=terminal, width=160, color_system=None, highlight=False)
    board = Board(tasks, console, jobs=1)
    with board.shown() as redraw:
        redraw()
        for task in tasks:
            board.say(task)
    shown = output.getvalue()
    if terminal:
        for words in ("5 cells: 2 done, 1 running, 1 failed", "step 30/400, epoch 2", "12.3 / -", "queued", "failed"):
            assert words in shown
    else:
        assert "[3/5] a/student/0: AP 12.3, AP_S -, 10 s; about" in shown
        assert "a/drkd/1: started" in shown and "a/drkd/0: failed" in shown


def test_a_board_higher_than_the_terminal_shows_what_runs(tmp_path: Path) -> None:
    tasks = [_task(f"method{number}", 0, tmp_path) for number in range(30)]
    tasks[3] = _done("method3", 0, tmp_path, 200.0)
    tasks[27].state, tasks[29].state = "failed", "running"
    output = StringIO()
    console = Console(file=output, force_terminal=True, width=100, height=12, color_system=None, highlight=False)
    console.print(Board(tasks, console, jobs=1).render())
    lines = output.getvalue().rstrip().splitlines()
    assert len(lines) < 12
    # The title says how long the last one took.
    assert lines[0].startswith("30 cells: 1 done, 1 running, 1 failed") and "a/method3/0 took 3 min" in lines[0]
    assert any("method29" in line and "starting" in line for line in lines)
    assert any("method27" in line and "failed" in line for line in lines)
    assert lines[-1].strip() == "and 22 rows more: 22 queued"


def test_running_cells_say_where_they_are(tmp_path: Path) -> None:
    task = _task("drkd", 0, tmp_path, state="running")
    task.look()
    assert task.words() == "starting"
    task.cell.run_folder.mkdir(parents=True)
    (task.cell.run_folder / "progress.json").write_text(json.dumps({"step": 7, "steps": 8, "epoch": 0}))
    task.look()
    assert task.words() == "step 7/8, epoch 1"
    task.first = 9
    task.look()
    assert task.first == 7
    (task.cell.run_folder / "progress.json").write_text("{")
    task.look()
    assert task.words() == "step 7/8, epoch 1"
    task.step = 8
    assert task.words() == "evaluating"


def test_time_left_is_estimated_from_cells_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1000.0)
    nothing = Board([_task("student", 0, tmp_path)], Console(file=StringIO()), jobs=1)
    assert nothing.seconds_left() is None
    assert nothing.left_words() == "time left not known yet"
    tasks = [
        _done("student", 0, tmp_path, 10.0),
        _done("student", 1, tmp_path, 14.0),
        _done("drkd", 0, tmp_path, 40.0),
        _task("student", 2, tmp_path),  # 12: mean of its pair and method
        _task("drkd", 1, tmp_path),  # 40
        _task("hint", 0, tmp_path),  # its pair's mean: 64 / 3
        _task("drkd", 0, tmp_path, pair="b"),  # its method's: 40
    ]
    board = Board(tasks, Console(file=StringIO()), jobs=2)
    assert board.seconds_left() == pytest.approx((12 + 40 + 64 / 3 + 40) / 2)
    # Half-way after 30 s: 60 s by its steps, 40 s by the cell alike, each half: 50 s, of which 30 are gone.
    running = _task("drkd", 1, tmp_path, state="running", began=970.0, step=50, steps=100)
    board = Board([*tasks[:3], running], Console(file=StringIO()), jobs=2)
    assert board.seconds_left() == pytest.approx(20.0)
    # Gone on with at step 40 of 100, half-way through the rest after 30 s: 60 s by its steps, 24 s by the cell alike.
    resumed = _task("drkd", 1, tmp_path, state="running", began=970.0, step=70, steps=100, first=40)
    board = Board([*tasks[:3], resumed], Console(file=StringIO()), jobs=2)
    assert board.seconds_left() == pytest.approx((60.0 + 24.0) / 2 - 30.0)
    alone = _task("drkd", 1, tmp_path, state="running", began=970.0, step=70, steps=100, first=40)
    assert Board([alone], Console(file=StringIO()), jobs=2).seconds_left() == pytest.approx(30.0)
    # Of a cell that went on after a kill only the last session's seconds are known.
    tasks[2].content["earlier_sessions"] = 1
    board = Board([*tasks[:3], _task("drkd", 1, tmp_path)], Console(file=StringIO()), jobs=1)
    assert board.seconds_left() == pytest.approx(12.0)
