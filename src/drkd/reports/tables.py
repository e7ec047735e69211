"""The tables of a report, once as data and written as text, Markdown or HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from typing import Any

from drkd.contracts import DrkdError
from drkd.reports.files import Evaluation
from drkd.reports.gap import PairedDifference, Spread, share_recovered, summarise

HEADINGS = {"ap": "AP", "ap50": "AP50", "ap_small": "AP_S", "ap_medium": "AP_M", "ap_large": "AP_L"}
_BASELINE = "student"
_TEACHER = "teacher"
_NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """A table ready to be written.

    Args:
        columns: Headings.
        rows: Cells, one tuple a row.
        notes: Sentences below the table.
        emphasis: Index of the row to set off, if any.
        words: How many columns at the left hold words; the others hold numbers and are set to the right.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    emphasis: int | None = None
    words: int = 1

    def markdown(self) -> str:
        """Return GitHub Markdown, the notes below."""
        lines = [self.columns, tuple(":--" if index < self.words else "--:" for index in range(len(self.columns)))]
        lines += [self._emphasise(row, index) for index, row in enumerate(self.rows)]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join([text, *self.notes]) + "\n"

    def html(self) -> str:
        """Return a ``<table>``; every cell is escaped, the notes are left to the page."""
        head = self._cells(self.columns, "th")
        body = "".join(
            ('<tr class="best">' if index == self.emphasis else "<tr>") + self._cells(row, "td") + "</tr>"
            for index, row in enumerate(self.rows)
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def text(self, *, width: int = 140) -> str:
        """Return a table drawn by rich for a terminal ``width`` characters wide, without colours."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table as RichTable

        drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for index, heading in enumerate(self.columns):
            drawn.add_column(heading, justify="left" if index < self.words else "right", no_wrap=index < self.words)
        for row in self.rows:
            drawn.add_row(*row)
        console = Console(file=StringIO(), width=width, color_system=None, markup=False, emoji=False, highlight=False)
        console.print(drawn)
        for note in self.notes:
            console.print(note)
        output = console.file
        return output.getvalue() if isinstance(output, StringIO) else ""

    def _cells(self, cells: Sequence[str], tag: str) -> str:
        marks = [' class="word"' if index < self.words else "" for index in range(len(cells))]
        # A narrow page breaks a difference before its interval, and neither of them within.
        whole = [
            escape(cell).replace(" ± ", "&nbsp;±&nbsp;").replace(", ", ",&nbsp;").replace(" %", "&nbsp;%")
            for cell in cells
        ]
        return "".join(f"<{tag}{mark}>{cell}</{tag}>" for mark, cell in zip(marks, whole, strict=True))

    def _emphasise(self, row: tuple[str, ...], index: int) -> tuple[str, ...]:
        return tuple(f"**{cell}**" for cell in row) if index == self.emphasis else row


@dataclass(frozen=True)
class Model:
    """One row of a comparison.

    Args:
        name: "teacher", "student", "student + DRKD".
        evaluation: Its metrics.
        cost: Its ``cost.json``; empty if not measured.
    """

    name: str
    evaluation: Evaluation
    cost: Mapping[str, Any] = field(default_factory=dict)


def compare_models(teacher: Model, student: Model, distilled: Model) -> Table:
    """Return the table of the demo: quality, cost and the share of the teacher's lead that distillation recovered."""
    models = (teacher, student, distilled)
    thresholds = {model.evaluation.thresholds_px for model in models}
    if len(thresholds) > 1:
        raise DrkdError(
            f"The evaluations of {', '.join(model.name for model in models)} split small, medium and large objects "
            f"at different sizes ({sorted(thresholds)} px), so they cannot stand in one table. Evaluate them alike."
        )
    share = share_recovered(
        teacher=teacher.evaluation.metrics["ap"],
        baseline=student.evaluation.metrics["ap"],
        distilled=distilled.evaluation.metrics["ap"],
    )
    rows = [
        (
            model.name,
            *(format_score(model.evaluation.metrics[metric]) for metric in HEADINGS),
            *_format_cost(model.cost),
            format_share(share) if model is distilled else "",
        )
        for model in models
    ]
    latency = "Latency" if any(_device(model) not in ("", "cpu") for model in models) else "CPU latency"
    columns = ("Model", *HEADINGS.values(), "Parameters", "FLOPs", latency, "Gap recovered")
    notes = [student.evaluation.thresholds, "Gap recovered: (student + DRKD - student) / (teacher - student), in AP."]
    if math.isnan(share):
        notes.append("The teacher is not better than the lone student here, so there is no gap to recover.")
    notes += _describe_cost([model.cost for model in models if model.cost])
    return Table(columns, tuple(rows), tuple(notes), emphasis=2)


def describe_evaluation(evaluation: Evaluation) -> Table:
    """Return COCO's twelve numbers of one model, on the split that the row names."""
    names = (*("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L"), *("AR_1", "AR_10", "AR_100", "AR_S", "AR_M", "AR_L"))
    scores = tuple(format_score(value) for value in evaluation.metrics.values())
    return Table(("", *names), ((evaluation.split, *scores),), (evaluation.thresholds,))


def compare_classes(evaluations: Mapping[str, Evaluation]) -> Table:
    """Return the average precision of every class, one column a model."""
    classes = list(dict.fromkeys(name for evaluation in evaluations.values() for name in evaluation.per_class))
    rows = [
        (name, *(format_score(evaluation.per_class.get(name, math.nan)) for evaluation in evaluations.values()))
        for name in classes
    ]
    return Table(("Class", *evaluations), tuple(rows))


def group_scores(
    cells: Sequence[Mapping[str, Any]], *, metrics: Sequence[str]
) -> dict[str, dict[str, dict[str, dict[int, float]]]]:
    """Return the scores of a run matrix by detector, method, metric and seed, in the order of the cells.

    Raises:
        DrkdError: If a field is missing or a detector, method and seed occur twice.
    """
    grouped: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    for index, cell in enumerate(cells):
        missing = [name for name in ("detector", "method", "metrics") if name not in cell]
        missing += [f"metrics.{name}" for name in metrics if name not in cell.get("metrics", {})]
        if missing:
            raise DrkdError(f"Cell {index} of the run matrix: field {missing[0]} is missing.")
        by_metric = grouped.setdefault(cell["detector"], {}).setdefault(cell["method"], {m: {} for m in metrics})
        seed = int(cell.get("seed") or 0)
        if seed in by_metric[metrics[0]]:
            name = f"{cell['detector']}, {cell['method']}, seed {seed}"
            raise DrkdError(f"Cell {index} of the run matrix repeats {name}.")
        for metric in metrics:
            value = cell["metrics"][metric]
            by_metric[metric][seed] = math.nan if value is None else float(value)
    return grouped


def format_score(value: float) -> str:
    """Write a score in [0, 1] as COCO does, x 100 with one decimal; a dash where there is none."""
    return _NOTHING if math.isnan(value) else f"{100 * value:.1f}"


def format_share(value: float) -> str:
    """Write a share as whole percents."""
    return _NOTHING if math.isnan(value) else f"{100 * value:.0f} %"


def format_count(value: float) -> str:
    """Write a large number with three significant digits: 31.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {unit}"
    return f"{value:.0f}"


def _format_cost(cost: Mapping[str, Any]) -> tuple[str, str, str]:
    if not cost:
        return (_NOTHING, _NOTHING, _NOTHING)
    return format_count(cost["parameters"]), format_count(cost["flops"]), f"{cost['latency_ms']:.1f} ms"


def _device(model: Model) -> str:
    return str(model.cost.get("device", ""))


def _describe_cost(costs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not costs:
        return []
    sizes = " and ".join(
        dict.fromkeys(" x ".join(str(side) for side in cost.get("image_size", ["?"])) for cost in costs)
    )
    threads = " and ".join(dict.fromkeys(str(cost.get("threads", "?")) for cost in costs))
    devices = " and ".join(dict.fromkeys(str(cost.get("device", "cpu")) for cost in costs))
    return [
        f"Cost of one image of {sizes} px (height x width) on {devices} with {threads} thread(s), post-processing "
        "included; latency is the median, a multiply-add counts as two FLOPs."
    ]


def format_spread(spread: Spread) -> str:
    """Write mean and spread of scores, x 100; of one value the mean alone."""
    if math.isnan(spread.std):
        return format_score(spread.mean)
    return f"{100 * spread.mean:.1f} ± {100 * spread.std:.1f}"


def format_difference(difference: PairedDifference) -> str:
    """Write a difference of scores, x 100, with its interval where there is one."""
    if math.isnan(difference.mean):
        return _NOTHING
    if math.isnan(difference.low):
        return f"{100 * difference.mean:+.1f}"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _format_matrix_share(methods: Mapping[str, Mapping[str, Mapping[int, float]]], method: str, metric: str) -> str:
    if method in (_BASELINE, _TEACHER) or not {_BASELINE, _TEACHER} <= methods.keys():
        return ""
    mean = {name: summarise(list(methods[name][metric].values())).mean for name in (_TEACHER, _BASELINE, method)}
    return format_share(share_recovered(teacher=mean[_TEACHER], baseline=mean[_BASELINE], distilled=mean[method]))
