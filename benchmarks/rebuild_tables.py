"""Write the table and the figures beside committed cells again, as `drkd compare` makes them; runs nothing.

    python benchmarks/rebuild_tables.py                  # all results that COMPARISONS names
    python benchmarks/rebuild_tables.py digits2 ablation # these

Cells of an arm that the comparison no longer has, or not on that pair, are left out. Afterwards the tables of scores in
the pages are written, see `readme_tables.py`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from readme_tables import RESULTS, ROOT
from readme_tables import main as write_pages

from drkd.cli import main as drkd
from drkd.recipes.comparison.cell import make_cells
from drkd.recipes.comparison.definition import load_comparison

COMPARISONS = {
    "leaderboard_6_epochs": ROOT / "recipes" / "compare" / "digits.yaml",
    "digits2": ROOT / "benchmarks" / "comparisons" / "digits2.yaml",
    "half_schedule": ROOT / "benchmarks" / "comparisons" / "half_schedule.yaml",
    "ablation": ROOT / "benchmarks" / "comparisons" / "ablation.yaml",
}
WRITTEN = ("table.md", "table.json", "comparison.json")


def rebuild(result: str) -> None:
    """Have `drkd compare` read a copy of the cells, and take what it writes.

    Raises:
        SystemExit: If it failed, as it does where a cell is of other settings than today's.
    """
    if result not in COMPARISONS:
        sys.exit(f"{result}: expected one of {', '.join(COMPARISONS)}")
    folder, comparison = RESULTS / result, COMPARISONS[result]
    declared = load_comparison(comparison)
    arms = {(cell.pair, cell.method) for cell in make_cells(declared, source=str(comparison))}
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "comparison"
        only, seeds = [], {*declared.seeds}
        for file in sorted((folder / "cells").rglob("*.json")):
            parts = file.relative_to(folder / "cells").with_suffix("").parts
            if parts[:2] not in arms:
                continue
            copy = output / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
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
