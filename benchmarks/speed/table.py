"""The measured numbers as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from losses import exponent

_MIB = 2**20
# Of the step over its floor: time and memory, by device and family.
TARGETS = {
    ("cuda", "retinanet"): (1.05, 1.10),
    ("cuda", "faster_rcnn"): (1.10, 1.15),
    ("cpu", "retinanet"): (1.10, 1.10),
    ("cpu", "faster_rcnn"): (1.10, 1.15),
}


def write_table(result: Mapping[str, Any]) -> str:
    """All sections that the result has."""
    where = result["provenance"]
    lines = [
        "# Speed and memory",
        "",
        f"`{where['command']}` on {where['machine']}, {where['threads']} threads, torch {where['torch']}, commit "
        f"{where['commit']}, {where['clock']} clock, {where['repeats']} rounds.",
    ]
    for block in result.get("steps", ()):
        lines += _steps(block)
    for block in result.get("memory", ()):
        lines += _memory(block)
    if "losses" in result:
        lines += _losses(result["losses"])
    if "growth" in result:
        lines += _growth(result["growth"])
    if "feeding" in result:
        lines += _feeding(result["feeding"])
    return "\n".join(lines) + "\n"


def _steps(block: Mapping[str, Any]) -> list[str]:
    time_limit, memory_limit = TARGETS[block["device"], block["family"]]
    lines = ["", f"## {block['name']} ({block['device']}, {block['precision']})", ""]
    lines += [
        f"Floor: the student's training step and the teacher's features. Aim for DRKD: time {time_limit:.2f}, memory "
        f"{memory_limit:.2f}. Memory: detectors, the method's own weights and buffers, optimizer state and the most "
        "that a step holds.",
        "",
        "| Step | seconds | time / floor | 10 to 90 % | memory, MiB | memory / floor |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in block["rows"].items():
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {row['ratio']:.3f} | {row['ratio_p10']:.3f} to {row['ratio_p90']:.3f} "
            f"| {row['memory_bytes'] / _MIB:.0f} | {row['memory_ratio']:.3f} |"
        )
    return lines + _impossible(block)


def _memory(block: Mapping[str, Any]) -> list[str]:
    _, limit = TARGETS[block["device"], block["family"]]
    lines = ["", f"## {block['name']}: memory ({block['device']}, {block['precision']})", ""]
    lines += [f"Aim for DRKD: {limit:.2f}.", "", "| Step | memory, MiB | memory / floor |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {row['memory_bytes'] / _MIB:.0f} | {row['memory_ratio']:.3f} |"
        for name, row in block["rows"].items()
    ]
    return lines + _impossible(block)


def _impossible(block: Mapping[str, Any]) -> list[str]:
    names = ", ".join(block["impossible"])
    return ["", f"Not possible with this pair: {names}."] if names else []


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Losses alone, forward and backward, against the released arithmetic done its way",
        "",
        "| Losses | boxes an image | seconds | times as fast | memory, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    return lines + [
        f"| {row['losses']} | {row['boxes']} | {row['seconds']:.4f} | {row['speedup']:.2f} | "
        f"{row['peak_bytes'] / _MIB:.1f} |"
        for row in rows
    ]


def _growth(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    lines = ["", "## Growth", ""]
    for key, rows in found.items():
        lines += [f"| What | {key} | seconds | memory, MiB |", "|---|---:|---:|---:|"]
        lines += [
            f"| {row['what']} | {row[key]} | {row['seconds']:.4f} | {row['peak_bytes'] / _MIB:.1f} |"
            for row in sorted(rows, key=lambda row: row["what"])
        ]
        lines.append("")
        for what in sorted({row["what"] for row in rows}):
            powers = [exponent(rows, what, key, value) for value in ("seconds", "peak_bytes")]
            lines.append(f"{what}: time grows as {key}^{powers[0]:.2f}, memory as {key}^{powers[1]:.2f} at the end.")
        lines.append("")
    return lines[:-1]


def _feeding(found: Mapping[str, Any]) -> list[str]:
    loader, scored = found["loader"], found["evaluation"]
    lines = [
        "",
        "## Loading and evaluation",
        "",
        f"Loader: {loader['images_per_second']:.1f} images a second with {loader['workers']} workers at "
        f"{loader['size'][0]} px.",
        f"Evaluation: {scored['detections']} detections of {scored['images']} images in {scored['seconds']:.1f} s.",
    ]
    return lines + [f"Step of {name}: {rate:.1f} images a second." for name, rate in found.get("demand", {}).items()]
