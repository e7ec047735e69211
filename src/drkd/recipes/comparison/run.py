"""Run a comparison: what is missing, several cells at a time, each in a process that does not outlive this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from drkd.contracts import DrkdError
from drkd.recipes.comparison.again import Again, read_again
from drkd.recipes.comparison.cell import (
    NOT_APPLICABLE,
    Cell,
    State,
    can_resume,
    check_inputs,
    collect,
    collect_reason,
    is_finished,
    look_up,
    make_cells,
    read_object,
    remove_report,
    remove_run,
)
from drkd.recipes.comparison.definition import Comparison
from drkd.recipes.comparison.gpus import Gpus, list_gpus
from drkd.recipes.comparison.leash import let_go, start_leashed
from drkd.recipes.comparison.progress import Board, Task
from drkd.recipes.lock import locked_folder
from drkd.recipes.run_folder import remove_asides, write_json

Rerun = Literal["no", "changed", "all"]

_SHOWN_LINES = 12
_INAPPLICABLE = 3  # exit code of drkd for a method that cannot work with a pair, see drkd.cli_errors
_INTERVAL = 0.25  # seconds between looks at the processes


@dataclass(frozen=True)
class Failure:
    """A cell that could not be measured.

    Args:
        name: PAIR/METHOD/SEED.
        log: What its process printed; None where none was started.
        lines: The last of it, and the reason.
    """

    name: str
    log: Path | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """What came of a comparison.

    Args:
        output: Its folder.
        measured: Cells that have scores now.
        cells: All cells of the comparison.
        failures: Those that failed in this session.
        inapplicable: By name, why a cell's method cannot work with its pair; such a cell has no scores.
        took: By name, seconds of the cells that were measured in this session.
        rest: Estimate of the seconds that the cells without a result will take; None where nothing is known.
    """

    output: Path
    measured: int
    cells: int
    failures: tuple[Failure, ...]
    inapplicable: Mapping[str, str]
    took: Mapping[str, float] = field(default_factory=dict)
    rest: float | None = None


class StoppedMeasuring(KeyboardInterrupt):
    """Interrupted when the cells to measure again were noted already, and not before."""


def compare(
    comparison: Comparison,
    *,
    source: str,
    only: Sequence[str] = (),
    rerun: Rerun = "no",
    console: Console | None = None,
) -> Compared:
    """Measure the cells that are missing; a killed or interrupted comparison goes on where it stopped.

    Args:
        comparison: What to compare.
        source: The comparison's file, for messages.
        only: Patterns of PAIR, PAIR/METHOD or PAIR/METHOD/SEED; of several, one must fit. None selects all.
        rerun: Measure again those selected cells whose settings changed, or all selected ones.
        console: Where to show progress; standard error by default.

    Returns:
        The folder, in which ``drkd.reports`` finds everything, and what failed.

    Raises:
        DrkdError: If a recipe or a method cannot be used, or settings of a measured cell changed.
        StoppedMeasuring: If it was interrupted while cells were measured.
    """
    cells = make_cells(comparison, source=source)
    selected = select_cells(cells, only, source=source)
    with locked_folder(comparison.output) as lock:
        again = _find_outdated(cells, selected, rerun)
        if any(cell in again and cell.file.exists() for cell in selected):
            # It would go on showing numbers whose cells are gone, however this session ends.
            remove_report(comparison.output)
        again.note()
        _describe(comparison)
        for cell in cells:
            remove_asides(cell.file.parent, [cell.file.name])
        tasks = [_task(cell, again) for cell in selected]
        missing = [task for task in tasks if task.state == "queued"]
        board = Board(tasks, console or Console(stderr=True, highlight=False), jobs=comparison.jobs)
        board.console.print(
            f"{len(selected)} cells, {len(missing)} to measure, {comparison.jobs} at a time, "
            f"{_threads(comparison.jobs)} threads each",
            markup=False,
        )
        try:
            failures = _work(tasks, board, again, jobs=comparison.jobs, lock=lock)
        except KeyboardInterrupt as stop:
            raise StoppedMeasuring from stop
    found = {cell.name: read_object(cell.file) for cell in cells if cell.file.exists() and cell not in again}
    inapplicable = {name: str(content[NOT_APPLICABLE]) for name, content in found.items() if NOT_APPLICABLE in content}
    took = {task.cell.name: task.seconds for task in tasks if not task.earlier and task.seconds is not None}
    rest = Board([_task(cell, again) for cell in cells], board.console, jobs=comparison.jobs).seconds_left()
    measured = len(found) - len(inapplicable)
    return Compared(comparison.output, measured, len(cells), tuple(failures), inapplicable, took, rest)


def list_cells(comparison: Comparison, *, source: str, only: Sequence[str] = ()) -> list[tuple[Cell, State, list[str]]]:
    """List the selected cells with their state and with the settings that changed; measures nothing.

    Raises:
        DrkdError: If a recipe or a method cannot be used.
    """
    cells = make_cells(comparison, source=source)
    found = {cell.name: look_up(cell) for cell in cells}
    noted = read_again(comparison.output, cells, [name for name, (state, _) in found.items() if state == "changed"])
    for name in noted.keys() & found.keys():
        found[name] = "changed", [*found[name][1], "is to be measured again: a --rerun was broken off"]
    return [(cell, *found[cell.name]) for cell in select_cells(cells, only, source=source)]


def describe(comparison: Comparison, *, source: str) -> None:
    """Have the folder's report be about this comparison, without measuring; not while another command is at work there.

    Raises:
        DrkdError: If a recipe or a method cannot be used, or settings of a measured cell changed.
    """
    cells = make_cells(comparison, source=source)
    _find_outdated(cells, (), "no")
    if not (comparison.output / "cells").is_dir():
        return
    try:
        with locked_folder(comparison.output, patience=0):
            _describe(comparison)
    except DrkdError:
        return


def select_cells(cells: Sequence[Cell], only: Sequence[str], *, source: str) -> list[Cell]:
    """Return the cells that fit a pattern.

    Raises:
        DrkdError: If a pattern fits nothing.
    """
    for pattern in only:
        if not any(_fits(cell, pattern) for cell in cells):
            pairs = ", ".join(dict.fromkeys(cell.pair for cell in cells))
            methods = ", ".join(dict.fromkeys(cell.method for cell in cells))
            raise DrkdError(
                f"--only {pattern}: no cell of {source} is called so. Expected PAIR, PAIR/METHOD or PAIR/METHOD/SEED, "
                f"where * stands for anything. Pairs: {pairs}. Methods: {methods}; some may be for some pairs only."
            )
    return [cell for cell in cells if not only or any(_fits(cell, pattern) for pattern in only)]


def _fits(cell: Cell, pattern: str) -> bool:
    wanted = pattern.strip("/").split("/")
    parts = cell.name.split("/")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))


def _find_outdated(cells: Sequence[Cell], selected: Sequence[Cell], rerun: Rerun) -> Again:
    """Cells to measure again, those of a broken-off session too; refuses those that would mix settings in a table."""
    changed = {cell.name: changes for cell in cells for state, changes in [look_up(cell)] if state == "changed"}
    folder = cells[0].output
    noted = read_again(folder, cells, changed)
    for cell in selected:
        if rerun == "all":
            noted[cell.name] = "all"
        elif rerun == "changed" and cell.name in changed:
            noted.setdefault(cell.name, "changed")
    left = [cell for cell in cells if cell.name in changed and cell.name not in noted]
    if left:
        first = left[0]
        more = f" and {len(left) - 1} other cells" if len(left) > 1 else ""
        changes = changed[first.name]
        words = "; ".join(changes[:3]) + (f"; {len(changes) - 3} more" if len(changes) > 3 else "")
        remedies = ["measure such cells again with --rerun", "take the change back"]
        # The scores on both splits are wanted then, and --rerun would remove those on the first.
        place = 0 if any(change.startswith("evaluation.split ") for change in changes) else 2
        remedies.insert(place, "choose another folder with --output")
        advice = f"{', '.join(remedies[:2])}, or {remedies[2]}".capitalize()
        raise DrkdError(f"{first.file}{more} were measured with other settings ({words}). {advice}.")
    return Again(folder, noted)


def _describe(comparison: Comparison) -> None:
    """Write what the report has to know of the comparison: order, reference, seeds."""
    content = {
        "pairs": list(comparison.pairs),
        "methods": list(comparison.methods),
        "limited": {name: arm.pairs for name, arm in comparison.methods.items() if arm.pairs is not None},
        "seeds": comparison.seeds,
        "split": comparison.split,
        "reference": comparison.reference,
        "jobs": comparison.jobs,
    }
    write_json(comparison.output / "comparison.json", content)


def _task(cell: Cell, again: Again) -> Task:
    if cell in again or not cell.file.exists():
        return Task(cell)
    return Task(cell, "done", read_object(cell.file), earlier=True)


def _work(tasks: Sequence[Task], board: Board, again: Again, *, jobs: int, lock: int | None) -> list[Failure]:
    """Run the queued tasks; stop the running ones when this is interrupted."""
    queue = deque(task for task in tasks if task.state == "queued")
    running: dict[int, tuple[Task, subprocess.Popen[bytes]]] = {}
    failures: list[Failure] = []
    environment = {**os.environ, "OMP_NUM_THREADS": str(_threads(jobs))}
    gpus = Gpus(list_gpus(environment))
    try:
        with board.shown() as redraw:
            while queue or running:
                while queue and len(running) < jobs:
                    task = queue.popleft()
                    if task.cell not in again and is_finished(task.cell):
                        _end(task, 0, board, failures)
                        continue
                    try:
                        check_inputs(task.cell)
                    except DrkdError as error:
                        _fail(task, board, failures, Failure(task.cell.name, None, (str(error),)))
                        continue
                    if task.cell in again:
                        # Outside of what makes a failed cell: where nothing can be removed the command ends.
                        again.begin(task.cell)
                    try:
                        process = _start(task, {**environment, **gpus.take(task.cell)}, lock=lock)
                    except DrkdError as error:
                        gpus.give_back(task.cell)
                        _fail(task, board, failures, Failure(task.cell.name, None, (str(error),)))
                        continue
                    running[process.pid] = task, process
                    board.say(task)
                time.sleep(_INTERVAL if running else 0)
                for pid, (task, process) in list(running.items()):
                    task.look()
                    if process.poll() is not None:
                        del running[pid]
                        let_go([process])
                        gpus.give_back(task.cell)
                        _end(task, process.returncode, board, failures)
                redraw()
    finally:
        let_go([process for _, process in running.values()])
    return failures


def _start(task: Task, environment: dict[str, str], *, lock: int | None) -> subprocess.Popen[bytes]:
    """Start the cell's process.

    Raises:
        DrkdError: If the folder cannot be written to.
    """
    task.state, task.began = "running", time.monotonic()
    if can_resume(task.cell):
        task.look()
        task.first = task.step
    else:
        # Before the new digests, which would make an old run one with these files.
        remove_run(task.cell)
    write_json(task.cell.inputs_file, dict(task.cell.inputs))
    return start_leashed(_program(task.cell), log=task.cell.log, environment=environment, lock=lock)


def _program(cell: Cell) -> list[str]:
    """The cell's command as this interpreter runs it; goes on from a checkpoint where there is one."""
    program, *arguments = cell.command("resume" if can_resume(cell) else "overwrite")
    return [sys.executable, *(["-m", "drkd"] if program == "drkd" else []), *arguments]


def _end(task: Task, code: int, board: Board, failures: list[Failure]) -> None:
    reason = f"its process ended with code {code}" + (" (killed: out of memory?)" if code == 137 else "")
    try:
        if task.state == "running":
            _check_run(task.cell)
        if code in (0, _INAPPLICABLE):
            task.content = collect(task.cell) if code == 0 else _collect_inapplicable(task.cell)
            task.state = "done"
            board.say(task)
            return
    except DrkdError as error:
        reason = str(error)
    lines = (*_last_lines(task.cell.log), f"({reason})")
    _fail(task, board, failures, Failure(task.cell.name, task.cell.log, lines))


def _check_run(cell: Cell) -> None:
    """Refuse the ended run if files were replaced meanwhile: nobody knows which of the two it has loaded.

    Raises:
        DrkdError: After the run is removed, which would count as one with the old files should they come back.
    """
    try:
        check_inputs(cell)
    except DrkdError:
        remove_run(cell)
        raise


def _collect_inapplicable(cell: Cell) -> dict[str, Any]:
    # The program prints this one paragraph last; what it lacks is not a setting that a second try could have.
    last = _last_lines(cell.log)[-1:]
    return collect_reason(cell, last[0].removeprefix("drkd: ") if last else f"exit code {_INAPPLICABLE}")


def _fail(task: Task, board: Board, failures: list[Failure], failure: Failure) -> None:
    task.state = "failed"
    failures.append(failure)
    board.say(task)


def _last_lines(log: Path) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_SHOWN_LINES:]
    except OSError:
        return []


def _threads(jobs: int) -> int:
    """Threads of each cell: an equal share of what OMP_NUM_THREADS or the machine gives."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, (int(given) if given.isdigit() and int(given) else cores) // jobs)
