"""Write the tables of scores in the README and beside the results from the table.json of `drkd compare`.

    python benchmarks/readme_tables.py          # rewrites them in place
    python benchmarks/readme_tables.py --check  # exits with 1 where a page says something else

A table stands between the lines ``<!-- scores:NAME -->`` and ``<!-- end -->``; NAME is ``means`` (mean, spread and
paired difference to the lone student, over seeds) or ``seeds`` (a row a seed).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drkd.reports.gap import PairedDifference, Spread
from drkd.reports.tables import Table, format_difference, format_score, format_share, format_spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    ROOT / "README.md": RESULTS / "leaderboard_6_epochs" / "table.json",
    RESULTS / "leaderboard_6_epochs" / "README.md": RESULTS / "leaderboard_6_epochs" / "table.json",
    RESULTS / "digits2" / "README.md": RESULTS / "digits2" / "table.json",
}
PAIRS = {"faster_rcnn": "Faster R-CNN", "retinanet": "RetinaNet"}
METHODS = {
    "teacher": "teacher",
    "student": "student",
    "cwd": "CWD",
    "fgfi": "FGFI",
    "crosskd": "CrossKD",
    "pkd": "PKD",
    "pkd_3": "PKD, 3 times as loud as the task",
    "pkd_adapter": "PKD with DRKD's adapter",
    "drkd": "DRKD",
    "drkd_cross_head": "DRKD with `response: cross_head`",
}
COUNTS = ("no", "one", "two", "three", "four", "five")
_BLOCK = re.compile(r"(<!-- scores:(means|seeds) -->\n).*?(<!-- end -->)", re.DOTALL)


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


WRITERS: Mapping[str, Callable[[list[Mapping[str, Any]]], str]] = {"means": write_means, "seeds": write_seeds}


def rewrite(page: Path, results: Path) -> str:
    """The page's text with its tables as the results say."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    text, count = _BLOCK.subn(
        lambda found: found[1] + WRITERS[found[2]](rows) + found[3], page.read_text(encoding="utf-8")
    )
    if not count:
        raise ValueError(f"{page}: no table between <!-- scores:means or seeds --> and <!-- end -->")
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
