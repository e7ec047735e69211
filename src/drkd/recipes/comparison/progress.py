"""How far a comparison is: every cell's state, scores as they come in, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from drkd.contracts import DrkdError
from drkd.recipes.comparison.cell import NOT_APPLICABLE, Cell, read_object
from drkd.recipes.comparison.definition import TEACHER


@dataclass
class Task:
    """A cell on its way.

    Args:
        cell: The cell.
        state: Where it stands.
        content: The cell's file, once it is done.
        began: `time.monotonic` when its process started.
        step: Optimizer steps taken, as far as they were noted.
        steps: Of how many; 0 while that is not known.
        first: Steps taken before this session: not 0 where the run goes on from a checkpoint.
        epoch: Passes over the data completed.
        earlier: Whether it was done before this session.
    """

    cell: Cell
    state: Literal["queued", "running", "done", "failed"] = "queued"
    content: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    step: int = 0
    steps: int = 0
    first: int = 0
    epoch: int = 0
    earlier: bool = False

    @property
    def seconds(self) -> float | None:
        """How long the finished cell took."""
        value = self.content.get("seconds")
        return float(value) if isinstance(value, int | float) else None

    def look(self) -> None:
        """Read how far the running cell is; its file may not be there yet."""
        try:
            noted = read_object(self.cell.run_folder / "progress.json")
            self.step, self.steps, self.epoch = (int(noted[name]) for name in ("step", "steps", "epoch"))
            # What was noted before a kill may be ahead of the checkpoint that the run goes on from.
            self.first = min(self.first, self.step)
        except (DrkdError, KeyError, TypeError, ValueError):
            return

    def words(self) -> str:
        """The state in a few words: scores, or how far it is."""
        if NOT_APPLICABLE in self.content:
            return "not applicable"
        if self.state == "done":
            metrics = self.content["metrics"]
            return f"AP {_score(metrics.get('ap'))}, AP_S {_score(metrics.get('ap_small'))}"
        if self.state != "running":
            return self.state
        if not self.steps:
            return "starting" if self.cell.method != TEACHER else "evaluating"
        return "evaluating" if self.step >= self.steps else f"step {self.step}/{self.steps}, epoch {self.epoch + 1}"


_Row = tuple[tuple[str, str], dict[int | None, Task]]
"""Pair and method, and their tasks by seed."""


class Board:
    """Shows the tasks: a table that is redrawn on a terminal, a line an event elsewhere.

    Args:
        tasks: All of them.
        console: Where to show them.
        jobs: Cells at a time, for the time that is left.
    """

    def __init__(self, tasks: Sequence[Task], console: Console, *, jobs: int) -> None:
        self.tasks = tasks
        self.console = console
        self.jobs = jobs

    @contextmanager
    def shown(self) -> Iterator[Callable[[], None]]:
        """Show the board inside this block; yields what redraws it."""
        if not self.console.is_terminal:
            yield lambda: None
            return
        with Live(self.render(), console=self.console, refresh_per_second=4, transient=False) as live:
            yield lambda: live.update(self.render())

    def say(self, task: Task) -> None:
        """Say that a task has started or ended, where nothing is redrawn."""
        if self.console.is_terminal:
            return
        ended = [other for other in self.tasks if other.state in ("done", "failed")]
        words = task.words() if task.state != "running" else "started"
        took = f", {duration(task.seconds)}" if task.state == "done" and task.seconds is not None else ""
        left = f"; {self.left_words()}" if task.state in ("done", "failed") else ""
        self.console.print(f"[{len(ended)}/{len(self.tasks)}] {task.cell.name}: {words}{took}{left}")

    def seconds_left(self) -> float | None:
        """Estimate from finished cells of the same pair and method, else of whatever is most alike; None if none is."""
        open_tasks = [task for task in self.tasks if task.state in ("queued", "running")]
        rest = [self._rest(task) for task in open_tasks]
        known = [value for value in rest if value is not None]
        if len(known) < len(rest):
            return None
        return max(sum(known) / self.jobs, max(known, default=0.0))

    def left_words(self) -> str:
        """The estimate in words."""
        left = self.seconds_left()
        if left is None:
            return "time left not known yet"
        return f"about {duration(left)} left" if left else "nothing left"

    def render(self) -> Group:
        """The board: how far all is, and a table with a row a pair and method, a column a seed."""
        seeds = list(dict.fromkeys(task.cell.seed for task in self.tasks if task.cell.seed is not None))
        counts = {state: sum(task.state == state for task in self.tasks) for state in ("done", "running", "failed")}
        summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        title = f"{len(self.tasks)} cells: {summary or 'none started'}; {self.left_words()}"
        measured = [
            task for task in self.tasks if task.state == "done" and not task.earlier and task.seconds is not None
        ]
        if measured:
            last = max(measured, key=lambda task: task.began + (task.seconds or 0.0))
            title += f"; {last.cell.name} took {duration(last.seconds or 0.0)}"
        table = Table("pair", "method", box=None, pad_edge=False)
        for seed in seeds:
            table.add_column(f"seed {seed}")
        rows: dict[tuple[str, str], dict[int | None, Task]] = {}
        for task in self.tasks:
            rows.setdefault((task.cell.pair, task.cell.method), {})[task.cell.seed] = task
        order = list(dict.fromkeys(pair for pair, _ in rows))
        kept, rest = _fit(sorted(rows.items(), key=lambda item: order.index(item[0][0])), self._room())
        for (pair, method), by_seed in kept:
            teacher = by_seed.get(None)
            shown = [teacher, *[None] * (len(seeds) - 1)] if teacher else [by_seed.get(seed) for seed in seeds]
            table.add_row(pair, method, *(_cell_text(task) for task in shown[: len(seeds)]))
        # Not as the table's title, which would be wrapped at the width of the table.
        hidden = [Text(f"and {len(rest)} rows more: {_count(rest)}", style="dim")] if rest else []
        return Group(Text(title, overflow="ellipsis", no_wrap=True), table, *hidden)

    def _room(self) -> int | None:
        """Rows that fit below the title and the heading, one line left for the cursor; None where nothing is cut."""
        return max(1, self.console.height - 3) if self.console.is_terminal else None

    def _rest(self, task: Task) -> float | None:
        now = time.monotonic()
        whole = self._expected(task.cell)
        first = task.first
        if task.state == "running" and task.steps > first:
            # All of this session: what an earlier one did of the run takes no more time.
            whole = None if whole is None else whole * (task.steps - first) / task.steps
            if task.step > first:
                elapsed = now - task.began
                # What is measured of this very cell counts more the further it is; evaluation comes on top of it.
                share = (task.step - first) / (task.steps - first)
                whole = elapsed / share if whole is None else elapsed + (1 - share) * whole
        if whole is None:
            return None
        return max(0.0, whole - (now - task.began)) if task.state == "running" else whole

    def _expected(self, cell: Cell) -> float | None:
        # The seconds of a run that went on after a kill are those of its last session.
        whole = [task for task in self.tasks if not task.content.get("earlier_sessions")]
        done = [(task.cell, task.seconds) for task in whole if task.seconds is not None]
        if cell.method == TEACHER:
            values = [seconds for other, seconds in done if other.method == TEACHER]
            return fmean(values) if values else 0.0
        alike: tuple[Callable[[Cell], bool], ...] = (
            lambda other: (other.pair, other.method) == (cell.pair, cell.method),
            lambda other: other.pair == cell.pair and other.method != TEACHER,
            lambda other: other.method == cell.method,
            lambda other: other.method != TEACHER,
        )
        for fits in alike:
            values = [seconds for other, seconds in done if seconds is not None and fits(other)]
            if values:
                return fmean(values)
        return None


def _fit(rows: list[_Row], room: int | None) -> tuple[list[_Row], list[_Row]]:
    """Rows that are shown, in order, and those that are not: where not all fit, running and failed ones come first."""
    if room is None or len(rows) <= room:
        return rows, []
    urgency = {"running": 0, "failed": 1}
    ranks = [min(urgency.get(task.state, 2) for task in by_seed.values()) for _, by_seed in rows]
    # A line less, for what is not shown.
    chosen = set(sorted(range(len(rows)), key=lambda place: ranks[place])[: max(1, room - 1)])
    return (
        [row for place, row in enumerate(rows) if place in chosen],
        [row for place, row in enumerate(rows) if place not in chosen],
    )


def _count(rows: list[_Row]) -> str:
    states = [task.state for _, by_seed in rows for task in by_seed.values()]
    counts = [f"{states.count(state)} {state}" for state in ("running", "failed", "done", "queued") if state in states]
    return ", ".join(counts)


def _cell_text(task: Task | None) -> Text:
    if task is None:
        return Text("")
    styles = {"done": "green", "running": "yellow", "failed": "bold red", "queued": "dim"}
    words = task.words()
    if task.state == "done":
        words = words.replace("AP_S ", "").replace("AP ", "").replace(", ", " / ")
    return Text(words, style=styles[task.state])


def _score(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
