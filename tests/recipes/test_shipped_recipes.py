"""Every shipped recipe is parsed and takes one step on a tiny data set; COCO's say what the paper's schedule says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from timm.optim import create_optimizer_v2

from drkd.contracts import DrkdError, NotApplicableError
from drkd.engine.module import scale_rates
from drkd.recipes.builtin import builtin_recipe, list_builtin, list_comparisons
from drkd.recipes.comparison.cell import make_cells
from drkd.recipes.comparison.definition import load_comparison
from drkd.recipes.recipe import load_recipe
from drkd.recipes.recipe_file import find_recipe, recipe_chain
from drkd.recipes.training import distill, train

ANYWHERE = {"student", "drkd", "paper", "fitnet", "pkd", "cwd", "fgd", "mgd", "nld", "fgfi", "defeat"}
METHODS = dict.fromkeys(("compare/coco_retinanet", "compare/coco_faster_rcnn"), ANYWHERE)
# CrossKD is for one-stage pairs whose heads are of one width; this teacher is narrower than the students of digits.
INAPPLICABLE = {
    ("compare/digits", pair, method)
    for pair in ("retinanet", "faster_rcnn")
    for method in ("crosskd", "crosskd_3", "drkd_cross_head", "pkd_cross_head")
}
# Those of transformers have a test file of their own, for that library is an extra.
RUNNABLE = [name for name in list_builtin() if not name.endswith("base") and not name.startswith("transformers/")]


def _arguments(name: str, tiny_coco: Path, tiny_detector: Path, output: Path) -> list[str]:
    """What makes a recipe small, and free of downloads."""
    small = [
        f"--data.root={tiny_coco}",
        "--data.batch_size=2",
        "--data.workers=0",
        "--data.val_split=val",
        "--training.steps=1",
        "--training.epochs=null",
        "--training.validate_every=0",
        "--training.accelerator=cpu",
        "--evaluation.split=null",
        f"--output={output}",
        "--student.backbone_weights=null",
    ]
    if name.startswith("coco/"):
        small += ["--data.min_size=64", "--data.max_size=96", "--student.fpn_channels=32"]
        if "mobilenet" not in name:
            small += ["--student.backbone=resnet18", "--student.width=0.25"]
        if "faster_rcnn" in name:
            small += ["--student.representation_size=32"]
    if name in ("demo", "digits/faster_rcnn", "digits/retinanet"):
        # The tiny teacher's head is another one's.
        small += ["--inherit=false"]
    if "paper" in name or "teacher_" in name:
        small += [] if "teacher_" in name else [f"--teacher.path={tiny_detector}"]
    elif name == "coco/retinanet_r18":
        # One recipe keeps the published teacher's architecture, with random weights.
        small += ["--teacher.weights=null"]
    else:
        small += ["--teacher=drkd.adapters.SavedDetectorBuilder", f"--teacher.path={tiny_detector}"]
    return small


@pytest.mark.parametrize("name", RUNNABLE)
def test_one_step(name: str, tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    recipe = load_recipe([name], _arguments(name, tiny_coco, tiny_detector, tmp_path / "run"))
    result = (train if recipe.teacher is None else distill)(recipe)
    assert (result.folder / "student.pt").is_file()


@pytest.mark.parametrize("name", list_comparisons())
def test_every_arm_of_a_comparison_takes_one_step(
    name: str, tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    comparison = load_comparison(name, [f"--output={tmp_path}"])
    cells = make_cells(comparison, source=name)
    first = [cell for cell in cells if cell.seed == comparison.seeds[0]]
    assert len(cells) == len(first) * len(comparison.seeds) + sum(cell.seed is None for cell in cells)
    # Of the cascade only backbone and pyramid are read: it cannot be scored, and shows no predictions.
    assert {cell.method for cell in cells} >= METHODS.get(name, set())
    assert any(cell.method == "teacher" for cell in cells) == (name != "compare/coco_faster_rcnn")
    teachers = dict.fromkeys(comparison.pairs, tiny_detector)
    for cell in first:
        small = _arguments(comparison.pairs[cell.pair].recipe, tiny_coco, teachers[cell.pair], cell.run_folder)
        recipe = load_recipe([], [*cell.arguments, *small])
        if (name, cell.pair, cell.method) in INAPPLICABLE:
            with pytest.raises(NotApplicableError, match="CrossKD"):
                distill(recipe)
            continue
        result = (train if cell.verb == "train" else distill)(recipe)
        assert (result.folder / "student.pt").is_file(), cell.name
        assert (result.folder / "training.json").is_file(), cell.name


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name.startswith("coco/")])
def test_coco_recipes_keep_the_papers_schedule(name: str) -> None:
    overrides = ["--teacher.path=teacher.pt"] if "paper" in name else []
    recipe = load_recipe([name], overrides)
    settings, optimization = recipe.training, recipe.training.optimization
    assert settings.epochs == 24 and settings.steps is None
    assert optimization.optimizer == "momentum" and optimization.momentum == 0.9
    made = create_optimizer_v2([torch.nn.Parameter(torch.zeros(1))], opt=optimization.optimizer, lr=0.1, momentum=0.9)
    assert isinstance(made, torch.optim.SGD) and not made.defaults["nesterov"]  # which timm's sgd has
    assert optimization.weight_decay == 1e-4 and optimization.decay_all
    assert optimization.learning_rate == (0.02 if "faster_rcnn" in name else 0.01)
    # At the paper's 16 images a step the rates are the paper's; whoever adds devices gets them in proportion.
    assert optimization.reference_batch == 16 and scale_rates(optimization, 16) == optimization
    assert optimization.warmup_steps == 500 and optimization.warmup_factor == 0.001
    assert [round(24 * milestone) for milestone in optimization.milestones] == [16, 22]
    assert recipe.data.image_settings == {"min_size": 800, "max_size": 1333, "size_divisor": 32}
    content = yaml.safe_load(recipe.resolved)
    assert content["data"]["batch_size"] == 16 and content["data"]["horizontal_flip"] == 0.5
    student = content["student"]["init_args"]
    assert student["norm"] == "frozen" and student["frozen_stages"] == 1 and student["backbone_weights"] == "imagenet"
    assert (
        student["backbone"]
        == {"r50": "resnet50", "r18": "resnet18", "v3": "timm/mobilenetv3_large_100"}[name.rpartition("_")[2]]
    )
    assert content["output"] == f"runs/{name}"


@pytest.mark.parametrize("name", ["coco/paper_retinanet_r50", "coco/paper_faster_rcnn_r50"])
def test_the_papers_recipes_need_your_teacher(name: str) -> None:
    with pytest.raises(DrkdError, match=r"path"):
        load_recipe([name])
    content = yaml.safe_load(load_recipe([name], ["--teacher.path=teacher.pt"]).resolved)
    assert content["teacher"]["init_args"]["path"] == "teacher.pt"
    assert content["method"]["class_path"].endswith("PaperDRKD")


def test_a_recipe_changes_its_base_and_later_files_change_both(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text("seed: 1\noutput: a\ndata: {root: x}\ntraining: {steps: 5, clip_norm: 2.0}\n")
    (tmp_path / "student.yaml").write_text("student: {class_path: drkd.adapters.FCOSBuilder}\n")
    (tmp_path / "deep" / "own.yaml").write_text("base: [../base.yaml, ../student.yaml]\ntraining: {clip_norm: 3.0}\n")
    (tmp_path / "more.yaml").write_text("training: {steps: 7}\n")
    recipe = load_recipe([tmp_path / "deep" / "own.yaml", tmp_path / "more.yaml"], ["--seed=4"])
    assert (recipe.training.steps, recipe.training.clip_norm, recipe.seed) == (7, 3.0, 4)
    assert type(recipe.student).__name__ == "FCOSBuilder"
    assert [path.name for path, _ in recipe_chain(tmp_path / "deep" / "own.yaml")] == [
        "base.yaml",
        "student.yaml",
        "own.yaml",
    ]


def test_a_resolved_recipe_reads_back_to_itself(tmp_path: Path) -> None:
    resolved = load_recipe(["coco/retinanet_r18"]).resolved
    (tmp_path / "recipe.yaml").write_text(resolved)
    assert load_recipe([tmp_path / "recipe.yaml"]).resolved == resolved


def test_a_recipe_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(DrkdError, match="its own base"):
        recipe_chain(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: [", "not valid YAML: line"),
        ("- 1", "expected a recipe"),
        ("base: 3", "base: expected the name"),
        ("data: {root: a}\ntraining: {steps: 1}\ndata: {root: b}\n", "line 3, column 1: the key 'data' is there twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DrkdError, match=expected):
        recipe_chain(tmp_path / "a.yaml")


def test_a_file_wins_over_a_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("coco/base") == builtin_recipe("coco/base")
    (tmp_path / "coco").mkdir()
    shutil.copy(builtin_recipe("coco/base"), tmp_path / "coco" / "base")
    assert find_recipe("coco/base") == Path("coco/base")


def test_wrong_overrides_alone_name_no_file() -> None:
    with pytest.raises(DrkdError, match=r"^The recipe cannot be used: .*color"):
        load_recipe([], ["--color=red"])
    with pytest.raises(DrkdError, match=r"^The recipe .*base\.yaml cannot be used: .*color"):
        load_recipe([find_recipe("digits/base")], ["--color=red"])
