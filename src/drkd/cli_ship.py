"""The verbs before and after a run: their options, and what each prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from drkd.cli_errors import WRONG
from drkd.cli_verbs import _call, _flag, _function_parser

if TYPE_CHECKING:
    from rich.console import Console


def export_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd export``."""
    from drkd.recipes.exporting import export

    positional = {"checkpoint": "A student.pt, or a run folder that holds one."}
    flags = {"int8": "Also write an int8 version; needs --calibration.", "json": "Print the report as JSON."}
    return _function_parser(export, description, positional=positional, flags=flags, **settings)


def run_export(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Export, and print how well it agrees, how fast it is and what int8 costs."""
    from drkd.recipes.exporting import export

    exported = _call(export, config, parser)
    report = exported.report
    if config.json:
        console.print(json.dumps(report, indent=2))
        return 0
    agreement, latency, machine = report["agreement"], report["latency"], report["machine"]
    height, width = latency["image_size"]
    console.print(f"{exported.output}: {report['bytes'] / 1e6:.1f} MB, suppression {report['nms']} the graph")
    console.print(
        f"Agrees with PyTorch: {agreement['matched']} of {agreement['detections']} detections in {agreement['images']} "
        f"images, {agreement['ties']} near ties; largest differences {agreement['worst_box_px']:.2g} px (bound "
        f"{agreement['bounds']['box_px']}) and {agreement['worst_score']:.2g} in score (bound "
        f"{agreement['bounds']['score']}); labels equal"
    )
    console.print(
        f"Latency, median of {latency['repeats']}: PyTorch {latency['pytorch_ms']:.1f} ms, onnxruntime "
        f"{latency['onnxruntime_ms']:.1f} ms; one image of {height} x {width} px, {latency['threads']} threads, "
        f"{machine['cpu']}"
    )
    if "int8" in report:
        small = report["int8"]
        before, after = (100 * (small["metrics"][name]["ap"] or 0.0) for name in ("fp32", "int8"))
        console.print(
            f"int8: {small['output']}: {small['bytes'] / 1e6:.1f} MB, {small['latency']:.1f} ms; AP {before:.1f} -> "
            f"{after:.1f} on {small['evaluation']['images']} images of '{small['evaluation']['split']}'"
        )
    console.print("How to feed it and read it: docs/export.md, and the file's metadata_props.")
    return 0
