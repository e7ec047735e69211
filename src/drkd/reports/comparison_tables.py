"""The tables of a comparison: scores, cost of training, distillation terms."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from drkd.reports.comparison_rows import TEACHER, Comparison, Row
from drkd.reports.files import Evaluation
from drkd.reports.tables import Table, format_count, format_difference, format_share, format_spread

_LOAD = 0.1
"""By how much the reference's step may differ from seed to seed before times are called rough."""

_NAMED = 12
"""How many methods without a cell a note names before it only counts them."""


def tabulate_quality(rows: Sequence[Row], comparison: Comparison) -> Table:
    """Return the table of scores."""
    reference = comparison.reference
    columns = ["Pair", "Method", "Seeds", "AP", f"Δ AP to {reference} (95 %)", "Δ AP to best rival (95 %)"]
    columns += ["Gap recovered", "AP50", "AP_S", f"Δ AP_S to {reference} (95 %)"]
    columns += ["Δ AP_S to best rival (95 %)", "AP_M", "AP_L"]
    lines = []
    for row in rows:
        rival = f"{format_difference(row.to_rival['ap'])} ({row.rival})" if row.rival else ""
        small = f"{format_difference(row.to_small_rival)} ({row.small_rival})" if row.to_small_rival else ""
        lines.append(
            (
                *(row.pair, row.method, "" if row.method == TEACHER else str(len(row.seeds))),
                format_spread(row.scores["ap"]),
                format_difference(row.to_reference["ap"]) if row.to_reference else "",
                rival,
                format_share(row.share) if row.to_reference else "",
                format_spread(row.scores["ap50"]),
                format_spread(row.scores["ap_small"]),
                format_difference(row.to_reference["ap_small"]) if row.to_reference else "",
                small,
                format_spread(row.scores["ap_medium"]),
                format_spread(row.scores["ap_large"]),
            )
        )
    return Table(tuple(columns), tuple(lines), tuple(_notes(rows, comparison)), words=2)


def tabulate_cost(rows: Sequence[Row], comparison: Comparison) -> Table:
    """Return the table of what training costs."""
    lines = []
    for row in rows:
        if row.method == TEACHER:
            continue
        lines.append(
            (
                *(row.pair, row.method, _number(row.seconds_per_step, "{:.3g} s")),
                _number(row.step_ratio, "{:.2f}"),
                _number(row.peak_memory / 2**20, "{:,.0f} MiB"),
                _parameters(row),
            )
        )
    columns = ("Pair", "Method", "Step", f"x {comparison.reference}", "Peak memory", "Extra parameters")
    kinds = {str(cell["training"].get("peak_memory_kind")) for cell in comparison.cells if cell.get("training")}
    machines = _distinct(comparison.cells, "machine")
    notes = [
        "Step: median seconds of forward, backward and update once training is warm, mean over seeds; loading data, "
        f"measuring gradient ratios and validation left out. x {comparison.reference}: mean of the ratios of the seeds "
        f"that both have measured on the same machine. Peak memory: {' or '.join(sorted(kinds)) or 'unknown'}, "
        "largest over seeds, the teacher included. Extra parameters: the method's, trained / held (fixed ones too, "
        "the teacher's not counted), thrown away after training; the student that comes out costs the same whatever "
        "the method."
    ]
    loads = list(_loads(rows, comparison))
    if loads:
        notes.append(
            f"Steps of {comparison.reference} differ by more than {_LOAD:.0%} from seed to seed "
            f"({', '.join(loads)}): other work shared the machine, and ratios are rough."
        )
    if len(machines) > 1:
        notes.append(
            f"Measured on {len(machines)} kinds of machine or thread counts: "
            "steps are not comparable from one to another, and a ratio has seeds of one machine only."
        )
    return Table(columns, tuple(lines), tuple(notes), words=2)


def _parameters(row: Row) -> str:
    """Trained / held; those trained alone where the cells do not say what is held."""
    counts = (row.extra_parameters, row.held_parameters)
    return " / ".join(format_count(count) for count in counts if not math.isnan(count)) or "-"


def tabulate_terms(rows: Sequence[Row]) -> Table:
    """Return the table of distillation terms."""
    lines = []
    for row in rows:
        for term, values in row.terms.items():
            first, last = values.get("first", math.nan), values.get("last", math.nan)
            fall = _change(first, last)
            target = _change(values.get("target_first", math.nan), values.get("target_last", math.nan))
            ratio = _number(values.get("median_gradient_ratio", math.nan), "{:.2f}")
            shown = (_number(first, "{:.3g}"), _number(last, "{:.3g}"), fall, target)
            lines.append((row.pair, row.method, term, ratio, *shown))
    notes = (
        "Gradient ratio: norm of the term's gradient at the student's features over the task's, median over the "
        "measurements of a run. First and last: the unweighted term, means of the first and last tenth of a run. "
        "Target: change of the spread of what the student is compared with, of terms that look; one that collapses is "
        "easy to meet and teaches nothing. All are means over seeds.",
    )
    columns = ("Pair", "Method", "Term", "Gradient ratio", "First", "Last", "Change", "Target")
    return Table(columns, tuple(lines), notes, words=3)


def _loads(rows: Sequence[Row], comparison: Comparison) -> Iterator[str]:
    """Pairs whose reference took unlike times for the same work."""
    for row in rows:
        if row.method == comparison.reference:
            steps = [
                cell["training"]["seconds_per_step"]
                for cell in comparison.cells
                if (cell["pair"], cell["method"]) == (row.pair, row.method)
                and isinstance((cell.get("training") or {}).get("seconds_per_step"), int | float)
            ]
            if steps and max(steps) > (1 + _LOAD) * min(steps):
                yield row.pair


def _notes(rows: Sequence[Row], comparison: Comparison) -> Iterator[str]:
    cells = comparison.cells
    yield (
        f"Mean ± sample standard deviation over seeds, x 100, on the split '{comparison.split}'. Δ: mean of the "
        "differences paired by seed, with Student's 95 % interval. Best rival: the best mean AP, or AP_S, among "
        f"the other methods with as many common seeds, {comparison.reference} aside; it is picked by the scores it "
        f"is compared by. Gap recovered: of the teacher's lead over {comparison.reference}, in AP."
    )
    for (pair, method), reason in comparison.inapplicable.items():
        yield f"{pair}/{method} is not applicable: {reason}"
    scored = {row.pair for row in rows if row.method == TEACHER}
    if unscored := [pair for pair in dict.fromkeys(row.pair for row in rows) if pair not in scored]:
        yield (
            f"Of {', '.join(unscored)} there are no scores of a teacher, so no gap to recover is known: it is not "
            "measured yet, or finds no objects by itself (features only, no `detections`), or there is not exactly one."
        )
    wanted = len(comparison.seeds)
    single = [f"{row.pair}/{row.method}" for row in rows if len(row.seeds) == 1]
    if wanted == 1:
        yield "One seed only, so no spread and no interval."
    elif single:
        yield f"One seed only, so no spread and no interval: {', '.join(single)}."
    # A method without any has no row, and would be missed by nobody.
    found = {(row.pair, row.method): len(row.seeds) for row in rows}
    counts = {
        (pair, method): found.get((pair, method), 0)
        for pair in comparison.pairs
        for method in comparison.methods
        if (pair, method) not in comparison.inapplicable and pair in comparison.limited.get(method, comparison.pairs)
    }
    short = [f"{pair}/{method} ({count})" for (pair, method), count in counts.items() if 0 < count < wanted]
    if short:
        yield f"Not all {wanted} seeds are measured of {', '.join(short)}."
    absent = [f"{pair}/{method}" for (pair, method), count in counts.items() if not count]
    if absent:
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        yield f"Not measured: {', '.join(absent[:_NAMED])}{more}."
    yield from comparison.aside
    if comparison.again:
        more = f" and {len(comparison.again) - _NAMED} more" if len(comparison.again) > _NAMED else ""
        yield (
            f"To be measured again, and not in this table: {', '.join(comparison.again[:_NAMED])}{more}. "
            "The command goes on with them."
        )
    sides = {tuple(cell["thresholds_px"]) for cell in cells if "thresholds_px" in cell} or {(32.0, 96.0)}
    if len(sides) == 1:
        yield Evaluation({}, {}, sides.pop()).thresholds
    else:
        yield f"The pairs split object sizes differently: {', '.join(map(str, sorted(sides)))} px."
    # A cell that was stopped and gone on with may have begun with another one.
    commits = _distinct(cells, "commit") | {str(commit) for cell in cells for commit in cell.get("earlier_commits", ())}
    if len(commits) > 1:
        yield f"Measured with {len(commits)} states of drkd's code: {', '.join(sorted(commits))}."


def _distinct(cells: Sequence[Mapping[str, Any]], field: str) -> set[str]:
    return {json.dumps(cell[field], sort_keys=True).strip('"') for cell in cells if cell.get(field)}


def _change(first: float, last: float) -> str:
    return f"{100 * (last / first - 1):+.0f} %" if first and not math.isnan(first + last) else "-"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)
