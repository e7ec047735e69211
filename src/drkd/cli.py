"""The command line: each verb hands its arguments to one use-case function and prints what comes back."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from drkd.cli_errors import FAILED, INTERRUPTED, WRONG, explain

if TYPE_CHECKING:
    from rich.console import Console

# What is heavy (torch takes seconds to import) is imported inside the verb that needs it, so that help is instant.


class _Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and writes types as a user would."""

    def format_help(self) -> str:
        """The help text (called by argparse)."""
        return super().format_help().replace("<class 'Path'>", "Path").replace("``", "")


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
        0; 1 for a fault of the machine (no disk, no memory); 2 for what the user can put right; 130 if interrupted.
    """
    from rich.console import Console

    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        return _dispatch(arguments, console)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("drkd: interrupted.", file=sys.stderr)
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
    try:
        return parser.parse_args(spelled)
    except (argparse.ArgumentError, TypeError, KeyError) as error:
        raise DrkdError(f"{readable(error, parser)} See {parser.prog} --help.") from error


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
    console.print(
        "\n`drkd VERB --help` explains a verb with examples. DRKD_TRACEBACK=1 shows where an error comes from."
    )
    return 0


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
    built = parser.instantiate_classes(config)
    return function(**dict(built.items()))


# --- the verbs -----------------------------------------------------------------------------------------------------


def _recipe_verb(kind: str) -> tuple[Callable[..., ArgumentParser], Callable[[Any, ArgumentParser, Console], int]]:
    def parser(description: str, **settings: Any) -> ArgumentParser:
        from drkd.recipes.recipe import recipe_parser

        return recipe_parser(description, **settings)

    def run(config: Any, own: ArgumentParser, console: Console) -> int:
        from drkd.cli_output import print_run
        from drkd.recipes import training
        from drkd.recipes.recipe import instantiate

        use_case = training.train if kind == "train" else training.distill
        print_run(use_case(instantiate(own, config)), console)
        return 0

    return parser, run


def _evaluate_parser(description: str, **settings: Any) -> ArgumentParser:
    from drkd.recipes.evaluation import evaluate

    positional = {"checkpoint?": "A student.pt, or a run folder that holds one; leave it out with --detector."}
    flags = {"cost": "Also measure parameters, FLOPs and CPU latency."}
    return _function_parser(evaluate, description, positional=positional, flags=flags, **settings)


def _evaluate(config: Any, parser: ArgumentParser, console: Console) -> int:
    from drkd.cli_output import print_metrics
    from drkd.recipes.evaluation import evaluate

    evaluated = _call(evaluate, config, parser)
    print_metrics(evaluated.metrics, evaluated.cost, console)
    return 0


def _predict_parser(description: str, **settings: Any) -> ArgumentParser:
    from drkd.recipes.prediction import predict

    positional = {
        "checkpoint": "A student.pt, or a run folder that holds one.",
        "path": "An image, or a folder of images; its sub-folders are searched too.",
    }
    flags = {"overwrite": "Replace what an earlier prediction left in the output folder."}
    return _function_parser(predict, description, positional=positional, flags=flags, **settings)


def _predict(config: Any, parser: ArgumentParser, console: Console) -> int:
    from drkd.recipes.prediction import predict

    predicted = _call(predict, config, parser)
    for message in predicted.unreadable:
        print(f"drkd: left out: {message}", file=sys.stderr)
    console.print(f"{predicted.detections} detections in {predicted.images} images.")
    console.print(f"Pictures, detections.json (COCO results) and images.json: {predicted.output}")
    return WRONG if predicted.unreadable else 0


def _init_parser(description: str, **settings: Any) -> ArgumentParser:
    from drkd.recipes.initialization import initialize

    flags = {"overwrite": "Replace an existing recipe file."}
    positional = {"root": "The data set's folder in COCO format."}
    return _function_parser(initialize, description, positional=positional, flags=flags, **settings)


def _init(config: Any, parser: ArgumentParser, console: Console) -> int:
    from drkd.recipes.initialization import initialize

    written = _call(initialize, config, parser)
    for line in written.findings:
        console.print(line)
    console.print(f"\nWrote {written.recipe}. Read it, change what you know better, then:\n  {written.command}")
    return 0


def _check_parser(description: str, **settings: Any) -> ArgumentParser:
    from drkd.recipes.datasets import check_dataset

    positional = {"path": "The data set's folder in COCO format."}
    return _function_parser(check_dataset, description, positional=positional, flags={}, **settings)


def _check(config: Any, parser: ArgumentParser, console: Console) -> int:
    from drkd.recipes.datasets import check_dataset

    report = _call(check_dataset, config, parser)
    console.print(str(report))
    return WRONG if report.errors else 0


def _digits_parser(description: str, **settings: Any) -> ArgumentParser:
    from drkd.recipes.datasets import build_embedded

    return _function_parser(build_embedded, description, positional={}, flags={}, **settings)


def _digits(config: Any, parser: ArgumentParser, console: Console) -> int:
    from drkd.recipes.datasets import build_embedded

    console.print(str(_call(build_embedded, config, parser)))
    return 0


def _demo_parser(description: str, **settings: Any) -> ArgumentParser:
    parser = _plain_parser(description, **settings)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="Folder of the runs and the report.")
    _flag(parser, "quick", "Show in about a minute that all works, not that it learns.")
    _flag(parser, "overwrite", "Replace an earlier demo.")
    return parser


def _demo(config: Any, parser: ArgumentParser, console: Console) -> int:
    from drkd.recipes.demo import run_demo

    console.print(f"Open {run_demo(config.output, quick=config.quick, overwrite=config.overwrite)}")
    return 0


def _report_parser(description: str, **settings: Any) -> ArgumentParser:
    parser = _plain_parser(description, **settings)
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="The run folder.")
    return parser


def _report(config: Any, parser: ArgumentParser, console: Console) -> int:
    from drkd.reports.page import write_run_report

    console.print(f"Open {write_run_report(config.run_folder)}")
    return 0


_VERBS: Mapping[tuple[str, ...], _Verb] = {
    ("demo",): _Verb(
        "Distil a small detector on the embedded data set and write a report.",
        ("demo --quick", "demo --output runs/demo --overwrite"),
        _demo_parser,
        _demo,
    ),
    ("init",): _Verb(
        "Look at your data and your teacher, and write a recipe for them.",
        (
            "init data/birds --teacher runs/teacher",
            "init data/birds --teacher teacher.pt --student faster_rcnn --backbone resnet34",
            "init data/street --teacher retinanet_resnet50_fpn_v2 --output street.yaml",
        ),
        _init_parser,
        _init,
    ),
    ("train",): _Verb(
        "Train a detector alone: a teacher, or a student to compare with.",
        (
            "train --config recipe.yaml",
            "train --config recipe.yaml --output runs/alone --training.epochs=12 --seed=1",
            "train --config recipe.yaml --student=drkd.adapters.FCOSBuilder --student.backbone=resnet34",
        ),
        *_recipe_verb("train"),
    ),
    ("distill",): _Verb(
        "Train a student with a teacher's help.",
        (
            "distill --config recipe.yaml",
            "distill --config recipe.yaml --config faster.yaml --training.steps=2000",
            "distill --config coco/retinanet_r50 --data.root=data/coco",
            "distill --config recipe.yaml --method.warmup_steps=500 --output runs/warmup",
            "distill --config recipe.yaml --resume",
        ),
        *_recipe_verb("distill"),
    ),
    ("evaluate",): _Verb(
        "Print the twelve COCO numbers of a detector on a data set.",
        (
            "evaluate runs/birds --data data/birds",
            "evaluate student.pt --data data/birds --split tune --cost --output numbers.json",
            "evaluate --detector drkd.adapters.ZooBuilder --detector.weights=DEFAULT --data data/coco",
        ),
        _evaluate_parser,
        _evaluate,
    ),
    ("predict",): _Verb(
        "Draw boxes on your images, and write the detections as COCO JSON.",
        (
            "predict runs/birds photo.jpg --output found",
            "predict student.pt photos/ --output found --threshold 0.3",
        ),
        _predict_parser,
        _predict,
    ),
    ("data", "check"): _Verb(
        "List every problem of a COCO-format folder at once, with counts.",
        ("data check data/birds", "data check data/birds --picture samples.png"),
        _check_parser,
        _check,
    ),
    ("data", "digits"): _Verb(
        "Build the embedded data set and print where it is.",
        ("data digits", "data digits --output data"),
        _digits_parser,
        _digits,
    ),
    ("report",): _Verb("Write an HTML report of a run folder.", ("report runs/birds",), _report_parser, _report),
}
