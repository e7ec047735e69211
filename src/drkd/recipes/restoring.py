"""Going on from a checkpoint: one that does not fit is told from a fault of the training, a folder may have moved."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from drkd.contracts import DrkdError

_DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)


class Restoring(Callback):
    """A context around ``Trainer.fit``: until training starts, an error of Python is the checkpoint's fault.

    Args:
        checkpoint: What the run goes on from; None where it starts.
        needs_best: Whether the best student so far must be there, as it may be the one that is kept.

    Raises:
        DrkdError: On leaving the context, instead of the error.
    """

    def __init__(self, checkpoint: Path | None, *, needs_best: bool = False) -> None:
        self._checkpoint = checkpoint
        self._needs_best = needs_best
        self._under_way = checkpoint is None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have Lightning's checkpoint callbacks find their files where the run folder is now.

        A checkpoint names them by where they were. Where the folder has another name since, or is mounted elsewhere,
        Lightning would forget the best score and still look for the best student in the old place.

        Raises:
            DrkdError: If the best student is needed and not there.
        """
        del pl_module
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if not isinstance(callback, ModelCheckpoint) or not state or callback.dirpath is None:
                continue
            _move(state, Path(callback.dirpath))
            best = state.get("best_model_path")
            if self._needs_best and callback.monitor and best and not Path(best).exists():
                raise DrkdError(
                    f"{best}: the best student so far is not there, and the run may have to keep it (training.keep, "
                    "training.patience). Put the file back, or start anew with --overwrite=true."
                )

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


def _move(state: dict[str, Any], folder: Path) -> None:
    """Change a ModelCheckpoint's state as if it had been written in another folder."""

    def moved(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    state["dirpath"] = str(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if name in state:
            state[name] = moved(state[name])
    if "best_k_models" in state:
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
