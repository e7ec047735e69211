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


def doctor_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd doctor``."""
    from drkd.recipes.recipe import recipe_parser

    parser = recipe_parser(description, **settings)
    parser.add_argument(
        "--images", type=int | None, default=200, help="Validation images to measure the teacher on; null: all."
    )
    parser.add_argument("--steps", type=int, default=8, help="Training steps to take, at least 2.")
    _flag(parser, "json", "Print the findings as JSON.")
    return parser


def run_doctor(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Examine the run, and print what was found and the verdict."""
    from drkd.recipes.preflight import doctor
    from drkd.recipes.recipe import instantiate

    diagnosis = doctor(instantiate(parser, config), images=config.images, steps=config.steps)
    if config.json:
        console.print(json.dumps(_finite(diagnosis.as_json()), indent=2))
    else:
        for finding in diagnosis.findings:
            console.print(f"{finding.severity:<8}{finding.check:<15}{finding.text}")
        console.print(f"\n{diagnosis.verdict}")
    return WRONG if diagnosis.severity == "stop" else 0


def _finite(value: Any) -> Any:
    """NaN, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and value != value else value
