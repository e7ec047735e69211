"""Checks of a recipe's training section beyond those of its types: what would fail hours later, or hang."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drkd.contracts import DrkdError

if TYPE_CHECKING:
    from drkd.recipes.recipe import Training

_SHARDED = ("fsdp", "deepspeed", "model_parallel")


def check_training(training: Training) -> None:
    """Refuse what cannot work.

    Raises:
        DrkdError: For numbers out of range, and for strategies that spread one model over several devices.
    """
    for name, least in (
        ("checkpoint_every", 1),
        ("accumulate", 1),
        ("num_nodes", 1),
        ("monitor_interval", 1),
        ("calibration_steps", 1),
        ("log_interval", 1),
        ("patience", 1),
        ("validate_every", 0),
        ("skip_nonfinite", 0),
    ):
        value = getattr(training, name)
        if value is not None and value < least:
            raise DrkdError(f"training.{name}: expected at least {least}, got {value}.")
    if training.checkpoint_minutes is not None and not training.checkpoint_minutes > 0:
        raise DrkdError(
            f"training.checkpoint_minutes: expected a positive number or null, got {training.checkpoint_minutes}."
        )
    if training.clip_norm is not None and not training.clip_norm > 0:
        raise DrkdError(f"training.clip_norm: expected a positive number or null, got {training.clip_norm}.")
    if training.sync_batchnorm and training.accelerator == "cpu":
        raise DrkdError("training.sync_batchnorm: PyTorch synchronises batch norm on GPUs only; leave it out on a CPU.")
    if any(training.strategy.startswith(name) for name in _SHARDED):
        raise DrkdError(
            f"training.strategy: {training.strategy} spreads one model over the devices, and drkd needs the student "
            "whole on each: its moving average, its detections in validation and student.pt are made from it between "
            "steps. Use ddp; a detector with its teacher fits one device, and bf16-mixed halves its activations."
        )
