"""The command line: each verb hands its arguments to one use-case function and prints what comes back."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from drkd import cli_inspect, cli_ship
from drkd import cli_verbs as verbs
from drkd.cli_errors import FAILED, INTERRUPTED, WRONG, explain
from drkd.recipes.home import expand_home

if TYPE_CHECKING:
    from rich.console import Console


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and writes types as a user would."""

    def format_help(self) -> str:
        """The help text (called by argparse)."""
        return re.sub(r"<class\s+'([\w.]+)'>", r"\1", super().format_help()).replace("``", "")


@dataclass(frozen=True)
class _Verb:
    """One sub-command.

    Args:
        summary: What it does, in a line.
        examples: Command lines to learn from.
        parser: Builds its parser; takes the description and the parser's settings.
        run: Calls the use case and prints its result; returns the exit code.
    """

    summary: str
    examples: tuple[str, ...]
    parser: Callable[..., ArgumentParser]
    run: Callable[[Any, ArgumentParser, Console], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0; 1 for a fault of the machine (no disk, no memory); 2 for what the user can put right; 3 for a method that
        cannot work with this pair of detectors; 130 if interrupted; 143 if SIGTERM asked a run to stop (128 + the
        signal's number).
    """
    from rich.console import Console

    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        return _dispatch(arguments, console)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(f"drkd: {stop.code}", file=sys.stderr)  # a user's own code may end with words, which mean failure
        return FAILED
    except KeyboardInterrupt:
        trains = arguments[:1] in (["train"], ["distill"])
        how = " Training goes on from the last checkpoint with --resume." if trains else ""
        print(f"drkd: interrupted.{how}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output (`| head`) has gone; the flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("DRKD_TRACEBACK") or (explained := explain(error)) is None:
            raise
        code, message = explained
        print(f"drkd: {message}", file=sys.stderr)
        return code


def _dispatch(arguments: list[str], console: Console) -> int:
    if arguments[:1] == ["--version"]:
        from drkd import __version__

        console.print(f"drkd {__version__}")
        return 0
    words = next((key for key in _VERBS if tuple(arguments[: len(key)]) == key), None)
    if words is None:
        return _overview(arguments, console)
    verb = _VERBS[words]
    description = "\n".join([verb.summary, "", "examples:", *(f"  drkd {example}" for example in verb.examples)])
    parser = verb.parser(description, prog=f"drkd {' '.join(words)}", exit_on_error=False, formatter_class=_Help)
    config = _parse(parser, arguments[len(words) :])
    return verb.run(config, parser, console)


def _parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    from drkd.contracts import DrkdError
    from drkd.recipes.recipe_error import readable

    # --area-scale and --area_scale are the same option.
    spelled = [re.sub(r"^--[^=]+", lambda key: "--" + key[0][2:].replace("-", "_"), argument) for argument in arguments]
    takes_files = any(action.dest == "config" for action in parser._actions)
    if takes_files:
        spelled = _files_first(spelled)
    try:
        return expand_home(parser.parse_args(spelled))
    except (argparse.ArgumentError, TypeError, KeyError) as error:
        recipe = takes_files and "--config" not in " ".join(spelled)
        hint = "Name a file with --config, or see" if recipe else "See"
        raise DrkdError(f"{readable(error, parser)} {hint} {parser.prog} --help.") from error


def _files_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with every ``--config`` in front, in their order, so that options change what files say.

    jsonargparse lets what comes later count: a file named after an option would take the option back in silence.
    """
    files: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.partition("=")[0] != "--config":
            others.append(argument)
            continue
        files.append(argument)
        if argument == "--config":
            files.extend(value for value in [next(rest, None)] if value is not None)
    return [*files, *others]


def _overview(arguments: list[str], console: Console) -> int:
    """List the verbs: all, or those of a group; say which was not understood."""
    group = arguments[0] if arguments and any(key[0] == arguments[0] for key in _VERBS) else ""
    rest = arguments[1:] if group else arguments
    if rest and rest[0] not in ("-h", "--help"):
        known = [" ".join(key) for key in _VERBS]
        given = " ".join([group, rest[0]]).strip()
        close = difflib.get_close_matches(given, known, n=1)
        hint = f"; did you mean 'drkd {close[0]}'?" if close else f". There are: {', '.join(known)}."
        print(f"drkd: there is no verb '{given}'{hint} See drkd --help.", file=sys.stderr)
        return WRONG
    console.print(f"usage: drkd {group or 'VERB'} {'VERB ' if group else ''}[options]\n")
    console.print("Make a small object detector better by letting a large one teach it.\n")
    for key, verb in _VERBS.items():
        if not group or key[0] == group:
            console.print(f"  {' '.join(key):<14}{verb.summary}")
    console.print("\nfirst steps:")
    console.print("  drkd demo --quick                              see that it works, in about a minute")
    console.print("  drkd data check path/to/coco                   is my data all right?")
    console.print("  drkd init path/to/coco --teacher teacher.pt    write a recipe for my data and teacher")
    console.print("  drkd distill --config recipe.yaml              train; the run folder then holds student.pt")
    console.print("  drkd compare --config comparison.yaml          which method is best, by how much, how surely")
    console.print(
        "\n`drkd VERB --help` explains a verb with examples. DRKD_TRACEBACK=1 shows where an error comes from."
    )
    return 0


_VERBS: Mapping[tuple[str, ...], _Verb] = {
    ("demo",): _Verb(
        "Distil a small detector on the embedded data set and write a report.",
        ("demo --quick", "demo --output runs/demo"),
        verbs.demo_parser,
        verbs.run_demo,
    ),
    ("init",): _Verb(
        "Look at your data and your teacher, and write a recipe for them; without a teacher, for training alone.",
        (
            "init data/birds --teacher runs/teacher",
            "init data/birds --teacher teacher.pt --student faster_rcnn --backbone resnet34",
            "init data/birds --backbone resnet101 --output teacher.yaml",
            "init data/street --teacher retinanet_resnet50_fpn_v2 --output street.yaml",
        ),
        verbs.init_parser,
        verbs.run_init,
    ),
    ("train",): _Verb(
        "Train a detector alone: a teacher, or a student to compare with.",
        (
            "train --config recipe.yaml",
            "train --config recipe.yaml --output runs/alone --training.epochs=12 --seed=1",
            "train --config recipe.yaml --student=drkd.adapters.FCOSBuilder --student.backbone=resnet34",
        ),
        *verbs.recipe_verb("train"),
    ),
    ("distill",): _Verb(
        "Train a student with a teacher's help.",
        (
            "distill --config recipe.yaml",
            "distill --config recipe.yaml --config faster.yaml --training.epochs=5",
            "distill --config coco/retinanet_r50 --data.root=data/coco",
            "distill --config recipe.yaml --method.warmup_steps=500 --output runs/warmup",
            "distill --config recipe.yaml --resume",
        ),
        *verbs.recipe_verb("distill"),
    ),
    ("doctor",): _Verb(
        "Before a long run: is the teacher good here, is everything alive, how long will it take?",
        (
            "doctor --config recipe.yaml",
            "doctor --config recipe.yaml --images 50 --steps 4 --json",
        ),
        cli_ship.doctor_parser,
        cli_ship.run_doctor,
    ),
    ("compare",): _Verb(
        "Measure which method is best for your detector and data: methods x pairs x seeds from one file.",
        (
            "compare --config compare/digits --dry-run",
            "compare --config comparison.yaml --jobs 2",
            "compare --config comparison.yaml --only retinanet/drkd '*/student'",
            "compare --config comparison.yaml --seeds=[0,1,2,3,4]",
            "compare --config comparison.yaml --rerun",
        ),
        verbs.compare_parser,
        verbs.run_compare,
    ),
    ("evaluate",): _Verb(
        "Print the twelve COCO numbers of a detector on a data set.",
        (
            "evaluate runs/birds --data data/birds",
            "evaluate student.pt --data data/birds --split tune --cost --output numbers.json",
            "evaluate --detector drkd.adapters.ZooBuilder --detector.weights=DEFAULT --data data/coco",
        ),
        verbs.evaluate_parser,
        verbs.run_evaluate,
    ),
    ("predict",): _Verb(
        "Draw boxes on your images, and write the detections as COCO JSON.",
        (
            "predict runs/birds photo.jpg --output found",
            "predict student.pt photos/ --output found --threshold 0.3",
        ),
        verbs.predict_parser,
        verbs.run_predict,
    ),
    ("export",): _Verb(
        "Write a student as ONNX, checked against PyTorch on real images.",
        (
            "export runs/birds --output birds.onnx --images data/birds/val",
            "export student.pt --output student.onnx --nms outside --dynamic batch",
            "export runs/birds --output birds.onnx --images data/birds/val --int8 --calibration data/birds",
        ),
        cli_ship.export_parser,
        cli_ship.run_export,
    ),
    ("inspect",): _Verb(
        "List the feature layers of a model with stride, channels and cost, and the YAML to paste.",
        (
            "inspect recipe.yaml",
            "inspect runs/birds --size 320 320",
            "inspect my_module:build_detector --forward my_module:losses",
            "inspect torchvision.models:resnet18 --depth 2 --json",
        ),
        cli_inspect.inspect_parser,
        cli_inspect.run_inspect,
    ),
    ("data", "check"): _Verb(
        "List every problem of a data set at once, with counts (COCO, YOLO or VOC).",
        ("data check data/birds", "data check data/birds --picture samples.png"),
        verbs.check_parser,
        verbs.run_check,
    ),
    ("data", "convert"): _Verb(
        "Write a data set in another format: COCO, YOLO or VOC.",
        (
            "data convert data/birds data/birds-yolo --to yolo",
            "data convert voc/VOC2007 data/voc --to coco --images link",
        ),
        verbs.convert_parser,
        verbs.run_convert,
    ),
    ("data", "digits"): _Verb(
        "Build the embedded data set and print where it is.",
        ("data digits", "data digits --output data"),
        verbs.digits_parser,
        verbs.run_digits,
    ),
    ("yolo", "import"): _Verb(
        "Turn a checkpoint of Ultralytics', a pickle, into a file of plain tensors that drkd reads.",
        ("yolo import yolo11s.pt --trust-pickle --output teacher.pt",),
        verbs.yolo_import_parser,
        verbs.run_yolo_import,
    ),
    ("yolo", "export"): _Verb(
        "Write a distilled YOLO as a checkpoint that Ultralytics loads and exports.",
        ("yolo export runs/street --output street.pt",),
        verbs.yolo_export_parser,
        verbs.run_yolo_export,
    ),
    ("report",): _Verb(
        "Write an HTML report of a run folder.", ("report runs/birds",), verbs.report_parser, verbs.run_report
    ),
}
