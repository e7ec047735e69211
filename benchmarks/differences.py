"""Mean paired differences between two arms of committed results, with Student's 95 % interval, AP x 100; runs nothing.

    python benchmarks/differences.py leaderboard_6_epochs retinanet drkd drkd_objects   # the first minus the second

Unlike `table.json` it also knows arms that the comparison no longer has, and AP_L.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from readme_tables import RESULTS

from drkd.reports.gap import compare_paired
from drkd.reports.tables import format_difference

METRICS = {"AP": "ap", "AP_S": "ap_small", "AP_L": "ap_large"}


def compare_arms(pair: Path, ours: str, theirs: str) -> dict[str, str]:
    """The difference by metric over the seeds that both have; ``pair`` is the folder of a pair's cells.

    A metric that a data set does not have (AP_L where there is no large object) is left out.
    """
    scores = []
    for arm in (theirs, ours):
        cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((pair / arm).glob("seed*.json"))]
        if not cells:
            sys.exit(f"{pair / arm}: expected cells, found none")
        scores.append({cell["seed"]: cell["metrics"] for cell in cells})
    return {
        name: format_difference(
            compare_paired(*({seed: metrics[key] for seed, metrics in side.items()} for side in scores))
        )
        for name, key in METRICS.items()
        if all(metrics[key] is not None for side in scores for metrics in side.values())
    }


if __name__ == "__main__":
    result, of, first, second = sys.argv[1:]
    for metric, words in compare_arms(RESULTS / result / "cells" / of, first, second).items():
        print(metric, words)
