"""The paper's two figures for one student: where pixels relate, and how instances relate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from drkd.contracts import DrkdError
from drkd.reports.figures import DISTILLED, drawing_style, new_figure, show_image
from drkd.reports.files import read_arrays

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAPS = {
    "plain_student": "features\nstudent",
    "plain_teacher": "features\nteacher",
    "relation_student": "pixel relation\nstudent",
    "relation_teacher": "pixel relation\nteacher",
}
_MATRICES = {
    "relation_matrix_student": "Student",
    "relation_matrix_teacher": "Teacher",
    "relation_filter": "Relation filter",
}
_MOST_INSTANCES = 16


def read_explanation(path: Path) -> dict[str, NDArray[Any]]:
    """Read ``explain.npz`` of a demo.

    It holds images (n, H, W, 3) uint8 RGB; heat maps ``plain_student``, ``plain_teacher``, ``relation_student`` and
    ``relation_teacher`` (n, H, W) float; ``relation_matrix_student``, ``relation_matrix_teacher`` and
    ``relation_filter`` (N, N) float; the instances' ``boxes`` (N, 4) xyxy px; ``image_index``, one number or (N,).
    """
    shapes = {"images": "n h w 3", **dict.fromkeys(_MAPS, "n h w"), **dict.fromkeys(_MATRICES, "N N"), "boxes": "N 4"}
    arrays = read_arrays(path, shapes)
    index, count, images = (
        arrays.get("image_index", np.zeros(1)).reshape(-1),
        len(arrays["boxes"]),
        len(arrays["images"]),
    )
    if len(index) not in (1, count) or not np.isin(index, np.arange(images)).all():
        raise DrkdError(
            f"{path}: array image_index should say, once or for each of {count} boxes, which of {images} images "
            f"it lies in (0..{images - 1}), got {index.tolist()}."
        )
    arrays["image_index"] = np.broadcast_to(index, (count,)).astype(np.int64)
    return arrays


def draw_pixel_relations(arrays: dict[str, NDArray[Any]], *, images: int = 4) -> Figure:
    """Draw the heat maps of plain features beside those of pixel relations, one row an image."""
    count = min(images, len(arrays["images"]))
    with drawing_style():
        figure = new_figure(8.6, 0.5 + 1.55 * max(1, count))
        panels = figure.subplots(max(1, count), 5, squeeze=False)
        drawn = None
        for row in range(count):
            image = arrays["images"][row]
            show_image(panels[row][0], image)
            for column, name in enumerate(_MAPS, start=1):
                show_image(panels[row][column], _to_grey(image), cmap="gray", vmin=0, vmax=255)
                heat = _normalise(arrays[name][row])
                drawn = show_image(
                    panels[row][column], heat, cmap="inferno", alpha=0.72, vmin=0, vmax=1, interpolation="bilinear"
                )
        for axes, title in zip(panels[0], ("image\n", *_MAPS.values()), strict=True):
            axes.set_title(title, loc="center", fontsize=9, fontweight="normal")
        if drawn is not None:
            bar = figure.colorbar(drawn, ax=panels[:, -1].tolist(), fraction=0.05, pad=0.03, ticks=[0, 1])
            bar.ax.set_yticklabels(["low", "high"])
            bar.outline.set_visible(False)
        return figure


def draw_relation_matrices(arrays: dict[str, NDArray[Any]]) -> Figure:
    """Draw the relation matrices of the instances, with each instance's crop along the axes."""
    count = min(_MOST_INSTANCES, len(arrays["boxes"]))
    crops = [_crop(arrays, index) for index in range(count)]
    pair = [arrays[name][:count, :count] for name in list(_MATRICES)[:2]]
    # Student and teacher share one scale, so that their colours compare; an instance's relation to itself, often by
    # far the largest, would flatten all others.
    shared = _off_diagonal_range(pair)
    with drawing_style():
        figure = new_figure(10.6, 3.6)
        if count == 0:
            figure.suptitle("no instances in these images", color="#888888")
            return figure
        for axes, (name, title) in zip(figure.subplots(1, 3), _MATRICES.items(), strict=True):
            matrix = arrays[name][:count, :count]
            low, high = shared if name != "relation_filter" else _off_diagonal_range([matrix])
            drawn = show_image(axes, matrix, cmap="viridis", vmin=low, vmax=high)
            axes.set_title(title, loc="center", pad=8)
            _put_crops(axes, crops)
            bar = figure.colorbar(drawn, ax=axes, fraction=0.045, pad=0.03, extend="both")
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7)
        return figure


def _to_grey(image: NDArray[Any]) -> NDArray[Any]:
    grey: NDArray[Any] = image @ np.array([0.299, 0.587, 0.114])
    return grey


def _normalise(heat: NDArray[Any]) -> NDArray[Any]:
    """Scale to [0, 1] between the 1st and 99th percentile: one bright pixel shall not darken the map."""
    low, high = np.percentile(heat, [1, 99])
    scaled: NDArray[Any] = np.clip((heat - low) / max(float(high - low), 1e-12), 0, 1)
    return scaled


def _off_diagonal_range(matrices: list[NDArray[Any]]) -> tuple[float, float]:
    values = [matrix[~np.eye(len(matrix), dtype=bool)] for matrix in matrices]
    joined = np.concatenate(values) if values else np.zeros(0)
    if joined.size == 0:
        return 0.0, 1.0
    return float(joined.min()), float(joined.max()) if joined.max() > joined.min() else float(joined.min()) + 1.0


def _crop(arrays: dict[str, NDArray[Any]], index: int) -> NDArray[Any]:
    """Return the instance's pixels with a small margin, padded with white to a square."""
    image = arrays["images"][int(arrays["image_index"][index])]
    x1, y1, x2, y2 = (float(value) for value in arrays["boxes"][index])
    margin = 0.08 * max(x2 - x1, y2 - y1)
    height, width = image.shape[:2]
    left, top = max(0, int(x1 - margin)), max(0, int(y1 - margin))
    right, bottom = min(width, max(left + 1, round(x2 + margin))), min(height, max(top + 1, round(y2 + margin)))
    crop = image[top:bottom, left:right]
    side = max(1, *crop.shape[:2])
    square = np.full((side, side, 3), 255, np.uint8)
    y, x = (side - crop.shape[0]) // 2, (side - crop.shape[1]) // 2
    square[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return square


def _put_crops(axes: Axes, crops: list[NDArray[Any]]) -> None:
    """Put the crops left of the rows and below the columns."""
    count = len(crops)
    for index, crop in enumerate(crops):
        low = index / count
        for bounds in ((-0.92 / count - 0.01, 1 - low - 0.96 / count), (low + 0.04 / count, -0.92 / count - 0.01)):
            inset = axes.inset_axes((*bounds, 0.92 / count, 0.92 / count))
            show_image(inset, crop, interpolation="bilinear")
            for spine in inset.spines.values():
                spine.set_visible(True)
                spine.set_color(DISTILLED)
                spine.set_linewidth(0.5)
