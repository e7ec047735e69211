"""What would fail hours later, or hang, is refused when the recipe is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.adapters.point_adapter import build, losses

from drkd.adapters import FasterRCNNBuilder, MaskRCNNBuilder, wrap_model
from drkd.adapters.resized import ResizedDetector
from drkd.contracts import DetectionBatch, Detector, DrkdError
from drkd.data.convert import convert
from drkd.engine import Distiller
from drkd.engine.unlabelled import UnlabelledImages
from drkd.methods import FeatureHint
from drkd.recipes import limits
from drkd.recipes.dry_run import dry_run
from drkd.recipes.limits import check_unlabelled
from drkd.recipes.recipe import load_recipe
from drkd.recipes.run_folder import RunFolder
from drkd.recipes.training import _trainer, distill

SMALL = {"width": 0.25, "fpn_channels": 32, "representation_size": 16}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("precision=bf16-true", "training.precision: expected one of auto, 32-true, .*, got bf16-true"),
        ("precision=64-true", "training.precision: expected .*, got 64-true"),
        ("strategy=fsdp", "training.strategy: fsdp spreads one model over the devices"),
        ("strategy=deepspeed_stage_2", "training.strategy: deepspeed_stage_2 spreads"),
        ("checkpoint_minutes=0", "training.checkpoint_minutes: expected a positive number or null, got 0"),
        ("checkpoint_every=0", "training.checkpoint_every: expected at least 1, got 0"),
        ("dead_after=0", "training.dead_after: expected at least 1, got 0"),
        ("skip_nonfinite=-1", "training.skip_nonfinite: expected at least 0, got -1"),
        ("clip_norm=-2", "training.clip_norm: expected a positive number or null, got -2"),
    ],
)
def test_a_number_or_strategy_that_cannot_work(option: str, message: str) -> None:
    with pytest.raises(DrkdError, match=message):
        load_recipe(["digits/retinanet"], [f"--training.{option}"])


def test_batch_norm_is_synchronised_on_gpus_only() -> None:
    arguments = ["--training.sync_batchnorm=true", "--training.accelerator=cpu"]
    with pytest.raises(DrkdError, match=r"training\.sync_batchnorm"):
        load_recipe(["digits/retinanet"], arguments)
    assert load_recipe(["digits/retinanet"], ["--training.strategy=ddp"]).training.strategy == "ddp"


@pytest.mark.slow
def test_so_it_is_where_auto_finds_none(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    arguments = ["--training.sync_batchnorm=true", "--training.strategy=ddp", "--training.devices=1"]
    arguments += [f"--data.root={tiny_coco}", "--data.val_split=val", "--inherit=false"]
    arguments += [f"--teacher.path={tiny_detector}", "--student.backbone_weights=null", f"--output={tmp_path / 'run'}"]
    recipe = load_recipe(["digits/retinanet"], arguments)
    with pytest.raises(DrkdError, match=r"training\.sync_batchnorm: .* on cpu, which training\.accelerator=auto means"):
        distill(recipe)
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(DrkdError, match=r"training\.sync_batchnorm: .*accelerator=auto"):
        dry_run(recipe, kind="distill")


def test_synchronised_batch_norm_reaches_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--training.strategy=ddp", "--training.devices=1", "--training.accelerator=cpu"]
    # On CPUs the recipe refuses it, as PyTorch would at the first step.
    monkeypatch.setattr(limits, "_NO_SYNC", ())
    with RunFolder(tmp_path / "run") as folder:
        plain = _trainer(load_recipe(["digits/retinanet"], options), folder, [])
        in_step = _trainer(load_recipe(["digits/retinanet"], [*options, "--training.sync_batchnorm=true"]), folder, [])
    student = FasterRCNNBuilder(**SMALL, norm="batch").build(["cat", "dog"])
    assert plain.strategy._layer_sync is None
    converted = in_step.strategy._layer_sync.apply(student)
    kinds = {type(module) for module in converted.modules() if "BatchNorm" in type(module).__name__}
    assert kinds == {torch.nn.SyncBatchNorm}


def masked() -> Detector:
    return MaskRCNNBuilder(**SMALL, mask_layers=(16,), mask_channels=16).build(["cat", "dog"])


def test_what_unlabelled_images_cannot_do_is_refused_when_the_run_is_built(tmp_path: Path) -> None:
    recipe = load_recipe(["digits/retinanet"], [f"--data.unlabelled=[{tmp_path}]", "--training.accelerator=gpu"])
    plain, silent = FasterRCNNBuilder(**SMALL).build(["cat", "dog"]), _Silent()
    check_unlabelled(recipe, student=plain, teacher=plain)
    with pytest.raises(DrkdError, match="no teacher of this run detects"):
        check_unlabelled(recipe, student=plain, teacher=silent)
    pseudo = replace(recipe.training, unlabelled=UnlabelledImages(pseudo_labels=True))
    check_unlabelled(replace(recipe, training=pseudo), student=plain, teacher=plain)
    with pytest.raises(DrkdError, match=r"pseudo_labels: this Mask R-CNN"):
        check_unlabelled(replace(recipe, training=pseudo), student=masked(), teacher=plain)
    in_step = replace(recipe.training, sync_batchnorm=True)
    with pytest.raises(DrkdError, match=r"training\.sync_batchnorm: .*data\.unlabelled_share"):
        check_unlabelled(replace(recipe, training=in_step), student=plain, teacher=plain)
    shared = load_recipe(["digits/retinanet"], [f"--data.unlabelled=[{tmp_path}]", "--data.unlabelled_share=0.5"])
    check_unlabelled(replace(shared, training=in_step), student=plain, teacher=plain)
    none = load_recipe(["digits/retinanet"], [])
    check_unlabelled(replace(none, training=in_step), student=plain, teacher=silent)


class _Silent(Detector):
    can_detect = False

    def forward(self, batch, *, want):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def detect(self, batch):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def test_a_student_of_masks_takes_a_batch_without_labels() -> None:
    torch.manual_seed(0)
    teacher = FasterRCNNBuilder(**SMALL, score_threshold=0.0).build(["cat", "dog"])
    settings = UnlabelledImages(score_threshold=0.0, max_boxes=5)
    distiller = Distiller(masked(), teacher, FeatureHint, unlabelled=settings).train()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    batch = DetectionBatch.from_lists([torch.rand(3, 64, 96)] * 2, [none] * 2)
    losses = distiller(replace(batch, labelled=(False, False)))
    task = {name: float(value.detach()) for name, value in losses.items() if name.startswith("task/")}
    assert "task/loss_mask" in task and set(task.values()) == {0.0}
    sum(losses.values()).backward()
    assert all(entry.grad is not None for entry in distiller.trainable_parameters())


def test_a_model_of_your_own_without_detections_says_so() -> None:
    names = ["cat", "dog"]
    silent = wrap_model(build(names), ["neck"], losses=losses, class_names=names, image_size=(64, 64))
    plain = FasterRCNNBuilder(**SMALL).build(names)
    for detector, expected in ((silent, False), (plain, True)):
        assert detector.can_detect is expected
        assert ResizedDetector(detector, scale=2.0).can_detect is expected


def test_validating_on_images_of_trainval_is_said(
    tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tiny_coco, tmp_path / "voc", to="voc")
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    text = (lists / "train.txt").read_text() + (lists / "val.txt").read_text()
    (lists / "trainval.txt").write_text(text)
    for split, said in (("trainval", True), ("train", False)):
        recipe = load_recipe(["digits/retinanet"], [f"--data.root={tmp_path}/voc", f"--data.train_split={split}"])
        recipe.data.setup("fit")
        limits.check_splits(replace(recipe, evaluation=replace(recipe.evaluation, split="val")))
        shown = capsys.readouterr().err
        assert ("3 of the 3 images of 'val' are in 'trainval' too" in shown) is said
