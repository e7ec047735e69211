"""The run of a comparison: kills, interrupts, failures and changes lose nothing and mix nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import fake_cell
import pytest
import yaml
from rich.console import Console

from drkd.cli import main
from drkd.contracts import DrkdError
from drkd.recipes.comparison import cell as cells
from drkd.recipes.comparison import run
from drkd.recipes.comparison.absent import find_absent
from drkd.recipes.comparison.again import AGAIN_FILE
from drkd.recipes.comparison.definition import Comparison, load_comparison
from drkd.recipes.comparison.gpus import Gpus, list_gpus
from drkd.recipes.lock import locked_folder
from drkd.reports.comparison_rows import read_comparison, summarise_comparison
from drkd.reports.comparison_tables import tabulate_quality

NAMES = ["tiny/teacher.json", *(f"tiny/{m}/seed{s}.json" for m in ("student", "hint", "drkd") for s in (0, 1))]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_program", fake_cell.fake_program)


def _compare(file: Path, *, overrides: tuple[str, ...] = (), **options: object) -> run.Compared:
    comparison: Comparison = load_comparison(file, overrides)
    console = Console(file=StringIO())
    return run.compare(comparison, source=str(file), console=console, **options)  # type: ignore[arg-type]


def _files(tmp_path: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below cells/ with its content and when it was written."""
    cells = tmp_path / "out" / "cells"
    return {
        path.relative_to(cells).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in cells.rglob("*")
        if path.is_file()
    }


def _wait(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended, and waits for whoever adopted it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def _drive(file: Path, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, fake_cell.__file__, "drive", str(seconds), "compare", "--config", str(file), "--jobs=2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_finished_cells_are_kept_and_only_missing_ones_run(fake: None, comparison_file: Path, tmp_path: Path) -> None:
    first = _compare(comparison_file, only=["*/hint", "tiny/student/1"])
    assert (first.measured, first.cells, first.failures) == (3, 7, ())
    before = _files(tmp_path)
    assert sorted(before) == ["tiny/hint/seed0.json", "tiny/hint/seed1.json", "tiny/student/seed1.json"]
    assert _compare(comparison_file).measured == 7
    after = _files(tmp_path)
    assert sorted(after) == sorted(NAMES)
    assert {name: after[name] for name in before} == before
    content = json.loads(after["tiny/drkd/seed1.json"][0])
    assert (content["pair"], content["method"], content["seed"]) == ("tiny", "drkd", 1)
    assert content["metrics"]["ap"] == 0.26


@pytest.mark.slow
def test_a_killed_comparison_goes_on(comparison_file: Path, tmp_path: Path) -> None:
    driver = _drive(comparison_file, 1.0)
    _wait(lambda: len(_files(tmp_path)) >= 2)
    driver.kill()
    driver.communicate()
    # The writer of one may have been killed, and left it aside.
    before = {name: content for name, content in _files(tmp_path).items() if name in NAMES}
    assert len(before) < 7
    left = tmp_path / "out/cells/tiny/student/.seed0.json.abcd1234"
    left.parent.mkdir(exist_ok=True)
    left.write_text("{")
    pids = [int(path.read_text()) for path in (tmp_path / "out" / "runs").rglob("pid")]
    _wait(lambda: not any(_lives(pid) for pid in pids), 15)
    again = _drive(comparison_file, 0.0)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert b"7 of 7 cells are measured" in output
    after = _files(tmp_path)
    assert sorted(after) == sorted(NAMES)
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_an_interrupt_stops_the_children(comparison_file: Path, tmp_path: Path) -> None:
    driver = _drive(comparison_file, 60.0)
    runs = tmp_path / "out" / "runs"
    _wait(lambda: len(list(runs.rglob("pid"))) == 2)
    pids = [int(path.read_text()) for path in runs.rglob("pid")]
    driver.send_signal(signal.SIGINT)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert b"The same command goes on" in errors and b"Traceback" not in errors
    assert not any(_lives(pid) for pid in pids)
    assert _files(tmp_path) == {}


def test_a_run_that_nobody_collected_is_collected(
    fake: None, comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare(comparison_file)
    before = _files(tmp_path)
    # As if the parent had been killed between the end of the run and the writing of the cell.
    (tmp_path / "out" / "cells" / "tiny" / "hint" / "seed1.json").unlink()
    monkeypatch.setattr(run, "_program", lambda _: pytest.fail("it was run again"))
    _compare(comparison_file)
    assert {name: content for name, (content, _) in _files(tmp_path).items()} == {
        name: content for name, (content, _) in before.items()
    }


def _find_cell(file: Path, overrides: tuple[str, ...], name: str) -> run.Cell:
    comparison = load_comparison(file, overrides)
    return next(cell for cell in run.make_cells(comparison, source="x") if cell.name == name)


@pytest.mark.parametrize("status", ["running", "finished"])
@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_a_run_of_the_old_teacher_is_not_one_of_the_new_after_an_interruption(
    removed: int,
    status: str,
    fake: None,
    comparison_file: Path,
    tmp_path: Path,
    tiny_detector: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = tmp_path / "teacher.pt"
    shutil.copy(tiny_detector, teacher)
    overrides, only = (f"--overrides.teacher.init_args.path={teacher}",), ["tiny/hint/0"]
    _compare(comparison_file, overrides=overrides, only=only)
    old = _find_cell(comparison_file, overrides, "tiny/hint/0")
    old.file.unlink()
    (old.run_folder / "run.json").write_text(json.dumps({"status": status}))
    (old.run_folder / "checkpoints").mkdir()
    (old.run_folder / "checkpoints" / "last.ckpt").touch()
    assert (cells.can_resume(old), cells.is_finished(old)) == (status == "running", status == "finished")
    with teacher.open("ab") as file:
        file.write(b"0")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # The session ends while the old run is removed, or before its process has begun.
    real = cells._remove
    left = iter([real] * removed)
    with monkeypatch.context() as patch:
        patch.setattr(cells, "_remove", lambda path: next(left, stop)(path))
        patch.setattr(run, "start_leashed", stop)
        with pytest.raises(KeyboardInterrupt):
            _compare(comparison_file, overrides=overrides, only=only)
    new = _find_cell(comparison_file, overrides, "tiny/hint/0")
    assert not cells.can_resume(new) and not cells.is_finished(new)
    # What the interruption left is no part of the new run either: nobody could tell its checkpoint from a new one.
    _compare(comparison_file, overrides=overrides, only=only)
    assert new.file.exists() and not (new.run_folder / "checkpoints").exists()


def test_a_teacher_that_is_replaced_while_cells_run_fails_those_it_may_have_reached(
    comparison_file: Path, tmp_path: Path, tiny_detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "teacher.pt"
    shutil.copy(tiny_detector, teacher)
    started: list[str] = []

    def program(cell: run.Cell) -> list[str]:
        started.append(cell.name)
        if started == ["tiny/student/0", "tiny/hint/0"]:
            with teacher.open("ab") as file:
                file.write(b"0")
        return fake_cell.fake_program(cell)

    monkeypatch.setattr(run, "_program", program)
    overrides, only = ("--jobs=1", f"--overrides.teacher.init_args.path={teacher}"), ["tiny/*/0"]
    result = _compare(comparison_file, overrides=overrides, only=only)
    assert started == ["tiny/student/0", "tiny/hint/0"]
    assert list(_files(tmp_path)) == ["tiny/student/seed0.json"]
    assert [failure.name for failure in result.failures] == ["tiny/hint/0", "tiny/drkd/0"]
    for failure in result.failures:
        assert f"{failure.name}: teacher.init_args.path: the file was replaced" in failure.lines[-1]
    # With the new one the command says what is measured with the old.
    with pytest.raises(
        DrkdError, match=r"student.seed0\.json were measured .*teacher\.init_args\.path is another file"
    ):
        _compare(comparison_file, overrides=overrides, only=only)
    # With the old one again, what may have been measured with the new is measured once more.
    shutil.copy(tiny_detector, teacher)
    assert _compare(comparison_file, overrides=overrides, only=only).failures == ()
    assert started[2:] == ["tiny/hint/0", "tiny/drkd/0"]


def test_a_method_that_cannot_work_with_a_replaced_teacher_is_not_recorded_as_such(
    comparison_file: Path, tmp_path: Path, tiny_detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tmp_path / "teacher.pt"
    shutil.copy(tiny_detector, teacher)
    code = f"open({str(teacher)!r}, 'ab').write(b'0'); raise SystemExit(3)"
    monkeypatch.setattr(run, "_program", lambda _: [sys.executable, "-c", code])
    overrides = (f"--overrides.teacher.init_args.path={teacher}",)
    (failure,) = _compare(comparison_file, overrides=overrides, only=["tiny/hint/0"]).failures
    assert "the file was replaced" in failure.lines[-1] and _files(tmp_path) == {}


def test_a_failing_cell_does_not_stop_the_others(
    comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(cell: run.Cell) -> list[str]:
        if cell.name == "tiny/hint/0":
            return [sys.executable, "-c", "print('all was well'); raise SystemExit('drkd: until it was not')"]
        return fake_cell.fake_program(cell)

    monkeypatch.setattr(run, "_program", program)
    assert main(["compare", "--config", str(comparison_file)]) == 1
    captured = capsys.readouterr()
    assert "tiny/hint/0 failed" in captured.err
    assert "  all was well\n  drkd: until it was not\n  (its process ended with code 1)" in captured.err
    assert "6 of 7 cells are measured" in captured.out
    assert sorted(_files(tmp_path)) == sorted(set(NAMES) - {"tiny/hint/seed0.json"})
    monkeypatch.setattr(run, "_program", fake_cell.fake_program)
    assert main(["compare", "--config", str(comparison_file)]) == 0


@pytest.mark.slow
def test_a_method_that_cannot_work_with_a_pair_is_a_finished_cell_with_the_reason(
    comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = run._program

    def program(cell: run.Cell) -> list[str]:
        return real(cell) if cell.method == "hint" else fake_cell.fake_program(cell)

    content = yaml.safe_load(comparison_file.read_text())
    content["methods"]["hint"] = "drkd.methods.LD"  # the tiny detectors' heads have no bins
    comparison_file.write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setattr(run, "_program", program)
    assert main(["compare", "--config", str(comparison_file), "--seeds=[0]"]) == 0
    shown = capsys.readouterr()
    assert "tiny/hint/0: not applicable" in shown.err
    assert "tiny/hint is not applicable: LD distils distributions over the bins" in shown.out
    kept = json.loads((tmp_path / "out/cells/tiny/hint/seed0.json").read_text())
    assert kept["not_applicable"].startswith("LD distils") and "metrics" not in kept
    monkeypatch.setattr(run, "_program", lambda _: pytest.fail("it was tried again"))
    assert main(["compare", "--config", str(comparison_file), "--seeds=[0]"]) == 0


def test_without_any_score_failures_and_reasons_are_shown(
    comparison_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(cell: run.Cell) -> list[str]:
        end = "print('drkd: [it] has no bins'); raise SystemExit(3)" if cell.method == "hint" else "raise SystemExit(9)"
        return [sys.executable, "-c", end]

    monkeypatch.setattr(run, "_program", program)
    command = ["compare", "--config", str(comparison_file), "--only"]
    assert main([*command, "tiny/hint/0"]) == 0
    shown = capsys.readouterr().out
    assert "tiny/hint/0 is not applicable: [it] has no bins" in shown
    assert "0 of 7 cells are measured, 1 not applicable." in shown
    assert main([*command, "tiny/hint/0", "tiny/drkd/0"]) == 1
    shown = capsys.readouterr()
    assert "tiny/drkd/0 failed" in shown.err and "ended with code 9" in shown.err
    # Nor does a report that cannot be written hide them.
    monkeypatch.setattr(run, "_program", lambda c: fake_cell.fake_program(c) if c.seed else program(c))
    with monkeypatch.context() as patch:
        patch.setattr("drkd.reports.write_comparison_report", lambda _: (_ for _ in ()).throw(DrkdError("disk full")))
        assert main([*command, "tiny/student/1", "tiny/drkd/0"]) == 2
    shown = capsys.readouterr()
    assert "tiny/drkd/0 failed" in shown.err and "disk full" in shown.err


def test_a_cell_that_leaves_nothing_has_failed(
    comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_program", lambda _: [sys.executable, "-c", ""])
    result = _compare(comparison_file, only=["tiny/hint/0"])
    assert [failure.name for failure in result.failures] == ["tiny/hint/0"]
    assert "run.json: cannot be read" in result.failures[0].lines[-1]
    assert _files(tmp_path) == {}


def test_changed_settings_are_refused_until_rerun(fake: None, comparison_file: Path, tmp_path: Path) -> None:
    _compare(comparison_file)
    before = _files(tmp_path)
    change = ("--overrides.training.steps=3",)
    with pytest.raises(DrkdError) as error:
        _compare(comparison_file, overrides=change)
    message = str(error.value)
    assert "seed0.json and 5 other cells" in message and "training.steps was 2, is 3" in message
    assert "--rerun" in message and "--output" in message
    # Measuring some again would mix settings in one table.
    with pytest.raises(DrkdError, match="other settings"):
        _compare(comparison_file, overrides=change, only=["*/hint"], rerun="changed")
    assert _files(tmp_path) == before
    _compare(comparison_file, overrides=change, rerun="changed")
    after = _files(tmp_path)
    assert sorted(name for name in NAMES if after[name] == before[name]) == ["tiny/teacher.json"]
    assert json.loads(after["tiny/hint/seed0.json"][0])["recipe"]["training"]["steps"] == 3


def test_rerun_all_measures_the_selected_cells_again(fake: None, comparison_file: Path, tmp_path: Path) -> None:
    _compare(comparison_file)
    before = _files(tmp_path)
    _compare(comparison_file, only=["tiny/hint"], rerun="all")
    after = _files(tmp_path)
    changed = sorted(name for name in NAMES if after[name][1] != before[name][1])
    assert changed == ["tiny/hint/seed0.json", "tiny/hint/seed1.json"]


def test_what_rerun_all_measured_outlives_an_interrupt_and_the_old_report_does_not(
    fake: None,
    comparison_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["compare", "--config", str(comparison_file), "--jobs=1", "--only", "tiny/hint"]
    assert main(command) == 0
    out, before = tmp_path / "out", _files(tmp_path)
    kept = {"comparison.json", "cells", "runs"}
    # Exactly what the report has written is what is removed.
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == kept | {
        name.split("/")[0] for name in cells.REPORT_FILES
    }
    assert {f"figures/{path.name}" for path in (out / "figures").iterdir()} < set(cells.REPORT_FILES)
    (out / "figures" / "mine.png").touch()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_find_outdated", stop)
        assert main([*command, "--rerun=all"]) == 130
    assert "The same command goes on." in capsys.readouterr().err
    assert _files(tmp_path) == before and (out / "report.html").exists()
    with monkeypatch.context() as patch:
        patch.setattr(run, "_program", lambda cell: stop() if cell.seed else fake_cell.fake_program(cell))
        assert main([*command, "--rerun=all"]) == 130
        assert "The same command without --rerun goes on" in capsys.readouterr().err
        # The report is a new one, of what is finished.
        assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == kept | {
            name.split("/")[0] for name in cells.REPORT_FILES
        }
        assert (out / "figures" / "mine.png").exists()
        (row,) = json.loads((out / "table.json").read_text())["rows"]
        assert (row["method"], row["seeds"]) == ("hint", [0])
        assert list(_files(tmp_path)) == ["tiny/hint/seed0.json"]
        patch.setattr(run, "_program", lambda _: [sys.executable, "-c", ""])
        assert main([*command[:-1], "tiny/hint/1", "--rerun=all"]) == 1
        assert "The same command without --rerun tries them again." in capsys.readouterr().err
    measured = _files(tmp_path)["tiny/hint/seed0.json"]
    assert main(command) == 0
    assert _files(tmp_path)["tiny/hint/seed0.json"] == measured


@pytest.mark.parametrize("rerun", ["all", "changed"])
def test_a_rerun_that_is_broken_off_keeps_what_it_has_not_begun_with(
    rerun: str, fake: None, comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = ("--jobs=1",) if rerun == "all" else ("--jobs=1", "--overrides.training.steps=3")
    only = ["tiny/student", "tiny/hint/0", "tiny/hint/1"]
    _compare(comparison_file, only=only)
    before = _files(tmp_path)

    def stop_at(name: str, cell: run.Cell) -> list[str]:
        if cell.name == name:
            raise KeyboardInterrupt
        return fake_cell.fake_program(cell)

    # Seed 0 of both is measured again; student/1 has begun, hint/1 has not.
    with monkeypatch.context() as patch:
        patch.setattr(run, "_program", lambda cell: stop_at("tiny/student/1", cell))
        with pytest.raises(KeyboardInterrupt):
            _compare(comparison_file, overrides=change, only=only, rerun=rerun)
    after = _files(tmp_path)
    assert sorted(before.keys() - after.keys()) == ["tiny/student/seed1.json"]
    assert after["tiny/hint/seed1.json"] == before["tiny/hint/seed1.json"]
    # It is in no table with those that are measured already, perhaps with other settings.
    comparison = read_comparison(tmp_path / "out")
    assert {(cell["method"], cell["seed"]) for cell in comparison.cells} == {("student", 0), ("hint", 0)}
    assert comparison.again == ("tiny/hint/1",)
    notes = tabulate_quality(summarise_comparison(comparison), comparison).notes
    assert any(note.startswith("To be measured again, and not in this table: tiny/hint/1.") for note in notes)
    listed = run.list_cells(load_comparison(comparison_file, change), source="x", only=["tiny/hint"])
    assert [state for _, state, _ in listed] == ["done", "changed"]
    assert "a --rerun was broken off" in listed[1][2][-1]
    # The same command without --rerun goes on, and repeats nothing.
    assert _compare(comparison_file, overrides=change, only=only).measured == 4
    last = _files(tmp_path)
    assert sorted(name for name in last if after.get(name) == last[name]) == [
        "tiny/hint/seed0.json",
        "tiny/student/seed0.json",
    ]
    assert read_comparison(tmp_path / "out").again == () and not (tmp_path / "out" / AGAIN_FILE).exists()


def test_a_change_that_is_taken_back_needs_no_second_run(
    fake: None, comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare(comparison_file, only=["tiny/hint"])
    before = _files(tmp_path)
    change = ("--jobs=1", "--overrides.training.steps=3")
    monkeypatch.setattr(run, "check_inputs", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _compare(comparison_file, overrides=change, only=["tiny/hint"], rerun="changed")
    assert _compare(comparison_file, only=["tiny/hint"]).measured == 2
    assert _files(tmp_path) == before


def test_a_method_for_other_pairs_is_not_missed(
    fake: None, comparison_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(comparison_file.read_text())
    content["pairs"]["other"] = content["pairs"]["tiny"]
    content["methods"]["hint"] = {"class_path": "drkd.methods.FeatureHint", "pairs": ["other"]}
    comparison_file.write_text(yaml.safe_dump({**content, "seeds": [0]}))
    assert main(["compare", "--config", str(comparison_file), "--only", "tiny"]) == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Not measured: other/drkd, other/hint, other/student." in table and "tiny/hint" not in table
    capsys.readouterr()
    assert main(["compare", "--config", str(comparison_file), "--only", "tiny/hint"]) == 2
    assert "--only tiny/hint: no cell of" in capsys.readouterr().err


def test_a_report_without_measuring(
    fake: None,
    comparison_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["compare", "--config", str(comparison_file), "--report-only"]
    assert main(command) == 2
    assert "comparison.json is missing" in capsys.readouterr().err and not (tmp_path / "out").exists()
    _compare(comparison_file, only=["tiny/hint/0", "tiny/student/0", "tiny/teacher"])
    monkeypatch.setattr(run, "_program", lambda _: pytest.fail("it was measured"))
    # As while another command is at work.
    with locked_folder(tmp_path / "out"):
        assert main(command) == 0
    shown = capsys.readouterr().out
    assert "tiny: no method is better than student" in shown and "Open " in shown
    assert (tmp_path / "out" / "report.html").exists()
    # Nor does it mix settings.
    assert main([*command, "--overrides.training.steps=3"]) == 2
    assert "training.steps was 2, is 3" in capsys.readouterr().err


def test_the_first_cell_says_how_long_the_others_will_take(
    fake: None, comparison_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--config", str(comparison_file), "--only", "tiny/hint/0", "--jobs=1"]) == 0
    shown = capsys.readouterr().out
    # Five more, and a teacher of which nothing is known.
    assert "tiny/hint/0 took 3 s." in shown and "The cells without a result will take about 15 s." in shown


def test_another_split_wants_another_folder(fake: None, comparison_file: Path) -> None:
    _compare(comparison_file, only=["tiny/hint/0"])
    with pytest.raises(
        DrkdError, match=r"evaluation\.split was 'val', is 'train'.*\)\. Choose another folder with --out"
    ):
        _compare(comparison_file, overrides=("--split=train",))


def test_what_cannot_be_removed_stops_before_anything_is_lost(
    fake: None, comparison_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare(comparison_file, only=["tiny/hint/0"])
    before = _files(tmp_path)

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path / "checkpoints" / "last.ckpt"))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(DrkdError, match=r"hint-seed0/checkpoints/last\.ckpt: cannot be removed \(Permission denied\)"):
        _compare(comparison_file, only=["tiny/hint/0"], rerun="all")
    assert _files(tmp_path) == before
    # Nor is a run begun over what is left of another one.
    next((tmp_path / "out" / "cells").rglob("seed0.json")).unlink()
    (failure,) = _compare(comparison_file, only=["tiny/hint/0"]).failures
    assert "cannot be removed" in failure.lines[-1] and failure.log is None


def test_a_pattern_that_fits_nothing_is_refused(fake: None, comparison_file: Path) -> None:
    with pytest.raises(DrkdError, match=r"--only tiny/hnit: no cell .*Methods: teacher, student, hint, drkd"):
        _compare(comparison_file, only=["tiny/hnit"])


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        locked_folder(tmp_path),
        pytest.raises(DrkdError, match="another drkd compare"),
        locked_folder(tmp_path, patience=0),
    ):
        pass
    with locked_folder(tmp_path):
        pass


def test_threads_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert [run._threads(jobs) for jobs in (1, 3, 16)] == [8, 2, 1]


def test_each_cell_has_a_gpu_of_its_own(fake: None, comparison_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, str | None]] = []
    started = run.start_leashed

    def note(command: list[str], *, environment: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
        given.append((Path(command[3]).name, environment.get("CUDA_VISIBLE_DEVICES")))
        return started(command, environment=environment, **options)

    monkeypatch.setattr(run, "start_leashed", note)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,-1,9")
    gpu = ("--overrides.training.accelerator=auto", "--jobs=2")
    assert not _compare(comparison_file, overrides=gpu, only=["tiny/*/0"]).failures
    assert dict(given[:2]) == {"student-seed0": "5", "hint-seed0": "7"}
    assert given[2][1] in ("5", "7")
    given.clear()
    _compare(comparison_file, overrides=("--jobs=2", f"--output={comparison_file.parent / 'cpu'}"), only=["tiny/*/0"])
    assert {value for _, value in given} == {"5,7,-1,9"}


def test_gpus_are_those_that_are_seen_and_the_freest_is_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert list_gpus({}) == ["0", "1", "2"] and list_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    settings = {"training": {"devices": 1, "accelerator": "auto"}}
    one, two, three, four = (
        cells.Cell("a", "m", seed, "train", (), settings, frozenset(), tmp_path) for seed in range(4)
    )
    gpus = Gpus(list_gpus({}))
    assert [gpus.take(cell)["CUDA_VISIBLE_DEVICES"] for cell in (one, two, three)] == ["0", "1", "2"]
    gpus.give_back(two)
    assert gpus.take(four) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert gpus.take(two) == {"CUDA_VISIBLE_DEVICES": "0"}
    wide = cells.Cell("a", "m", 9, "train", (), {"training": {"devices": 2}}, frozenset(), tmp_path)
    assert gpus.take(wide) == {} and Gpus(["0"]).take(one) == {}


def test_dry_run_lists_and_runs_nothing(
    fake: None, comparison_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _compare(comparison_file, only=["tiny/hint"])
    assert main(["compare", "--config", str(comparison_file), "--dry-run", "--only", "tiny/hint", "*/drkd"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["tiny/hint/0", "done"],
        ["tiny/drkd/0", "missing"],
        ["tiny/hint/1", "done"],
        ["tiny/drkd/1", "missing"],
    ]
    assert lines[4] == "4 cells: 2 done, 2 missing."
    assert main(["compare", "--config", str(comparison_file), "--dry-run", "--overrides.training.steps=9"]) == 0
    assert "(training.steps was 2, is 9)" in capsys.readouterr().out
    assert len(_files(tmp_path)) == 2


def test_only_given_twice_counts_twice(fake: None, comparison_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--config", str(comparison_file), "--dry-run"]
    assert main([*command, "--only", "tiny/hint/0", "--only=tiny/drkd/1", "--only", "tiny/teacher"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["tiny/teacher", "tiny/hint/0", "tiny/drkd/1"]


def test_dry_run_names_what_is_not_there(
    fake: None, comparison_file: Path, tiny_coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--dry-run", "--config", str(comparison_file)]
    assert main([*command, "--split=test", "--overrides.teacher.init_args.path=gone.pt"]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"drkd: tiny: evaluation.split: {tiny_coco} has no split 'test'; it has train, val",
        "drkd: tiny: teacher.init_args.path: there is no gone.pt",
    ]
    assert "7 cells: 7 missing." in said.out
    assert main([*command, "--overrides.data.root=nowhere", "--overrides.class_map=none.yaml"]) == 2
    found = capsys.readouterr().err
    assert "tiny: data.root: nowhere: there is no such folder" in found
    assert "tiny: class_map: there is no none.yaml" in found
    assert main(command) == 0 and capsys.readouterr().err == ""


def test_what_a_function_of_the_users_own_takes_is_not_looked_for(tmp_path: Path) -> None:
    arguments = {"config": "COCO-Detection/retinanet_R_50_FPN_1x.yaml", "weights": "https://example.org/model.pth"}
    teacher = {"class_path": "drkd.adapters.HookedBuilder", "init_args": {"factory": "m:f", "arguments": arguments}}
    settings = {"data": {"root": "digits"}, "teacher": teacher}
    cell = cells.Cell("a", "m", 0, "train", (), settings, frozenset(), tmp_path)
    assert find_absent([cell]) == []
    settings["student"] = {"class_path": "drkd.adapters.RetinaNetBuilder", "init_args": {"weights": "mine.pth"}}
    assert find_absent([cell]) == ["a: student.init_args.weights: there is no mine.pth"]


def test_a_folder_called_as_the_embedded_data_is_named_before_any_cell_runs(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").symlink_to(tiny_coco, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    settings = {"data": {"root": "digits"}}
    (line,) = find_absent([cells.Cell("a", "m", 0, "train", (), settings, frozenset(), tmp_path)])
    assert line.startswith("a: data.root: 'digits' is the embedded data set, and there is a folder of that name")


@pytest.mark.slow
def test_a_small_comparison_from_one_command(comparison_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "drkd", "compare", "--config", str(comparison_file)]
    # Seed 0 would be the weights of the teacher, with nothing left to teach.
    only = ["--only", "tiny/teacher", "*/*/1"]
    done = subprocess.run([*command, *only], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert sorted(_files(tmp_path)) == sorted(name for name in NAMES if "seed0" not in name)
    drkd = json.loads((out / "cells/tiny/drkd/seed1.json").read_text())
    assert drkd["command"][:2] == ["drkd", "distill"]
    assert drkd["recipe"]["training"]["steps"] == 2 and drkd["steps"] == 2
    training = drkd["training"]
    assert training["seconds_per_step"] > 0 and training["peak_memory_bytes"] > 2**20
    assert training["trainable_parameters"]["method"] > 0
    assert set(drkd["distillation"]) >= {"pixel_relation", "instance"}
    assert drkd["distillation"]["pixel_relation"]["median_gradient_ratio"] > 0
    assert {"versions", "machine", "commit", "seconds"} <= set(drkd)
    student = json.loads((out / "cells/tiny/student/seed1.json").read_text())
    assert student["training"]["trainable_parameters"]["method"] == 0
    assert student["distillation"] == {}
    # The teacher is the checkpoint as it is, scored as a student is.
    teacher = json.loads((out / "cells/tiny/teacher.json").read_text())
    assert set(teacher["metrics"]) == set(student["metrics"])
    assert "One seed only" in (out / "table.md").read_text()
    assert json.loads((out / "table.json").read_text())["reference"] == "student"
    assert (out / "report.html").stat().st_size > 20_000
    assert not list((out / "runs").rglob("progress.json"))
