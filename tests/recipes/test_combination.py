"""A combination of methods and a rival with arguments, named in a recipe, train."""

from __future__ import annotations

from pathlib import Path

import pytest

from drkd.methods import Combination
from drkd.recipes.recipe import load_recipe
from drkd.recipes.training import distill

METHODS = {
    "combination": """
method:
  class_path: drkd.methods.Combination
  init_args:
    methods:
      relations: {class_path: drkd.methods.DRKD, init_args: {relation_weight: 0.2}}
      features: drkd.methods.PKD
    factors: {features: 0.5}
""",
    "fgd": """
method:
  class_path: drkd.methods.FGD
  init_args: {foreground_weight: 2.0e-3, balanced: false, warmup_steps: 2}
""",
    "fgfi": """
method:
  class_path: drkd.FGFI
  init_args: {scales: [4, 8], assignment: all}
""",
}


def _arguments(tiny_coco: Path, tiny_detector: Path, output: Path) -> list[str]:
    return [
        f"--data.root={tiny_coco}",
        "--data.val_split=val",
        "--data.batch_size=2",
        "--data.workers=0",
        "--data.min_size=64",
        "--data.max_size=96",
        "--student.fpn_channels=32",
        "--student.backbone_weights=null",
        "--training.steps=2",
        "--training.epochs=null",
        "--training.validate_every=0",
        "--training.accelerator=cpu",
        "--evaluation.split=null",
        "--inherit=false",
        "--doctor=false",
        "--teacher=drkd.adapters.SavedDetectorBuilder",
        f"--teacher.path={tiny_detector}",
        f"--output={output}",
    ]


@pytest.mark.parametrize("name", list(METHODS))
def test_a_recipe_names_it_and_it_trains(name: str, tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    (tmp_path / "method.yaml").write_text(METHODS[name])
    arguments = _arguments(tiny_coco, tiny_detector, tmp_path / "run")
    recipe = load_recipe(["digits/retinanet", tmp_path / "method.yaml"], arguments)
    # What a run writes down reads back to the same.
    (tmp_path / "resolved.yaml").write_text(recipe.resolved)
    assert load_recipe([tmp_path / "resolved.yaml"]).resolved == recipe.resolved
    result = distill(recipe)
    assert (result.folder / "student.pt").is_file()
    if name == "combination":
        assert recipe.method is not None and recipe.teacher is not None
        specs = [builder.build(["cat", "dog"]).spec for builder in (recipe.student, recipe.teacher)]
        method = recipe.method(specs[0], specs[1])
        assert isinstance(method, Combination)
        assert method.weights["relations.instance_relation"] == 0.2
        assert method.weights["features.pkd"] == 0.5
