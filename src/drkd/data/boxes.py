"""Clips, checks and groups the boxes of a whole split at once, whatever format they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from drkd.contracts import Size

Finding = Literal["flat", "outside", "overhang"]

# COCO's own files overhang their images by rounding; only more than this many px is worth a word.
_OVERHANG = 1.0


@dataclass(frozen=True)
class BoxColumns:
    """Boxes of many images, a row each.

    Args:
        images: (N,) int64, position of the image.
        labels: (N,) int64.
        crowd: (N,) bool.
        boxes: (N, 4) float64, x, y, width, height, px.
        areas: (N,) float64, px^2; NaN where that of the clipped box is meant.
    """

    images: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    boxes: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]


@dataclass(frozen=True)
class GroupedBoxes:
    """Usable boxes, one tensor an image: boxes xyxy px float32, labels int64, crowd bool, areas float32 px^2.

    Args:
        boxes: (N_i, 4) an image.
        labels: (N_i,) an image.
        crowd: (N_i,) an image.
        areas: (N_i,) an image.
        rows: (N_i,) int64 an image, the row that each box came from.
        findings: Row and kind of every box that was not simply taken over: "flat" (no area: left out), "outside"
            (wholly outside its image: left out) and "overhang" (by more than a pixel: clipped).
    """

    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    crowd: tuple[Tensor, ...]
    areas: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    findings: tuple[tuple[int, Finding], ...]


def group_boxes(columns: BoxColumns, sizes: Sequence[Size]) -> GroupedBoxes:
    """Clip boxes to their images, leave out what has no area, and hand them out by image.

    Args:
        columns: All boxes; widths and heights >= 0, all finite.
        sizes: Height and width of every image, px; boxes of an image of size (0, 0) are left out without a word.
    """
    limits = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)[columns.images][:, [1, 0, 1, 0]]
    sized = (limits > 0).all(axis=1)
    corners = np.concatenate([columns.boxes[:, :2], columns.boxes[:, :2] + columns.boxes[:, 2:]], axis=1)
    clipped = np.clip(corners, 0.0, limits)
    overhang = np.asarray(np.abs(corners - clipped).max(axis=1, initial=0.0) > _OVERHANG)
    # As the float32 that training sees: a width of 1e-9 at x = 100 is none.
    single = clipped.astype(np.float32)
    flat = (columns.boxes[:, 2:] <= 0).any(axis=1)
    gone = (single[:, 2:] <= single[:, :2]).any(axis=1)
    inside = (corners[:, :2] < limits[:, :2]).all(axis=1) & (corners[:, 2:] > 0).all(axis=1)
    flat |= gone & inside
    findings: list[tuple[int, Finding]] = []
    for row in np.flatnonzero(sized & (flat | gone | overhang)).tolist():
        findings.append((row, "flat" if flat[row] else "outside" if gone[row] else "overhang"))
    order = np.flatnonzero(sized & ~flat & ~gone)
    order = order[np.argsort(columns.images[order], kind="stable")]
    counts = np.bincount(columns.images[order], minlength=len(sizes)).tolist()
    # Of a box within its image the very numbers of the file: a difference of corners is 1e-12 beside them.
    whole = (clipped == corners).all(axis=1)
    own = np.where(whole, columns.boxes[:, 2] * columns.boxes[:, 3], (clipped[:, 2:] - clipped[:, :2]).prod(axis=1))
    areas = np.where(np.isnan(columns.areas), own, columns.areas)
    # Views of one tensor a column: building four tensors for each of 118,000 images takes longer than all the rest.
    return GroupedBoxes(
        boxes=torch.from_numpy(single[order]).split(counts),
        labels=torch.from_numpy(columns.labels[order]).split(counts),
        crowd=torch.from_numpy(columns.crowd[order]).split(counts),
        areas=torch.from_numpy(areas[order].astype(np.float32)).split(counts),
        rows=torch.from_numpy(order).split(counts),
        findings=tuple(findings),
    )
