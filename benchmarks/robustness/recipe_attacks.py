"""Damaged and hostile recipes and comparisons: parsed, built, turned into cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from attacks import Attacks
from mutations import ODD, guarded, mutate_bytes, mutate_value, tiny_detectors

from drkd.recipes.comparison.cell import make_cells
from drkd.recipes.comparison.definition import load_comparison
from drkd.recipes.recipe import load_recipe
from drkd.recipes.training import build_module, require_teacher_and_method


class RecipeAttacks(Attacks):
    """Recipes and comparisons.

    Args:
        folder: Working folder.
        data: A small data set.
        teacher: A saved detector of its classes.
    """

    def __init__(self, folder: Path, *, data: Path, teacher: Path) -> None:
        super().__init__(folder)
        self._file = folder / "input.yaml"
        self._recipe: dict[str, Any] = {
            **tiny_detectors(teacher),
            "method": {"class_path": "drkd.methods.DRKD", "init_args": {"warmup_steps": 3, "nodes": 4}},
            "data": {
                **{"root": str(data), "batch_size": 2, "min_size": [32, 40], "max_size": 64, "pad_to": [32, 64]},
                **{"workers": 0, "limit": 2, "zoom_out": 0.1, "classes": ["cat"], "size_divisor": 32},
            },
            "training": {
                **{"steps": 2, "ema": 0.9, "devices": 1, "accumulate": 1, "calibration_steps": 2},
                "optimization": {"milestones": [0.5, 0.9], "learning_rate": 0.01},
            },
            "evaluation": {"split": None, "area_scale": 0.25},
            "output": str(folder / "built"),
            "seed": 0,
        }
        self._named = folder / "recipe.yaml"
        self._named.write_text(yaml.safe_dump(self._recipe))
        self._comparison: dict[str, Any] = {
            "pairs": {"tiny": {"recipe": "recipe.yaml", "overrides": {"data.limit": 1, "training": {"steps": 3}}}},
            "methods": {
                "student": "train",
                "drkd": {
                    **{"class_path": "drkd.methods.DRKD", "init_args": {"nodes": 4, "states": 8}},
                    "overrides": {"training.calibration_steps": 2},
                },
            },
            **{"seeds": [0, 1], "split": "val", "overrides": {"data.max_size": 48}, "jobs": 1},
            **{"reference": "student", "output": str(folder / "compared")},
        }

    def try_recipe(self) -> str:
        """A recipe with other values, or other bytes, parsed."""
        self._damage(self._recipe)
        return guarded(lambda: load_recipe([self._file]))

    def try_build(self) -> str:
        """A recipe with other values, and where it parses: its data, its first batch, student, teacher and method."""
        changed: Any = self._recipe
        for _ in range(self._chance.choice((1, 1, 2))):
            # Where a run writes, and what is run, are not what this is for.
            part = self._chance.choice(("student", "teacher", "method", "data", "training", "evaluation"))
            changed = {**changed, part: mutate_value(self._chance, changed[part])} if part in changed else changed
        self._file.write_text(yaml.safe_dump(changed))
        return guarded(self._build, seconds=20.0)

    def try_comparison(self) -> str:
        """A comparison with other values, or other bytes, down to its cells."""
        self._damage(self._comparison)
        return guarded(
            lambda: make_cells(load_comparison(self._file), source=str(self._file)),
            seconds=30.0,
        )

    def _build(self) -> None:
        recipe = load_recipe([self._file])
        kind = "train" if recipe.method is None or recipe.teacher is None else "distill"
        if kind == "distill":
            require_teacher_and_method(recipe)
        recipe.data.setup("fit")
        if recipe.data._workers == 0:
            next(iter(recipe.data.train_dataloader()))
        build_module(recipe, kind=kind)

    def _damage(self, content: dict[str, Any]) -> None:
        chance = self._chance
        draw = chance.random()
        if draw < 0.6:
            changed: Any = content
            for _ in range(chance.choice((1, 1, 2))):
                changed = mutate_value(chance, changed, ODD)
            self._file.write_text(yaml.safe_dump(changed))
        elif draw < 0.7:
            words = yaml.safe_dump(content).splitlines()
            place = chance.randrange(len(words))
            key = words[place].partition(":")[0]
            words[place] = f"{key}: !!python/object/apply:os.mkdir [{self.marker}]"
            self._file.write_text("\n".join(words))
        else:
            self._file.write_bytes(mutate_bytes(chance, yaml.safe_dump(content).encode()))
