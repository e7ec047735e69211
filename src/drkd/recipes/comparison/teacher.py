"""Score a recipe's teacher on the split that its students are scored on, as a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from drkd.contracts import DrkdError
from drkd.recipes.evaluation import evaluate_detector
from drkd.recipes.loading import choose_device
from drkd.recipes.recipe import Recipe, load_recipe
from drkd.recipes.run_folder import RunFolder, write_json
from drkd.recipes.teacher_assembly import build_teacher


def evaluate_teacher(recipe: Recipe) -> Path:
    """Measure the recipe's teacher on ``evaluation.split``; write a run folder; return it.

    Raises:
        DrkdError: If the recipe names no teacher or no split, or the teacher cannot be loaded.
    """
    if recipe.teacher is None or recipe.evaluation.split is None:
        raise DrkdError("Expected a recipe with a teacher and with evaluation.split.")
    with RunFolder(recipe.output, overwrite=recipe.overwrite) as folder:
        recipe.data.setup("fit")
        teacher = build_teacher(
            recipe.teacher,
            recipe.data.class_names,
            image_settings=recipe.data.image_settings,
            class_map=recipe.class_map,
            teacher_size=recipe.teacher_size,
        )
        folder.start(resolved=recipe.resolved, seed=recipe.seed, kind="teacher")
        accelerator = recipe.training.accelerator
        evaluated = evaluate_detector(
            teacher,
            recipe.data.split(recipe.evaluation.split),
            loader=recipe.data.loader(recipe.evaluation.split),
            area_scale=recipe.evaluation.area_scale,
            device=choose_device("cuda" if accelerator == "gpu" else accelerator),
        )
        write_json(folder.path / "evaluation.json", {**evaluated.metrics, "split": recipe.evaluation.split})
        folder.finish("finished")
    return folder.path


def main(arguments: Sequence[str]) -> int:
    """Take a recipe's command-line arguments; a user's mistake is a paragraph and exit code 2."""
    try:
        evaluate_teacher(load_recipe([], arguments))
    except DrkdError as error:
        print(f"drkd: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
