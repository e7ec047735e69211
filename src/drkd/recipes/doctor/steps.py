"""A few real training steps: how loud each distillation term is, how long a step takes, and when the run would end."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from drkd.contracts import DetectionBatch, DrkdError, KDMethod
from drkd.data.batches import TrainLoader
from drkd.engine.distiller import Distiller
from drkd.engine.training_cost import _peak_memory
from drkd.recipes.doctor.finding import Finding
from drkd.recipes.precision import choose_precision
from drkd.recipes.recipe import Recipe

_QUIET, _LOUD = 0.01, 5.0


@dataclass
class StepNumbers:
    """What a few steps showed.

    Attributes:
        ratios: By term, gradient norm at the student's features over the task loss's, after weighting and without
            warm-up: the mean over the measured steps; 0 where it never had one.
        possible: By term, whether a batch held boxes enough for it.
        compute_seconds: Median of forward, backward and update.
        wait_seconds: Median of waiting for data.
        peak_bytes: Peak memory; None where it is not known.
        peak_kind: What that counts.
        error: What stopped the steps, if anything.
        has_spans: Whether the method has terms in a part of the run only, which these steps' time may leave out.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    possible: dict[str, bool] = field(default_factory=dict)
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    peak_bytes: int | None = None
    peak_kind: str = ""
    error: str = ""
    has_spans: bool = False


def take_steps(
    recipe: Recipe, distiller: Distiller, *, steps: int, device: torch.device, processes: int = 1
) -> StepNumbers:
    """Train for a few steps at the warm-up's first learning rate; the distiller is changed.

    Gradient ratios are measured in the first half, and time in the second, where nothing is measured. Every step is
    of one pass here, whatever the recipe accumulates.

    Args:
        recipe: The recipe, its data set up.
        distiller: Student, teacher and method, on ``device``.
        steps: At least two.
        device: Where to run.
        processes: How many share an epoch's images in the run.
    """
    numbers = StepNumbers()
    settings = recipe.training.optimization
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=settings.learning_rate * settings.warmup_factor)
    distiller.wake_student()
    method = distiller.method
    measured = max(1, steps // 2)
    found: dict[str, list[float]] = {}
    compute, wait = [], []
    loader = recipe.data.train_dataloader()
    distiller.total_steps = run_length(recipe, passes=max(1, len(loader) // processes))
    batches = _endless(loader)
    numbers.has_spans = method is not None and any(
        part.needs_run_length for part in method.modules() if isinstance(part, KDMethod)
    )
    for step in range(steps):
        started = time.perf_counter()
        batch = next(batches).to(device)
        loaded = time.perf_counter()
        distiller.monitor_interval = 1 if step < measured else 10**9
        distiller.balance.interval = 1 if step < measured else 10**9
        # Of a run that is shorter, its last step again and again.
        place = min(step, max(0, distiller.total_steps - 1))
        distiller.at_step(place, first=True)
        try:
            with _autocast(choose_precision(recipe.training), device):
                losses = distiller(batch)
            total = torch.stack([value.float() for value in losses.values()]).sum()
            total.backward()
        except DrkdError as error:
            numbers.error = str(error)
            break
        if not bool(total.isfinite()):
            bad = [name for name, value in losses.items() if not bool(value.isfinite().all())]
            numbers.error = f"The loss is NaN or infinite at step {step} ({', '.join(bad) or 'the sum'})."
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= measured:
            compute.append(time.perf_counter() - loaded)
            wait.append(loaded - started)
        elif method is not None:
            schedule = method.schedule(place, distiller.total_steps)
            for name, value in distiller.monitor.ratios.items():
                found.setdefault(name, []).append(float(value) / schedule)
            _note_possible(numbers.possible, method, batch)
    heard = {name: [v for v in values if 0 < v < math.inf] for name, values in found.items()}
    numbers.ratios = {name: statistics.fmean(values) if values else 0.0 for name, values in heard.items()}
    numbers.compute_seconds = statistics.median(compute) if compute else 0.0
    numbers.wait_seconds = statistics.median(wait) if wait else 0.0
    numbers.peak_bytes, numbers.peak_kind = _peak_memory(device)
    return numbers


def judge_gradients(numbers: StepNumbers, weights: Mapping[str, float]) -> list[Finding]:
    """Say whether each term is heard beside the task loss, and none drowns it."""
    if numbers.error:
        return [Finding("stop", "gradients", numbers.error)]
    findings = []
    for name, ratio in numbers.ratios.items():
        if weights.get(name, 1.0) == 0:
            continue
        if ratio == 0:
            if numbers.possible.get(name, True):
                text = f"The term '{name}' sends the student no gradient: it is silently off."
                findings.append(Finding("stop", "gradients", text))
            else:
                text = f"The term '{name}' could not be measured: no image of these steps had boxes enough."
                findings.append(Finding("careful", "gradients", text))
        elif ratio < _QUIET:
            text = f"The term '{name}' is {ratio:.2g} of the task loss in gradient: too quiet. Raise its weight."
            findings.append(Finding("careful", "gradients", text))
        elif ratio > _LOUD:
            text = f"The term '{name}' is {ratio:.1f} times as loud as the task loss: it drowns it. Lower its weight."
            findings.append(Finding("careful", "gradients", text))
    if not findings:
        heard = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares(numbers).items())
        findings.append(Finding("ok", "gradients", f"Every term is heard; shares of the gradient: {heard}."))
    return findings


def shares(numbers: StepNumbers) -> dict[str, float]:
    """Each term's share of the sum of gradient norms, the task's included."""
    total = 1.0 + sum(numbers.ratios.values())
    return {"task": 1.0 / total, **{name: ratio / total for name, ratio in numbers.ratios.items()}}


def run_length(recipe: Recipe, *, passes: int) -> int:
    """Optimizer steps of the whole run.

    Args:
        recipe: The recipe.
        passes: Batches an epoch.
    """
    settings = recipe.training
    return settings.steps or (settings.epochs or 0) * _steps_an_epoch(recipe, passes)


def _steps_an_epoch(recipe: Recipe, passes: int) -> int:
    return max(1, math.ceil(passes / recipe.training.accumulate))


def forecast(
    recipe: Recipe, numbers: StepNumbers, *, detect_seconds: float, passes: int, processes: int = 1
) -> dict[str, Any]:
    """Steps, seconds and finish of the whole run.

    Args:
        recipe: The recipe.
        numbers: Of the steps that were taken.
        detect_seconds: The student's, for one validation image.
        passes: Batches an epoch, of each process.
        processes: How many there are; they share the validation too.
    """
    settings = recipe.training
    steps = run_length(recipe, passes=passes)
    epochs = steps / _steps_an_epoch(recipe, passes)
    validations = int(epochs // settings.validate_every) if settings.validate_every else 0
    validations += recipe.evaluation.split is not None
    scored = math.ceil(len(recipe.data.val_split) / processes) if validations else 0
    step = settings.accumulate * (numbers.compute_seconds + numbers.wait_seconds)
    seconds = steps * step + validations * scored * detect_seconds
    return {
        "steps": steps,
        "seconds_per_step": step,
        "of_which_waiting_for_data": settings.accumulate * numbers.wait_seconds,
        "validations": validations,
        "seconds": seconds,
        "finish": time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(time.time() + seconds)),
        "without_spans": numbers.has_spans,
        "peak_memory_bytes": numbers.peak_bytes,
        "peak_memory_kind": numbers.peak_kind,
        "threads": torch.get_num_threads(),
    }


def judge_cost(plan: Mapping[str, Any]) -> Finding:
    """Say how long the run takes; careful where it mostly waits for data."""
    memory = (
        f", {plan['peak_memory_bytes'] / 2**30:.1f} GiB {plan['peak_memory_kind']}" if plan["peak_memory_bytes"] else ""
    )
    text = (
        f"{plan['steps']} steps of {plan['seconds_per_step']:.2f} s: about {duration(plan['seconds'])}, until "
        f"{plan['finish']} if started now{memory}."
    )
    if plan.get("without_spans"):
        text += " It is the time of the run's beginning: terms in another part of the run come on top."
    if plan["of_which_waiting_for_data"] > 0.5 * plan["seconds_per_step"]:
        return Finding(
            "careful", "cost", f"{text} Most of it is waiting for images: raise data.workers, or store them smaller."
        )
    return Finding("ok", "cost", text)


def duration(seconds: float) -> str:
    """Seconds in words that fit their size."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _note_possible(possible: dict[str, bool], method: KDMethod, batch: DetectionBatch) -> None:
    most = max((len(boxes) for boxes in batch.boxes), default=0)
    for name, needed in method.minimum_boxes.items():
        possible[name] = possible.get(name, False) or most >= needed


def _endless(loader: TrainLoader) -> Iterator[DetectionBatch]:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        loader.order.position = 0
        yield from loader
        epoch += 1


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    if not precision.startswith(("bf16", "16")):  # with or without "-mixed", as Lightning takes them
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision.startswith("bf16") else torch.float16)
