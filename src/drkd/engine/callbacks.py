"""Lightning callbacks: averaged weights, the non-finite guard, progress in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from drkd.contracts import DrkdError
from drkd.engine.module import DistillationModule

# How torch names the averaged model within its average.
_WITHIN = "module."


class StudentAverage(Callback):
    """Exponential moving average of the student, used for validation and for what is saved as the student.

    Lightning's own averaging copies the whole module, teacher included; this one copies the student only. Buffers that
    hold an infinity, such as a mask, are taken as they are: an infinity has no average.

    Args:
        decay: Share of the old average kept at a step, in (0, 1), once training is under way. Early on the share is
            limited to (1 + step) / (10 + step), so that short runs are not dominated by the initial weights.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise DrkdError(f"training.ema: expected a decay in (0, 1), got {decay}")
        self.decay = decay
        self._average: AveragedModel | None = None
        self._copied: list[tuple[Tensor, Tensor]] = []
        self._saved: dict[str, Any] | None = None
        self._swapped: dict[str, Tensor] | None = None

    @property
    def average(self) -> nn.Module | None:
        """The averaged student; None before fitting."""
        return None if self._average is None else self._average.module

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the current student, or from the checkpoint's average."""
        del trainer
        student = _student(pl_module)
        self._average = AveragedModel(student, use_buffers=True)
        if self._saved is not None:
            self._average.load_state_dict(self._saved)
            self._saved = None
        ours = dict(self._average.module.named_buffers())
        self._copied = [(ours[name], value) for name, value in student.named_buffers() if not _has_mean(value)]
        for own, value in self._copied:
            own.copy_(value)  # an average of before this was seen to has means of them

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after each optimizer step."""
        del outputs, batch, batch_idx
        if self._average is None or trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step
        decay = min(self.decay, (1 + step) / (10 + step))
        self._average.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self._average.update_parameters(_student(pl_module))
        for ours, value in self._copied:
            ours.copy_(value)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        del trainer
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on training the raw weights."""
        del trainer
        if self._swapped is not None:
            _student(pl_module).load_state_dict(self._swapped)
            self._swapped = None

    def apply_to(self, pl_module: LightningModule) -> None:
        """Put the average into the student for good (the end of a run); a loaded state comes first."""
        if self._average is not None and self._saved is not None:
            self._average.load_state_dict(self._saved)
            self._saved = None
        self._swap_in(pl_module)
        self._swapped = None

    @staticmethod
    def put_saved(state: Mapping[str, Any], pl_module: LightningModule) -> None:
        """Put the average that a checkpoint holds into the student; of one before the first step, nothing.

        Args:
            state: The callback's state in the checkpoint.
            pl_module: The module whose student it goes to.
        """
        saved = state["average"]
        if int(saved["n_averaged"]) > 0:
            own = {name.removeprefix(_WITHIN): value for name, value in saved.items() if name.startswith(_WITHIN)}
            _student(pl_module).load_state_dict(_with_means(_student(pl_module), own))

    def _swap_in(self, pl_module: LightningModule) -> None:
        if self._average is None or int(self._average.n_averaged) == 0:
            return
        student = _student(pl_module)
        self._swapped = {name: value.detach().clone() for name, value in student.state_dict().items()}
        student.load_state_dict(_with_means(student, self._average.module.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """Saved with the checkpoint."""
        return {} if self._average is None else {"average": self._average.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken over when fitting starts."""
        self._saved = state_dict.get("average")


def _has_mean(buffer: Tensor) -> bool:
    """Indices and counts have none: cut off to whole numbers it would be the one below, for ever; nor has infinity."""
    return buffer.is_floating_point() and bool(buffer.isfinite().all())


def _with_means(student: nn.Module, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The average's state, with the student's own buffers where those have no mean."""
    own = student.state_dict()
    return {**average} | {
        name: own[name] for name, value in student.named_buffers() if name in own and not _has_mean(value)
    }


class FiniteLossGuard(Callback):
    """Stop with an explanation when the loss is no longer finite (see `FiniteWeightsGuard` for the weights).

    Args:
        interval: Every how many steps the flag is read where reading costs a synchronisation (GPU).
    """

    def __init__(self, interval: int = 20) -> None:
        self.interval = interval
        self._broken: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note a non-finite loss; read the note now and then."""
        del batch
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        broken = ~torch.isfinite(loss.detach())
        self._broken = broken if self._broken is None else self._broken | broken
        if loss.device.type == "cpu" or batch_idx % self.interval == 0 or trainer.is_last_batch:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the note at the latest when an epoch ends."""
        self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read the note before a checkpoint is written, whoever writes it."""
        del checkpoint
        self._check(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the note before scores are made of such weights."""
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._broken is None or not bool(self._broken):
            return
        terms = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("task/", "kd/")) and not torch.isfinite(value)
        }
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        raise DrkdError(
            f"The loss became NaN or infinite at step {trainer.global_step} (not finite: "
            f"{', '.join(terms) or 'the sum'}; learning rate {rate:g}). Nothing was saved after the last checkpoint. "
            "Lower training.optimization.learning_rate, raise warmup_steps, clip gradients (training.clip_norm), or "
            "use precision 32-true or bf16-mixed instead of 16-mixed."
        )


class LineProgress(Callback):
    """One line every few seconds, for logs and terminals that cannot redraw.

    Args:
        seconds: Time between lines.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds
        self._started = self._last = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del pl_module
        self._started = self._last = time.monotonic()
        self._first_step = trainer.global_step

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print when it is time."""
        del pl_module, outputs, batch, batch_idx
        now, step = time.monotonic(), trainer.global_step
        total = int(trainer.estimated_stepping_batches)
        if now - self._last < self.seconds and step != total:
            return
        self._last = now
        rate = (now - self._started) / max(1, step - self._first_step)
        metrics = trainer.callback_metrics
        shown = " ".join(
            f"{name} {float(value):.3f}"
            for name, value in sorted(metrics.items())
            if name == "loss" or name in ("val/ap", "val/ap_small") or name.startswith(("task/", "kd/", "ratio/"))
        )
        print(f"step {step}/{total} eta {rate * (total - step):.0f}s {shown}", file=sys.stderr, flush=True)


def _student(pl_module: LightningModule) -> nn.Module:
    if not isinstance(pl_module, DistillationModule):
        raise TypeError(f"expected a DistillationModule, got {type(pl_module).__name__}")
    return pl_module.distiller.student
