"""Write the tables of scores in the README and beside the results from the table.json of `drkd compare`.

    python benchmarks/readme_tables.py          # rewrites them in place
    python benchmarks/readme_tables.py --check  # exits with 1 where a page says something else

A table stands between the lines ``<!-- scores:NAME -->`` and ``<!-- end -->``; NAME is ``means`` (mean, spread and
paired difference to the lone student, over seeds), ``seeds`` (a row a seed), ``rows`` (of one seed: a row for each of
the comparison's file, best first), or ``effort``: of every method, how many committed runs were scored on `tune`, over
all results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import drkd.methods
from drkd.reports.gap import PairedDifference, Spread
from drkd.reports.tables import Table, format_difference, format_score, format_share, format_spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES: Mapping[Path, Path | None] = {
    ROOT / "README.md": RESULTS / "leaderboard_6_epochs" / "table.json",
    RESULTS / "leaderboard_6_epochs" / "README.md": RESULTS / "leaderboard_6_epochs" / "table.json",
    RESULTS / "digits2" / "README.md": RESULTS / "digits2" / "table.json",
    RESULTS / "tuning" / "README.md": RESULTS / "tuning" / "table.json",
    RESULTS / "trials" / "README.md": None,
}
PAIRS = {"faster_rcnn": "Faster R-CNN", "retinanet": "RetinaNet"}
METHODS = {
    "teacher": "teacher",
    "student": "student",
    "cwd": "CWD",
    "cwd_3": "CWD, 3 times as loud as the task",
    "fgfi": "FGFI",
    "fgfi_scaled_identity": "FGFI, regions to scale, adapter from the identity",
    "crosskd": "CrossKD",
    "crosskd_3": "CrossKD, 3 times as loud as the task",
    "pkd": "PKD",
    "pkd_3": "PKD, 3 times as loud as the task",
    "pkd_cross_head": "PKD, 3 times as loud as the task, with CrossKD",
    "pkd_adapter": "PKD with DRKD's adapter",
    "drkd": "DRKD",
    "drkd_adapter_3": "DRKD with an adapter of 3x3 cells",
    "drkd_cross_head": "DRKD with `response: cross_head`",
}
COUNTS = ("no", "one", "two", "three", "four", "five")


def write_means(rows: list[Mapping[str, Any]]) -> str:
    """A row a method: AP and AP_S over its seeds, the paired differences to the lone student, the gap recovered."""
    most = max(len(row["seeds"]) for row in rows)
    lines = []
    for pair, row in _ordered(rows):
        name = METHODS[row["method"]]
        if row["method"] not in ("teacher", "student"):
            name = f"student + {name}"
        if row["method"] != "teacher" and len(row["seeds"]) != most:
            name += f", {_count(len(row['seeds']))} seed{'s' * (len(row['seeds']) != 1)}"
        cells = [pair, name]
        for metric in ("ap", "ap_small"):
            difference = row["to_reference"].get(metric)
            cells.append(format_spread(Spread(**_numbers(row["scores"][metric]))))
            cells.append("" if difference is None else format_difference(PairedDifference(**_numbers(difference))))
        taught = row["to_reference"] and row["share"] is not None
        lines.append((*cells, format_share(row["share"]) if taught else ""))
    columns = ("Detector", "", "AP", "Δ AP (95 %)", "AP_S", "Δ AP_S (95 %)", "Gap recovered")
    return Table(columns, tuple(lines), words=2).markdown()


def write_seeds(rows: list[Mapping[str, Any]]) -> str:
    """A row a method and seed."""
    lines = []
    for pair, row in _ordered(rows):
        name = METHODS[row["method"]]
        values = row["values"]
        if row["method"] == "teacher":
            scores = (row["scores"][metric]["mean"] for metric in ("ap", "ap_small"))
            lines.append((pair, name, "", *map(format_score, scores)))
            continue
        for place, seed in enumerate(values["ap"]):
            scores = (values[metric][seed] for metric in ("ap", "ap_small"))
            lines.append((pair if not place else "", name if not place else "", seed, *map(format_score, scores)))
    return Table(("Pair", "Method", "Seed", "AP", "AP_S"), tuple(lines), words=2).markdown()


def write_rows(rows: list[Mapping[str, Any]]) -> str:
    """The rows of a comparison of one seed by its own names, best AP first, both pairs side by side."""
    found = [
        sorted((row for row in rows if row["pair"] == pair), key=lambda row: -row["scores"]["ap"]["mean"])
        for pair in PAIRS
    ]
    lines = []
    for sides in zip_longest(*found):
        line: list[str] = []
        for row in sides:
            scores = () if row is None else (row["scores"][metric]["mean"] for metric in ("ap", "ap_small"))
            line += ["", "", ""] if row is None else [f"`{row['method']}`", *map(format_score, scores)]
        lines.append(tuple(line))
    columns = [name for pair in PAIRS.values() for name in (pair, "AP", "AP_S")]
    return Table(tuple(columns), tuple(lines), words=1).markdown()


def write_effort(results: Path = RESULTS) -> str:
    """A row a method: its committed runs that were scored on `tune`, by detector; a sum counts for each part."""
    runs: dict[str, Counter[str]] = defaultdict(Counter)
    for file in sorted(results.rglob("*.json")):
        if file.relative_to(results).parts[0] == "sensitivity":
            continue  # of 16 steps, whose scores nothing was chosen by
        cell = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(cell, dict) or not {"metrics", "command"} <= cell.keys() or cell.get("seed") is None:
            continue
        command = " ".join(cell["command"])
        if cell.get("split") != "tune" and "--evaluation.split=tune" not in command:
            continue
        pair = cell.get("pair", cell.get("detector", "")).removesuffix("_teacher")
        written = json.dumps(cell["recipe"].get("method")) if "recipe" in cell else command
        named = {*re.findall(r"drkd(?:\.methods)?\.([A-Z]\w+)", written)}
        # The recipes' own method, unless another is named; what is no method any more was a part of DRKD in a trial.
        found = (named & {*drkd.methods.__all__}) - {"Combination"} or {"DRKD"}
        for name in ("student alone",) if cell["command"][1] == "train" else found:
            runs[name][pair] += 1
    rows = [
        (name, *(str(counts[pair]) for pair in PAIRS), str(counts.total() - sum(counts[pair] for pair in PAIRS)))
        for name, counts in sorted(runs.items(), key=lambda item: (-item[1].total(), item[0]))
    ]
    return Table(("Method", *PAIRS.values(), "other pairs"), tuple(rows), words=1).markdown()


def _count(number: int) -> str:
    return COUNTS[number] if number < len(COUNTS) else str(number)


def _ordered(rows: list[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows in the order of `PAIRS` and `METHODS`, each with its pair's name where the pair begins."""
    unknown = {row["pair"] for row in rows} - PAIRS.keys() | {row["method"] for row in rows} - METHODS.keys()
    if unknown:
        raise ValueError(f"pairs and methods without a name for the tables: {', '.join(sorted(unknown))}")
    found, last = [], ""
    for row in sorted(rows, key=lambda row: ([*PAIRS].index(row["pair"]), [*METHODS].index(row["method"]))):
        found.append((PAIRS[row["pair"]] if row["pair"] != last else "", row))
        last = row["pair"]
    return found


def _numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; the tables' functions do."""
    return {name: float("nan") if value is None else value for name, value in fields.items()}


WRITERS: Mapping[str, Callable[[list[Mapping[str, Any]]], str]] = {
    "means": write_means,
    "seeds": write_seeds,
    "rows": write_rows,
    "effort": lambda _: write_effort(),
}
_BLOCK = re.compile(rf"(<!-- scores:({'|'.join(WRITERS)}) -->\n).*?(<!-- end -->)", re.DOTALL)


def rewrite(page: Path, results: Path | None) -> str:
    """The page's text with its tables as the results say, those of effort as all results do."""
    rows = [] if results is None else json.loads(results.read_text(encoding="utf-8"))["rows"]
    text, count = _BLOCK.subn(
        lambda found: found[1] + WRITERS[found[2]](rows) + found[3], page.read_text(encoding="utf-8")
    )
    if not count:
        raise ValueError(f"{page}: no table between <!-- scores:{' or '.join(WRITERS)} --> and <!-- end -->")
    return text


def main() -> None:
    """Rewrite the pages, or say which differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for page, results in PAGES.items():
        text = rewrite(page, results)
        if text == page.read_text(encoding="utf-8"):
            continue
        stale.append(str(page.relative_to(ROOT)))
        if not options.check:
            page.write_text(text, encoding="utf-8")
    if options.check and stale:
        sys.exit(f"These tables are not what their results say: {', '.join(stale)}")


if __name__ == "__main__":
    main()
