"""Figures of what happened over the steps: learning curves, losses, loudness of the distillation terms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from drkd.reports.figures import (
    DISTILLED,
    GREEN,
    GREY,
    SERIES,
    STUDENT,
    TEACHER,
    drawing_style,
    label_decades,
    new_figure,
    size_label,
)
from drkd.reports.files import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The least ratio that is told apart from none, and the largest rise of a term that a bar is drawn for, %.
_LEAST = 1e-6
_MOST_RISE = 200.0


def draw_learning_curves(
    runs: Mapping[str, Mapping[str, Curve]],
    *,
    teacher: Mapping[str, float] | None = None,
    metrics: Sequence[str] = ("ap", "ap50", "ap_small"),
    small_px: float | None = None,
) -> Figure:
    """Draw validation metrics over the steps, one panel a metric and one line a run.

    Args:
        runs: Columns of ``metrics.csv`` by run: the first is the student, the second the distilled one.
        teacher: The teacher's final metrics, drawn as a level.
        metrics: Which ones; only those that some run has logged as ``val/<metric>`` are drawn.
        small_px: Side of the square below which an object is small, px.
    """
    shown = [name for name in metrics if any(f"val/{name}" in curves for curves in runs.values())]
    with drawing_style():
        figure = new_figure(3.5 * max(1, len(shown)), 3.1)
        panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
        for axes, metric in zip(panels, shown, strict=False):
            for colour, (run, curves) in zip((STUDENT, DISTILLED, *SERIES[2:]), runs.items(), strict=False):
                if f"val/{metric}" in curves:
                    curve = curves[f"val/{metric}"]
                    values = [100 * value for value in curve.values]
                    # Matplotlib leaves labels that begin with "_" out of legends.
                    label = f" {run}" if run.startswith("_") else run
                    axes.plot(curve.steps, values, color=colour, label=label, marker="o", markersize=3)
            level = (teacher or {}).get(metric, math.nan)
            if not math.isnan(level):
                axes.axhline(100 * level, color=TEACHER, linestyle=(0, (5, 3)), linewidth=1.4, label="teacher")
            axes.set_title(size_label(metric, small_px))
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
        if shown:
            panels[0].legend(loc="lower right")
        else:
            _say_empty(panels[0], "no validation was logged")
        return figure


def draw_losses(curves: Mapping[str, Curve], *, spans: bool = False) -> Figure:
    """Draw the task's and the distillation's terms over the steps, smoothed, each group on a logarithmic axis.

    Args:
        curves: Columns of ``metrics.csv``.
        spans: Whether some distillation terms have a part of the run only; they are drawn there.
    """
    groups = {
        "Task losses": _told(summed_terms(curves, "task/")),
        "Distillation terms (unweighted)": _told(summed_terms(curves, "bare/"), spans=spans),
    }
    groups = {title: terms for title, terms in groups.items() if terms}
    with drawing_style():
        figure = new_figure(4.6 * max(1, len(groups)), 3.1)
        panels = figure.subplots(1, max(1, len(groups)), squeeze=False)[0]
        for axes, (title, terms) in zip(panels, groups.items(), strict=False):
            _draw_terms(axes, terms)
            axes.set_title(title)
        if not groups:
            _say_empty(panels[0], "no losses were logged")
        return figure


def draw_kd_report(curves: Mapping[str, Curve], *, spans: bool = False) -> Figure:
    """Draw what every distillation term did: its gradient against the task's, and how far it fell.

    A term whose ratio stays near zero distils nothing, however sensible its weight looks.

    Args:
        curves: Columns of ``metrics.csv``.
        spans: Whether some terms have a part of the run only; how far one fell is then said of its part.
    """
    ratios, terms = _told(_every_term(curves, "ratio/")), _told(summed_terms(curves, "bare/"), spans=spans)
    with drawing_style():
        figure = new_figure(9.6, 0.9 + 0.3 * max(5, len(ratios)))
        left, right = figure.subplots(1, 2)
        left.set_title("Gradient at the student's features, relative to the task's")
        if ratios:
            for row, curve in enumerate(ratios.values()):
                # A logarithmic axis has no zero: what is silent stands at its end.
                values = [max(value, _LEAST) for value in curve.values]
                middle, last = statistics.median(values), values[-1]
                left.plot(
                    [min(values), max(values)], [row, row], color=GREY, linewidth=4, alpha=0.35, solid_capstyle="round"
                )
                left.plot([middle], [row], "o", color=DISTILLED, markersize=6, label="median" if row == 0 else None)
                left.plot(
                    [last],
                    [row],
                    "|",
                    color=STUDENT,
                    markersize=11,
                    markeredgewidth=2,
                    label="last" if row == 0 else None,
                )
            left.axvspan(0.1, 1.0, color=GREEN, alpha=0.08, linewidth=0)
            left.set_xscale("log")
            low, high = left.get_xlim()
            left.set_xlim(min(low, 0.05), max(high, 2.0))
            label_decades(left.xaxis)
            left.set_yticks(range(len(ratios)), [name.replace("_", " ") for name in ratios])
            left.set_ylim(len(ratios) - 0.4, -1.5)
            left.set_xlabel("ratio of gradient norms (band: 0.1 to 1)")
            left.legend(loc="upper right", ncols=2)
        else:
            _say_empty(left, "no gradient ratios were logged")
        right.set_title("Fall of each term since the first steps")
        falls = {name: _fall(curve) for name, curve in terms.items()}
        if falls:
            for row, (first, last) in enumerate(falls.values()):
                change = 100 * (last / first - 1) if first else 0.0
                shown = min(change, _MOST_RISE)  # a bar at the rim is longer than that; its number says how much
                right.barh(row, shown, color=SERIES[0] if change <= 0 else SERIES[5], height=0.55)
                right.annotate(
                    f"{f'{change:+.0f} %' if first else '-'}  ({first:.3g} to {last:.3g})",
                    (max(shown, 0), row),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            right.axvline(0, color="#777777", linewidth=0.8)
            changes = [100 * (last / first - 1) if first else 0.0 for first, last in falls.values()]
            # Room for the words beside the longest bar.
            right.set_xlim(min(-50.0, *changes) * 1.05, 90 + min(max(0.0, *changes), _MOST_RISE))
            right.set_yticks(range(len(falls)), [name.replace("_", " ") for name in falls])
            right.set_ylim(len(falls) - 0.4, -0.6)
            right.set_xlabel("change, %: mean of the last tenth against the first")
        else:
            _say_empty(right, "no distillation terms were logged")
        return figure


def summed_terms(curves: Mapping[str, Curve], prefix: str) -> dict[str, Curve]:
    """Return the curves below a prefix without those of single levels ("kd/pixel_relation/p3") where a sum is there."""
    named = _every_term(curves, prefix)
    return {name: curve for name, curve in named.items() if name.rpartition("/")[0] not in named}


def _told(terms: Mapping[str, Curve], *, spans: bool = False) -> dict[str, Curve]:
    """The terms where they say something: where they are finite, and with spans not 0, as a term is outside of its own.

    A step that was skipped logs infinite ones. A term that is 0 all along stays, one that is never finite does not.
    """
    found = {}
    for name, curve in terms.items():
        points = [point for point in zip(curve.steps, curve.values, strict=True) if math.isfinite(point[1])]
        points = [point for point in points if not spans or point[1]] or points
        if points:
            found[name] = Curve(tuple(step for step, _ in points), tuple(value for _, value in points))
    return found


def _every_term(curves: Mapping[str, Curve], prefix: str) -> dict[str, Curve]:
    return {name.removeprefix(prefix): curve for name, curve in curves.items() if name.startswith(prefix)}


def _draw_terms(axes: Axes, terms: Mapping[str, Curve]) -> None:
    for colour, (name, curve) in zip(SERIES * 3, terms.items(), strict=False):
        axes.plot(curve.steps, curve.values, color=colour, alpha=0.22, linewidth=1.0)
        axes.plot(curve.steps, _smooth(curve.values), color=colour, label=name.replace("_", " "))
    if all(value > 0 for curve in terms.values() for value in curve.values):
        axes.set_yscale("log")
        label_decades(axes.yaxis)
    axes.set_xlabel("step")
    # Curves may pass behind it: a short run's are flat, wherever they lie.
    axes.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=0.85)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Running mean over a fifteenth of the points, shorter at the ends."""
    half = max(1, len(values) // 30)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _fall(curve: Curve) -> tuple[float, float]:
    """Mean of the first and of the last tenth of the points."""
    count = max(1, len(curve.values) // 10)
    return sum(curve.values[:count]) / count, sum(curve.values[-count:]) / count


def _say_empty(axes: Axes, words: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="#888888")
