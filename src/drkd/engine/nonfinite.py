"""Lightning callback that leaves out optimizer steps whose loss or gradient is NaN or infinite, and counts them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from drkd.contracts import DetectionBatch, DrkdError


class NonFiniteSteps(Callback):
    """Skip what is not finite, up to a limit.

    A skipped step changes no weight, no optimizer state and no running statistic of a norm layer; schedule and step
    count go on, so a run is as long as without it. Several processes skip alike, as gradients are summed over them.

    Reads one number from the device at every step; the guard that is there without it does not (`FiniteLossGuard`).

    Args:
        limit: Steps that may be skipped in the whole run; one more stops it.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise DrkdError(f"training.skip_nonfinite: expected at least one step, got {limit}")
        self.limit = limit
        self.skipped = 0
        self._buffers: list[Tensor] = []
        self._image_ids: list[int] = []
        self._loss: Tensor | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: DetectionBatch, batch_idx: int
    ) -> None:
        """Remember the running statistics as they were before the first batch of the step."""
        del trainer, batch_idx
        if not self._image_ids:
            self._buffers = [buffer.detach().clone() for buffer in _moving_buffers(pl_module)]
        self._image_ids += batch.image_ids

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss of every batch of the step."""
        del trainer, pl_module
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients away where one is not finite, so that the optimizer finds nothing to do."""
        image_ids, loss, self._image_ids, self._loss = self._image_ids, self._loss, [], None
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        checks = [] if loss is None else [loss.isfinite().all().reshape(1)]
        # With a gradient scaler infinite gradients are part of the game: it skips those steps itself.
        if not hasattr(trainer.precision_plugin, "scaler") or trainer.precision_plugin.scaler is None:
            norms = torch._foreach_norm([p.grad for p in parameters])
            checks += [torch.stack(norms).isfinite().all().reshape(1)] if norms else []
        finite = torch.cat(checks).all() if checks else torch.ones((), dtype=torch.bool)
        if trainer.world_size > 1:
            flag = finite.to(device=trainer.strategy.root_device, dtype=torch.int32)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
            finite = flag.bool()
        if bool(finite):
            return
        self.skipped += 1
        if self.skipped > self.limit:
            raise DrkdError(
                f"The loss or its gradient became NaN or infinite at step {trainer.global_step} once more (images "
                f"{_listing(image_ids)}), after {self.limit} skipped steps, which is the limit "
                "(training.skip_nonfinite). Lower training.optimization.learning_rate, clip gradients "
                "(training.clip_norm), use precision 32-true or bf16-mixed, or look at those images."
            )
        for parameter in parameters:
            parameter.grad = None
        for buffer, before in zip(_moving_buffers(pl_module), self._buffers, strict=True):
            buffer.copy_(before)
        print(
            f"drkd: step {trainer.global_step} skipped: the loss or its gradient is not finite (images "
            f"{_listing(image_ids)}); {self.skipped} of at most {self.limit}",
            file=sys.stderr,
            flush=True,
        )

    def state_dict(self) -> dict[str, Any]:
        """The count, saved with the checkpoint."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = int(state_dict.get("skipped", 0))


def _moving_buffers(pl_module: LightningModule) -> list[Tensor]:
    return [buffer for name, buffer in pl_module.named_buffers() if ".teacher." not in f".{name}"]


def _listing(ids: list[int], shown: int = 8) -> str:
    return ", ".join(map(str, ids[:shown])) + (", ..." if len(ids) > shown else "")
