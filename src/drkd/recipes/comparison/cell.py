"""One cell of a comparison: its command, where its files are, whether it is measured, and what is kept of it."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from drkd.contracts import DrkdError
from drkd.recipes.comparison.definition import TEACHER, Arm, Comparison, Pair, flatten
from drkd.recipes.comparison.inputs import Fingerprints, changed_inputs
from drkd.recipes.recipe import load_recipe
from drkd.recipes.recipe_file import recipe_chain
from drkd.recipes.run_folder import write_json
from drkd.recipes.setting_changes import differences, leaves, without_folder

State = Literal["done", "missing", "changed"]

# What a teacher's scores depend on.
_TEACHERS_SETTINGS = (
    *("teacher", "data.root", "data.min_size", "data.max_size", "data.size_divisor", "data.pad_to", "data.val_limit"),
    *("data.class_names", "data.classes", "data.format", "evaluation.split", "evaluation.area_scale", "class_map"),
)
NOT_APPLICABLE = "not_applicable"
"""Field of a cell's file that says why its method cannot work with its pair; there are no scores then."""
REPORT_FILES = (
    *("report.html", "table.md", "table.json"),
    *(f"figures/{name}.png" for name in ("scores", "differences", "cost")),
)
"""What ``drkd.reports`` writes of a comparison; it knows nothing of recipes, nor they of it."""
# As safe as the plain one, and written in C where PyYAML has it. It recurses, so it is for what drkd itself wrote.
_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KEPT = ("steps", "epochs", "commit", "versions", "machine", "started", "finished")


@dataclass(frozen=True)
class Cell:
    """A method on a pair with a seed, or a pair's teacher.

    Args:
        pair: Name of the pair.
        method: Name of the method, or "teacher".
        seed: Of everything random; None for a teacher.
        verb: "train", "distill" or "teacher".
        arguments: Command-line arguments after the verb, without those of the run folder.
        settings: The resolved recipe as nested plain values.
        stated: Dotted keys that the recipe files, the comparison and its overrides state; the rest are defaults.
        output: The comparison's folder.
        inputs: Digests of the files that the settings name, see `Fingerprints`.
    """

    pair: str
    method: str
    seed: int | None
    verb: str
    arguments: tuple[str, ...]
    settings: Mapping[str, Any]
    stated: frozenset[str]
    output: Path
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As ``--only`` and messages name it."""
        return f"{self.pair}/{self.method}" + ("" if self.seed is None else f"/{self.seed}")

    @property
    def file(self) -> Path:
        """The results, one file a cell."""
        if self.seed is None:
            return self.output / "cells" / self.pair / f"{TEACHER}.json"
        return self.output / "cells" / self.pair / self.method / f"seed{self.seed}.json"

    @property
    def run_folder(self) -> Path:
        """The run folder."""
        leaf = TEACHER if self.seed is None else f"{self.method}-seed{self.seed}"
        return self.output / "runs" / self.pair / leaf

    @property
    def log(self) -> Path:
        """What the cell's process printed."""
        return self.run_folder.with_name(f"{self.run_folder.name}.log")

    @property
    def inputs_file(self) -> Path:
        """The digests of the files that the run in the run folder began with."""
        return self.run_folder.with_name(f"{self.run_folder.name}.inputs.json")

    def command(self, how: Literal["overwrite", "resume"] = "overwrite") -> tuple[str, ...]:
        """The command line, without the interpreter."""
        program = ("python", "-m", "drkd.recipes.comparison.teacher") if self.seed is None else ("drkd", self.verb)
        # A recipe may say the other one, and no run does both.
        other = "resume" if how == "overwrite" else "overwrite"
        return (*program, *self.arguments, f"--output={self.run_folder}", f"--{other}=false", f"--{how}=true")


def make_cells(comparison: Comparison, *, source: str) -> list[Cell]:
    """List the cells: teachers first, then seed by seed, so that a broken-off comparison has compared something.

    Args:
        comparison: What to compare.
        source: The comparison's file, for messages.

    Raises:
        DrkdError: If a recipe cannot be used with a method, naming file, pair and method.
    """
    teachers: list[Cell] = []
    arms: list[Cell] = []
    fingerprints = Fingerprints()
    for pair_name, pair in comparison.pairs.items():
        try:
            written = frozenset(key for _, content in recipe_chain(pair.recipe) for key in leaves(content))
        except DrkdError as error:
            raise DrkdError(f"{source}: pairs.{pair_name}: {error}") from error
        context = _Context(comparison, written, fingerprints)
        for name, arm in comparison.methods.items():
            if arm.pairs is not None and pair_name not in arm.pairs:
                continue
            try:
                cell = _make_cell(context, (pair_name, pair), (name, arm))
            except DrkdError as error:
                raise DrkdError(f"{source}: pairs.{pair_name} with methods.{name}: {error}") from error
            arms.append(cell)
        teacher = _make_teacher(context, pair_name, pair)
        teachers += [teacher] if teacher is not None else []
    seeded = [_with_seed(cell, seed) for seed in comparison.seeds for cell in arms]
    return [*teachers, *seeded]


def look_up(cell: Cell) -> tuple[State, list[str]]:
    """Say whether the cell is measured, and which settings, or files that they name, differ from those then.

    Cells of drkd before it kept digests of files say nothing about files.

    Raises:
        DrkdError: If its file is damaged.
    """
    if not cell.file.exists():
        return "missing", []
    content = read_object(cell.file)
    recorded = content.get("recipe")
    if not isinstance(recorded, Mapping):
        raise DrkdError(f"{cell.file}: field recipe should be an object. Remove the file, and the cell is measured.")
    changes = differences(recorded, cell.settings, stated=cell.stated)
    changes += changed_inputs(content.get("inputs"), cell.inputs)
    return ("changed" if changes else "done"), changes


def is_finished(cell: Cell) -> bool:
    """Whether the run folder holds a finished run of these settings that was not collected (its parent was killed)."""
    return _recorded_status(cell) == "finished" and (cell.run_folder / "evaluation.json").exists()


def can_resume(cell: Cell) -> bool:
    """Whether the run folder holds an unfinished run of these settings with a checkpoint."""
    status = _recorded_status(cell)
    return status is not None and status != "finished" and (cell.run_folder / "checkpoints" / "last.ckpt").exists()


def check_inputs(cell: Cell) -> None:
    """Refuse files that are not what they were when the cell was made: it would be recorded with those.

    Files that did not change since are not read again.

    Raises:
        DrkdError: If one was replaced meanwhile, naming the setting.
    """
    now = Fingerprints(same_files=True).of(leaves(cell.settings, plain=False))
    changes = [key for key, value in now.items() if cell.inputs.get(key, value) != value]
    if changes:
        raise DrkdError(
            f"{cell.name}: {', '.join(changes)}: the file was replaced while drkd compare was at work, and one table "
            "must not mix two. Put the old one back, or start the command again with --rerun, which measures with the "
            "new one what was measured with the old."
        )


def forget(cell: Cell) -> None:
    """Remove what is measured of the cell, in an order that leaves nothing behind that a later run would collect.

    Raises:
        DrkdError: If a file cannot be removed.
    """
    remove_run(cell)
    _remove(cell.file)


def remove_run(cell: Cell) -> None:
    """Remove the cell's run, in an order in which what an interruption leaves is neither collected nor gone on with.

    Raises:
        DrkdError: If a file cannot be removed.
    """
    # Without run.json the folder holds no run, whatever is left of it.
    for path in (cell.run_folder / "run.json", cell.run_folder, cell.inputs_file):
        _remove(path)


def remove_report(folder: Path) -> None:
    """Remove what the report of a comparison wrote into its folder; anything else there stays.

    Raises:
        DrkdError: If a file cannot be removed.
    """
    for name in REPORT_FILES:
        _remove(folder / name)
    with contextlib.suppress(OSError):
        (folder / "figures").rmdir()  # a figure of the user's own keeps it


def collect(cell: Cell) -> dict[str, Any]:
    """Write the cell's file, whole or not at all, from what its run left; return its content.

    Raises:
        DrkdError: If the run folder lacks a file.
    """
    run = read_object(cell.run_folder / "run.json")
    evaluation = read_object(cell.run_folder / "evaluation.json")
    training = cell.run_folder / "training.json"
    metrics = cell.run_folder / "metrics.csv"
    content = {
        "pair": cell.pair,
        "method": cell.method,
        "seed": cell.seed,
        "metrics": {name: value for name, value in evaluation.items() if isinstance(value, float | None)},
        "thresholds_px": evaluation["thresholds_px"],
        "per_class": evaluation["per_class"],
        "training": read_object(training) if training.exists() else {},
        "distillation": _terms(cell, metrics) if metrics.exists() else {},
        "command": list(cell.command()),
        "recipe": cell.settings,
        "inputs": dict(cell.inputs),
        "seconds": run.get("seconds"),
        "earlier_sessions": len(run.get("sessions", [])),
        "earlier_commits": sorted({entry["commit"] for entry in run.get("sessions", []) if entry.get("commit")}),
        **{name: run.get(name) for name in _KEPT},
    }
    write_json(cell.file, content)
    return content


def collect_reason(cell: Cell, reason: str) -> dict[str, Any]:
    """Write the cell's file for a method that cannot work with its pair; return its content.

    Args:
        cell: The cell.
        reason: One paragraph.
    """
    content: dict[str, Any] = {"pair": cell.pair, "method": cell.method, "seed": cell.seed, NOT_APPLICABLE: reason}
    content |= {"command": list(cell.command()), "recipe": cell.settings, "inputs": dict(cell.inputs)}
    write_json(cell.file, content)
    return content


def summarise_terms(metrics: Path, *, calibration_steps: int = 0, spans: bool = False) -> dict[str, dict[str, float]]:
    """Median gradient ratio, and first and last value and spread of the target (means of a tenth of the run), by term.

    Args:
        metrics: ``metrics.csv`` of a run.
        spans: Whether some terms have a part of the run only; then zeros are left out too.
        calibration_steps: Ratios of these first steps are left out where there are later ones: while weights are being
            set, a ratio is what it was asked to be.

    Values that are not finite, of steps that were skipped say, are left out.
    """
    columns: dict[str, list[float]] = {}
    calibrating: dict[str, list[float]] = {}
    with metrics.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            early = float(row.get("step") or 0) < calibration_steps
            for name, value in row.items():
                if value and name.startswith(("ratio/", "bare/", "target/")) and math.isfinite(float(value)):
                    place = calibrating if early and name.startswith("ratio/") else columns
                    place.setdefault(name, []).append(float(value))
    found: dict[str, dict[str, float]] = {}
    for name, values in {**calibrating, **columns}.items():
        kind, _, term = name.partition("/")
        if kind == "ratio":
            found.setdefault(term, {})["median_gradient_ratio"] = statistics.median(values)
        else:
            if spans and kind == "bare":
                # Outside of its span a term is 0 and says nothing of its course.
                values = [value for value in values if value] or values
            part, name = max(1, len(values) // 10), "target_" if kind == "target" else ""
            first, last = sum(values[:part]) / part, sum(values[-part:]) / part
            found.setdefault(term, {}).update({f"{name}first": first, f"{name}last": last})
    return found


def _terms(cell: Cell, metrics: Path) -> dict[str, dict[str, float]]:
    training = cell.settings.get("training") or {}
    settings = leaves(cell.settings.get("method") or {})
    spans = any(key.endswith("span") and value not in (None, [0, 1]) for key, value in settings.items())
    return summarise_terms(metrics, calibration_steps=int(training.get("calibration_steps") or 0), spans=spans)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DrkdError: If it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DrkdError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DrkdError(f"{path}: no valid JSON ({error}). Remove the file, and the cell is measured again.") from error
    if not isinstance(content, dict):
        raise DrkdError(f"{path}: expected an object, got {type(content).__name__}.")
    return content


@dataclass(frozen=True)
class _Context:
    """What the cells of a pair have in common.

    Args:
        comparison: The comparison.
        written: Keys in the pair's recipe and its bases.
        fingerprints: Digests files.
    """

    comparison: Comparison
    written: frozenset[str]
    fingerprints: Fingerprints


def _make_cell(context: _Context, pair: tuple[str, Pair], arm: tuple[str, Arm]) -> Cell:
    """The cell of a pair and a method, of seed 0."""
    comparison = context.comparison
    overrides = {
        **flatten(comparison.overrides),
        **flatten(pair[1].overrides),
        **flatten(arm[1].overrides),
        "evaluation.split": comparison.split,
        # Not the recipe's own method with other arguments: what the comparison says is what runs.
        "method": None,
    }
    options = [_option(key, value) for key, value in overrides.items()]
    method: dict[str, Any] = {}
    if arm[1].method is not None:
        method = {"class_path": arm[1].method, "init_args": arm[1].arguments}
        options.append(_option("method", method))
    arguments = (f"--config={pair[1].recipe}", *options)
    recipe = load_recipe([], [*arguments, f"--output={comparison.output}"])
    if method and recipe.teacher is None and not recipe.teachers:
        raise DrkdError(f"the recipe {pair[1].recipe} names no teacher, and the method needs one.")
    settings = yaml.load(recipe.resolved, Loader=_SAFE_LOADER)
    kept = without_folder(settings)
    stated = context.written.union(leaves(overrides), (f"method.{key}" for key in leaves(method)))
    verb = "distill" if method else "train"
    inputs = context.fingerprints.of(leaves(kept, plain=False))
    return Cell(pair[0], arm[0], 0, verb, arguments, kept, stated, comparison.output, inputs)


def _make_teacher(context: _Context, name: str, pair: Pair) -> Cell | None:
    cell = _make_cell(context, (name, pair), (TEACHER, Arm()))
    teacher = cell.settings.get("teacher")
    if teacher is None or not _detects(teacher):
        return None
    flat = leaves(cell.settings, plain=False)
    kept = {key: value for key, value in flat.items() if key.startswith(_TEACHERS_SETTINGS)}
    inputs = {key: value for key, value in cell.inputs.items() if key.startswith(_TEACHERS_SETTINGS)}
    return Cell(name, TEACHER, None, "teacher", cell.arguments, kept, cell.stated, cell.output, inputs)


def _detects(teacher: Mapping[str, Any]) -> bool:
    """Whether a teacher can be scored: not one without heads, nor one of the user's own without ``detections``."""
    arguments = teacher.get("init_args") or {}
    return arguments.get("part") != "features" and arguments.get("detections", "") is not None


def _with_seed(cell: Cell, seed: int) -> Cell:
    settings = {**cell.settings, "seed": seed}
    return replace(cell, seed=seed, arguments=(*cell.arguments, f"--seed={seed}"), settings=settings)


def _recorded_status(cell: Cell) -> str | None:
    """How the run in the cell's folder ended, if it is a run of the cell's settings."""
    recipe, run = cell.run_folder / "recipe.yaml", cell.run_folder / "run.json"
    try:
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        status = json.loads(run.read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return None
    if cell.seed is None or not isinstance(settings, Mapping):
        return None
    kept = without_folder(settings)
    began = read_object(cell.inputs_file) if cell.inputs_file.exists() else None
    changed = differences(kept, cell.settings, stated=cell.stated) or changed_inputs(began, cell.inputs)
    return None if changed else status


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise DrkdError(
            f"{error.filename or path}: cannot be removed ({reason}), so nothing is measured anew."
        ) from error


def _option(key: str, value: Any) -> str:
    # YAML knows dates, which no setting is: the recipe's parser says so.
    return f"--{key}={value if isinstance(value, str) else json.dumps(value, default=str)}"
