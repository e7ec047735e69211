"""Where does a student not follow its teacher? Linear readability of the teacher's maps, by size of the object.

    python benchmarks/small_objects.py RUN_FOLDER ... --out benchmarks/results/small_objects.json

For each run, and each pyramid level that student and teacher share: a ridge regression from the student's map to the
teacher's (channel by channel standardised), fitted on training images and tested on `tune`, for cells whose centre lies
in small, medium and large objects and in the background. R^2 is the share of the teacher's variance there that a 1x1
convolution reads out of the student's map: a method that compares maps cannot get more out of this student. Beside it,
the AP on `tune` with all classes taken for one (overlapping detections suppressed across classes): is it finding or
naming that fails?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import nms

from drkd.contracts import DetectionBatch, Detections, Detector
from drkd.evaluation import CocoEvaluator
from drkd.recipes.loading import open_detector
from drkd.recipes.recipe import Recipe, load_recipe

GROUPS = ("small", "medium", "large", "background")
LIMITS = (16.0, 48.0)  # px, as evaluation.area_scale 0.25 says
RIDGE = 1e-3


def main() -> None:
    """Probe every run and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fit-batches", type=int, default=40)
    parser.add_argument("--skip-readable", action="store_true", help="score only")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for run in options.runs:
        name = f"{run.parent.name}/{run.name}"
        recipe, student, teacher = open_run(run)
        readable = {} if options.skip_readable else probe(recipe, student, teacher, fit_batches=options.fit_batches)
        found[name] = {"readable": readable, "student": score(student, recipe), "teacher": score(teacher, recipe)}
        print(name, json.dumps(found[name]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def open_run(run: Path) -> tuple[Recipe, Detector, Detector]:
    """Recipe, student and teacher of a run folder."""
    options = ["--data.photometric=false", "--resume=false", "--overwrite=true"]
    recipe = load_recipe([str(run / "recipe.yaml")], options)
    student = open_detector(run / "student.pt").detector.eval()
    if recipe.teacher is None:
        raise SystemExit(f"{run}: its recipe names no teacher to compare with.")
    return recipe, student, recipe.teacher.build(student.spec.class_names).eval()


@torch.no_grad()
def score(detector: Detector, recipe: Recipe) -> dict[str, float]:
    """AP and AP_S on `tune`, and the same with all classes taken for one."""
    split = recipe.data.split("tune")
    one = [replace(record, labels=torch.zeros_like(record.labels)) for record in split.records]
    scale = recipe.evaluation.area_scale
    named = CocoEvaluator(split.records, split.class_names, area_scale=scale)
    found = CocoEvaluator(one, ("object",), area_scale=scale)
    for batch in recipe.data.loader("tune"):
        detections = detector.detect(batch)
        named.update(batch.image_ids, detections)
        found.update(batch.image_ids, [_as_one(entry) for entry in detections])
    with_names, without = named.compute(), found.compute()
    return {
        "ap": with_names.ap,
        "ap_small": with_names.ap_small,
        "ap_one_class": without.ap,
        "ap_small_one_class": without.ap_small,
    }


def _as_one(entry: Detections) -> Detections:
    kept = nms(entry.boxes, entry.scores, 0.6)
    return Detections(entry.boxes[kept], entry.scores[kept], torch.zeros_like(entry.labels[kept]))


@torch.no_grad()
def probe(recipe: Recipe, student: Detector, teacher: Detector, *, fit_batches: int) -> dict[str, dict[str, float]]:
    """R^2 by level and group."""
    data = recipe.data
    data.setup("fit")
    pairs = [
        (ours.name, theirs.name)
        for ours in student.spec.levels
        for theirs in teacher.spec.levels
        if ours.stride == theirs.stride
    ]
    fits: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
    for index, batch in enumerate(data.train_dataloader()):
        if index == fit_batches:
            break
        for key, x, y in _cells(student, teacher, batch, pairs):
            a, b = fits.get(key, (0, 0))
            fits[key] = a + x.T @ x, b + x.T @ y
    weights = {
        key: torch.linalg.solve(a + RIDGE * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype), b)
        for key, (a, b) in fits.items()
    }
    sums: dict[tuple[str, str], list[torch.Tensor]] = {}
    for batch in data.loader("tune"):
        for key, x, y in _cells(student, teacher, batch, pairs):
            if key not in weights:
                continue
            error = (y - x @ weights[key]).square().sum(0)
            parts = (error, y.sum(0), y.square().sum(0), torch.tensor(float(len(y)), dtype=y.dtype))
            old = sums.get(key)
            sums[key] = list(parts) if old is None else [p + q for p, q in zip(old, parts, strict=True)]
    result: dict[str, dict[str, float]] = {}
    for (level, group), (error, total, square, count) in sums.items():
        variance = square - total.square() / count
        result.setdefault(level, {})[group] = round(float(1 - error.sum() / variance.sum()), 4)
        result[level][f"{group}_cells"] = int(count)
    return result


def _cells(
    student: Detector, teacher: Detector, batch: DetectionBatch, pairs: list[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], torch.Tensor, torch.Tensor]]:
    """By level and group: the student's cells with a constant, and the teacher's."""
    ours = {m.name: m.tensor for m in student(batch, want=frozenset({"features"})).features}
    theirs = {m.name: m.tensor for m in teacher(batch, want=frozenset({"features"})).features}
    for name, other in pairs:
        x, y = ours[name].double(), theirs[other].double()
        deviation = y.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
        y = y / deviation
        group = _groups(batch, y.shape[-2:])
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1).movedim(1, 3)
        y = y.movedim(1, 3)
        for index, label in enumerate(GROUPS):
            mask = group == index
            if mask.any():
                yield (name, label), x[mask], y[mask]


def _groups(batch: DetectionBatch, size: tuple[int, int]) -> torch.Tensor:
    """(B, h, w): which group each cell's centre belongs to; the smallest object wins."""
    height, width = size
    ys = (torch.arange(height) + 0.5) * batch.image_size[0] / height
    xs = (torch.arange(width) + 0.5) * batch.image_size[1] / width
    group = torch.full((len(batch), height, width), 3)
    for image, boxes in enumerate(batch.boxes):
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        for place in side.argsort(descending=True).tolist():
            left, top, right, bottom = boxes[place].tolist()
            # A box smaller than a cell still has the cell that its centre lies in.
            rows = ((ys >= top) & (ys < bottom)) | _nearest(ys, (top + bottom) / 2)
            columns = ((xs >= left) & (xs < right)) | _nearest(xs, (left + right) / 2)
            index = int(side[place] >= LIMITS[0]) + int(side[place] >= LIMITS[1])
            group[image][rows[:, None] & columns[None]] = index
    return group


def _nearest(values: torch.Tensor, value: float) -> torch.Tensor:
    return torch.arange(len(values)) == (values - value).abs().argmin()


if __name__ == "__main__":
    main()
