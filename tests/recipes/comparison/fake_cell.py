"""Stands in for training a cell: leaves the files of a run after a while. Also drives the command line with such cells.

python fake_cell.py cell RUN_FOLDER RECIPE SECONDS     one cell
python fake_cell.py drive SECONDS ARGUMENTS...         `drkd ARGUMENTS...`, whose cells take so long
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100")
METRICS += ("ar_small", "ar_medium", "ar_large")


def fake_program(cell, seconds=0.0):
    """What to run instead of a cell's command."""
    recipe = cell.run_folder.parent / f"{cell.run_folder.name}.recipe.json"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(json.dumps(dict(cell.settings)))
    return [sys.executable, __file__, "cell", str(cell.run_folder), str(recipe), str(seconds)]


def write_run(folder, recipe, seconds):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "progress.json").write_text(json.dumps({"step": 1, "steps": 2, "epoch": 0}))
    print("working", flush=True)
    time.sleep(seconds)
    (folder / "recipe.yaml").write_text(recipe.read_text())
    score = 0.25 + 0.01 * (json.loads(recipe.read_text()).get("seed") or 0)
    evaluation = {**dict.fromkeys(METRICS, score), "per_class": {"cat": score}, "thresholds_px": [32.0, 96.0]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "run.json").write_text(json.dumps({"status": "finished", "seconds": 3.0, "steps": 2, "commit": "abc"}))
    (folder / "progress.json").unlink()


if __name__ == "__main__":
    if sys.argv[1] == "cell":
        write_run(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
    else:
        # A shell that starts the tests in the background has them ignore interrupts, and what they start with them.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from drkd.cli import main
        from drkd.recipes.comparison import run

        run._program = lambda cell: fake_program(cell, float(sys.argv[2]))
        sys.exit(main(sys.argv[3:]))
