"""Run matrix on the embedded digits: detectors x methods x seeds, every finished cell kept as a small JSON file.

    python benchmarks/digits_matrix.py --methods student drkd --seeds 0 1 2 --jobs 2

A cell is one call of the command line (`drkd train` or `drkd distill`) in a process of its own; a cell whose file
exists is skipped, so a killed matrix goes on where it stopped. Scores are of the `val` split at the last step; nothing
is selected on it. With `--split tune` the cells score the `tune` split instead: that is what design trials use.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECIPES = {"retinanet": "digits/retinanet", "faster_rcnn": "digits/faster_rcnn"}
METHODS: dict[str, tuple[str, list[str]]] = {
    "student": ("train", []),
    "drkd": ("distill", []),
    "hint": ("distill", ["--method=drkd.methods.FeatureHint"]),
    "paper": ("distill", ["--method=drkd.methods.PaperDRKD"]),
}


def main() -> int:
    """Run the cells that are missing, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--methods", nargs="+", default=["student", "drkd"], help="name, or name=override,override")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time; the cores are shared among them")
    parser.add_argument("--split", default="val", choices=["val", "tune"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "digits")
    parser.add_argument("--runs", type=Path, default=Path("runs/matrix"))
    parser.add_argument("--set", nargs="*", default=[], help="overrides for every cell, such as training.epochs=2")
    options = parser.parse_args()
    if len({_name(method) for method in options.methods}) < len(options.methods):
        parser.error("two methods have one name; write name=override to name a variant")
    cells = [(d, m, s) for s in options.seeds for d in options.detectors for m in options.methods]
    for cell in cells:
        file = _file(options.out, *cell)
        if file.exists() and json.loads(file.read_text())["command"] != ["drkd", *_arguments(*cell, options=options)]:
            parser.error(f"{file} is of another command; remove it, or choose another --out")
    missing = [cell for cell in cells if not _file(options.out, *cell).exists()]
    print(f"{len(cells)} cells, {len(missing)} to run, {options.jobs} at a time", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        good = list(pool.map(lambda cell: _run(*cell, options=options), missing))
    _report(options.out)
    return 0 if all(good) else 1


def _name(method: str) -> str:
    return method.partition("=")[0]


def _file(out: Path, detector: str, method: str, seed: int) -> Path:
    return out / f"{detector}-{_name(method)}-seed{seed}.json"


def _arguments(detector: str, method: str, seed: int, *, options: argparse.Namespace) -> list[str]:
    name, _, extra = method.partition("=")
    verb, overrides = METHODS.get(name, ("distill", []))
    overrides = overrides + [f"--{item}" for item in extra.split(",") if item]
    return [
        verb,
        f"--config={RECIPES[detector]}",
        *overrides,
        *(f"--{item}" for item in options.set),
        f"--evaluation.split={options.split}",
        f"--seed={seed}",
        f"--output={_folder(detector, method, seed, options=options)}",
        "--overwrite=true",
    ]


def _folder(detector: str, method: str, seed: int, *, options: argparse.Namespace) -> Path:
    return Path(options.runs) / f"{detector}-{_name(method)}-seed{seed}"


def _run(detector: str, method: str, seed: int, *, options: argparse.Namespace) -> bool:
    name = _name(method)
    folder = _folder(detector, method, seed, options=options)
    arguments = _arguments(detector, method, seed, options=options)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w") as file:
        code = subprocess.run(
            [sys.executable, "-m", "drkd", *arguments], stdout=file, stderr=file, env=environment, check=False
        ).returncode
    seconds = time.monotonic() - started
    if code:
        print(f"{folder.name}: FAILED after {seconds:.0f} s, see {log}", flush=True)
        return False
    cell = _cell(detector, name, seed, folder, arguments=arguments, seconds=seconds, threads=threads)
    target = _file(options.out, detector, method, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".part")
    aside.write_text(json.dumps(cell, indent=1) + "\n")
    aside.replace(target)
    scores = cell["metrics"]
    print(
        f"{folder.name}: AP {100 * scores['ap']:.2f}, AP_S {100 * scores['ap_small']:.2f}, {seconds:.0f} s", flush=True
    )
    return True


def _cell(
    detector: str, method: str, seed: int, folder: Path, *, arguments: list[str], seconds: float, threads: int
) -> dict[str, Any]:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    run = json.loads((folder / "run.json").read_text())
    return {
        "detector": detector,
        "method": method,
        "seed": seed,
        "metrics": {name: value for name, value in evaluation.items() if isinstance(value, float | None)},
        "thresholds_px": evaluation["thresholds_px"],
        "per_class": evaluation["per_class"],
        "distillation": _distillation(folder / "metrics.csv"),
        "command": ["drkd", *arguments],
        "seconds": round(seconds, 1),
        "threads": threads,
        **{name: run.get(name) for name in ("steps", "commit", "versions", "machine", "started", "finished")},
    }


def _distillation(metrics: Path) -> dict[str, dict[str, float]]:
    """Median gradient ratio, and first and last value (means of a tenth of the run), of each KD term."""
    columns: dict[str, list[float]] = {}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name.startswith(("ratio/", "bare/")):
                    columns.setdefault(name, []).append(float(value))
    found: dict[str, dict[str, float]] = {}
    for name, values in columns.items():
        kind, _, term = name.partition("/")
        if kind == "ratio":
            found.setdefault(term, {})["median_gradient_ratio"] = sorted(values)[len(values) // 2]
        else:
            part = max(1, len(values) // 10)
            found.setdefault(term, {}).update(first=sum(values[:part]) / part, last=sum(values[-part:]) / part)
    return found


def _report(out: Path) -> None:
    from drkd.reports import write_matrix_report

    cells = [json.loads(path.read_text()) for path in sorted(out.glob("*-seed*.json"))]
    cells += [json.loads(path.read_text()) for path in sorted(out.glob("*-teacher.json"))]
    if cells:
        print(write_matrix_report(cells, out))
        print((out / "table.md").read_text())


if __name__ == "__main__":
    sys.exit(main())
