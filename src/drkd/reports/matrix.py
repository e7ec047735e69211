"""The figure of a run matrix: every seed a dot, every method's mean a line, the teacher a level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drkd.reports.figures import DISTILLED, SERIES, STUDENT, TEACHER, drawing_style, new_figure, size_label
from drkd.reports.gap import summarise
from drkd.reports.tables import group_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"student": STUDENT, "drkd": DISTILLED}


def draw_matrix(cells: Sequence[Mapping[str, Any]], *, metrics: Sequence[str] = ("ap", "ap_small")) -> Figure:
    """Draw the scores of a run matrix, one panel a detector and metric.

    Args:
        cells: As in ``compare_matrix``.
        metrics: Which metrics to draw.
    """
    scores = group_scores(cells, metrics=metrics)
    with drawing_style():
        figure = new_figure(0.6 + 2.7 * max(1, len(scores)) * len(metrics), 3.2)
        panels = figure.subplots(1, max(1, len(scores) * len(metrics)), squeeze=False)[0]
        wanted = [(detector, metric) for detector in scores for metric in metrics]
        for axes, (detector, metric) in zip(panels, wanted, strict=False):
            _draw_panel(axes, {method: list(found[metric].values()) for method, found in scores[detector].items()})
            axes.set_title(f"{detector}: {size_label(metric, None)}")
        return figure


def _draw_panel(axes: Axes, values: Mapping[str, list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    methods = [method for method in values if method != "teacher"]
    spare = (colour for colour in SERIES[2:] * 3)
    for place, method in enumerate(methods):
        colour = _COLOURS.get(method) or next(spare)
        points = [100 * value for value in values[method] if not math.isnan(value)]
        spread = [0.16 * (index - (len(points) - 1) / 2) / max(1, len(points) - 1) for index in range(len(points))]
        axes.plot([place + shift for shift in spread], points, "o", color=colour, markersize=6, alpha=0.8)
        mean = summarise(points).mean
        if not math.isnan(mean):
            axes.plot([place - 0.28, place + 0.28], [mean, mean], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.annotate(f"{mean:.1f}", (place + 0.3, mean), xytext=(2, 0), textcoords="offset points", va="center")
    teacher = summarise(values.get("teacher", [])).mean
    if not math.isnan(teacher):
        axes.axhline(100 * teacher, color=TEACHER, linestyle=(0, (5, 3)), linewidth=1.4)
        axes.annotate("teacher", (-0.55, 100 * teacher), xytext=(0, 3), textcoords="offset points", color=TEACHER)
    axes.set_xticks(range(len(methods)), methods)
    axes.set_xlim(-0.6, len(methods) - 0.25)
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", visible=False)
