"""Assemble a recipe and run it: train a detector alone, or distil it."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from drkd.adapters.checkpoint import SavedDetectorBuilder, save_student
from drkd.contracts import Detector, DrkdError
from drkd.engine.agreement import share_buffers
from drkd.engine.callbacks import FiniteLossGuard, LineProgress, StudentAverage
from drkd.engine.checkpoint_io import AtomicCheckpoints
from drkd.engine.compilation import compile_distiller
from drkd.engine.distiller import Distiller
from drkd.engine.finite_weights import FiniteWeightsGuard, nonfinite_weights, refuse_nonfinite
from drkd.engine.interruption import Interruptible, StoppedBySignal, StopsAtOnce, stop_signals
from drkd.engine.module import DistillationModule
from drkd.engine.nonfinite import NonFiniteSteps
from drkd.engine.quiet import quiet_lightning
from drkd.engine.training_cost import TrainingCost
from drkd.evaluation import CocoEvaluator
from drkd.recipes.building import explained_by_recipe
from drkd.recipes.evaluation import evaluate_detector
from drkd.recipes.inheritance import inherit_neck_and_head
from drkd.recipes.limits import check_device, check_splits, check_unlabelled, check_validation, steps_per_epoch
from drkd.recipes.precision import choose_precision
from drkd.recipes.preflight import preflight
from drkd.recipes.recipe import Recipe
from drkd.recipes.requeue import requeue, under_slurm
from drkd.recipes.restoring import Restoring, explained_by_checkpoint
from drkd.recipes.run_folder import RunFolder, is_first_process, write_json
from drkd.recipes.teacher_assembly import build_teacher, build_teachers, short_side
from drkd.recipes.unreadable import SharedUnreadable


@dataclass(frozen=True)
class RunResult:
    """What a run produced.

    Args:
        folder: The run folder.
        student: The student, trained, in eval mode.
        metrics: COCO numbers on the evaluation split; empty when none was asked for.
        distiller: Student, teacher and method as they were at the end.
    """

    folder: Path
    student: Detector
    metrics: dict[str, Any]
    distiller: Distiller


def distill(recipe: Recipe) -> RunResult:
    """Train the student with the teacher's help.

    Raises:
        DrkdError: If the recipe names no teacher or no method, or for anything else a user can put right.
    """
    require_teacher_and_method(recipe)
    return _run(recipe, kind="distill")


def train(recipe: Recipe) -> RunResult:
    """Train the student alone: the same harness with the recipe's teacher and method left out.

    Raises:
        DrkdError: For anything that a user can put right.
    """
    return _run(recipe, kind="train")


def require_teacher_and_method(recipe: Recipe) -> None:
    """Raise a DrkdError that says what a recipe lacks for a distillation, if it lacks anything."""
    missing = [] if recipe.teachers or recipe.teacher is not None else ["teacher"]
    missing += ["method"] if recipe.method is None else []
    if missing:
        raise DrkdError(
            f"drkd distill needs a {' and a '.join(missing)} in the recipe; give --{missing[0]}, or use `drkd train` "
            "to train the student alone."
        )


def build_module(recipe: Recipe, *, kind: str) -> DistillationModule:
    """Build student, teacher, method and the Lightning module; the student's initial weights depend on the seed only.

    Args:
        recipe: The recipe; its data module must be set up.
        kind: "distill" or "train".
    """
    names = recipe.data.class_names
    lightning.seed_everything(recipe.seed, verbose=False)
    with explained_by_recipe("student"):
        student = recipe.student.build(names)
        student.expect_image_size(short_side(recipe.data.image_settings))
    teacher: Detector | dict[str, Detector] | None = None
    method = None
    if kind == "distill" or recipe.inherit:
        teacher = assemble_teacher(recipe)
    if recipe.inherit:
        if not isinstance(teacher, Detector):
            raise DrkdError("inherit: the recipe names no teacher whose neck and head the student could start from.")
        inherited = inherit_neck_and_head(student, _starting_point(recipe, teacher))
        if is_first_process():
            print(f"drkd: {inherited}", file=sys.stderr)
    if kind == "distill":
        lightning.seed_everything(recipe.seed, verbose=False)
        method = recipe.method
    else:
        teacher = None
    with explained_by_recipe("method" if method is not None else "training"):
        distiller = Distiller(
            student,
            teacher,
            method,
            calibration_steps=recipe.training.calibration_steps,
            monitor_interval=recipe.training.monitor_interval,
            dead_after=recipe.training.dead_after,
            accumulate=recipe.training.accumulate,
            teacher_weights=(
                {name: entry.weight for name, entry in (recipe.teachers or {}).items()}
                if isinstance(teacher, dict)
                else None
            ),
            unlabelled=recipe.training.unlabelled,
        )
    if distiller.teacher is not None:
        check_unlabelled(recipe, student=student, teacher=distiller.teacher)
    if recipe.training.compile is not None:
        compile_distiller(distiller, backend=recipe.training.compile)

    def make_evaluator() -> CocoEvaluator:
        return CocoEvaluator(recipe.data.val_split.records, names, area_scale=recipe.evaluation.area_scale)

    return DistillationModule(
        distiller,
        recipe.training.optimization,
        evaluator=make_evaluator if recipe.training.validate_every else None,
        seed=recipe.seed,
        channels_last=recipe.training.channels_last,
        batch_size=recipe.data.batch_size,
    )


def _starting_point(recipe: Recipe, teacher: Detector) -> Detector:
    """The detector whose neck and head the student starts from: its teacher's; of a random one its file's.

    So a control with a random teacher changes the teacher alone.
    """
    builder = recipe.teacher
    if not isinstance(builder, SavedDetectorBuilder) or not builder.random_weights:
        return teacher
    trained = assemble_teacher(replace(recipe, teacher=replace(builder, random_weights=False)))
    assert isinstance(trained, Detector)  # one teacher is named, so one is built
    return trained


def assemble_teacher(recipe: Recipe) -> Detector | dict[str, Detector] | None:
    """Build the recipe's teacher, its teachers by name, or None, as a run does.

    Raises:
        DrkdError: If the recipe names both a teacher and teachers, or one of them cannot be built.
    """
    names, settings = recipe.data.class_names, recipe.data.image_settings
    if recipe.teachers:
        if recipe.teacher is not None or recipe.class_map is not None or recipe.teacher_size is not None:
            raise DrkdError(
                "teachers: the recipe names several teachers, so leave out teacher, class_map and teacher_size (each "
                "entry of teachers has its own)."
            )
        with explained_by_recipe("teachers"):
            return dict(build_teachers(recipe.teachers, names, image_settings=settings))
    if recipe.teacher is None:
        return None
    with explained_by_recipe("teacher"):
        return build_teacher(
            recipe.teacher,
            names,
            image_settings=settings,
            class_map=recipe.class_map,
            teacher_size=recipe.teacher_size,
        )


def _run(recipe: Recipe, *, kind: str) -> RunResult:
    # Reading data, the examination and the final evaluation may take longer than a scheduler waits.
    with StopsAtOnce(stop_signals(requeue=under_slurm())) as stops:
        try:
            return _run_until_stopped(recipe, stops, kind=kind)
        except StoppedBySignal as stop:
            stops.ignore()
            if is_first_process():
                requeue(stop.signal_number)
            raise


def _run_until_stopped(recipe: Recipe, stops: StopsAtOnce, *, kind: str) -> RunResult:
    with RunFolder(recipe.output, resume=recipe.resume, overwrite=recipe.overwrite) as folder:
        return _run_in(folder, recipe, stops, kind=kind)


def _run_in(folder: RunFolder, recipe: Recipe, stops: StopsAtOnce, *, kind: str) -> RunResult:
    if kind == "train":
        recipe.data.leave_out_unlabelled()
    recipe.data.setup("fit")
    check_splits(recipe)
    module = build_module(recipe, kind=kind)
    average = StudentAverage(recipe.training.ema) if recipe.training.ema else None
    last, best = _checkpoints(recipe, folder)
    cost = TrainingCost(folder.note_progress)
    restoring = Restoring(
        folder.last_checkpoint if folder.resumes else None, needs_best=best is not None and recipe.training.keeps_best
    )
    callbacks = [cost, *_callbacks(recipe), *([average] if average else []), *([best] if best else []), last]
    interruptible = _interruptible(recipe, folder)
    callbacks += [restoring, interruptible]
    with quiet_lightning():
        trainer = _trainer(recipe, folder, callbacks)
    check_device(recipe.training, trainer.strategy.root_device)
    if recipe.training.steps and recipe.training.keeps_best and not folder.resumes:
        check_validation(recipe.training, steps_per_epoch=steps_per_epoch(recipe, processes=trainer.world_size))
    folder.start(resolved=recipe.resolved, seed=recipe.seed, kind=kind)
    try:
        if kind == "distill" and recipe.doctor and not folder.resumes:
            preflight(recipe, module.distiller, folder, device=trainer.strategy.root_device)
        with quiet_lightning(), restoring:
            trainer.fit(
                module,
                datamodule=recipe.data,
                ckpt_path=str(folder.last_checkpoint) if folder.resumes else None,
                weights_only=True,
            )
        restoring.restored = True  # a run that had ended already begins no training that would say so
        folder.merge_metrics()
        if folder.writes and cost.measured:
            write_json(folder.path / "training.json", {**cost.measured, "precision": trainer.precision})
        # The last epoch's checkpoint is the run's. One written now would say that the epoch after it had begun, and a
        # run that is made longer would leave one out.
        stops.step, stops.saved = trainer.global_step, True
        interruptible.stop_if_asked(trainer)
        _restore(recipe, module, best, average)
        student = module.distiller.student.eval()
        refuse_nonfinite(nonfinite_weights(student), step=trainer.global_step, left=f"{folder.student} is not written.")
        metrics = _finish(recipe, folder, student, device=trainer.strategy.root_device)
    except BaseException as error:
        stops.ignore()
        # Ctrl-C reaches us as Lightning's SystemExit.
        pressed = isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and trainer.interrupted)
        stopped = isinstance(error, StoppedBySignal)
        # The disk may be full: what went wrong first is what the user must hear.
        with contextlib.suppress(DrkdError, OSError):
            folder.merge_metrics()
        with contextlib.suppress(DrkdError, OSError):
            status = "interrupted" if pressed or stopped else "failed"
            reason = f"{type(error).__name__}: {error}"
            if folder.resumes and not restoring.restored and isinstance(error, DrkdError):
                folder.withdraw()
            else:
                folder.finish(status, steps=trainer.global_step, error=reason, **_left_out(recipe, callbacks))
        if pressed:
            raise KeyboardInterrupt from error
        raise
    stops.ignore()
    folder.finish("finished", steps=trainer.global_step, epochs=trainer.current_epoch, **_left_out(recipe, callbacks))
    return RunResult(folder.path, student, metrics, module.distiller)


def _finish(recipe: Recipe, folder: RunFolder, student: Detector, *, device: torch.device) -> dict[str, Any]:
    """Save the student alone, then measure it; every process evaluates its share, the first one writes."""
    if folder.writes:
        save_student(
            folder.student,
            student,
            builder=recipe.student,
            image_settings=recipe.data.image_settings,
            extra={"seed": recipe.seed, "category_ids": recipe.data.train_split.numbered_categories()},
        )
    if recipe.evaluation.split is None:
        return {}
    share_buffers(student.to(device))
    evaluated = evaluate_detector(
        student,
        recipe.data.split(recipe.evaluation.split),
        loader=recipe.data.loader(recipe.evaluation.split),
        area_scale=recipe.evaluation.area_scale,
        cost=recipe.evaluation.cost and folder.writes,
        device=device,
    )
    if folder.writes:
        write_json(folder.path / "evaluation.json", {**evaluated.metrics, "split": recipe.evaluation.split})
        if evaluated.cost is not None:
            write_json(folder.path / "cost.json", evaluated.cost)
    return evaluated.metrics


def _restore(
    recipe: Recipe, module: DistillationModule, best: ModelCheckpoint | None, average: StudentAverage | None
) -> None:
    """Put the weights that are to be saved into the student."""
    kept = best.best_model_path if best is not None and recipe.training.keeps_best else None
    if kept == "" and is_first_process():
        # Refused before training, but for a run that goes on: it may have kept its last student until then.
        print(
            "drkd: training.keep: the run ended without a validation, so there is no best student and the last one is "
            "saved. Lower training.validate_every, or train for longer, where that is not wanted.",
            file=sys.stderr,
        )
    if kept:
        saved = AtomicCheckpoints().load_checkpoint(kept)
        with explained_by_checkpoint(kept):
            module.on_load_checkpoint(saved)  # which compares the names
            module.load_state_dict(saved["state_dict"], strict=False)
            states = [state for key, state in saved["callbacks"].items() if str(key).startswith("StudentAverage")]
            # What was scored: the average where that run had one, whatever this session of it has.
            if states and states[0]:
                StudentAverage.put_saved(states[0], module)
    elif average is not None:
        average.apply_to(module)


def _checkpoints(recipe: Recipe, folder: RunFolder) -> tuple[ModelCheckpoint, ModelCheckpoint | None]:
    """The checkpoint of every epoch's end, to resume from, and the best one where there is validation."""
    last = ModelCheckpoint(
        dirpath=folder.checkpoints,
        filename=folder.last_checkpoint.stem,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    if not recipe.training.validate_every:
        return last, None
    best = ModelCheckpoint(
        dirpath=folder.checkpoints, filename="best", monitor="val/ap", mode="max", enable_version_counter=False
    )
    return last, best


def _left_out(recipe: Recipe, callbacks: list[Callback]) -> dict[str, Any]:
    """What the run went on without, for its record; empty for a run that had everything."""
    skipped = sum(callback.skipped for callback in callbacks if isinstance(callback, NonFiniteSteps))
    found = {"unreadable": recipe.data.unreadable_files(), "skipped_steps": skipped}
    return {name: value for name, value in found.items() if value}


def _interruptible(recipe: Recipe, folder: RunFolder) -> Interruptible:
    return Interruptible(
        folder.last_checkpoint,
        every_steps=recipe.training.checkpoint_every,
        every_minutes=recipe.training.checkpoint_minutes,
        signals=stop_signals(requeue=under_slurm()),
    )


def _callbacks(recipe: Recipe) -> list[Callback]:
    limit = recipe.training.skip_nonfinite
    guard: Callback = NonFiniteSteps(limit) if limit else FiniteLossGuard()
    shared = SharedUnreadable(recipe.data)
    callbacks: list[Callback] = [guard, FiniteWeightsGuard(), LearningRateMonitor(logging_interval="step"), shared]
    callbacks.append(TQDMProgressBar(refresh_rate=5) if sys.stderr.isatty() else LineProgress())
    if recipe.training.patience is not None:
        # After a validation, not after an epoch: the last one may end within its images, without any.
        callbacks.append(
            EarlyStopping("val/ap", mode="max", patience=recipe.training.patience, check_on_train_epoch_end=False)
        )
    return callbacks


def _trainer(recipe: Recipe, folder: RunFolder, callbacks: list[Callback]) -> Trainer:
    settings = recipe.training
    part = folder.next_log()
    if folder.writes:
        part.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        precision=choose_precision(settings),  # type: ignore[arg-type]
        max_steps=settings.steps or -1,
        max_epochs=settings.epochs if settings.epochs else -1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip_norm,
        check_val_every_n_epoch=settings.validate_every or 1,
        limit_val_batches=1.0 if settings.validate_every else 0,
        sync_batchnorm=settings.sync_batchnorm,
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        logger=[
            # Every row goes to the disk at once: a killed run's curve then reaches as far as its checkpoint.
            CSVLogger(part.parent, name="", version=part.name, flush_logs_every_n_steps=1),
            TensorBoardLogger(part.parent, name="", version=part.name),
        ],
        log_every_n_steps=settings.log_interval,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        default_root_dir=folder.path,
    )
    # A run that counts steps would enter an epoch anew that its checkpoint ends, train a step too many in it, and leave
    # out the order of the next. One that counts epochs goes on with the next; so shall both.
    trainer.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
    return trainer
