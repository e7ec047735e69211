"""Turn a trained teacher into the file that ships: weights in half precision, scored on `val` as it will be loaded.

    drkd train --config digits/teacher_retinanet
    python benchmarks/ship_teacher.py runs/teachers/retinanet --name digits_retinanet

Writes `src/drkd/assets/NAME.pt`, beside it `NAME.json` (command, seed, commit, machine and the scores on `tune` during
training and on `val`). What is overwritten counts as the run that this one went on from, if it says so.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch

from drkd.adapters import load_detector
from drkd.data.module import DetectionDataModule
from drkd.recipes.evaluation import evaluate_detector

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Convert, load back, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    options = parser.parse_args()
    run = json.loads((options.run / "run.json").read_text())
    if run["status"] != "finished":
        parser.error(f"{options.run} is {run['status']}")
    saved = torch.load(options.run / "student.pt", map_location="cpu", weights_only=True)
    saved["state_dict"] = {
        name: value.half() if value.is_floating_point() else value for name, value in saved["state_dict"].items()
    }
    file = ROOT / "src" / "drkd" / "assets" / f"{options.name}.pt"
    aside = file.with_suffix(".part")
    torch.save(saved, aside)
    aside.replace(file)
    data = DetectionDataModule("digits", workers=0, pad_to=(128, 128), min_size=128, max_size=128)
    scored = evaluate_detector(
        load_detector(file, class_names=data.class_names), data.split("val"), loader=data.loader("val"), area_scale=0.25
    )
    known = ("command", "seed", "steps", "commit", "versions", "machine", "started", "finished", "sessions")
    facts = {name: run.get(name) for name in known}
    facts["command"] = ["drkd", *run["command"][1:]]
    before = file.with_suffix(".json")
    if any(word == f"--student.weights=drkd:{options.name}" for word in run["command"]):
        facts["before"] = json.loads(before.read_text())
    log = {**facts, "tune": _validations(options.run / "metrics.csv"), "val": scored.metrics}
    file.with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n")
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    print(scored.coco.table())


def _validations(metrics: Path) -> list[dict[str, Any]]:
    """AP on `tune` while the teacher was trained."""
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/ap")]
    return [
        {"step": int(row["step"]), "ap": float(row["val/ap"]), "ap_small": float(row["val/ap_small"])} for row in rows
    ]


if __name__ == "__main__":
    main()
