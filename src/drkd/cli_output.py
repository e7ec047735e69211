"""Results as tables in the terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from drkd.recipes.comparison.cell import Cell
    from drkd.recipes.comparison.run import Compared, Failure
    from drkd.recipes.training import RunResult

_FEW = 3
"""Cells of which it is said at the end how long each took: who tries one wants to know."""


def print_run(result: RunResult, console: Console) -> None:
    """Print where a run's results are, and its metrics."""
    console.print(f"\nRun folder: {result.folder}")
    console.print(f"Student:    {result.folder / 'student.pt'}")
    if result.metrics:
        print_metrics(result.metrics, None, console)
    folder = shlex.quote(str(result.folder))
    console.print(f"Next: drkd report {folder}, or drkd predict {folder} IMAGES --output found")


def print_metrics(metrics: Mapping[str, Any], cost: Mapping[str, Any] | None, console: Console) -> None:
    """Print the twelve COCO numbers, what small, medium and large mean, AP by class, and the cost where measured.

    Args:
        metrics: As ``CocoMetrics.as_json`` gives them.
        cost: As ``ModelCost.as_json`` gives it, or None.
        console: Where to print.
    """
    small, medium = metrics["thresholds_px"]
    first, second, third = metrics["max_detections"]
    table = Table("metric", "", "x 100", box=None)
    table.columns[2].justify = "right"
    rows = [
        ("AP", "IoU 0.50:0.95", "ap"),
        ("AP50", "IoU 0.50", "ap50"),
        ("AP75", "IoU 0.75", "ap75"),
        ("AP_S", f"small, area < {small:g}² px", "ap_small"),
        ("AP_M", f"medium, {small:g}² to {medium:g}² px", "ap_medium"),
        ("AP_L", f"large, > {medium:g}² px", "ap_large"),
        (f"AR_{first}", f"{first} detection an image", "ar_1"),
        (f"AR_{second}", f"{second} detections an image", "ar_10"),
        (f"AR_{third}", f"{third} detections an image", "ar_100"),
        ("AR_S", "small", "ar_small"),
        ("AR_M", "medium", "ar_medium"),
        ("AR_L", "large", "ar_large"),
    ]
    for name, meaning, key in rows:
        table.add_row(name, meaning, _score(metrics[key]))
    console.print(table)
    scaled = "" if (small, medium) == (32, 96) else "; scaled to the images, COCO uses 32² and 96²"
    console.print(f"Sizes are areas in px of the original images{scaled}. '-': no such object in the ground truth.")
    per_class = [(name, value) for name, value in metrics["per_class"].items() if value is not None]
    if 1 < len(per_class) <= 20:
        console.print("AP by class: " + ", ".join(f"{name} {_score(value)}" for name, value in per_class))
    if cost is not None:
        _print_cost(cost, console)


def print_cells(cells: Sequence[tuple[Cell, str, list[str]]], console: Console) -> None:
    """Print the cells of a comparison, their state and their files, and what changed since they were measured."""
    width = max(len(cell.name) for cell, _, _ in cells)
    for cell, state, changes in cells:
        shown = "; ".join(changes[:2]) + ("; ..." if len(changes) > 2 else "")
        console.print(f"{cell.name:<{width}}  {state:<7}  {cell.file}{f' ({shown})' if shown else ''}")
    states = [state for _, state, _ in cells]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "missing", "changed") if state in states)
    console.print(f"{len(cells)} cells: {counts}.")


def print_outcome(compared: Compared, page: Path | None, console: Console) -> None:
    """Print how many cells have scores and how many cannot have any, and where the report is.

    Args:
        compared: What came of the comparison.
        page: Its report, whose notes give the reasons; None where there is none, and they are printed here.
        console: Where to print.
    """
    from drkd.recipes.comparison.progress import duration

    for name, reason in compared.inapplicable.items() if page is None else ():
        console.print(f"{name} is not applicable: {reason}", markup=False)
    without = f", {len(compared.inapplicable)} not applicable" if compared.inapplicable else ""
    where = "" if page is None else f" Open {page}"
    for name, seconds in compared.took.items() if len(compared.took) <= _FEW else ():
        console.print(f"{name} took {duration(seconds)}.", markup=False)
    if compared.rest:
        console.print(f"The cells without a result will take about {duration(compared.rest)}.", markup=False)
    console.print(f"{compared.measured} of {compared.cells} cells are measured{without}.{where}", markup=False)


def print_failures(failures: Sequence[Failure], *, rerun_all: bool = False) -> None:
    """Print on standard error which cells failed, and the last lines of their logs.

    Args:
        failures: The failed cells.
        rerun_all: Whether the command would forget what it has just measured, if it were repeated as it is.
    """
    for failure in failures:
        where = "" if failure.log is None else f"; the end of {failure.log}"
        print(f"\n{failure.name} failed{where}:", file=sys.stderr)
        for line in failure.lines:
            print(f"  {line}", file=sys.stderr)
    if failures:
        names = ", ".join(failure.name for failure in failures)
        how = "The same command without --rerun" if rerun_all else "The same command"
        print(f"\ndrkd: {len(failures)} cells failed ({names}). {how} tries them again.", file=sys.stderr)


def _print_cost(cost: Mapping[str, Any], console: Console) -> None:
    height, width = cost["image_size"]
    console.print(
        f"Parameters: {cost['parameters'] / 1e6:.2f} M   FLOPs: {cost['flops'] / 1e9:.2f} G (a multiply-add is two)   "
        f"latency: {cost['latency_ms']:.1f} ms (10 to 90 %: {cost['latency_p10_ms']:.1f} to "
        f"{cost['latency_p90_ms']:.1f}) on {cost['device']}, {cost['threads']} threads, one image of "
        f"{height} x {width} px"
    )


def _score(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
