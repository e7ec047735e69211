"""Tells a checkpoint that does not fit from a fault of the training that follows."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from drkd.contracts import DrkdError

_DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)


class Restoring(Callback):
    """A context around ``Trainer.fit``: until training starts, an error of Python is the checkpoint's fault.

    Args:
        checkpoint: What the run goes on from; None where it starts.

    Raises:
        DrkdError: On leaving the context, instead of the error.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self._checkpoint = checkpoint
        self._under_way = checkpoint is None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is restored."""
        del trainer, pl_module
        self._under_way = True

    def __enter__(self) -> Restoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        kept = isinstance(error, DrkdError | torch.OutOfMemoryError)
        if self._under_way or kept or not isinstance(error, _DAMAGE):
            return
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DrkdError(
            f"{self._checkpoint}: the run cannot go on from this checkpoint ({type(error).__name__}: {reason}). It "
            "belongs to another recipe or is damaged; start anew with --overwrite=true or another --output."
        ) from error
