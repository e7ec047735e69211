"""The precision that a run computes in where the recipe leaves it open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from drkd.recipes.recipe import Training


def choose_precision(training: Training) -> str:
    """Lightning's precision: what the recipe says; for "auto" bf16-mixed on a GPU that computes it, otherwise 32-true.

    CPUs keep float32, and so do GPUs that only emulate bf16. Distances, relations and the norms of
    gradients are computed in float32 whatever the precision.
    """
    if training.precision != "auto":
        return training.precision
    on_gpu = training.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
