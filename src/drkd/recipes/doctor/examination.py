"""The two forms of the preflight: the whole one before a long run, and the short one at every run's start."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from drkd.contracts import DetectionBatch, Detector, DrkdError
from drkd.data.split import DatasetSplit
from drkd.engine.distiller import Distiller
from drkd.engine.teachers import PerTeacher, TeacherGroup
from drkd.recipes.doctor.adapters import judge_adapters
from drkd.recipes.doctor.batches import UnreadableBatch, ValidationBatches
from drkd.recipes.doctor.classes import compare_classes, count_boxes
from drkd.recipes.doctor.features import look_at_features
from drkd.recipes.doctor.finding import Diagnosis, Finding
from drkd.recipes.doctor.levels import judge_levels
from drkd.recipes.doctor.preprocessing import (
    average_precision,
    judge_preprocessing,
    judge_teacher,
    preprocessing_changes,
)
from drkd.recipes.doctor.steps import forecast, judge_cost, judge_gradients, shares, take_steps
from drkd.recipes.recipe import Recipe

BRIEF_IMAGES = 16


def examine(
    recipe: Recipe,
    distiller: Distiller,
    *,
    images: int | None = 200,
    steps: int = 8,
    device: torch.device,
    processes: int = 1,
) -> Diagnosis:
    """The whole preflight. The distiller is changed: take one that will not be trained.

    Args:
        recipe: The recipe, its data set up.
        distiller: Student, teacher and method as the run would begin with them.
        images: Validation images to measure the teacher on; None takes all.
        steps: Training steps to take, at least two.
        device: Where to run.
        processes: How many the run will have; they share an epoch's images.

    Raises:
        DrkdError: If there is no teacher, or a number is out of range.
    """
    if steps < 2 or (images is not None and images < 1):
        raise DrkdError(f"drkd doctor: expected at least 2 steps and 1 image, got {steps} and {images}.")
    distiller.to(device)
    with _kept_modes(distiller):
        findings, numbers = _look(recipe, distiller, images=images, device=device)
        batch = ValidationBatches(recipe, 1, device=device).first()
        detect = _detect_seconds(distiller.student, batch)
    taken = take_steps(recipe, distiller, steps=steps, device=device, processes=processes)
    weights = distiller.method.weights if distiller.method is not None else {}
    findings += judge_gradients(taken, weights)
    numbers["gradients"] = {"ratio_to_task": taken.ratios, "share": shares(taken), "steps": max(1, steps // 2)}
    if not taken.error:
        passes = max(1, len(recipe.data.train_dataloader()) // processes)
        plan = forecast(recipe, taken, detect_seconds=detect, passes=passes, processes=processes)
        findings.append(judge_cost(plan))
        numbers["cost"] = {**plan, "detect_seconds_an_image": detect, "steps_taken": asdict(taken)}
    return Diagnosis(tuple(findings), numbers)


def examine_briefly(recipe: Recipe, distiller: Distiller, *, device: torch.device | None = None) -> Diagnosis:
    """The short form: classes, features, and the teacher on a handful of images. Seconds, and nothing is changed.

    Neither the random state nor the weights, the buffers or the modes of the models are touched, so that a run is the
    same bit for bit with and without it.

    Args:
        recipe: The recipe, its data set up.
        distiller: Student, teacher and method.
        device: Where to run, after which the models are put back; where they are, by default.
    """
    home = next(distiller.student.parameters()).device
    where = device or home
    with isolate_rng(), _kept_modes(distiller):
        try:
            findings, numbers = _look(recipe, distiller.to(where), images=BRIEF_IMAGES, device=where)
        finally:
            distiller.to(home)
    return Diagnosis(tuple(findings), numbers, brief=True)


@contextmanager
def _kept_modes(distiller: Distiller) -> Iterator[None]:
    """Every module's mode is afterwards what it was."""
    modes = {module: module.training for module in distiller.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _look(
    recipe: Recipe, distiller: Distiller, *, images: int | None, device: torch.device
) -> tuple[list[Finding], dict[str, Any]]:
    """What both forms look at; nothing is trained."""
    teacher, student = distiller.teacher, distiller.student
    if teacher is None:
        raise DrkdError("drkd doctor: the recipe names no teacher and no method; there is nothing to examine.")
    train, val = recipe.data.train_split, recipe.data.val_split
    student.eval()
    findings, counts = count_boxes(train, val)
    batches = ValidationBatches(recipe, images, device=device)
    first = batches.first()
    numbers: dict[str, Any] = {"classes": counts}
    validates = bool(recipe.training.validate_every) or recipe.evaluation.split is not None
    group = isinstance(teacher, TeacherGroup)
    members: Mapping[str, Any] = dict(teacher.members) if isinstance(teacher, TeacherGroup) else {"": teacher}
    for name, member in members.items():
        missing = getattr(member, "missing_classes", ())
        more = compare_classes(student.spec, member.spec, recipe.data.class_names, missing=missing)
        measured, found = _measure(member, student, batches, val, validates=validates)
        alive, found["features"] = look_at_features("teacher", member, first)
        method = distiller.method.members[name] if isinstance(distiller.method, PerTeacher) else distiller.method
        more += [*measured, *alive, *judge_levels(student.spec, member.spec, method)]
        more += judge_adapters(method, inherits=recipe.inherit)
        findings += [replace(entry, text=f"{name}: {entry.text}") for entry in more] if group else more
        if group:
            numbers.setdefault("teachers", {})[name] = found
        else:
            numbers |= {**found, "features": {"teacher": found["features"]}}
    more, own = look_at_features("student", student, first)
    numbers.setdefault("features", {})["student"] = own
    return findings + more, numbers


def _measure(
    teacher: Detector, student: Detector, batches: ValidationBatches, split: DatasetSplit, *, validates: bool
) -> tuple[list[Finding], dict[str, Any]]:
    """The teacher's AP as it is and under other preprocessings; one that cannot detect is left at that."""
    try:
        others = average_precision(teacher, batches, split, preprocessing_changes(teacher, student))
    except UnreadableBatch as error:
        if validates:
            raise  # so would the run
        return [Finding("careful", "teacher", f"The teacher's AP was not measured: {error}")], {"teacher": None}
    except DrkdError as error:
        return [Finding("ok", "teacher", f"The teacher's AP was not measured. {error}")], {"teacher": None}
    own = others.pop("")
    boxes = sum(int((~record.crowd).sum()) for record in split.records[: batches.count])
    findings = [judge_teacher(own["ap"], own["ap50"], batches.count, boxes=boxes)]
    aps = {name: found["ap"] for name, found in others.items()}
    if boxes:
        findings.append(judge_preprocessing(own["ap"], aps))
    numbers = {**own, "images": batches.count, "boxes": boxes, "split": split.name}
    return findings, {"teacher": numbers, "preprocessing": aps}


@torch.no_grad()
def _detect_seconds(detector: Detector, batch: DetectionBatch) -> float:
    detector.eval()
    detector.detect(batch)
    started = time.perf_counter()
    detector.detect(batch)
    return (time.perf_counter() - started) / len(batch)
