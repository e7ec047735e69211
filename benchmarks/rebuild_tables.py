"""Write the table and the figures beside committed cells again, as `drkd compare` makes them; runs nothing.

    python benchmarks/rebuild_tables.py                  # all results that COMPARISONS names
    python benchmarks/rebuild_tables.py digits2 ablation # these

Cells of an arm that the comparison no longer has, or not on that pair, are left out. Afterwards the tables of scores in
the pages are written, see `readme_tables.py`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from readme_tables import RESULTS, ROOT
from readme_tables import main as write_pages

from drkd.cli import main as drkd
from drkd.recipes.comparison.cell import Cell, make_cells
from drkd.recipes.comparison.definition import load_comparison

COMPARISONS = {
    "leaderboard_6_epochs": ROOT / "recipes" / "compare" / "digits.yaml",
    "digits2": ROOT / "benchmarks" / "comparisons" / "digits2.yaml",
    "half_schedule": ROOT / "benchmarks" / "comparisons" / "half_schedule.yaml",
    "ablation": ROOT / "benchmarks" / "comparisons" / "ablation.yaml",
    "tuning": ROOT / "benchmarks" / "comparisons" / "tuning.yaml",
}
CHOSEN = {"pixel_distance": {"faster_rcnn": "mse", "retinanet": "rms"}}
"""Defaults of DRKD that go by stages since trial 23, by pair: cells of before have them written out."""
WRITTEN = ("table.md", "table.json", "comparison.json")


def as_today(content: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """A cell's content with those defaults null that were written out when it was measured and go by stages today."""

    def change(then: Any, now: Any) -> None:
        for name in then if isinstance(then, dict) and isinstance(now, dict) else ():
            if now.get(name, ...) is None and name in CHOSEN and then[name] == CHOSEN[name][cell.pair]:
                then[name] = None
            change(then[name], now.get(name))

    change(content.get("recipe"), cell.settings)
    return content


def rebuild(result: str) -> None:
    """Have `drkd compare` read a copy of the cells, and take what it writes.

    Raises:
        SystemExit: If it failed, as it does where a cell is of other settings than today's.
    """
    if result not in COMPARISONS:
        sys.exit(f"{result}: expected one of {', '.join(COMPARISONS)}")
    folder, comparison = RESULTS / result, COMPARISONS[result]
    declared = load_comparison(comparison)
    arms = {(cell.pair, cell.method): cell for cell in make_cells(declared, source=str(comparison))}
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "comparison"
        only, seeds = [], {*declared.seeds}
        for file in sorted((folder / "cells").rglob("*.json")):
            parts = file.relative_to(folder / "cells").with_suffix("").parts
            if parts[:2] not in arms:
                continue
            copy = output / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = as_today(json.loads(file.read_text(encoding="utf-8")), arms[parts[0], parts[1]])
            copy.write_text(json.dumps(content), encoding="utf-8")
            numbers = [part.removeprefix("seed") for part in parts[2:]]
            only.append("/".join((*parts[:2], *numbers)))
            seeds |= {*map(int, numbers)}
        arguments = [f"--config={comparison}", f"--output={output}", f"--seeds={sorted(seeds)}", "--jobs=1"]
        if drkd(["compare", *arguments, "--only", *only]) != 0:
            sys.exit(f"{result}: drkd compare did not end well; are all cells those of today's recipes?")
        for name in WRITTEN:
            shutil.copy(output / name, folder / name)
        shutil.copytree(output / "figures", folder / "figures", dirs_exist_ok=True)


def main() -> None:
    """Rebuild what the command line names, and the pages."""
    for result in sys.argv[1:] or COMPARISONS:
        rebuild(result)
    sys.argv[1:] = []
    write_pages()


if __name__ == "__main__":
    main()
