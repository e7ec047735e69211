"""Does one weight work everywhere? How loud each method is beside the task, under other sizes, batches and widths.

    drkd compare --config benchmarks/comparisons/sensitivity.yaml --jobs 2
    python benchmarks/sensitivity.py runs/compare/sensitivity --out benchmarks/results/sensitivity

Reads a comparison's cells, whose methods come in twos (NAME_fixed: the authors' weights; NAME_balanced: ratios of
gradient norms). Writes a table and a figure: the median gradient ratio of all terms together in each condition, after
the steps in which balanced weights are set, and how many times the largest is the smallest. A method whose ratio moves
a hundredfold is silent in one place and deafening in another. A ratio of 0, and a run that the guard against silent
terms stopped before its end, count as silent; a condition that was not run is left empty.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt

HOW = ("fixed", "balanced")


def main() -> None:
    """Read the cells, write table.md, table.json and ratios.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of the comparison")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = read(options.folder)
    if not found:
        parser.error(f"{options.folder}: expected cells of methods that end with _fixed and _balanced, found none")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    (options.out / "table.md").write_text(text)
    draw(found, options.out / "ratios.png")
    print(text)


def read(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Gradient ratio by method, kind of weight and condition."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for file in sorted(folder.glob("cells/*/*_*/seed*.json")):
        name, _, how = file.parent.name.rpartition("_")
        terms = json.loads(file.read_text()).get("distillation") or {}
        ratios = [term["median_gradient_ratio"] for term in terms.values() if "median_gradient_ratio" in term]
        if how in HOW and ratios:
            condition = file.parent.parent.name
            found.setdefault(name, {}).setdefault(how, {})[condition] = math.sqrt(sum(r * r for r in ratios))
    for file in sorted(folder.glob("runs/*/*_*-seed*/run.json")):
        name, _, how = file.parent.name.rpartition("-seed")[0].rpartition("_")
        if how in HOW and "DeadDistillation" in str(json.loads(file.read_text()).get("error")):
            found.setdefault(name, {}).setdefault(how, {})[file.parent.parent.name] = 0.0
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The numbers as Markdown."""
    conditions = list(dict.fromkeys(key for kinds in found.values() for own in kinds.values() for key in own))
    head = ["Method", "Weights", *conditions, "largest / smallest"]
    lines = ["| " + " | ".join(head) + " |", "| :-- | :-- |" + " --: |" * (len(head) - 2)]
    for name, kinds in found.items():
        for how in HOW:
            own = kinds.get(how, {})
            if own:
                cells = ["" if key not in own else f"{own[key]:.2g}" if own[key] else "silent" for key in conditions]
                smallest = min(own.values())
                ratio = f"{max(own.values()) / smallest:.1f}" if smallest else "silent somewhere"
                lines.append(f"| {name} | {how} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """One row a method, a point a condition."""
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(found) + 1.2))
    for row, kinds in enumerate(found.values()):
        for how, colour, shift in (("fixed", "tab:red", 0.15), ("balanced", "tab:blue", -0.15)):
            # A logarithmic axis has no place for silence: the table says it.
            values = [value for value in kinds.get(how, {}).values() if value]
            axes.plot(values, [row + shift] * len(values), "o-", color=colour, label=how if row == 0 else None)
    axes.set_xscale("log")
    axes.axvspan(0.1, 10, color="0.93", zorder=0)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_xlabel("gradient of the distillation beside the task's, at the student's features")
    axes.legend(loc="best")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
