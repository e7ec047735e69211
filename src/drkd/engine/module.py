"""The Lightning module: optimisation, logging and validation around a `Distiller`."""

from __future__ import annotations

import bisect
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning import LightningModule, Trainer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from drkd.contracts import DetectionBatch, Detections, Detector, DrkdError
from drkd.engine.agreement import share_buffers, share_weights
from drkd.engine.distiller import Distiller

# Under these names a checkpoint says how the images of a step were shared out, and what moved the weights.
_SHARING = "drkd_images_per_step"
_OPTIMIZER = "drkd_optimizer"
_CLASSES = "drkd_class_names"
# What optimizers count or move in their groups themselves; all the rest of a group is as the recipe says.
_MOVING = ("params", "lr", "lookahead_step")


class Evaluator(Protocol):
    """Collects detections and turns them into metrics (drkd.evaluation has the COCO one)."""

    def update(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Add the detections of some images."""

    def compute(self) -> Any:
        """Return metrics that have ``as_dict()``."""


@dataclass(frozen=True)
class Optimization:
    """How the weights move.

    Args:
        optimizer: Any name that timm's optimizer factory knows: sgd (there with Nesterov's momentum), momentum (SGD
            with the plain one), adamw, ...
        learning_rate: Peak learning rate of the student.
        backbone_learning_rate: Peak learning rate of the student's backbone, its neck excluded; None = the student's.
            DETRs take a tenth of the rest's.
        method_learning_rate: Peak learning rate of the method's connectors; None = the student's.
        weight_decay: Not applied to biases and norm layers unless ``decay_all``.
        decay_all: Apply the weight decay to every parameter, as MMDetection's schedules do.
        momentum: Of SGD.
        schedule: "cosine" to 0 (as a share of the steps), or "multistep".
        milestones: Shares of the whole run at which "multistep" multiplies by ``gamma``, ascending, in (0, 1).
        gamma: Factor at each milestone.
        warmup_steps: Steps of linear warm-up.
        warmup_factor: Share of the learning rate at step 0.
        reference_batch: Images an optimizer step that the learning rates are meant for; all are multiplied by the
            images that a step really takes, over all processes and accumulated batches, over this number (Goyal et
            al., arXiv:1706.02677), and the result is printed. None = the rates as they are.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.01
    backbone_learning_rate: float | None = None
    method_learning_rate: float | None = None
    weight_decay: float = 1e-4
    decay_all: bool = False
    momentum: float = 0.9
    schedule: Literal["cosine", "multistep"] = "multistep"
    milestones: tuple[float, ...] = (16 / 24, 22 / 24)
    gamma: float = 0.1
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    reference_batch: int | None = None

    def __post_init__(self) -> None:
        if self.reference_batch is not None and self.reference_batch < 1:
            raise DrkdError(
                f"training.optimization.reference_batch: expected images or null, got {self.reference_batch}"
            )
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise DrkdError(
                "training.optimization: expected learning_rate > 0 and weight_decay >= 0, "
                f"got {self.learning_rate} and {self.weight_decay}"
            )
        for name in ("backbone_learning_rate", "method_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and rate < 0:
                raise DrkdError(f"training.optimization.{name}: expected a number of at least 0 or null, got {rate}")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise DrkdError(
                "training.optimization.milestones: expected ascending shares of the run, each in (0, 1), "
                f"got {list(self.milestones)}"
            )

    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate at a step, as a share of the peak.

        Args:
            step: 0-based optimizer step.
            total_steps: Optimizer steps of the whole run.
        """
        if step < self.warmup_steps:
            return self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        if self.schedule == "cosine":
            done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return float(self.gamma ** bisect.bisect_right([m * total_steps for m in self.milestones], step))


class DistillationModule(LightningModule):
    """Trains the student of a `Distiller`; checkpoints hold student, method and balance, not the teacher.

    Logged names: ``task/*`` and ``kd/*`` (weighted, what is minimised), ``bare/*`` (terms before weighting: these must
    fall), ``ratio/*`` (gradient norm at the student's features over the task's), ``weight/*`` (the factor in force,
    level by level), ``target/*`` (spread of what is compared with: it must not collapse), ``loss``, ``val/*``.

    Args:
        distiller: What to train.
        optimization: How the weights move.
        evaluator: Makes a fresh evaluator for a pass over the validation data; None = no validation metrics.
        seed: Every step's randomness is a function of it, the step and the rank, so a resumed run draws what an
            uninterrupted one would.
        channels_last: Use the channels-last memory layout.
        batch_size: Images a batch and process, for ``optimization.reference_batch``.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimization: Optimization,
        *,
        evaluator: Callable[[], Evaluator] | None = None,
        seed: int = 0,
        channels_last: bool = True,
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        self._batch_size = batch_size
        self._loader_states: list[dict[str, Any]] = []
        self._asked: list[dict[str, Any]] = []
        self.distiller = distiller
        self.optimization = optimization
        self.evaluation_model: nn.Module | None = None
        self.last_metrics: dict[str, float] = {}
        self._make_evaluator = evaluator
        self._evaluator: Evaluator | None = None
        self._seed = seed
        self._channels_last = channels_last
        # The teacher is left out of the checkpoint, so loading cannot be strict; load_state_dict checks instead.
        self.strict_loading = False
        # DDP would send the buffers of a teacher that never changes to all processes before every step.
        self._ddp_params_and_buffers_to_ignore = [
            name
            for name, _ in (*self.named_parameters(), *self.named_buffers())
            if name.startswith("distiller.teacher.")
        ]
        if channels_last:
            self.distiller.to(memory_format=torch.channels_last)

    def transfer_batch_to_device(self, batch: DetectionBatch, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch, images in the module's memory layout."""
        del dataloader_idx
        moved = batch.to(device, non_blocking=True)
        if self._channels_last:
            moved = _with_images(moved, moved.images.contiguous(memory_format=torch.channels_last))
        return moved

    def on_fit_start(self) -> None:
        """Have the student train, and give every process one teacher, once: DDP leaves it out. Collective."""
        self.distiller.wake_student()
        if self.distiller.teacher is not None:
            share_weights(self.distiller.teacher)

    def on_train_start(self) -> None:
        """Have the data go on after the last batch of the checkpoint.

        Lightning leaves this out whenever the number of steps was asked for before, as the schedule does: it then has
        made its loaders already. Nothing is drawn from them until the first batch.
        """
        states, self._loader_states = self._loader_states, []
        loader: Any = self.trainer.train_dataloader
        if len(states) == 1 and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(states[0])
        self._put_settings_in_force()

    def _put_settings_in_force(self) -> None:
        """Have a run that goes on use the rates, decay, momentum and length that it was given, not its checkpoint's."""
        for config in self.trainer.lr_scheduler_configs:
            schedule, step = config.scheduler, config.scheduler.last_epoch
            groups = schedule.optimizer.param_groups
            if not isinstance(schedule, LambdaLR) or len(groups) != len(self._asked):
                continue
            for index, (group, asked) in enumerate(zip(groups, self._asked, strict=True)):
                group.update(asked)
                schedule.base_lrs[index] = asked["initial_lr"]
                group["lr"] = asked["initial_lr"] * schedule.lr_lambdas[index](step)
            schedule._last_lr = [group["lr"] for group in groups]

    def on_train_batch_start(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Draw this step's randomness (box sampling, dropout, what a user's model draws) from seed, step and rank."""
        del batch
        position = self.current_epoch * 10_000_019 + batch_idx
        seed = (self._seed * 1_000_003 + position * 8191 + self.global_rank) % 2**63
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        """One pass: the sum of the named losses."""
        # Without a trainer, as somebody may call this by hand, the distiller counts for itself.
        if (trainer := self._trainer) is not None:
            self.distiller.at_step(trainer.global_step, first=batch_idx % trainer.accumulate_grad_batches == 0)
        losses = self.distiller(batch)
        total = torch.stack([value.float() for value in losses.values()]).sum()
        for name, value in losses.items():
            self.log(name, value.detach(), batch_size=len(batch), prog_bar=True)
        monitor = self.distiller.monitor
        for name, value in monitor.terms.items():
            self.log(f"bare/{name}", value, batch_size=len(batch))
        for kind, values in (("ratio", monitor.ratios), ("weight", monitor.weights), ("target", monitor.targets)):
            for name, value in values.items():
                self.log(f"{kind}/{name}", value, batch_size=len(batch))
        self.log("loss", total.detach(), prog_bar=True, batch_size=len(batch))
        missing = 1.0 if trainer is None else _missing_passes(trainer, batch_idx)
        return total if missing == 1 else missing * total

    def on_validation_epoch_start(self) -> None:
        """Start a fresh evaluator, with one student in all processes."""
        share_buffers(self.distiller.student)
        self._evaluator = self._make_evaluator() if self._make_evaluator else None

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Detect; metrics come at the end of the pass."""
        del batch_idx
        if self._evaluator is not None:
            self._evaluator.update(batch.image_ids, self.distiller.student.detect(batch))

    def on_validation_epoch_end(self) -> None:
        """Compute and log the metrics."""
        if self._evaluator is None:
            return
        metrics = self._evaluator.compute().as_dict()
        self._evaluator = None
        self.last_metrics = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for name, value in self.last_metrics.items():
            self.log(f"val/{name}", value, prog_bar=name in ("ap", "ap_small"), sync_dist=False, batch_size=1)

    def configure_optimizers(self) -> Any:
        """Optimizer over student and connectors, and the learning-rate schedule by optimizer step."""
        total = int(self.trainer.estimated_stepping_batches)
        settings = self._scaled(self.optimization)
        groups = _parameter_groups(self.distiller, settings)
        if not groups:
            raise DrkdError("Nothing to train: every parameter of the student is frozen. Lower frozen_stages.")
        optimizer = create_optimizer_v2(
            groups,
            opt=settings.optimizer,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            filter_bias_and_bn=False,
        )
        self.distiller.total_steps = total
        schedule = LambdaLR(optimizer, lambda step: settings.factor(step, total))
        self._asked = [
            {name: value for name, value in group.items() if name not in _MOVING} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _scaled(self, settings: Optimization) -> Optimization:
        """The settings with their learning rates scaled to the images that a step takes."""
        if settings.reference_batch is None:
            return settings
        # An epoch shorter than a step ends it. The loaders are there: the number of steps was asked for.
        passes = min(self.trainer.accumulate_grad_batches, max(1, self.trainer.num_training_batches))
        images = int(self._batch_size * self.trainer.world_size * passes)
        scaled = scale_rates(settings, images)
        if self.global_rank == 0:
            print(
                f"learning rate {scaled.learning_rate:g} = {settings.learning_rate:g} x {images} / "
                f"{settings.reference_batch} images a step",
                file=sys.stderr,
                flush=True,
            )
        return scaled

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out, and say what a step is."""
        checkpoint[_SHARING] = self._sharing()
        checkpoint[_OPTIMIZER] = self.optimization.optimizer
        checkpoint[_CLASSES] = list(self.distiller.student.spec.class_names)
        state = checkpoint["state_dict"]
        for name in [name for name in state if name.startswith("distiller.teacher.")]:
            del state[name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another student or method, naming the keys."""
        own = {name for name in self.state_dict() if not name.startswith("distiller.teacher.")}
        saved = set(checkpoint["state_dict"])
        if own != saved:
            missing, unexpected = sorted(own - saved), sorted(saved - own)
            if not unexpected and all(name.startswith("distiller.method.") for name in missing):
                raise DrkdError(
                    "The checkpoint is that of a student that was trained alone, and this is a distillation. Expected "
                    "the folder of a run of `drkd distill` with this method; start it in another folder (--output)."
                )
            raise DrkdError(
                f"The checkpoint belongs to another student or method: {len(missing)} keys missing "
                f"({', '.join(missing[:3])} ...), {len(unexpected)} unexpected ({', '.join(unexpected[:3])} ...)."
            )
        names = list(self.distiller.student.spec.class_names)
        if checkpoint.get(_CLASSES, names) != names:
            raise DrkdError(
                f"The checkpoint's student knows the classes {', '.join(map(str, checkpoint[_CLASSES]))}, and the data "
                f"has {', '.join(names)}: other names, or another order. Give the data its classes as they were, "
                "or start anew in another folder (--output)."
            )
        loops = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        self._refuse_other_sharing(checkpoint)
        saved = checkpoint.get(_OPTIMIZER, self.optimization.optimizer)
        if saved != self.optimization.optimizer:
            raise DrkdError(
                f"The run was optimised by {str(saved)[:40]!r}, training.optimization.optimizer is now "
                f"{self.optimization.optimizer!r}, which cannot go on from that state. Start anew in another folder."
            )
        self._loader_states = list(loops.get("combined_loader", []))

    def _sharing(self) -> dict[str, int]:
        """How the images of an optimizer step are shared out."""
        accumulated = self.trainer.accumulate_grad_batches
        return {"processes": self.trainer.world_size, "batch_size": self._batch_size, "accumulate": accumulated}

    def _refuse_other_sharing(self, checkpoint: dict[str, Any]) -> None:
        """The schedule counts steps, the place in the data batches of a process: both would be wrong, unnoticed."""
        saved, own = checkpoint.get(_SHARING), self._sharing()
        if not isinstance(saved, dict) or saved.keys() != own.keys() or saved == own:
            return
        told = [
            f"{layout['processes']} process(es) x {layout['batch_size']} images x {layout['accumulate']} accumulated"
            for layout in (saved, own)
        ]
        if math.prod(saved.values()) != math.prod(own.values()):
            raise DrkdError(
                f"The run took {math.prod(saved.values())} images a step ({told[0]}), now it would take "
                f"{math.prod(own.values())} ({told[1]}); its schedule counts steps. Change data.batch_size or "
                "training.accumulate so that a step takes as many as before, or start anew."
            )
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
        if not progress.get("is_last_batch"):
            raise DrkdError(
                f"The checkpoint is from within an epoch of {told[0]}, now it would be {told[1]}: what each process "
                "has seen of the epoch cannot be shared out anew. Go on as before until an epoch's end."
            )


def scale_rates(settings: Optimization, images: int) -> Optimization:
    """Settings for steps of so many images, their rates in proportion to ``reference_batch``."""
    if settings.reference_batch is None:
        return settings
    factor = images / settings.reference_batch
    backbone, method = settings.backbone_learning_rate, settings.method_learning_rate
    return replace(
        settings,
        learning_rate=settings.learning_rate * factor,
        backbone_learning_rate=None if backbone is None else backbone * factor,
        method_learning_rate=None if method is None else method * factor,
    )


def _with_images(batch: DetectionBatch, images: Tensor) -> DetectionBatch:
    return replace(batch, images=images)


def _missing_passes(trainer: Trainer, batch_idx: int) -> float:
    """Passes that a step should have over those that this batch's has: more than 1 where the epoch ends within a step.

    Lightning divides every pass by the former. The step's gradient is the mean over its images all the same.
    """
    asked = trainer.accumulate_grad_batches
    first = batch_idx - batch_idx % asked
    return float(asked / max(1, min(asked, trainer.num_training_batches - first)))


def _parameter_groups(distiller: Distiller, settings: Optimization) -> list[dict[str, Any]]:
    """Groups by owner (student, its backbone where that has a rate of its own, method) and by weight decay."""
    body, rest = _split_body(distiller.student, apart=settings.backbone_learning_rate is not None)
    method = [] if distiller.method is None else list(distiller.method.parameters())
    owners = (
        (rest, settings.learning_rate),
        (body, settings.backbone_learning_rate),
        (method, settings.method_learning_rate),
    )
    groups = []
    for parameters, rate in owners:
        trainable = [p for p in parameters if p.requires_grad]
        decayed = [p for p in trainable if p.ndim > 1 or settings.decay_all]
        kept = [p for p in trainable if not (p.ndim > 1 or settings.decay_all)]
        own_rate = settings.learning_rate if rate is None else rate
        groups.append({"params": decayed, "lr": own_rate, "weight_decay": settings.weight_decay})
        groups.append({"params": kept, "lr": own_rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _split_body(student: Detector, *, apart: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the backbone and all others; none and all where they need not be told apart.

    Raises:
        DrkdError: If no parameter is the backbone's.
    """
    if not apart:
        return [], list(student.parameters())
    body = [p for name, p in student.model.named_parameters() if name.startswith(student.body_names)]
    if not body:
        raise DrkdError(
            "training.optimization.backbone_learning_rate: expected parameters of the student whose names begin with "
            f"{' or '.join(student.body_names)}, got none."
        )
    ours = {id(p) for p in body}
    return body, [p for p in student.parameters() if id(p) not in ours]
