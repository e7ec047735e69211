"""The HTML page of a demo, a run or a run matrix: one file with everything inside, to open or to send."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drkd.contracts import DrkdError
from drkd.reports.curves import draw_kd_report, draw_learning_curves, draw_losses
from drkd.reports.figures import render_png
from drkd.reports.files import Evaluation, Run, read_cost, read_evaluation, read_run, write_atomically
from drkd.reports.pictures import draw_detections, draw_headline, read_compared_images
from drkd.reports.relations import draw_pixel_relations, draw_relation_matrices, read_explanation
from drkd.reports.tables import Model, Table, compare_classes, compare_models, describe_evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from drkd.reports.files import Curve

PAGE = "report.html"
_FIGURES = "figures"
_LEARNING = "learning_curves"
_QUICK = 100
"""Steps below which nothing is learned that a page could show."""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: Heading.
        text: What the reader sees here and how to read it, a paragraph a line.
        table: A table, if any.
        figure: PNG file, if any.
        description: The figure in words, for those who cannot see it.
    """

    title: str
    text: str = ""
    table: Table | None = None
    figure: bytes | None = None
    description: str = ""

    @property
    def figure_url(self) -> str:
        """The figure as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.figure or b"").decode("ascii")


def write_demo_report(folder: Path) -> Path:
    """Write the report of a demo: ``report.html``, ``table.md`` and ``figures/*.png`` in its folder.

    Args:
        folder: Holds ``teacher/`` (evaluation.json, cost.json), the run folders ``student/`` and ``drkd/``,
            ``detections.json`` with its images and ``explain.npz``.

    Returns:
        The page.

    Raises:
        DrkdError: If a file is missing or damaged, naming it and the field.
    """
    teacher = Model(
        "teacher", read_evaluation(folder / "teacher/evaluation.json"), _read_cost_if_there(folder / "teacher")
    )
    student, distilled = (read_run(folder / name) for name in ("student", "drkd"))
    distilled_evaluation = _require_evaluation(distilled)
    models = (
        teacher,
        Model("student", _require_evaluation(student), student.cost),
        Model("student + DRKD", distilled_evaluation, distilled.cost),
    )
    compared = read_compared_images(folder / "detections.json")
    explanation = read_explanation(folder / "explain.npz")
    table = compare_models(*models)
    small_px = distilled_evaluation.thresholds_px[0]
    runs = {"student": student.curves, "student + DRKD": distilled.curves}
    metrics = dict(zip(("teacher", "student", "drkd"), (model.evaluation.metrics for model in models), strict=True))
    figures = {
        "headline": draw_headline(metrics, compared, small_px=small_px),
        **_learning_figure(runs, teacher=teacher.evaluation.metrics, small_px=small_px),
        "detections": draw_detections(compared),
        "pixel_relations": draw_pixel_relations(explanation),
        "relation_matrices": draw_relation_matrices(explanation),
        "distillation": draw_kd_report(distilled.curves, spans=distilled.has_spans),
        "losses": draw_losses(distilled.curves, spans=distilled.has_spans),
    }
    images = save_figures(figures, folder)
    sections = [
        Section("Result", "", table, images["headline"], "Bars of AP and AP_S for each model beside one image"),
        *_demo_sections(images),
        Section("Every class", "AP of every class.", compare_classes({m.name: m.evaluation for m in models})),
    ]
    write_atomically(folder / "table.md", table.markdown().encode())
    return write_page(
        folder / PAGE,
        title="A student taught by DRKD",
        lead=say_quick(distilled.facts.get("steps"))
        + "The same student, budget and seed twice: alone, and taught by a frozen teacher through dual relation "
        "knowledge distillation. Both times it starts from the teacher's neck and head, its small backbone being its "
        "own. It costs the same at inference; only its weights differ.",
        sections=sections,
        runs={"student": student, "student + DRKD": distilled},
    )


def say_quick(steps: object) -> str:
    """What a demo's page begins with where so few steps show nothing; else nothing."""
    if not isinstance(steps, int) or steps >= _QUICK:
        return ""
    return f"A quick run of {steps} steps, which shows that everything works and not that it learns. "


def write_run_report(folder: Path) -> Path:
    """Write the report of one run folder: ``report.html`` and ``figures/*.png`` in it.

    Returns:
        The page.

    Raises:
        DrkdError: If ``run.json`` is missing or a file is damaged, naming it and the field.
    """
    run = read_run(folder)
    # "." and ".." have no name of their own.
    name = folder.resolve().name
    small_px = run.evaluation.thresholds_px[0] if run.evaluation else None
    figures = {
        **_learning_figure({name: run.curves}, small_px=small_px),
        "losses": draw_losses(run.curves, spans=run.has_spans),
    }
    distils = any(name.startswith(("kd/", "ratio/")) for name in run.curves)
    if distils:
        figures["distillation"] = draw_kd_report(run.curves, spans=run.has_spans)
    images = save_figures(figures, folder)
    sections = []
    if run.evaluation:
        sections.append(Section("Result", "COCO's twelve numbers, x 100.", describe_evaluation(run.evaluation)))
    sections += _learning_sections(images)
    sections.append(_loss_section(images["losses"]))
    if distils:
        sections.append(_distillation_section(images["distillation"]))
    if run.evaluation:
        sections.append(Section("Every class", "AP of every class.", compare_classes({"AP": run.evaluation})))
    status = str(run.facts.get("status", "unknown"))
    return write_page(
        folder / PAGE,
        title=f"Run {name}",
        lead=f"Status: {status}.",
        sections=sections,
        runs={name: run},
    )


def _demo_sections(images: Mapping[str, bytes]) -> list[Section]:
    return [
        *_learning_sections(images),
        Section(
            "Detections side by side",
            "Validation images. Blue: found; red: wrong; dashed white: an object that the model missed.",
            figure=images["detections"],
            description="Ground truth and the detections of teacher, student and distilled student on several images",
        ),
        Section(
            "Where pixels relate",
            "Left: the strength of plain features, as a feature-imitating loss sees them. Right: what the graph "
            "reasoning of the pixel-wise relation makes of them: what DRKD teaches. Each map has its own scale.",
            figure=images["pixel_relations"],
            description="Heat maps of plain features and of pixel relations for student and teacher",
        ),
        Section(
            "How instances relate",
            "Row and column are the instances shown at the rim; a bright cell is a strong relation. Student and "
            "teacher share a scale, set by the relations between different instances. The filter says which relations "
            "the student is asked to copy.",
            figure=images["relation_matrices"],
            description="Relation matrices of the instances for student and teacher, and the relation filter",
        ),
        _distillation_section(images["distillation"]),
        _loss_section(images["losses"]),
    ]


def _learning_figure(
    runs: Mapping[str, Mapping[str, Curve]], *, teacher: Mapping[str, float] | None = None, small_px: float | None
) -> dict[str, Figure]:
    """The learning curves; nothing where no run was validated."""
    if not any(name.startswith("val/") for curves in runs.values() for name in curves):
        return {}
    return {_LEARNING: draw_learning_curves(runs, teacher=teacher, small_px=small_px)}


def _learning_sections(images: Mapping[str, bytes]) -> list[Section]:
    if _LEARNING not in images:
        return []
    return [
        Section(
            "Learning curves",
            "On the split that is watched in training, x 100. A dashed line is the teacher on the split of the table.",
            figure=images[_LEARNING],
            description="Validation metrics over steps",
        )
    ]


def _loss_section(figure: bytes) -> Section:
    return Section(
        "Losses",
        "As logged (pale) and smoothed. Distillation terms are shown without their weights.",
        figure=figure,
        description="Task losses and distillation terms over steps",
    )


def _distillation_section(figure: bytes) -> Section:
    return Section(
        "Is the distillation alive?",
        "A term teaches only if its gradient at the student's features is felt beside the task's (left), and if the "
        "student can follow it (right). A ratio near zero means that the term is silently off.",
        figure=figure,
        description="Gradient ratio and fall of every distillation term",
    )


def _require_evaluation(run: Run) -> Evaluation:
    if run.evaluation is None:
        raise DrkdError(f"{run.folder / 'evaluation.json'} is missing. Evaluate the run before its report is written.")
    return run.evaluation


def _read_cost_if_there(folder: Path) -> dict[str, Any]:
    path = folder / "cost.json"
    return read_cost(path) if path.exists() else {}


def save_figures(figures: Mapping[str, Figure], folder: Path) -> dict[str, bytes]:
    """Write the figures as ``figures/<name>.png``; return them."""
    images = {name: render_png(figure) for name, figure in figures.items()}
    for name, image in images.items():
        write_atomically(folder / _FIGURES / f"{name}.png", image)
    return images


def write_page(path: Path, *, title: str, lead: str, sections: Sequence[Section], runs: Mapping[str, Run]) -> Path:
    """Write one HTML file with everything inside.

    Args:
        path: The file.
        title: Heading.
        lead: The first sentence.
        sections: In this order.
        runs: By name, runs whose facts and recipes close the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Everything that comes from a run is escaped: names of classes and folders are not ours.
    environment = Environment(
        loader=PackageLoader("drkd.reports", package_path=""), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html.j2").render(
        title=title,
        lead=lead,
        sections=sections,
        runs=[{"name": name, "facts": _describe_facts(run.facts), "recipe": run.recipe} for name, run in runs.items()],
    )
    return write_atomically(path, page.encode("utf-8"))


def _describe_facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the facts of a run as pairs of words, nested ones in one line."""
    order = ("seed", "commit", "status", "started", "finished", "machine", "versions", "command")
    known = [name for name in order if name in facts]
    return [
        (name, _describe_fact(name, facts[name])) for name in (*known, *(name for name in facts if name not in order))
    ]


def _describe_fact(name: str, value: Any) -> str:
    # A command is there to be pasted.
    return shlex.join(map(str, value)) if name == "command" and isinstance(value, list) else _describe(value)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_describe(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(_describe(part) for part in value)
    return "-" if value is None else str(value)
