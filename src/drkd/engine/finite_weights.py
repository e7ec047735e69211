"""Keeps weights that are NaN or infinite out of every checkpoint and out of the student."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from drkd.contracts import DrkdError
from drkd.engine.callbacks import StudentAverage
from drkd.engine.module import DistillationModule

_STATISTICS = ("running_mean", "running_var")


def nonfinite_weights(module: nn.Module) -> list[str]:
    """Names of the parameters and running statistics of norm layers that hold a NaN or an infinity.

    Other buffers are left out: a mask may well be infinite. One synchronisation for each device.
    """
    named = [*module.named_parameters(), *((n, b) for n, b in module.named_buffers() if n.endswith(_STATISTICS))]
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.numel():
            by_device.setdefault(tensor.device, []).append((name, tensor.detach()))
    found = []
    for group in by_device.values():
        finite = torch.stack([tensor.isfinite().all() for _, tensor in group]).tolist()
        found += [name for (name, _), good in zip(group, finite, strict=True) if not good]
    return found


def refuse_nonfinite(names: Iterable[str], *, step: int, left: str) -> None:
    """Raise a DrkdError if there are names of weights that are not finite.

    Args:
        names: Of the weights.
        step: Optimizer steps made.
        left: A sentence on what was not written.
    """
    listed = list(names)
    if not listed:
        return
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    raise DrkdError(
        f"The weights are NaN or infinite after step {step} ({', '.join(listed[:3])}{more}), though the loss was "
        f"finite: its gradient was not, or a step was too large. {left} Go on with --resume from the checkpoint before "
        "and a lower training.optimization.learning_rate or clipped gradients (training.clip_norm), or leave such "
        "steps out (training.skip_nonfinite)."
    )


class FiniteWeightsGuard(Callback):
    """Stop before a checkpoint is written, or scores are made, of weights that are not finite.

    A finite loss does not show it: where its gradient is infinite the weights are broken after the step, and the loss
    is so only at the next one, when a checkpoint may have been written in between.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at what is to be saved, the average included."""
        del checkpoint
        self._check(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before scores are made."""
        self._check(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, DistillationModule):
            raise TypeError(f"expected a DistillationModule, got {type(pl_module).__name__}")
        distiller = pl_module.distiller
        names = [f"student.{name}" for name in nonfinite_weights(distiller.student)]
        if distiller.method is not None:
            names += [f"method.{name}" for name in nonfinite_weights(distiller.method)]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StudentAverage) and callback.average is not None:
                names += [f"average.{name}" for name in nonfinite_weights(callback.average)]
        refuse_nonfinite(names, step=trainer.global_step, left="Nothing was saved after the last checkpoint.")
