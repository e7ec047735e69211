"""Figures of a run matrix: every seed's scores, differences with their intervals, scores against cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from drkd.reports.figures import DISTILLED, SERIES, STUDENT, TEACHER, drawing_style, new_figure, size_label
from drkd.reports.gap import PairedDifference, summarise
from drkd.reports.tables import group_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"student": STUDENT, "drkd": DISTILLED}
_BESIDE = 7
"""So many methods fit a narrow panel."""
_TITLE = 34
"""So many letters of a title fit above a panel of differences."""
_NAMED = 14
"""So many names fit a panel of points."""
_LETTERS = 40
"""So many of their names' letters stand beside each other."""
_LINE = 12.0
"""Height of a label, pt."""
_LETTER = 5.6
"""Width of a letter of it, pt, about."""
_PANEL = (3.9, 2.9)
"""Of the figure of costs, inches, about."""


def draw_matrix(cells: Sequence[Mapping[str, Any]], *, metrics: Sequence[str] = ("ap", "ap_small")) -> Figure:
    """Draw the scores of a run matrix, one panel a detector and metric.

    Args:
        cells: Each with ``detector``, ``method``, ``seed`` and ``metrics``.
        metrics: Which metrics to draw.
    """
    scores = group_scores(cells, metrics=metrics)
    with drawing_style():
        wanted = [(detector, metric) for detector in scores for metric in metrics]
        methods = max((len(found) for found in scores.values()), default=1)
        # A panel is as wide as its methods ask for; of few, a detector's metrics stand beside each other.
        columns = len(metrics) if methods <= _BESIDE else 1
        rows = max(1, len(wanted) // columns)
        wide = 1.4 + (0.72 if methods <= _BESIDE else 0.5) * max(3, methods)
        figure = new_figure(wide * columns, 3.6 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (detector, metric) in zip(panels, wanted, strict=False):
            _draw_panel(axes, {method: list(found[metric].values()) for method, found in scores[detector].items()})
            axes.set_title(f"{detector}: {size_label(metric, None)}")
        return figure


def draw_differences(
    differences: Mapping[str, Mapping[str, Mapping[str, PairedDifference]]], *, reference: str
) -> Figure:
    """Draw paired differences with their intervals, one panel a pair and metric.

    Args:
        differences: By pair, metric and method, in [0, 1].
        reference: The method that stands at zero.
    """
    wanted = [(pair, metric) for pair, by_metric in differences.items() for metric in by_metric]
    rows = max((len(differences[pair][metric]) for pair, metric in wanted), default=1)
    with drawing_style():
        longest = max(
            (len(method) for by in differences.values() for found in by.values() for method in found), default=0
        )
        # What the names at the left take, inches, is no room for the title above the panel.
        wide = 3.4 + 0.07 * max(0, longest - 12) + 0.075 * max(0, max(map(len, differences), default=0) - _TITLE)
        figure = new_figure(0.6 + wide * max(1, len(wanted)), 1.3 + 0.36 * rows)
        panels = figure.subplots(1, max(1, len(wanted)), squeeze=False)[0]
        for axes, (pair, metric) in zip(panels, wanted, strict=False):
            by_method = differences[pair][metric]
            for row, difference in enumerate(by_method.values()):
                colour = DISTILLED if difference.is_clear else TEACHER
                if not math.isnan(difference.low):
                    ends = [100 * difference.low, 100 * difference.high]
                    axes.plot(ends, [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
                axes.plot([100 * difference.mean], [row], "o", color=colour, markersize=6)
            axes.axvline(0, color=STUDENT, linewidth=1.4)
            axes.set_yticks(range(len(by_method)), list(by_method))
            axes.set_ylim(len(by_method) - 0.4, -0.6)
            title = f"{pair}: Δ {size_label(metric, None)}"
            axes.set_title(title if len(title) <= _TITLE else f"{pair}\nΔ {size_label(metric, None)}")
            axes.set_xlabel(f"to {reference}, x 100; blue: beyond chance")
        if not wanted:
            panels[0].set_axis_off()
            panels[0].text(0.5, 0.5, f"nothing to compare with {reference} yet", ha="center", va="center")
        return figure


def draw_cost(costs: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """Draw AP against the time of a training step, one panel a pair.

    Args:
        costs: By pair and method: seconds per step, and AP in [0, 1].
    """
    with drawing_style():
        figure = new_figure(0.6 + 4.6 * max(1, len(costs)), 3.6)
        panels = figure.subplots(1, max(1, len(costs)), squeeze=False)[0]
        for axes, (pair, by_method) in zip(panels, costs.items(), strict=False):
            spare = cycle(SERIES[2:])
            for method, (seconds, score) in by_method.items():
                colour = _COLOURS.get(method) or next(spare)
                axes.plot([seconds], [100 * score], "o", color=colour, markersize=8)
            axes.set_title(pair)
            axes.set_xlabel("seconds per training step")
            axes.set_ylabel("AP x 100")
            axes.set_xlim(0, 1.35 * max((seconds for seconds, _ in by_method.values()), default=1.0))
            axes.margins(y=0.2)
            _name_points(axes, {name: (seconds, 100 * score) for name, (seconds, score) in by_method.items()})
        if not costs:
            panels[0].set_axis_off()
            panels[0].text(0.5, 0.5, "no step was timed", ha="center", va="center")
        return figure


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside points of a finished panel, each a line above those that it would cover.

    Of more than fit, those that no other point is both quicker and better than, and those that always have a colour.
    """
    if len(points) > _NAMED:
        points = {
            name: (x, y)
            for name, (x, y) in points.items()
            if name in _COLOURS or not any(other[0] < x and other[1] > y for other in points.values())
        }
    width, height = (72 * inches for inches in _PANEL)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()

    def place(x: float, y: float) -> tuple[float, float]:
        return width * (x - left) / (right - left), height * (y - low) / (high - low)

    # Left and right end and foot of what is there already, pt: the points, then names too.
    placed = [(across - 4, across + 4, up - 6) for across, up in (place(*point) for point in points.values())]
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
        across, up = place(x, y)
        start, own = across + 6, up + 5
        end, foot = start + _LETTER * len(name), own
        for other_start, other_end, other_foot in sorted(placed, key=lambda entry: entry[2]):
            if start < other_end and other_start < end and abs(foot - other_foot) < _LINE:
                foot = other_foot + _LINE
        placed.append((start, end, foot))
        line = {"arrowstyle": "-", "color": TEACHER, "linewidth": 0.8} if foot > own else None
        text = axes.annotate(name, (x, y), xytext=(6, 5 + foot - own), textcoords="offset points", arrowprops=line)
        text.set_in_layout(False)


def _draw_panel(axes: Axes, values: Mapping[str, list[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    methods = [method for method in values if method != "teacher"]
    many = len(methods) > 3
    slanted = sum(map(len, methods)) > _LETTERS or len(methods) > _BESIDE
    spare = cycle(SERIES[2:])
    for place, method in enumerate(methods):
        colour = _COLOURS.get(method) or next(spare)
        points = [100 * value for value in values[method] if not math.isnan(value)]
        spread = [0.16 * (index - (len(points) - 1) / 2) / max(1, len(points) - 1) for index in range(len(points))]
        axes.plot([place + shift for shift in spread], points, "o", color=colour, markersize=6, alpha=0.8)
        mean = summarise(points).mean
        if not math.isnan(mean):
            axes.plot([place - 0.28, place + 0.28], [mean, mean], color=colour, linewidth=2.2, solid_capstyle="round")
            if many:  # above, since beside it is the next method
                axes.annotate(
                    f"{mean:.1f}",
                    (place, max(points)),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize="small",
                )
            else:
                axes.annotate(
                    f"{mean:.1f}", (place + 0.3, mean), xytext=(2, 0), textcoords="offset points", va="center"
                )
    teacher = summarise(values.get("teacher", [])).mean
    if not math.isnan(teacher):
        axes.axhline(100 * teacher, color=TEACHER, linestyle=(0, (5, 3)), linewidth=1.4)
        axes.annotate("teacher", (-0.55, 100 * teacher), xytext=(0, 3), textcoords="offset points", color=TEACHER)
    axes.set_xticks(range(len(methods)), methods)
    if slanted:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(methods) - 0.25)
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="x", visible=False)
