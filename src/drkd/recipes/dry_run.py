"""Build a recipe's whole run, take two real steps of it, and project what the run will take on this machine."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer

from drkd.contracts import DetectionBatch
from drkd.engine.callbacks import FiniteLossGuard
from drkd.engine.interruption import leave_out_sigterm_broadcast
from drkd.engine.module import DistillationModule
from drkd.engine.quiet import quiet_lightning
from drkd.engine.training_cost import TrainingCost
from drkd.recipes.limits import check_device, check_splits, check_validation, steps_per_epoch
from drkd.recipes.precision import choose_precision
from drkd.recipes.recipe import Recipe
from drkd.recipes.training import build_module, require_teacher_and_method

_LOADER_SECONDS = 20.0
_STEPS = 2


@dataclass(frozen=True)
class Projection:
    """What two steps say of a run on this machine.

    Args:
        device: What trained.
        images: Training images.
        batch_size: Images a batch and process.
        step_seconds: The second step's forward and backward passes and update, without waiting for data.
        steps_per_epoch: Optimizer steps.
        epochs: Of the recipe; a part of one where it counts steps.
        loader_rate: Images a second that the loader delivers when nothing else runs.
        needed_rate: Images a second that the step consumes.
        peak_bytes: Peak memory of the two steps; None where the system does not say.
        peak_kind: What that counts.
        validation_seconds: One validation, detection by all processes, from one batch; None = not known.
        validations: How many the run has; the final evaluation counts as one, though its split may be larger.
        losses: The named losses of the last step.
        price: Of an hour of this machine, in any currency; None where not given.
    """

    device: str
    images: int
    batch_size: int
    step_seconds: float
    steps_per_epoch: int
    epochs: float
    loader_rate: float
    needed_rate: float
    peak_bytes: int | None
    peak_kind: str
    validation_seconds: float | None
    validations: int
    losses: dict[str, float]
    price: float | None

    @property
    def epoch_seconds(self) -> float:
        """An epoch without validation: of the step and the loader, the slower one decides."""
        return self.steps_per_epoch * self.step_seconds * max(1.0, self.needed_rate / self.loader_rate)

    @property
    def total_seconds(self) -> float:
        """The run with its validations."""
        return self.epochs * self.epoch_seconds + self.validations * (self.validation_seconds or 0.0)

    def lines(self) -> list[str]:
        """What to print, one line each."""
        found = [
            f"device:      {self.device}",
            "losses:      " + ", ".join(f"{name} {value:.4g}" for name, value in self.losses.items()),
            f"step:        {_duration(self.step_seconds)} for {self.batch_size} images a process",
            f"loader:      {self.loader_rate:.1f} images a second, the step consumes {self.needed_rate:.1f}"
            + ("" if self.loader_rate >= self.needed_rate else ": loading is the bottleneck, raise data.workers"),
            f"epoch:       {self.images} images, {self.steps_per_epoch} steps, {_duration(self.epoch_seconds)}"
            + self._money(self.epoch_seconds),
        ]
        if self.validation_seconds is not None:
            found.append(f"validation:  {_duration(self.validation_seconds)}, {self.validations} times")
        found.append(
            f"whole run:   {self.epochs:g} epochs, {_duration(self.total_seconds)}" + self._money(self.total_seconds)
        )
        if self.peak_bytes is not None:
            found.append(f"peak memory: {self.peak_bytes / 2**30:.2f} GiB, {self.peak_kind}")
        found.append(
            "From the second of two steps, so take it as a first guess. Steps that measure gradient ratios "
            "(every 5th of the first 100, then every 50th by default) take longer; the first epoch's start-up is left "
            "out."
        )
        return found

    def _money(self, seconds: float) -> str:
        return "" if self.price is None else f", costs {self.price * seconds / 3600:.2f}"


def dry_run(recipe: Recipe, *, kind: str, price: float | None = None) -> Projection:
    """Build data, student, teacher and method, take two optimizer steps, detect once; nothing is written.

    Args:
        recipe: The recipe.
        kind: "distill" or "train".
        price: Of an hour of this machine.

    Raises:
        DrkdError: For anything that would stop the run itself.
    """
    settings = recipe.training
    if kind == "distill":
        require_teacher_and_method(recipe)
    else:
        recipe.data.leave_out_unlabelled()
    recipe.data.setup("fit")
    check_splits(recipe)
    module = build_module(recipe, kind=kind)
    cost = TrainingCost()
    with tempfile.TemporaryDirectory() as scratch, quiet_lightning():
        trainer = Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=settings.strategy,
            precision=choose_precision(settings),  # type: ignore[arg-type]
            max_steps=_STEPS,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip_norm,
            sync_batchnorm=settings.sync_batchnorm,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            callbacks=[cost, FiniteLossGuard()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=scratch,
        )
        check_device(settings, trainer.strategy.root_device)
        if not recipe.resume:
            check_validation(settings, steps_per_epoch=steps_per_epoch(recipe, processes=trainer.world_size))
        leave_out_sigterm_broadcast(trainer)  # as in the run itself
        trainer.fit(module, datamodule=recipe.data)
    per_epoch = math.ceil(int(trainer.num_training_batches) / settings.accumulate)
    epochs = float(settings.epochs) if settings.epochs else (settings.steps or 0) / per_epoch
    loader = recipe.data.train_dataloader()
    size, rate = _loader_rate(loader)
    seconds = float(cost.measured["seconds_per_step"])
    device = trainer.strategy.root_device
    every = settings.validate_every
    # The last one is of the finished student.
    validations = (int(epochs // every) if every else 0) + (recipe.evaluation.split is not None)
    losses = {
        name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(("task/", "kd/"))
    }
    return Projection(
        device=_describe(device, trainer.world_size),
        images=len(recipe.data.train_split.records),
        batch_size=size,
        step_seconds=seconds,
        steps_per_epoch=per_epoch,
        epochs=epochs,
        loader_rate=rate,
        needed_rate=size * settings.accumulate / seconds,
        peak_bytes=cost.measured["peak_memory_bytes"],
        peak_kind=str(cost.measured["peak_memory_kind"]),
        # Each process detects on its share.
        validation_seconds=_validation_seconds(recipe, module, device) / trainer.world_size if validations else None,
        validations=validations,
        losses=losses,
        price=price,
    )


def _loader_rate(loader: Any) -> tuple[int, float]:
    """Images of the first batch, and images a second in the steady state: the workers' first batch is not counted."""
    wanted = 4 * max(loader.num_workers, 1) + 1
    first = 0
    counted = 0
    started = time.perf_counter()
    begun = started
    for number, batch in enumerate(loader):
        now = time.perf_counter()
        if number == 0:
            first, started = len(batch), now
            # Without workers the first batch is as good as any; an epoch of one batch has no other.
            rate = len(batch) / max(now - begun, 1e-9)
            continue
        counted += len(batch)
        rate = counted / max(now - started, 1e-9)
        if number + 1 >= wanted or now - started > _LOADER_SECONDS:
            break
    return first, rate


def _validation_seconds(recipe: Recipe, module: DistillationModule, device: torch.device) -> float:
    """Detection by one process on the whole validation split, from its first batch (the second of two passes)."""
    loader = recipe.data.val_dataloader()
    batch: DetectionBatch = next(iter(loader))
    student = module.distiller.student.to(device).eval()
    moved = batch.to(device)
    seconds = 0.0
    for _ in range(2):
        _wait(device)
        started = time.perf_counter()
        student.detect(moved)
        _wait(device)
        seconds = time.perf_counter() - started
    return seconds * len(recipe.data.val_split.records) / len(batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        return f"{processes} x {torch.cuda.get_device_name(device)} ({total:.0f} GiB)"
    return f"{device.type}, {torch.get_num_threads()} threads" + (f", {processes} processes" if processes > 1 else "")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
