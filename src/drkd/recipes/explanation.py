"""What DRKD saw: heat maps of pixel relations and relation matrices of instances, as arrays for the report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from drkd.contracts import DetectionBatch, DrkdError, Want
from drkd.engine.distiller import Distiller
from drkd.losses import standardise
from drkd.methods.drkd import DRKD, LevelRelations
from drkd.methods.levels import maps_by_name


@torch.no_grad()
def explain(distiller: Distiller, batch: DetectionBatch, *, shown: Sequence[int]) -> dict[str, NDArray[np.generic]]:
    """Compute the paper's two figures for this student: what plain features show, and what the relations show.

    Args:
        distiller: Student, teacher and a `DRKD` method.
        batch: Images with boxes.
        shown: Images of the batch whose maps are wanted; the matrix is of the one with the most boxes.

    Returns:
        ``images`` (n, H, W, 3) uint8; ``plain_student``, ``plain_teacher``, ``relation_student``,
        ``relation_teacher`` (n, H, W) float32, mean absolute activation over channels of the finest level, of the
        standardised maps and of what the graph adds to them; ``relation_matrix_student``, ``relation_matrix_teacher``,
        ``relation_filter`` (N, N); ``boxes`` (N, 4) xyxy px of the batch; ``image_index`` (1,) into ``images``.

    Raises:
        DrkdError: If the distiller has no teacher or another method.
    """
    if distiller.teacher is None or not isinstance(distiller.method, DRKD):
        raise DrkdError("Only a student distilled with DRKD can be explained by relations.")
    distiller.eval()
    want = frozenset[Want]({"features"})
    student = maps_by_name(distiller.student(batch, want=want).features)
    teacher = maps_by_name(distiller.teacher(batch, want=want).features)
    relations = distiller.method.relations(student, teacher, batch.boxes, image_size=batch.image_size)
    arrays: dict[str, NDArray[np.generic]] = {"images": _pixels(batch, shown)}
    arrays.update(_heat_maps(relations, batch, shown, student=student, teacher=teacher))
    arrays.update(_matrices(relations, batch, shown))
    return arrays


def save_explanation(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Write the arrays aside and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as aside:
        np.savez_compressed(aside, **arrays)  # type: ignore[arg-type]
    os.chmod(aside.name, 0o644)  # noqa: PTH101 - temporary files are private, results are not
    Path(aside.name).replace(path)


def _pixels(batch: DetectionBatch, shown: Sequence[int]) -> NDArray[np.generic]:
    images = batch.images[list(shown)].permute(0, 2, 3, 1).clamp(0, 1)
    return (images * 255).round().to(torch.uint8).cpu().numpy()


def _heat_maps(
    relations: Sequence[LevelRelations],
    batch: DetectionBatch,
    shown: Sequence[int],
    *,
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
) -> dict[str, NDArray[np.generic]]:
    level = next((found for found in relations if found.student_graph is not None), None)
    if level is None or level.student_graph is None or level.teacher_graph is None:
        raise DrkdError("The method has no pixel relation, so there is no heat map of it to draw.")
    maps = {
        "plain_student": standardise(student[level.name]),
        "plain_teacher": standardise(teacher[level.teacher_name]),
        "relation_student": level.student_graph,
        "relation_teacher": level.teacher_graph,
    }
    heat = {}
    for name, tensor in maps.items():
        strength = tensor[list(shown)].abs().mean(dim=1, keepdim=True)
        full = functional.interpolate(strength, size=batch.image_size, mode="bilinear", align_corners=False)
        heat[name] = full[:, 0].float().cpu().numpy()
    return heat


def _matrices(
    relations: Sequence[LevelRelations], batch: DetectionBatch, shown: Sequence[int]
) -> dict[str, NDArray[np.generic]]:
    level = next((found for found in relations if found.student_matrix is not None), None)
    if level is None or level.student_matrix is None or level.teacher_matrix is None:
        raise DrkdError("The method has no instance relation, so there is no matrix of it to draw.")
    place, image = max(enumerate(shown), key=lambda pair: len(batch.boxes[pair[1]]))
    count = len(batch.boxes[image])
    # Related across images, all instances of the batch share one matrix.
    across = level.student_matrix.shape[0] == 1 and len(batch) > 1
    start = sum(len(boxes) for boxes in batch.boxes[:image]) if across else 0
    own = slice(start, start + count)
    group = 0 if across else image
    weights = torch.ones(count, count) if level.filter is None else level.filter[group, own, own]
    return {
        "relation_matrix_student": level.student_matrix[group, own, own].float().cpu().numpy(),
        "relation_matrix_teacher": level.teacher_matrix[group, own, own].float().cpu().numpy(),
        "relation_filter": weights.float().cpu().numpy(),
        "boxes": batch.boxes[image].float().cpu().numpy(),
        "image_index": np.array([place], dtype=np.int64),
    }
