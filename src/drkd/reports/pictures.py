"""Figures that show images: detections side by side, and the headline of the README."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from drkd.contracts import DrkdError
from drkd.reports.figures import (
    BLUE,
    DISTILLED,
    GREEN,
    RED,
    STUDENT,
    TEACHER,
    drawing_style,
    new_figure,
    show_image,
    size_label,
)
from drkd.reports.files import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODELS = {"teacher": "teacher", "student": "student", "drkd": "student + DRKD"}
_LEAST_OVERLAP = 0.5


@dataclass(frozen=True)
class Box:
    """One box of an image.

    Args:
        corners: x1, y1, x2, y2 in px.
        label: Index of its class.
        score: In [0, 1]; 1 for ground truth.
    """

    corners: tuple[float, float, float, float]
    label: int
    score: float


@dataclass(frozen=True)
class ComparedImage:
    """One image with its ground truth and what each model found.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        truth: Its objects.
        found: Detections by model: teacher, student, drkd.
    """

    pixels: NDArray[np.uint8]
    truth: tuple[Box, ...]
    found: Mapping[str, tuple[Box, ...]]


@dataclass(frozen=True)
class ComparedImages:
    """``detections.json`` of a demo with its images.

    Args:
        images: The images.
        class_names: Names by label.
    """

    images: tuple[ComparedImage, ...]
    class_names: tuple[str, ...]


def read_compared_images(path: Path) -> ComparedImages:
    """Read ``detections.json`` and the image files it names, relative to itself.

    Raises:
        DrkdError: Naming file, image and field.
    """
    from PIL import Image, UnidentifiedImageError

    content = read_json(path, kind=dict)
    names, entries = content.get("class_names"), content.get("images")
    if not isinstance(names, list) or not isinstance(entries, list):
        raise DrkdError(f"{path}: fields class_names and images should be arrays.")
    images = []
    for index, entry in enumerate(entries):
        where = f"{path}, images[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            raise DrkdError(f"{where}: field file should be the path of an image.")
        try:
            with Image.open(path.parent / entry["file"], formats=("PNG", "JPEG")) as image:
                pixels = np.asarray(image.convert("RGB"), dtype=np.uint8)
        except (OSError, UnidentifiedImageError) as error:
            raise DrkdError(f"{where}: the image {path.parent / entry['file']} cannot be read: {error}") from error
        parts = {
            name: _read_boxes(
                entry.get(name), where=f"{where}.{name}", classes=len(names), scored=name != "ground_truth"
            )
            for name in ("ground_truth", *_MODELS)
        }
        images.append(ComparedImage(pixels, parts.pop("ground_truth"), parts))
    return ComparedImages(tuple(images), tuple(str(name) for name in names))


def draw_detections(compared: ComparedImages, *, images: int = 5, threshold: float = 0.4) -> Figure:
    """Draw ground truth, teacher, student and student + DRKD side by side, one row an image.

    Args:
        compared: The images.
        images: How many rows at most.
        threshold: Least score of a detection that is drawn.
    """
    rows = compared.images[:images]
    with drawing_style():
        figure = new_figure(10.4, 0.5 + 2.75 * max(1, len(rows)))
        panels = figure.subplots(max(1, len(rows)), 4, squeeze=False)
        for row, image in zip(panels, rows, strict=False):
            _draw_truth(row[0], image, compared.class_names)
            for axes, model in zip(row[1:], _MODELS, strict=True):
                _draw_found(axes, image, model, compared.class_names, threshold=threshold)
        for axes, title in zip(panels[0], ("ground truth", *_MODELS.values()), strict=True):
            axes.set_title(title, loc="center")
        if not rows:
            for axes in panels[0]:
                axes.set_axis_off()
        _explain_colours(figure, threshold)
        return figure


def draw_headline(
    metrics: Mapping[str, Mapping[str, float]],
    compared: ComparedImages,
    *,
    image: int = 0,
    threshold: float = 0.4,
    small_px: float | None = None,
) -> Figure:
    """Draw the README's picture: bars of AP and AP_S beside one image as each model sees it.

    Args:
        metrics: COCO's numbers in [0, 1] by model: teacher, student, drkd.
        compared: The images.
        image: Which of them.
        threshold: Least score of a detection that is drawn.
        small_px: Side of the square below which an object is small, px.
    """
    with drawing_style():
        figure = new_figure(11.6, 3.0)
        parts: Any = figure.subfigures(1, 2, width_ratios=[1, 2.35])
        left, right = parts
        _draw_bars(left.subplots(), metrics, small_px)
        if image < len(compared.images):
            panels = right.subplots(1, 4)
            chosen = compared.images[image]
            _draw_truth(panels[0], chosen, compared.class_names)
            panels[0].set_title("ground truth", loc="center")
            for axes, (model, title) in zip(panels[1:], _MODELS.items(), strict=True):
                _draw_found(axes, chosen, model, compared.class_names, threshold=threshold)
                axes.set_title(title, loc="center")
            _explain_colours(right, threshold)
        return figure


def match_boxes(found: Sequence[Box], truth: Sequence[Box]) -> list[int | None]:
    """Return, for every detection, the index of the object it found, or None.

    Greedy in the order of scores: the object of its class that overlaps most, by at least half, and is still free.
    """
    matches: list[int | None] = [None] * len(found)
    free = set(range(len(truth)))
    for index in sorted(range(len(found)), key=lambda i: -found[i].score):
        fitting = {
            other: _overlap(found[index].corners, truth[other].corners)
            for other in free
            if truth[other].label == found[index].label
        }
        best = max(fitting, key=fitting.__getitem__, default=None)
        if best is not None and fitting[best] >= _LEAST_OVERLAP:
            matches[index] = best
            free.discard(best)
    return matches


def _draw_bars(axes: Axes, metrics: Mapping[str, Mapping[str, float]], small_px: float | None) -> None:
    colours = {"teacher": TEACHER, "student": STUDENT, "drkd": DISTILLED}
    groups = {name: size_label(name, small_px) for name in ("ap", "ap_small")}
    highest = 1.0
    for offset, (model, title) in enumerate(_MODELS.items()):
        values = [metrics[model][name] for name in groups]
        heights = [0.0 if math.isnan(value) else 100 * value for value in values]
        highest = max(highest, *heights)
        places = [group + 0.28 * (offset - 1) for group in range(len(groups))]
        axes.bar(places, heights, width=0.25, color=colours[model], label=title)
        for place, height, value in zip(places, heights, values, strict=True):
            text = "-" if math.isnan(value) else f"{height:.1f}"
            axes.annotate(
                text,
                (place, height),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                fontweight="bold" if model == "drkd" else "normal",
            )
    axes.set_xticks(range(len(groups)), list(groups.values()), fontsize=9)
    axes.set_ylim(0, 1.32 * highest)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper center", ncols=3, columnspacing=0.9, handlelength=0.9, handletextpad=0.4, fontsize=8)


def _draw_truth(axes: Axes, image: ComparedImage, names: Sequence[str]) -> None:
    _show_pixels(axes, image)
    for box in image.truth:
        _draw_box(axes, box, colour=GREEN, text=names[box.label])
    axes.set_xlabel(f"{len(image.truth)} objects", fontsize=8)


def _draw_found(axes: Axes, image: ComparedImage, model: str, names: Sequence[str], *, threshold: float) -> None:
    _show_pixels(axes, image)
    found = [box for box in image.found[model] if box.score >= threshold]
    matches = match_boxes(found, image.truth)
    for box in (truth for index, truth in enumerate(image.truth) if index not in matches):
        _draw_box(axes, box, colour="white", text="", dashed=True)
    for box, match in zip(found, matches, strict=True):
        _draw_box(axes, box, colour=RED if match is None else BLUE, text=names[box.label])
    right = sum(match is not None for match in matches)
    axes.set_xlabel(f"{right} of {len(image.truth)} found, {len(found) - right} wrong", fontsize=8)


def _show_pixels(axes: Axes, image: ComparedImage) -> None:
    show_image(axes, image.pixels)
    height, width = image.pixels.shape[:2]
    # Boxes may reach over the rim; the view does not follow them.
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _draw_box(axes: Axes, box: Box, *, colour: str, text: str, dashed: bool = False) -> None:
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box.corners
    style: Any = (0, (2.5, 2)) if dashed else "solid"
    axes.add_patch(
        Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.4, linestyle=style)
    )
    if text:
        label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        axes.text(
            x1 - 0.5,
            y1 - 1.2,
            text,
            color="white",
            fontsize=6.5,
            va="bottom",
            bbox=label,
            clip_on=True,
            parse_math=False,
        )


def _explain_colours(figure: Any, threshold: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    missed = Line2D([], [], color="#777777", linestyle=(0, (2.5, 2)), linewidth=1.4, label="missed (white)")
    handles = [Patch(color=BLUE, label="found"), Patch(color=RED, label="wrong"), missed]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        handlelength=1.4,
        title=f"detections with a score of {threshold:g} or more; found: right class, overlap 0.5 or more",
        title_fontsize=8,
    )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return both / (areas - both) if areas > both else 0.0


def _read_boxes(content: Any, *, where: str, classes: int, scored: bool) -> tuple[Box, ...]:
    if not isinstance(content, list):
        raise DrkdError(f"{where} should be an array of boxes.")
    boxes = []
    for index, entry in enumerate(content):
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        corners, label = fields.get("box", []), fields.get("label")
        score = fields.get("score", None if scored else 1.0)
        numbers = isinstance(corners, list) and len(corners) == 4 and all(isinstance(c, int | float) for c in corners)
        if not numbers or not isinstance(label, int) or not 0 <= label < classes or not isinstance(score, int | float):
            raise DrkdError(
                f"{where}[{index}] should hold box (x1, y1, x2, y2 px), label (0..{classes - 1})"
                f"{' and score' if scored else ''}, got {entry!r}."
            )
        x1, y1, x2, y2 = (float(corner) for corner in corners)
        boxes.append(Box((x1, y1, x2, y2), label, float(score)))
    return tuple(boxes)
