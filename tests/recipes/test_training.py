"""Runs as a whole, on a tiny data set: which student is kept, and what a run folder refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from drkd.adapters import load_detector, save_student
from drkd.contracts import DetectionBatch, DrkdError
from drkd.data.split import DatasetSplit
from drkd.engine.module import DistillationModule
from drkd.recipes import training
from drkd.recipes.dry_run import dry_run
from drkd.recipes.recipe import Recipe, load_recipe
from drkd.recipes.training import build_module, distill, train


def _recipe(tiny_coco: Path, output: Path, *extra: str) -> Recipe:
    overrides = [
        f"--data.root={tiny_coco}",
        "--data.val_split=val",
        "--data.batch_size=2",
        "--data.min_size=64",
        "--data.max_size=96",
        "--student.fpn_channels=32",
        "--student.backbone_weights=null",
        "--training.epochs=3",
        "--training.validate_every=1",
        "--evaluation.split=null",
        "--inherit=false",
        f"--output={output}",
        *extra,
    ]
    return load_recipe(["digits/retinanet"], overrides)


@pytest.mark.parametrize("ema", ["0.9", "null"])
def test_the_best_student_is_the_one_that_validated_best(ema: str, tiny_coco: Path, tmp_path: Path) -> None:
    result = train(_recipe(tiny_coco, tmp_path / "run", "--training.keep=best", f"--training.ema={ema}"))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    if ema == "null":
        expected = {
            name.removeprefix("distiller.student."): value
            for name, value in saved["state_dict"].items()
            if name.startswith("distiller.student.model.")
        }
    else:
        (average,) = (state for name, state in saved["callbacks"].items() if name.startswith("StudentAverage"))
        expected = {name.removeprefix("module."): v for name, v in average["average"].items() if "." in name}
    kept = load_detector(result.folder / "student.pt").state_dict()
    assert set(kept) == set(expected)
    for name, value in kept.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_the_best_student_is_kept_where_the_run_folder_moved(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse_and_worse(self: DistillationModule) -> None:
        self.log("val/ap", 0.9 - 0.1 * self.current_epoch, batch_size=1)

    take_step = DistillationModule.training_step

    def fail(self: DistillationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == 1:
            raise OSError("the machine is gone")
        return take_step(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "on_validation_epoch_end", worse_and_worse)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "training_step", fail)
        with pytest.raises(OSError, match="machine"):
            train(_recipe(tiny_coco, tmp_path / "old", "--training.keep=best", "--training.ema=null"))
    moved = (tmp_path / "old").rename(tmp_path / "new")
    best = moved / "checkpoints" / "best.ckpt"
    aside = best.rename(tmp_path / "best.ckpt")
    options = ("--training.keep=best", "--training.ema=null", "--resume=true", "--training.epochs=2")
    with pytest.raises(DrkdError, match=r"new/checkpoints/best\.ckpt: the best student so far is not there"):
        train(_recipe(tiny_coco, moved, *options))
    aside.rename(best)
    train(_recipe(tiny_coco, moved, *options))
    saved = torch.load(best, weights_only=True)
    kept = load_detector(moved / "student.pt").state_dict()
    # Six images by two: three steps an epoch.
    assert saved["global_step"] == 3
    for name, value in kept.items():
        torch.testing.assert_close(value, saved["state_dict"][f"distiller.student.{name}"], rtol=0, atol=0)
    assert not (tmp_path / "old").exists()


def test_patience_ends_a_run_that_gets_no_better(tiny_coco: Path, tmp_path: Path) -> None:
    recipe = _recipe(
        tiny_coco,
        tmp_path / "run",
        "--training.patience=2",
        "--training.epochs=9",
        "--training.optimization.learning_rate=1e-9",
    )
    train(recipe)
    assert '"epochs": 3' in (tmp_path / "run" / "run.json").read_text()
    # Started again by a job script, it has ended.
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before, student = torch.load(last, weights_only=True), tmp_path / "run" / "student.pt"
    student.unlink()
    train(replace(recipe, resume="auto"))
    assert '"epochs": 3' in (tmp_path / "run" / "run.json").read_text() and student.exists()
    assert torch.load(last, weights_only=True)["global_step"] == before["global_step"] == 9


@pytest.mark.parametrize(("first", "then"), [("null", "0.5"), ("0.5", "null")])
def test_the_best_student_is_what_was_scored_whatever_average_the_run_has_now(
    first: str, then: str, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse_and_worse(self: DistillationModule) -> None:
        self.log("val/ap", 0.9 - 0.1 * self.current_epoch, batch_size=1)

    monkeypatch.setattr(DistillationModule, "on_validation_epoch_end", worse_and_worse)
    for epochs, ema in ((1, first), (2, then)):
        given = (f"--training.epochs={epochs}", f"--training.ema={ema}", "--training.keep=best", "--resume=auto")
        train(_recipe(tiny_coco, tmp_path / "run", *given))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    averages = [state for name, state in saved["callbacks"].items() if name.startswith("StudentAverage") and state]
    kept = load_detector(tmp_path / "run" / "student.pt").state_dict()
    raw = {name: saved["state_dict"][f"distiller.student.{name}"] for name in kept}
    expected = raw if first == "null" else {name: averages[0]["average"][f"module.{name}"] for name in kept}
    assert bool(averages) == (first != "null")
    assert [name for name, value in kept.items() if not torch.equal(value, expected[name])] == []


def test_a_folder_with_training_images_alone_is_enough_where_nothing_is_validated(
    tiny_coco: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    (root / "annotations").mkdir(parents=True)
    for file in (tiny_coco / "annotations").glob("*train*"):
        shutil.copy(file, root / "annotations")
    for folder in tiny_coco.iterdir():
        if folder.name != "annotations":
            shutil.copytree(folder, root / folder.name)
    given = (f"--data.root={root}", "--training.epochs=1", "--training.validate_every=0")
    assert dry_run(_recipe(tiny_coco, tmp_path / "run", *given), kind="train").validation_seconds is None
    train(_recipe(tiny_coco, tmp_path / "run", *given))
    assert (tmp_path / "run" / "student.pt").exists()
    # What comes at the end is looked for at the beginning.
    for asked in ("--training.validate_every=1", "--evaluation.split=val"):
        with pytest.raises(DrkdError, match="there is no split 'val'"):
            train(_recipe(tiny_coco, tmp_path / "other", *given, asked))
    assert not (tmp_path / "other" / "run.json").exists()


@pytest.mark.parametrize("choice", ["--training.keep=best", "--training.patience=1"])
def test_a_best_student_by_images_without_boxes_is_refused(
    choice: str, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = DatasetSplit.first

    def bare(self: DatasetSplit, count: int | None) -> DatasetSplit:
        split = first(self, count)
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "areas": torch.zeros(0)}
        empty = [replace(record, crowd=torch.zeros(0, dtype=torch.bool), **nothing) for record in split.records]
        return replace(split, records=empty) if self.name == "val" else split

    monkeypatch.setattr(DatasetSplit, "first", bare)
    with pytest.raises(DrkdError, match=r"data\.val_split: none of the \d images of 'val' .* has a box"):
        train(_recipe(tiny_coco, tmp_path / "run", choice))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("choice", ["--training.keep=best", "--training.patience=1"])
def test_a_best_student_without_a_validation_is_refused_before_training(
    choice: str, tiny_coco: Path, tmp_path: Path
) -> None:
    with pytest.raises(DrkdError, match=r"training\.validate_every: training\.\w+.* expected at most training\.epochs"):
        _recipe(tiny_coco, tmp_path / "run", choice, "--training.validate_every=4")
    # Six images by one, two batches a step: three steps an epoch.
    given = (choice, "--training.epochs=null", "--data.batch_size=1", "--training.accumulate=2")
    recipe = _recipe(tiny_coco, tmp_path / "run", *given, "--training.steps=5", "--training.validate_every=2")
    with pytest.raises(
        DrkdError, match=r"training\.steps: .* after 6 steps \(training\.validate_every=2, 3 steps an ep"
    ):
        train(recipe)
    with pytest.raises(DrkdError, match=r"training\.steps: .* after 6 steps"):
        dry_run(recipe, kind="train")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_that_went_on_without_a_validation_keeps_its_last_student(
    tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(_recipe(tiny_coco, tmp_path / "run", "--training.epochs=1", "--training.validate_every=0")).folder
    kept = load_detector(folder / "student.pt").state_dict()
    (folder / "student.pt").unlink()
    train(_recipe(tiny_coco, tmp_path / "run", "--training.epochs=1", "--training.keep=best", "--resume=true"))
    assert "training.keep: the run ended without a validation" in capsys.readouterr().err
    again = load_detector(folder / "student.pt").state_dict()
    assert [name for name, value in kept.items() if not torch.equal(again[name], value)] == []
    assert '"status": "finished"' in (folder / "run.json").read_text()


def test_a_run_that_fails_before_it_starts_lets_go_of_its_folder(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "build_module", lambda *_, **__: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            train(_recipe(tiny_coco, tmp_path / "run"))


def test_a_finished_run_is_not_overwritten_by_accident(tiny_coco: Path, tmp_path: Path) -> None:
    folder = train(_recipe(tiny_coco, tmp_path / "run", "--training.epochs=1")).folder
    before = (folder / "run.json").read_text()
    with pytest.raises(DrkdError, match="already holds a run"):
        train(_recipe(tiny_coco, tmp_path / "run"))
    assert (folder / "run.json").read_text() == before
    train(_recipe(tiny_coco, tmp_path / "run", "--training.epochs=1", "--overwrite=true"))


@pytest.mark.parametrize(("unit", "validate"), [("epochs", 1), ("steps", 0), ("steps", 1)])
def test_a_finished_run_made_longer_goes_on_with_the_next_epoch(
    unit: str, validate: int, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs, images = [], []
    real = DistillationModule.training_step

    def note(module: DistillationModule, batch: DetectionBatch, batch_idx: int) -> torch.Tensor:
        images.append(list(batch.image_ids))
        return real(module, batch, batch_idx)

    monkeypatch.setattr(
        DistillationModule,
        "on_train_epoch_start",
        lambda module: epochs.append((module.current_epoch, module.global_step)),
        raising=False,
    )
    monkeypatch.setattr(DistillationModule, "training_step", note)
    recipe = _recipe(tiny_coco, tmp_path / "run")
    recipe.data.setup("fit")
    loader = recipe.data.train_dataloader()
    expected = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        expected += [list(batch.image_ids) for batch in loader]
    for length in (2, 4):
        limit = ("null", length * len(loader)) if unit == "steps" else (length, "null")
        options = (
            f"--training.epochs={limit[0]}",
            f"--training.steps={limit[1]}",
            f"--training.validate_every={validate}",
        )
        train(_recipe(tiny_coco, tmp_path / "run", *options, "--resume=auto"))
    assert epochs == [(epoch, epoch * len(loader)) for epoch in range(4)]
    assert images == expected
    assert '"epochs": 4' in (tmp_path / "run" / "run.json").read_text()


def test_a_distillation_goes_on_at_its_step_and_not_with_another_optimizer(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    options = [f"--teacher.path={tiny_detector}", "--resume=auto", "--doctor=false"]
    first = distill(_recipe(tiny_coco, tmp_path / "run", "--training.epochs=1", *options))
    assert first.distiller._step == 3
    longer = [*options, "--training.epochs=2"]
    with pytest.raises(DrkdError, match="optimised by 'adamw'"):
        distill(_recipe(tiny_coco, tmp_path / "run", *longer, "--training.optimization.optimizer=sgd"))
    # Twelve passes and not nine, six steps all the same: warm-up, balance and decay go by them.
    shared = ["--data.batch_size=1", "--training.accumulate=2"]
    second = distill(_recipe(tiny_coco, tmp_path / "run", *longer, *shared))
    assert (second.distiller._step, second.distiller.get_extra_state()["passes"]) == (6, 12)


def test_patience_counts_validations_alone(tiny_coco: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    # Three steps an epoch: the fourth ends the run in an epoch that is not validated, and the run that goes on for it
    # has seen no validation at all.
    given = ("--training.patience=1", "--training.epochs=null", "--resume=auto")
    for steps in (3, 4):
        train(_recipe(tiny_coco, tmp_path / "run", *given, f"--training.steps={steps}"))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    states = [state for name, state in saved["callbacks"].items() if name.startswith("EarlyStopping")]
    assert [state["wait_count"] for state in states] == [0]
    assert not [warning for warning in recwarn if "val/ap" in str(warning.message)]


def test_patience_is_that_which_the_run_was_given_last(tiny_coco: Path, tmp_path: Path) -> None:
    still = ("--training.optimization.learning_rate=1e-9", "--training.epochs=9", "--resume=auto")
    for patience in (1, 3):
        train(_recipe(tiny_coco, tmp_path / "run", f"--training.patience={patience}", *still))
    assert '"epochs": 4' in (tmp_path / "run" / "run.json").read_text()


def test_a_run_that_goes_on_uses_the_settings_that_it_was_given(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[tuple[float, float]]] = []

    def note(module: DistillationModule) -> None:
        groups = module.trainer.optimizers[0].param_groups
        seen.append({(group["lr"], group["weight_decay"]) for group in groups})

    monkeypatch.setattr(DistillationModule, "on_train_epoch_start", note, raising=False)
    options = ["--training.optimization.warmup_steps=0", "--training.optimization.schedule=multistep"]
    options += ["--training.optimization.milestones=[0.9]", "--training.optimization.decay_all=true", "--resume=auto"]
    for epochs, rate, decay in ((1, 0.01, 1e-4), (2, 0.01, 1e-4), (3, 0.001, 1e-3)):
        given = (f"--training.epochs={epochs}", f"--training.optimization.learning_rate={rate}")
        decays = f"--training.optimization.weight_decay={decay}"
        train(_recipe(tiny_coco, tmp_path / "run", *options, *given, decays))
    assert seen == [{(0.01, 1e-4)}, {(0.01, 1e-4)}, {(0.001, 1e-3)}]


def test_a_run_does_not_go_on_with_other_steps(tiny_coco: Path, tmp_path: Path) -> None:
    train(_recipe(tiny_coco, tmp_path / "run", "--training.epochs=1"))
    longer = ("--training.epochs=2", "--resume=true")
    with pytest.raises(DrkdError, match=r"took 2 images a step .* would take 1 .*data\.batch_size"):
        train(_recipe(tiny_coco, tmp_path / "run", *longer, "--data.batch_size=1"))
    longer += ("--data.batch_size=1", "--training.accumulate=2")
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = file.read_bytes()
    within = torch.load(file, weights_only=True)
    within["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
    torch.save(within, file)
    with pytest.raises(DrkdError, match=r"from within an epoch of 1 process\(es\) x 2 images"):
        train(_recipe(tiny_coco, tmp_path / "run", *longer))
    # At an epoch's end the same images may be shared out otherwise.
    file.write_bytes(saved)
    train(_recipe(tiny_coco, tmp_path / "run", *longer))
    assert '"steps": 6' in (tmp_path / "run" / "run.json").read_text()


@pytest.mark.parametrize(("text", "expected"), [("null", None), ("7", 7)])
def test_the_guard_is_as_patient_as_the_recipe_says(
    text: str, expected: int | None, tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    options = (f"--teacher.path={tiny_detector}", f"--training.dead_after={text}")
    recipe = _recipe(tiny_coco, tmp_path / "run", *options)
    recipe.data.setup("fit")
    assert build_module(recipe, kind="distill").distiller.dead_after == expected


def test_a_random_teacher_leaves_the_students_start_alone(tiny_coco: Path, tmp_path: Path) -> None:
    """The control changes the teacher and nothing else: neck and head are inherited from the file's weights."""
    builder, file = _recipe(tiny_coco, tmp_path / "run").student, tmp_path / "teacher.pt"
    settings = {"min_size": 64, "max_size": 96, "size_divisor": 32}
    save_student(file, builder.build(("cat", "dog")), builder=builder, image_settings=settings)
    modules = []
    for random in ("false", "true"):
        options = ("--inherit=true", f"--teacher.path={file}", f"--teacher.random_weights={random}")
        recipe = _recipe(tiny_coco, tmp_path / random, *options)
        recipe.data.setup("fit")
        modules.append(build_module(recipe, kind="distill").distiller)
    (trained, control), head = modules, "head.classification_head.cls_logits.weight"
    ours, theirs = (module.student.model.state_dict() for module in (trained, control))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    taught = [module.teacher.model.state_dict() for module in modules if module.teacher is not None]
    assert torch.equal(ours[head], taught[0][head])
    convolution = "head.classification_head.conv.0.0.weight"
    assert not torch.equal(taught[0][convolution], taught[1][convolution])


@pytest.mark.slow
def test_a_compiled_run_is_compiled_and_learns_the_same(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    options = [
        f"--teacher.path={tiny_detector}",
        "--training.epochs=null",
        "--training.steps=1",
        "--training.validate_every=0",
        "--training.ema=null",
        "--training.precision=32-true",
        "--training.accelerator=cpu",
        "--training.optimization.warmup_steps=0",
        "--doctor=false",
    ]
    runs = []
    for backend in ("null", "aot_eager"):
        runs.append(distill(_recipe(tiny_coco, tmp_path / backend, *options, f"--training.compile={backend}")))
        # Two backbones, and at least one pixel loss.
        assert (counters["stats"]["unique_graphs"] >= 3) == (backend != "null")
    plain, compiled = runs
    assert plain.distiller.monitor.terms and plain.distiller.monitor.ratios
    torch.testing.assert_close(compiled.distiller.monitor.terms, plain.distiller.monitor.terms, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(compiled.distiller.monitor.ratios, plain.distiller.monitor.ratios, rtol=1e-2, atol=1e-4)
    ours, theirs = (load_detector(run.folder / "student.pt").state_dict() for run in runs)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_that_fails_says_so_in_its_folder(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drkd.engine.module.DistillationModule.training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(_recipe(tiny_coco, tmp_path / "run"))
    assert '"status": "failed"' in (tmp_path / "run" / "run.json").read_text()


def test_a_student_that_is_not_finite_is_not_written(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = training._restore

    def spoil(recipe: Recipe, module: DistillationModule, *rest: Any) -> None:
        restore(recipe, module, *rest)
        next(module.distiller.student.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(training, "_restore", spoil)
    with pytest.raises(DrkdError, match=r"weights are NaN or infinite after step 3 .*student\.pt is not written"):
        train(_recipe(tiny_coco, tmp_path / "run", "--training.epochs=1"))
    assert not (tmp_path / "run" / "student.pt").exists()


def test_half_precision_accumulation_clipping_and_tensorboard(tiny_coco: Path, tmp_path: Path) -> None:
    recipe = _recipe(
        tiny_coco,
        tmp_path / "run",
        "--training.epochs=2",
        "--data.batch_size=1",
        "--training.precision=bf16-mixed",
        "--training.accumulate=3",
        "--training.clip_norm=0.5",
        "--training.ema=0.5",
        "--training.accelerator=cpu",
    )
    train(recipe)
    # Six images one by one, three a step, twice.
    assert '"steps": 4' in (tmp_path / "run" / "run.json").read_text()
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    (average,) = (state for name, state in saved["callbacks"].items() if name.startswith("StudentAverage"))
    assert int(average["average"]["n_averaged"]) == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values() if torch.is_tensor(value))
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*"))


def test_a_run_that_may_not_go_on_keeps_its_record(tiny_coco: Path, tmp_path: Path) -> None:
    train(_recipe(tiny_coco, tmp_path / "run", "--training.epochs=1"))
    files = [tmp_path / "run" / name for name in ("recipe.yaml", "run.json", "student.pt")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(DrkdError):
        train(_recipe(tiny_coco, tmp_path / "run", "--student.fpn_channels=64", "--resume=true"))
    assert [file.read_bytes() for file in files] == before
