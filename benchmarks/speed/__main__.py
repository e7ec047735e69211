"""Measure what DRKD and its rivals cost: ``python benchmarks/speed``; writes results/speed/<device>.json and .md."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from feeding import evaluation_seconds, loader_rate, usable_workers
from losses import compare_with_released, growth
from steps import METHODS, Setting, clock_of, make_steps, measure_peaks, measure_steps
from table import write_table

_OUTPUT = Path(__file__).resolve().parents[1] / "results" / "speed"
_PAPER = [
    Setting(family, "resnet50", teacher, size, 2, boxes)
    for family in ("retinanet", "faster_rcnn")
    for teacher in ("resnext101_64x4d", "resnet101")
    for size, boxes in (((800, 1344), 7), ((512, 512), 7))
]
# What a small machine does in minutes; the networks are the paper's, the images are not.
_SMALL = [
    Setting("retinanet", "resnet50", "resnet101", (256, 256), 2, 7),
    Setting("faster_rcnn", "resnet50", "resnet101", (256, 256), 2, 7),
    Setting("faster_rcnn", "resnet50", "resnet101", (256, 256), 2, 60),
]
_PARTS = ("steps", "losses", "growth", "feeding")
# What "steps" has too: alone for shapes whose steps take minutes, and with other work beside.
_MEMORY = "memory"


def main() -> None:
    """Measure the parts that are asked for and write them."""
    options = _options()
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = clock_of("wall" if device.type == "cuda" else options.clock)
    result: dict[str, Any] = {"provenance": _provenance(options, device)}
    if "steps" in options.parts:
        result["steps"] = [_measure(setting, options, device) for setting in _settings(options, device)]
    if _MEMORY in options.parts:
        result[_MEMORY] = [_measure(setting, options, device, timed=False) for setting in _settings(options, device)]
    big = device.type == "cuda"
    if "losses" in options.parts:
        size = (64, 64) if options.tiny else (800, 1344) if big else (256, 256)
        boxes = (2,) if options.tiny else (7, 60, 200)
        result["losses"] = compare_with_released(size, boxes, device, repeats=options.repeats, clock=clock)
    if "growth" in options.parts:
        sides = (4, 8) if options.tiny else (32, 64, 128, 256) if big else (16, 32, 64)
        counts = (2, 4) if options.tiny else (8, 32, 128, 512)
        result["growth"] = growth(sides, counts, device, repeats=options.repeats, clock=clock)
    if "feeding" in options.parts:
        found = {
            # At the size of the steps that it stands beside.
            "loader": loader_rate(size=(800, 1333) if big else (256, 256), images=64, workers=usable_workers()),
            "evaluation": evaluation_seconds(),
        }
        result["feeding"] = {
            **found,
            "demand": {
                block["name"]: block["images"] / block["rows"]["DRKD"]["seconds"]
                for block in result.get("steps", ())
                if "DRKD" in block["rows"]
            },
        }
    text = write_table(result)
    print(text)
    output = Path(options.output) if options.output else _OUTPUT / f"{device.type}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".md").write_text(text)
    print(f"Wrote {output} and {output.with_suffix('.md').name}.")


def _measure(
    setting: Setting, options: argparse.Namespace, device: torch.device, *, timed: bool = True
) -> dict[str, Any]:
    precision = torch.bfloat16 if device.type == "cuda" and options.precision == "bf16" else None
    steps, impossible, held = make_steps(
        setting,
        options.methods,
        device,
        precision=precision,
        channels_last=not options.contiguous,
        compile_with=options.compile,
    )
    clock = clock_of("wall" if device.type == "cuda" else options.clock)
    rows = measure_steps(steps, repeats=options.repeats, clock=clock) if timed else measure_peaks(steps, warm=1)
    for row in rows.values():
        row["memory_bytes"] = held + row["peak_bytes"]
        row["memory_ratio"] = row["memory_bytes"] / (held + rows["floor"]["peak_bytes"])
    print(f"measured: {setting.name}", file=sys.stderr)
    return {
        "name": setting.name,
        "family": setting.family,
        "images": setting.batch_size,
        "device": device.type,
        "precision": "bf16" if precision else "float32",
        "detector_bytes": held,
        "rows": rows,
        "impossible": impossible,
    }


def _settings(options: argparse.Namespace, device: torch.device) -> list[Setting]:
    if options.size is None:
        return _PAPER if device.type == "cuda" else _SMALL
    return [
        Setting(family, options.student, options.teacher, tuple(options.size), options.batch_size, boxes)
        for family in options.families
        for boxes in options.boxes
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python benchmarks/speed", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 leaves torch's choice")
    parser.add_argument("--repeats", type=int, default=11, help="rounds; every variant runs once in each")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's time; CPU only")
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16", help="GPU only")
    parser.add_argument("--contiguous", action="store_true", help="not channels-last")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile; the floor too, beside a method")
    parser.add_argument("--parts", nargs="+", choices=(*_PARTS, _MEMORY), default=list(_PARTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--size", type=int, nargs=2, help="height and width, px, instead of the usual settings")
    parser.add_argument("--tiny", action="store_true", help="losses and growth at sizes that only show that they run")
    parser.add_argument("--families", nargs="+", default=["retinanet", "faster_rcnn"])
    parser.add_argument("--student", default="resnet50")
    parser.add_argument("--teacher", default="resnet101")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--boxes", type=int, nargs="+", default=[7])
    parser.add_argument("--output", help="JSON file")
    return parser.parse_args()


def _provenance(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return {
        "command": shlex.join(["python", "benchmarks/speed", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "clock": "wall" if device.type == "cuda" else options.clock,
        "repeats": options.repeats,
        "seed": 0,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
