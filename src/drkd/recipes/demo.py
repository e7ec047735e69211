"""The demo: the embedded digits, a student alone and with DRKD, and one page that shows what came of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from drkd.contracts import DetectionBatch, Detections, Detector, DrkdError
from drkd.data.digits import DigitsConfig, build_digits
from drkd.data.module import DetectionDataModule
from drkd.recipes.builtin import builtin_recipe
from drkd.recipes.evaluation import evaluate_detector, measure_detector
from drkd.recipes.explanation import explain, save_explanation
from drkd.recipes.lock import locked_folder
from drkd.recipes.recipe import load_recipe
from drkd.recipes.run_folder import versions, write_json
from drkd.recipes.training import RunResult, distill, train

_MARK = "demo.json"
_SHOWN = 6
_QUICK_DIGITS = DigitsConfig(train=96, tune=16, val=32)
_QUICK = (
    "--training.epochs=null",
    "--training.steps=16",
    "--training.optimization.warmup_steps=4",
    "--training.validate_every=0",
    "--training.monitor_interval=4",
    "--training.calibration_steps=8",
)


def run_demo(output: Path, *, quick: bool = False) -> Path:
    """Train the demo's student alone and with DRKD, one budget, one seed; evaluate; write what the report shows.

    Args:
        output: Folder of the demo; an earlier demo in it (by its ``demo.json``) is replaced.
        quick: A minute's run that only shows that everything works; its scores say nothing.

    Returns:
        The folder, with everything that ``drkd.reports.write_demo_report`` draws.

    Raises:
        DrkdError: If the folder holds something else, or for anything else a user can put right.
    """
    check_demo(output)
    with locked_folder(output, worker="drkd demo"):
        clear_demo(output)
        return _run(output, quick=quick)


def _run(output: Path, *, quick: bool) -> Path:
    """The demo, in a folder that is empty and held."""
    console = Console(stderr=True)
    console.print("[bold]1/5[/] Building the embedded data set: handwritten digits on photographs (once)")
    root = build_digits(config=_QUICK_DIGITS) if quick else build_digits()
    overrides = [f"--data.root={root}", *(_QUICK if quick else ())]
    console.print("[bold]2/5[/] Training the student alone")
    alone = train(load_recipe(["demo"], [*overrides, f"--output={output / 'student'}"]))
    console.print("[bold]3/5[/] Training the same student with DRKD: same images, steps and seed")
    recipe = load_recipe(["demo"], [*overrides, f"--output={output / 'drkd'}"])
    distilled = distill(recipe)
    console.print("[bold]4/5[/] Evaluating the teacher")
    teacher = distilled.distiller.teacher
    if teacher is None:
        raise DrkdError(f"The recipe {builtin_recipe('demo')} names no teacher, so there is nothing to compare with.")
    _evaluate_teacher(teacher, recipe.data, output / "teacher", area_scale=recipe.evaluation.area_scale)
    models = {"teacher": teacher, "student": alone.student, "drkd": distilled.student}
    _measure_costs(models, recipe.data, output)
    console.print("[bold]5/5[/] Drawing detections and relations")
    _write_pictures(alone, distilled, recipe.data, output)
    return output


def check_demo(output: Path) -> list[str]:
    """The names of what a demo left in the folder.

    Raises:
        DrkdError: If it holds anything else: runs of the user's may be called as the demo's are.
    """
    known = {"student", "drkd", "teacher", "images", "figures", "detections.json", "explain.npz", _MARK}
    known |= {"report.html", "table.md"}
    held = sorted(path.name for path in output.iterdir() if path.name != ".lock") if output.is_dir() else []
    # Demos of before there was a mark have both of these at their end.
    marked = _MARK in held or {"detections.json", "explain.npz"} <= set(held)
    strange = [name for name in held if name not in known] if marked else held
    if strange or (output.exists() and not output.is_dir()):
        raise DrkdError(
            f"{output} holds something that is no demo ({', '.join(strange[:5]) or 'it is a file'}). "
            "Choose another folder with --output."
        )
    return held


def clear_demo(output: Path) -> None:
    """Make the folder empty, but for the mark that it is a demo's; only such a one is removed, see `check_demo`."""
    held = check_demo(output)
    output.mkdir(parents=True, exist_ok=True)
    # First, so that what an interruption leaves is known again.
    write_json(output / _MARK, {"made_by": "drkd demo", "versions": versions()})
    for path in (output / name for name in held if name != _MARK):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _evaluate_teacher(teacher: Detector, data: DetectionDataModule, folder: Path, *, area_scale: float) -> None:
    measured = evaluate_detector(teacher, data.split("val"), loader=data.loader("val"), area_scale=area_scale)
    write_json(folder / "evaluation.json", {**measured.metrics, "split": "val"})


def _measure_costs(models: Mapping[str, Detector], data: DetectionDataModule, output: Path) -> None:
    """Time all models one right after the other, so that what else the machine does meets all of them alike."""
    image_size = next(iter(data.loader("val"))).image_size
    for name, model in models.items():
        write_json(output / name / "cost.json", measure_detector(model, image_size).as_json())


@torch.no_grad()
def _write_pictures(alone: RunResult, distilled: RunResult, data: DetectionDataModule, output: Path) -> None:
    """Write what the report draws: detections of all three models, heat maps and relation matrices."""
    teacher = distilled.distiller.teacher
    if teacher is None:
        raise DrkdError("The distilled run has no teacher to draw.")
    batch = next(batch for batch in data.loader("val") if max(map(len, batch.boxes)) > 1)
    models = {"teacher": teacher, "student": alone.student, "drkd": distilled.student}
    found = {name: model.eval().detect(batch) for name, model in models.items()}
    shown = _busiest(batch)
    entries = []
    for index in shown:
        file = f"images/{batch.image_ids[index]}.png"
        _save_image(batch, index, output / file)
        scale = _original_scale(batch, index)
        truth = batch.targets[index]
        entries.append(
            {
                "file": file,
                "ground_truth": [
                    {"box": (box * scale).tolist(), "label": int(label)}
                    for box, label in zip(truth.boxes, truth.labels, strict=True)
                ],
                **{name: _plain(detections[index]) for name, detections in found.items()},
            }
        )
    write_json(output / "detections.json", {"class_names": list(data.class_names), "images": entries})
    save_explanation(output / "explain.npz", explain(distilled.distiller, batch, shown=shown))


def _busiest(batch: DetectionBatch) -> list[int]:
    """Images with the most boxes, in the order of the batch: they show the most."""
    order = sorted(range(len(batch)), key=lambda index: -len(batch.boxes[index]))
    return sorted(order[:_SHOWN])


def _original_scale(batch: DetectionBatch, index: int) -> torch.Tensor:
    (height, width), (original_height, original_width) = batch.sizes[index], batch.original_sizes[index]
    x, y = original_width / width, original_height / height
    return torch.tensor([x, y, x, y])


def _save_image(batch: DetectionBatch, index: int, path: Path) -> None:
    from torchvision.transforms.v2.functional import resize, to_pil_image

    height, width = batch.sizes[index]
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = resize(batch.images[index, :, :height, :width], list(batch.original_sizes[index]), antialias=True)
    to_pil_image(pixels.clamp(0, 1)).save(path)


def _plain(found: Detections, *, limit: int = 50) -> Sequence[dict[str, Any]]:
    return [
        {"box": box.tolist(), "score": float(score), "label": int(label)}
        for box, score, label in zip(found.boxes[:limit], found.scores[:limit], found.labels[:limit], strict=True)
    ]
