"""The report of `drkd compare`: which method is better on which pair, by how much, how surely, and at what cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from drkd.reports.comparison_answer import judge
from drkd.reports.comparison_rows import TEACHER, Comparison, Row, read_comparison, summarise_comparison
from drkd.reports.comparison_tables import tabulate_cost, tabulate_quality, tabulate_terms
from drkd.reports.files import Run, write_atomically
from drkd.reports.gap import PairedDifference
from drkd.reports.matrix import draw_cost, draw_differences, draw_matrix
from drkd.reports.page import PAGE, Section, save_figures, write_page

_COMPARED = ("ap", "ap_small")
_FACTS = ("seed", "commit", "started", "finished", "machine", "versions", "command")


def write_comparison_report(folder: Path) -> Path:
    """Write ``report.html``, ``table.md``, ``table.json`` and ``figures/*.png`` of a comparison into its folder.

    Args:
        folder: Holds ``comparison.json`` and ``cells/``.

    Returns:
        The page.

    Raises:
        DrkdError: If no cell is measured, or a file is missing or damaged, naming it and the field.
    """
    comparison = read_comparison(folder)
    rows = summarise_comparison(comparison)
    quality, cost, terms = tabulate_quality(rows, comparison), tabulate_cost(rows, comparison), tabulate_terms(rows)
    answers = [judge(rows, pair, comparison.reference) for pair in comparison.pairs]
    answers = [words for words in answers if words] or [f"Nothing to compare with {comparison.reference} yet."]
    figures = {
        "scores": draw_matrix(comparison.cells, metrics=_COMPARED),
        "differences": draw_differences(_differences(rows), reference=comparison.reference),
        "cost": draw_cost(_costs(rows)),
    }
    images = save_figures(figures, folder)
    text = ["# Comparison", *answers, "## Scores", quality.markdown(), "## Cost of training", cost.markdown()]
    text += ["## Distillation terms", terms.markdown()] if terms.rows else []
    write_atomically(folder / "table.md", "\n\n".join(part.strip() for part in text).encode() + b"\n")
    content = {"reference": comparison.reference, "split": comparison.split, "rows": [_plain(asdict(r)) for r in rows]}
    write_atomically(folder / "table.json", json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    sections = [
        Section("Answer", "\n".join(answers), quality, images["scores"], "Scores of every seed by pair and method"),
        Section(
            f"Difference to {comparison.reference}",
            "Mean over seeds, and Student's 95 % interval of it where there are two seeds or more. An interval that "
            "crosses zero is no proof of a difference.",
            figure=images["differences"],
            description=f"Paired differences of every method to {comparison.reference} with intervals",
        ),
        Section("Cost of training", "", cost, images["cost"], "AP against seconds per training step"),
    ]
    if terms.rows:
        sections.append(
            Section(
                "Distillation terms",
                "A term whose gradient is far below the task's (ratio below 0.1) teaches next to nothing; one that "
                "does not fall is not followed.",
                terms,
            )
        )
    lead = f"Every method with the same seeds, each scored once, at the end, on the split '{comparison.split}'."
    return write_page(folder / PAGE, title="Comparison", lead=lead, sections=sections, runs=_runs(comparison, folder))


def _differences(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, PairedDifference]]]:
    found: dict[str, dict[str, dict[str, PairedDifference]]] = {}
    for row in rows:
        if row.to_reference:
            by_metric = found.setdefault(row.pair, {metric: {} for metric in _COMPARED})
            for metric in _COMPARED:
                by_metric[metric][row.method] = row.to_reference[metric]
    return found


def _costs(rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, float]]]:
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row.method != TEACHER and not math.isnan(row.seconds_per_step + row.scores["ap"].mean):
            found.setdefault(row.pair, {})[row.method] = row.seconds_per_step, row.scores["ap"].mean
    return found


def _runs(comparison: Comparison, folder: Path) -> dict[str, Run]:
    """One run a pair and method, the first seed's, for the facts and the recipe at the end of the page."""
    runs: dict[str, Run] = {}
    for cell in comparison.cells:
        name = f"{cell['pair']}: {cell['method']}"
        facts = {
            key: cell[key] for key in ("seed", "commit", "started", "finished", "machine", "versions") if key in cell
        }
        facts["command"] = cell.get("command")
        recipe = yaml.safe_dump(cell.get("recipe"), sort_keys=False)
        runs.setdefault(name, Run(folder, recipe, facts, {}, None, {}))
    return runs


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
