"""Compile what of a distillation step gains from it: the two backbones with their pyramids, and the method."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch._functorch.config
from torch import nn

from drkd.contracts import Detector, KDMethod
from drkd.engine.distiller import Distiller


def compile_distiller(distiller: Distiller, *, backend: str = "inductor") -> None:
    """Compile in place; names of parameters, checkpoints and results stay as they are.

    Heads and matching stay eager: they depend on the number of boxes, and would be compiled anew at every step. The
    first steps take minutes; images of many sizes are compiled for a few of them, then once with sizes left open.

    Args:
        distiller: Student, and teacher and method where it has them.
        backend: Of ``torch.compile``: inductor (needs a C++ compiler on a CPU), aot_eager, ...
    """
    # Gradient ratios are measured by several backward passes through one graph, so its buffers must not be given away.
    torch._functorch.config.donated_buffer = False
    for detector in (distiller.student, distiller.teacher):
        if detector is not None:
            _backbone(detector).compile(backend=backend)
    if distiller.method is not None:
        for part in _parts(distiller.method):
            part.compile(backend=backend)


def _backbone(detector: Detector) -> nn.Module:
    """What turns images into maps; the whole model where it has no part of that name."""
    backbone = getattr(detector.model, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else detector.model


def _parts(method: KDMethod) -> Iterator[nn.Module]:
    """The modules that read maps of fixed sizes; the whole method where it does not say which."""
    parts = getattr(method, "pixel_losses", None)
    if isinstance(parts, nn.ModuleList):
        yield from parts
    else:
        yield method
