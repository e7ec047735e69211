"""Makes a run stoppable at any moment: checkpoints within an epoch, an orderly stop, one at once around training."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["Interruptible", "StoppedBySignal", "StopsAtOnce", "leave_out_sigterm_broadcast", "stop_signals"]

# Steps between two agreements of several processes on whether to stop; one costs a small collective.
_AGREE_EVERY = 10


class StoppedBySignal(BaseException):
    """The run was asked to stop and did, after saving; not an Exception, so that nothing takes it for a failure.

    Args:
        signal_number: Which signal asked.
        step: Optimizer steps made; None before training.
        saved: Whether a checkpoint of that very step was written.
    """

    def __init__(self, signal_number: int, *, step: int | None, saved: bool) -> None:
        self.signal_number = signal_number
        self.step = step
        self.saved = saved
        when = "before training" if step is None else f"at step {step}"
        what = "a checkpoint of this step is saved" if saved else "the last checkpoint stands"
        what = "what was saved before stands" if step is None else what
        super().__init__(f"stopped by {signal.Signals(signal_number).name} {when}; {what}")


def stop_signals(*, requeue: bool) -> tuple[int, ...]:
    """Signals that ask for an orderly stop: SIGTERM, Ctrl-C; with ``requeue`` SIGUSR1, as SLURM is told to send it."""
    user = getattr(signal, "SIGUSR1", None)
    asking = (signal.SIGTERM, signal.SIGINT)
    return (*asking, user) if requeue and user is not None else asking


class StopsAtOnce:
    """A context in which a signal raises `StoppedBySignal` at once: what surrounds training has nothing to save.

    `Interruptible` and Lightning take the signals over while they train, and give them back. Ctrl-C stays Python's.

    Args:
        signals: Signals that ask to stop.

    Attributes:
        step: Optimizer steps made, for the message; None before training.
        saved: Whether a checkpoint of that very step is written.
    """

    def __init__(self, signals: tuple[int, ...]) -> None:
        self.signals = tuple(number for number in signals if number != signal.SIGINT)
        self.step: int | None = None
        self.saved = False
        self._over = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopsAtOnce:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        for number, handler in self._before.items():
            # None: it was not set from Python, and cannot be put back from there.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def ignore(self) -> None:
        """Stop no more: the run has ended, and only its record is still to be written."""
        self._over = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        if os.getpid() != self._process:
            # A process that decodes images, made with these handlers: its parent is told as well, and ends it.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if not self._over:
            raise StoppedBySignal(number, step=self.step, saved=self.saved)


class Interruptible(Checkpoint):
    """Save the run's checkpoint every so many steps or minutes, and stop where a signal asks for it.

    A signal only leaves a note: the run saves and stops after the optimizer step under way, when its state is
    consistent. Several processes agree every ten steps, so that all stop at the same step whichever was told. In
    validation one process stops at once, several after the epoch; that costs one step at most, since the last step but
    one before a validation is saved.

    Args:
        path: The checkpoint.
        every_steps: Optimizer steps between checkpoints; None = none by steps.
        every_minutes: Minutes after which one is written; None = none by time.
        signals: Signals that ask to stop.
    """

    def __init__(
        self, path: Path, *, every_steps: int | None, every_minutes: float | None, signals: tuple[int, ...]
    ) -> None:
        self.path = path
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.signals = signals
        self._asked = 0
        self._saved_at = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have Lightning, which takes SIGTERM from here to training's start, leave a note here too.

        Its own notifier would have the process that is told wait for all others, which were told nothing.
        """
        del pl_module
        if self._takes_sigterm:
            connector = trainer._signal_connector
            connector._sigterm_notifier_fn = partial(self._note_early, trainer)  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals; Lightning, which sets its own handlers before, puts the old ones back at the end.

        Its loop would have all processes wait for the first one's note of a SIGTERM before every batch, and read it on
        the host; here they agree by themselves, and less often.
        """
        del pl_module
        self._saved_at = time.monotonic()
        if self._takes_sigterm:
            leave_out_sigterm_broadcast(trainer)
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due; save and stop where it was asked for."""
        del pl_module, outputs, batch
        # After an epoch's last batch come validation and the checkpoint of the epoch's end: nothing goes between.
        if trainer.is_last_batch or trainer.fit_loop._should_accumulate():
            return
        # Not by the batch's number: where gradients are accumulated, every tenth batch may never end a step.
        together = trainer.world_size == 1 or trainer.global_step % _AGREE_EVERY == 0
        asked, late = self._agree(trainer) if together else (0, False)
        due = late or (self.every_steps is not None and trainer.global_step % self.every_steps == 0)
        if asked or due or _before_validation(trainer, batch_idx):
            trainer.save_checkpoint(self.path)
            self._saved_at = time.monotonic()
        if asked:
            raise StoppedBySignal(asked, step=trainer.global_step, saved=True)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Stop in the midst of a validation (one process): its results would come too late."""
        del pl_module, rest
        if trainer.world_size == 1 and self._asked:
            raise StoppedBySignal(self._asked, step=trainer.global_step, saved=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the epoch's own checkpoint."""
        del pl_module
        self._saved_at = time.monotonic()
        asked, _ = self._agree(trainer)
        if asked:
            raise StoppedBySignal(asked, step=trainer.global_step, saved=True)

    def stop_if_asked(self, trainer: Trainer) -> None:
        """Stop for a signal that came after training's last look (one process), once all is saved."""
        if trainer.world_size == 1 and self._asked:
            raise StoppedBySignal(self._asked, step=trainer.global_step, saved=True)

    @property
    def _takes_sigterm(self) -> bool:
        return signal.SIGTERM in self.signals and threading.current_thread() is threading.main_thread()

    def _note_early(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not self._asked:
            launcher.kill(number)  # the processes that this one has started
        self._note(number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._asked == signal.SIGINT:
            raise KeyboardInterrupt  # whoever presses twice will not wait
        self._asked = number

    def _agree(self, trainer: Trainer) -> tuple[int, bool]:
        """The signal that any process got, or 0, and whether the time is up on any."""
        asked = self._asked
        late = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        if trainer.world_size == 1:
            return asked, late
        notes = torch.tensor([asked, int(late)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(notes, op=torch.distributed.ReduceOp.MAX)
        first, second = notes.tolist()
        return int(first), bool(second)


def leave_out_sigterm_broadcast(trainer: Trainer) -> None:
    """Have Lightning's loop not ask the first process before every batch whether it got a SIGTERM."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def _nothing() -> None:
    """In place of what is not to happen."""


def _before_validation(trainer: Trainer, batch_idx: int) -> bool:
    """Whether one optimizer step is left of an epoch that ends in a validation, whose checkpoint comes after that."""
    every = trainer.check_val_every_n_epoch
    if not every or (trainer.current_epoch + 1) % every or not trainer.enable_validation:
        return False
    return trainer.num_training_batches - (batch_idx + 1) <= trainer.accumulate_grad_batches
