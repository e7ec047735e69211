"""Look at a model's layers: which could be a pyramid, which are, what they cost, and how a recipe names them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from drkd.adapters.checkpoint import load_detector
from drkd.adapters.hooks import HookedDetector
from drkd.adapters.import_path import import_function
from drkd.adapters.layer_outputs import TracedLayer, trace_layers
from drkd.adapters.pyramid_probe import probe_batch, undisturbed
from drkd.contracts import DetectionBatch, Detector, DetectorOutput, DrkdError, Size, Want
from drkd.recipes.builtin import list_builtin
from drkd.recipes.loading import find_checkpoint
from drkd.recipes.recipe import load_recipe
from drkd.recipes.training import assemble_teacher

_FEATURES = frozenset[Want]({"features"})


@dataclass(frozen=True)
class LayerRow:
    """One map that a layer returns.

    Args:
        name: As ``layers`` of a `HookedBuilder` takes it.
        kind: The layer's class.
        stride: Pixels a cell, the mean of both directions.
        channels: Its channels.
        size: Height and width of the map, cells.
        parameters: Of the layer with all in it; None for its second map and those that follow.
        flops: Floating-point operations for the image, a multiply-add counted as two; same.
        pyramid: Whether it is a level.
    """

    name: str
    kind: str
    stride: float
    channels: int
    size: Size
    parameters: int | None
    flops: int | None
    pyramid: bool


@dataclass(frozen=True)
class Inspected:
    """One model.

    Args:
        title: What it is to the user: "student", "teacher", "teacher NAME" of several, or what was asked for.
        kind: The model's class.
        image_size: Height and width of the image that it was run on, px.
        parameters: Number of its weights.
        flops: Floating-point operations of the pass, a multiply-add counted as two.
        layers: Its feature layers, in the order in which they return: those that are called once and return maps.
            Of several that return the same map the outermost.
        hidden: How many more there are, deeper.
        note: What to do with the YAML.
        yaml: What to paste into a recipe.
    """

    title: str
    kind: str
    image_size: Size
    parameters: int
    flops: int
    layers: tuple[LayerRow, ...]
    hidden: int
    note: str
    yaml: str

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)


def inspect_model(
    model: str, *, size: Size = (512, 512), depth: int = 3, forward: str | None = None, trust_code: bool = False
) -> list[Inspected]:
    """List the layers of one model, or of a recipe's student and teacher.

    Args:
        model: A recipe or the name of a shipped one, a student.pt or a run folder, or an import path of a function
            without arguments (or of one that takes class names) that returns a module.
        size: Height and width of the image, px.
        depth: Leave out layers of more parts in their dotted name, unless they are levels; 0 keeps all.
        forward: Import path of a function of (model, batch) that runs the model; for import paths only.
        trust_code: Call the functions that a checkpoint with a detector of the user's own names.

    Raises:
        DrkdError: If there is no such model, or it cannot be run on an image of this size.
    """
    if min(size) < 32 or depth < 0:
        raise DrkdError(f"size and depth: expected at least 32 px and a depth of 0 or more, got {size} and {depth}.")
    if model in list_builtin() or model.endswith((".yaml", ".yml")):
        return _inspect_recipe(model, size=size, depth=depth)
    if Path(model).exists() or model.startswith("drkd:") or ":" not in model:
        file = find_checkpoint(Path(model))
        detector = load_detector(file, trust_code=trust_code)
        text = _yaml("teacher", "drkd.adapters.SavedDetectorBuilder", {"path": str(file)})
        return [_inspect_detector(detector, model, size=size, depth=depth, text=text)]
    return [_inspect_import(model, size=size, depth=depth, forward=forward)]


def _inspect_recipe(name: str, *, size: Size, depth: int) -> list[Inspected]:
    recipe = load_recipe([name], ["--output=unused"])
    teacher = assemble_teacher(recipe)
    parts = {"student": recipe.student.build(recipe.data.class_names)}
    if isinstance(teacher, Detector):
        parts["teacher"] = teacher
    else:
        parts |= {f"teacher {member}": detector for member, detector in (teacher or {}).items()}
    found = []
    for title, detector in parts.items():
        levels = [level.name for level in detector.spec.levels]
        text = yaml.safe_dump({"method": {"init_args": {"levels": levels}}}, default_flow_style=None)
        if title != "student":
            text = f"# levels of the {title}: {', '.join(levels)}; the student's are matched with them by stride\n"
        found.append(_inspect_detector(detector, title, size=size, depth=depth, text=text))
    return found


def _inspect_detector(detector: Detector, title: str, *, size: Size, depth: int, text: str) -> Inspected:
    """A detector that drkd wraps: its levels are the maps that it returns as features."""
    model = detector.model
    batch = probe_batch(model, size, images=1)

    def run() -> None:
        try:
            detector.detect(batch)
        except DrkdError:
            # Wrapped without a function for detections: features are what it can.
            detector(batch, want=_FEATURES)

    with undisturbed(detector):
        levels = _level_names(detector, model, batch)
        traced, failure = _trace(model, run)
    if failure is not None:
        raise failure
    note = "Already known to drkd. In a recipe:"
    return _describe(model, title, traced, batch, depth=depth, levels=levels, note=note, text=text)


def _level_names(detector: Detector, model: nn.Module, batch: DetectionBatch) -> set[str]:
    """Names of the layers whose output is a level, by identity of the tensors."""
    if isinstance(detector, HookedDetector):
        return set(detector.layers)
    found: list[DetectorOutput] = []
    traced = trace_layers(model, lambda: found.append(detector(batch, want=_FEATURES)))
    outermost = _outermost(traced, batch)
    return {outermost[id(level.tensor)] for level in found[0].features if id(level.tensor) in outermost}


def _outermost(traced: Sequence[TracedLayer], batch: DetectionBatch) -> dict[int, str]:
    """For each map, by identity, the name of the last layer that returns it: a layer's parents return after it."""
    return {
        id(tensor): name
        for layer in traced
        if layer.name and layer.calls == 1
        for name, tensor in layer.maps(len(batch), batch.image_size).items()
    }


def _inspect_import(path: str, *, size: Size, depth: int, forward: str | None) -> Inspected:
    made = _make(path)
    if isinstance(made, Detector):
        return _inspect_detector(made, path, size=size, depth=depth, text="# the function returns a Detector of drkd\n")
    if not isinstance(made, nn.Module):
        raise DrkdError(f"{path}: expected a function that returns a torch module, got {type(made).__name__}.")
    model = made
    batch = probe_batch(model, size, images=1)
    if forward is not None:
        function = import_function(forward, field="forward")
        attempts: list[Callable[[], Any]] = [lambda: function(model, batch)]
    else:
        attempts = [lambda: model(batch.images), lambda: model(list(batch.images))]
    failures = []
    for attempt in attempts:
        with undisturbed(model):
            traced, failure = _trace(model, attempt)
        if failure is None:
            break
        failures.append(f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure) else ''}")
    else:
        how = f"through {forward}" if forward else "with images (1, 3, H, W), nor with a list of them"
        raise DrkdError(
            f"{path}: {type(model).__name__} cannot be run {how} ({'; '.join(failures)}). Give --forward "
            "'module:function', a function of (model, batch), such as the one that returns its losses."
        )
    chosen = _suggest(traced, batch)
    module, _, _ = path.partition(":")
    arguments = {
        "factory": path,
        "losses": f"{module}:losses",
        "detections": f"{module}:detections",
        "layers": chosen or ["NAME"],
    }
    note = (
        "Write the functions `losses` and `detections` of (model, batch), see docs/adapters.md; choose the layers from "
        f"the table{' (a guess is filled in)' if chosen else ''}. In a recipe:"
    )
    text = _yaml("student", "drkd.adapters.HookedBuilder", arguments)
    return _describe(model, path, traced, batch, depth=depth, levels=set(), note=note, text=text)


def _make(path: str) -> Any:
    """Call a function of the user's: without arguments, or with class names where it wants them."""
    function = import_function(path, field="MODEL")
    if isinstance(function, nn.Module):
        return function
    names = [str(label) for label in range(80)]
    attempts: list[tuple[Any, ...]] = [(), (names,)]
    with suppress(TypeError, ValueError):  # what is written in C may have no signature
        # Told by what it takes: an error within it is no sign that it wants something else.
        signature = inspect.signature(function)
        # Of one that takes whatever it is given, as a decorator's may, nothing is told.
        if not any(taken.kind is taken.VAR_POSITIONAL for taken in signature.parameters.values()):
            attempts = [arguments for arguments in attempts if _takes(signature, arguments)][:1]
    failures = []
    for arguments in attempts:
        try:
            return function(*arguments)
        except DrkdError:
            raise
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
            if not isinstance(error, TypeError) or arguments == attempts[-1]:
                how = "with a list of class names" if arguments else "without arguments"
                raise DrkdError(f"{path}: the function failed, called {how} ({'; '.join(failures)}).") from error
    raise DrkdError(f"{path}: cannot be called without arguments, nor with a list of class names.")


def _takes(signature: inspect.Signature, arguments: tuple[Any, ...]) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _trace(model: nn.Module, run: Callable[[], Any]) -> tuple[list[TracedLayer], Exception | None]:
    try:
        return trace_layers(model, run), None
    except Exception as error:
        return [], error


def _suggest(traced: Sequence[TracedLayer], batch: DetectionBatch) -> list[str]:
    """A layer that returns a pyramid by itself, the last one of those: a neck comes after its backbone."""
    several = [
        layer.name
        for layer in traced
        if layer.calls == 1 and layer.name and len(layer.maps(len(batch), batch.image_size)) > 1
    ]
    return several[-1:]


def _describe(
    model: nn.Module,
    title: str,
    traced: Sequence[TracedLayer],
    batch: DetectionBatch,
    *,
    depth: int,
    levels: set[str],
    note: str,
    text: str,
) -> Inspected:
    rows: list[LayerRow] = []
    hidden = 0
    outermost = _outermost(traced, batch)
    for layer in traced:
        maps = layer.maps(len(batch), batch.image_size) if layer.name else {}
        maps = {name: tensor for name, tensor in maps.items() if outermost.get(id(tensor)) == name}
        shown = not depth or layer.name.count(".") < depth or any(name in levels for name in maps)
        hidden += bool(maps) and not shown
        for number, (name, tensor) in enumerate(maps.items() if shown else ()):
            rows.append(
                LayerRow(
                    name,
                    layer.kind,
                    _stride(tensor.shape[-2:], batch.image_size),
                    int(tensor.shape[1]),
                    (int(tensor.shape[2]), int(tensor.shape[3])),
                    None if number else layer.parameters,
                    None if number else layer.flops,
                    name in levels,
                )
            )
    total = sum(layer.flops for layer in traced if not _inside(layer.name, traced))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Inspected(title, type(model).__name__, batch.image_size, parameters, total, tuple(rows), hidden, note, text)


def _inside(name: str, traced: Sequence[TracedLayer]) -> bool:
    """Whether another traced layer holds this one, so that its operations are counted there already."""
    parents = {layer.name for layer in traced if layer.name != name}
    if not name:
        return False
    parts = name.split(".")
    return "" in parents or any(".".join(parts[:count]) in parents for count in range(1, len(parts)))


def _stride(cells: Sequence[int], image_size: Size) -> float:
    return round(math.sqrt(image_size[0] / cells[0] * image_size[1] / cells[1]), 2)


def _yaml(part: str, class_path: str, arguments: dict[str, Any]) -> str:
    content = {part: {"class_path": class_path, "init_args": arguments}}
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=False)
