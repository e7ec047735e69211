"""The verbs' options, taken from the use cases' signatures, and what each prints."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from drkd.cli_errors import FAILED, INTERRUPTED, WRONG

if TYPE_CHECKING:
    from rich.console import Console

_TRUST_CODE = "Call the functions that a checkpoint with a detector of your own names."
_TRUST = "Load a checkpoint of Ultralytics' own, a pickle: that runs the code in it, so only one that you trust."

# What is heavy (torch takes seconds to import) is imported inside the verb that needs it, so that help is instant.


def _plain_parser(description: str, **settings: Any) -> ArgumentParser:
    return ArgumentParser(description=description, **settings)


def _flag(parser: ArgumentParser, name: str, text: str) -> None:
    parser.add_argument(f"--{name}", type=bool, nargs="?", const=True, default=False, help=text)


def _function_parser(
    function: Callable[..., Any],
    description: str,
    *,
    positional: Mapping[str, str],
    flags: Mapping[str, str],
    **settings: Any,
) -> ArgumentParser:
    """Options from a use case's signature and docstring; a positional name that ends in "?" may be left out."""
    parser = _plain_parser(description, **settings)
    for name, text in positional.items():
        optional: dict[str, Any] = {"nargs": "?", "default": None} if name.endswith("?") else {}
        bare = name.rstrip("?")
        kind: Any = Path | None if optional else Path
        parser.add_argument(bare, type=kind, metavar=bare.upper(), help=text, **optional)
    parser.add_function_arguments(function, skip={*(name.rstrip("?") for name in positional), *flags})
    for name, text in flags.items():
        _flag(parser, name, text)
    return parser


def _call(function: Callable[..., Any], config: Any, parser: ArgumentParser) -> Any:
    """Build what the arguments describe and call the use case with it."""
    built = parser.instantiate(config)
    return function(**dict(built.items()))


def recipe_verb(kind: str) -> tuple[Callable[..., ArgumentParser], Callable[[Any, ArgumentParser, Console], int]]:
    """The parser and the run function of ``drkd train`` or ``drkd distill``."""

    def parser(description: str, **settings: Any) -> ArgumentParser:
        from drkd.recipes.recipe import recipe_parser

        made = recipe_parser(description, **settings)
        _flag(made, "dry_run", "Build everything, take two real steps, print projected time and memory, write nothing.")
        made.add_argument("--price", type=float | None, default=None, help="Of an hour of this machine, for --dry_run.")
        return made

    def run(config: Any, own: ArgumentParser, console: Console) -> int:
        from drkd.cli_output import print_run
        from drkd.contracts import DrkdError
        from drkd.recipes import training
        from drkd.recipes.recipe import instantiate
        from drkd.recipes.requeue import StoppedBySignal
        from drkd.recipes.run_folder import is_first_process

        dry, price = config.pop("dry_run"), config.pop("price")
        if price is not None and not dry:
            raise DrkdError("--price is of the projection that --dry-run prints: give --dry-run too, or leave it out.")
        if dry:
            from drkd.recipes.dry_run import dry_run

            for line in dry_run(instantiate(own, config), kind=kind, price=price).lines():
                if is_first_process():
                    console.print(line)
            return 0
        use_case = training.train if kind == "train" else training.distill
        try:
            result = use_case(instantiate(own, config))
        except StoppedBySignal as stop:
            if not is_first_process():
                return 0  # one report is enough, and a launcher takes another process' code for a crash
            print(f"drkd: {stop}. Go on with --resume.", file=sys.stderr)
            return 128 + stop.signal_number
        print_run(result, console)
        return 0

    return parser, run


def evaluate_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd evaluate``."""
    from drkd.recipes.evaluation import evaluate

    positional = {"checkpoint?": "A student.pt, or a run folder that holds one; leave it out with --detector."}
    flags = {
        "cost": "Also measure parameters, FLOPs and CPU latency.",
        "trust_pickle": _TRUST,
        "trust_code": _TRUST_CODE,
    }
    return _function_parser(evaluate, description, positional=positional, flags=flags, **settings)


def run_evaluate(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Measure a detector and print the numbers."""
    from drkd.cli_output import print_metrics
    from drkd.recipes.evaluation import evaluate

    evaluated = _call(evaluate, config, parser)
    print_metrics(evaluated.metrics, evaluated.cost, console)
    return 0


def predict_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd predict``."""
    from drkd.recipes.prediction import predict

    positional = {
        "checkpoint": "A student.pt, or a run folder that holds one.",
        "path": "An image, or a folder of images and its sub-folders; each is turned as its EXIF data say.",
    }
    flags = {
        "overwrite": "Replace what an earlier prediction left in the output folder; nothing else is ever replaced.",
        "trust_pickle": _TRUST,
        "trust_code": _TRUST_CODE,
    }
    return _function_parser(predict, description, positional=positional, flags=flags, **settings)


def run_predict(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Predict, and name every image that could not be read."""
    from drkd.recipes.prediction import predict

    predicted = _call(predict, config, parser)
    for message in predicted.unreadable:
        print(f"drkd: left out: {message}", file=sys.stderr)
    console.print(f"{predicted.detections} detections in {predicted.images} images.")
    console.print(f"Pictures, detections.json (COCO results) and images.json: {predicted.output}")
    return WRONG if predicted.unreadable else 0


def init_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd init``."""
    from drkd.recipes.initialization import initialize

    flags = {"overwrite": "Replace an existing recipe file.", "trust_pickle": _TRUST}
    positional = {"root": "The data set's folder in COCO, YOLO or VOC format."}
    return _function_parser(initialize, description, positional=positional, flags=flags, **settings)


def run_init(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Write a recipe; print what was found and what to run next."""
    from drkd.recipes.initialization import initialize

    written = _call(initialize, config, parser)
    for line in written.findings:
        console.print(line)
    console.print(f"\nWrote {written.recipe}. Read it, change what you know better, then:\n  {written.command}")
    return 0


def check_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd data check``."""
    from drkd.recipes.datasets import check_dataset

    positional = {"path": "The data set's folder in COCO, YOLO or VOC format."}
    return _function_parser(check_dataset, description, positional=positional, flags={}, **settings)


def run_check(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Print what a data set holds and what is wrong with it."""
    from drkd.recipes.datasets import check_dataset

    report = _call(check_dataset, config, parser)
    console.print(str(report))
    return WRONG if report.errors else 0


def convert_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd data convert``."""
    from drkd.recipes.datasets import convert_dataset

    positional = {
        "source": "The data set's folder in COCO, YOLO or VOC format, or digits or digits2.",
        "target": "Folder to write; must not exist, or be empty.",
    }
    return _function_parser(convert_dataset, description, positional=positional, flags={}, **settings)


def run_convert(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Convert a data set; print what was written and what was lost on the way."""
    from drkd.recipes.datasets import convert_dataset

    converted = _call(convert_dataset, config, parser)
    for name, count in converted.images.items():
        console.print(f"{name}: {count} images, {converted.boxes[name]} boxes")
    console.print("not carried over:")
    for line in converted.lost:
        console.print(f"  {line}")
    console.print(f"Wrote {converted.target}. Look it over: drkd data check {shlex.quote(str(converted.target))}")
    return 0


def digits_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd data digits``."""
    from drkd.recipes.datasets import build_embedded

    return _function_parser(build_embedded, description, positional={}, flags={}, **settings)


def run_digits(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Build the embedded data set and print where it is."""
    from drkd.recipes.datasets import build_embedded

    console.print(str(_call(build_embedded, config, parser)))
    return 0


def demo_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd demo``."""
    parser = _plain_parser(description, **settings)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="Folder of the runs and the report.")
    _flag(parser, "quick", "Show in about a minute that all works, not that it learns.")
    return parser


def run_demo(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Run the demo, write its report and print its table."""
    from drkd.recipes.demo import run_demo
    from drkd.reports import write_demo_report

    folder = run_demo(config.output, quick=config.quick)
    page = write_demo_report(folder)
    console.print((folder / "table.md").read_text(encoding="utf-8"))
    console.print(f"Open {page}")
    return 0


def compare_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd compare``."""
    from drkd.recipes.comparison.definition import comparison_parser

    parser = comparison_parser(description, **settings)
    parser.add_argument(
        "--only",
        type=str,
        nargs="+",
        action="extend",  # given twice, both count
        default=[],
        metavar="PAIR[/METHOD[/SEED]]",
        help="Measure these cells only; * stands for anything, as in '*/hint'.",
    )
    parser.add_argument(
        "--rerun",
        type=Literal["no", "changed", "all"],
        nargs="?",
        const="changed",
        default="no",
        help="Measure again what was measured with other settings; 'all': every selected cell.",
    )
    _flag(
        parser,
        "dry_run",
        "List the cells, whether they are measured, and what those that are not would lack; run nothing.",
    )
    _flag(parser, "report_only", "Write the report of what is measured; run nothing.")
    return parser


def run_compare(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Measure what is missing, write the report and print its table; say what failed."""
    from drkd.cli_output import print_cells, print_failures, print_outcome
    from drkd.contracts import DrkdError
    from drkd.recipes.comparison.absent import find_absent
    from drkd.recipes.comparison.again import AGAIN_FILE
    from drkd.recipes.comparison.definition import instantiate, source_of
    from drkd.recipes.comparison.run import StoppedMeasuring, compare, describe, list_cells
    from drkd.reports import write_comparison_report

    source = source_of(config)
    comparison = instantiate(parser, config)
    if config.dry_run:
        listed = list_cells(comparison, source=source, only=config.only)
        print_cells(listed, console)
        absent = find_absent(cell for cell, state, _ in listed if state != "done")
        for line in absent:
            print(f"drkd: {line}", file=sys.stderr)
        return WRONG if absent else 0
    if config.report_only:
        describe(comparison, source=source)
        written = write_comparison_report(comparison.output)
        console.print((comparison.output / "table.md").read_text(encoding="utf-8"), markup=False)
        console.print(f"Open {written}", markup=False)
        return 0
    try:
        compared = compare(comparison, source=source, only=config.only, rerun=config.rerun)
    except KeyboardInterrupt as stop:
        forgotten = config.rerun == "all" and isinstance(stop, StoppedMeasuring)
        how = "goes on" if not forgotten else "without --rerun goes on; with it, all is measured once more"
        if config.rerun != "no" and (comparison.output / AGAIN_FILE).exists():
            how += f" (to keep the old scores of what had not begun, remove {comparison.output / AGAIN_FILE})"
        print(
            f"drkd: interrupted; what was running is stopped, what was finished is kept. The same command {how}.",
            file=sys.stderr,
        )
        if isinstance(stop, StoppedMeasuring) and any((comparison.output / "cells").rglob("*.json")):
            # Without a cell that has scores there is nothing to report, and nothing to say about that.
            with suppress(DrkdError):
                print(f"What is finished is in {write_comparison_report(comparison.output)}", file=sys.stderr)
        return INTERRUPTED
    page = None
    try:
        if compared.measured:
            page = write_comparison_report(compared.output)
            console.print((compared.output / "table.md").read_text(encoding="utf-8"))
        print_outcome(compared, page, console)
    finally:
        # Whatever becomes of the report: a failed cell is what the user must hear of.
        print_failures(compared.failures, rerun_all=config.rerun == "all")
    return FAILED if compared.failures else 0


def yolo_import_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd yolo import``."""
    from drkd.recipes.yolo import import_yolo

    positional = {"checkpoint": "A checkpoint of Ultralytics', such as yolo11n.pt."}
    return _function_parser(import_yolo, description, positional=positional, flags={"trust_pickle": _TRUST}, **settings)


def run_yolo_import(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Turn a checkpoint of Ultralytics' into a file of plain tensors."""
    from drkd.recipes.yolo import import_yolo

    console.print(f"Wrote {_call(import_yolo, config, parser)}; drkd takes it wherever it takes a student.pt.")
    return 0


def yolo_export_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd yolo export``."""
    from drkd.recipes.yolo import export_yolo

    positional = {"checkpoint": "A student.pt that holds a YOLO, or a run folder with one."}
    flags = {"half": "Store weights in 16 bits, as Ultralytics does."}
    return _function_parser(export_yolo, description, positional=positional, flags=flags, **settings)


def run_yolo_export(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Write a checkpoint that Ultralytics loads."""
    from drkd.recipes.yolo import export_yolo

    written = _call(export_yolo, config, parser)
    console.print(f'Wrote {written}. In Python: YOLO("{written}").predict(...) or .export(format="onnx")')
    return 0


def report_parser(description: str, **settings: Any) -> ArgumentParser:
    """Options of ``drkd report``."""
    parser = _plain_parser(description, **settings)
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="The run folder.")
    return parser


def run_report(config: Any, parser: ArgumentParser, console: Console) -> int:
    """Write a run's report and print where it is."""
    from drkd.reports.page import write_run_report

    console.print(f"Open {write_run_report(config.run_folder)}")
    return 0
