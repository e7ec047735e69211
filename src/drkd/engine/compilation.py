"""Compile parts of a distillation step: the two backbones with their pyramids, and what of a method reads maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import nn

from drkd.contracts import Detector, KDMethod
from drkd.engine.distiller import Distiller
from drkd.engine.teachers import TeacherGroup

# Forms of a part, of torch's own default: one for each of a few image sizes, in train and eval mode.
_FORMS = 8


def compile_distiller(distiller: Distiller, *, backend: str = "inductor") -> None:
    """Compile in place; names of parameters, checkpoints and results stay as they are.

    Each teacher of several is compiled, and each method of several. A detector that runs its layers one by one, as a
    YOLO of Ultralytics does, stays eager.

    Of pixel relations the student's side is compiled; the teacher's, made before it, stays eager. So do heads and
    matching: they depend on the number of boxes, and would be compiled anew at every step. The
    first steps take minutes; images of many sizes are compiled for a few of them, then once with sizes left open.

    Args:
        distiller: Student, and teacher or teachers and method where it has them.
        backend: Of ``torch.compile``: inductor (needs a C++ compiler on a CPU), aot_eager, ...
    """
    # Gradient ratios are measured by several backward passes through one graph, so its buffers must not be given away.
    torch._functorch.config.donated_buffer = False
    parts = [_backbone(detector) for detector in _detectors(distiller)]
    if distiller.method is not None:
        parts += _parts(distiller.method)
    # All parts count as one function, of which torch compiles so many forms and then none: each is to have its own.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _FORMS * len(parts))
    for part in parts:
        part.compile(backend=backend)


def _detectors(distiller: Distiller) -> Iterator[Detector]:
    yield distiller.student
    if isinstance(distiller.teacher, TeacherGroup):
        for member in distiller.teacher.members.values():
            yield cast(Detector, member)
    elif distiller.teacher is not None:
        yield distiller.teacher


def _backbone(detector: Detector) -> nn.Module:
    """What turns images into maps; the whole model where it has no part of that name."""
    backbone = getattr(detector.model, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else detector.model


def _parts(method: KDMethod) -> Iterator[nn.Module]:
    """The modules that read maps of fixed sizes, of all inner methods; a whole method that reads no boxes."""
    inner, parts = method.inner_methods(), getattr(method, "pixel_losses", None)
    if isinstance(parts, nn.ModuleList):
        yield from parts  # of a response beside them, a detector's head does nearly all
    elif inner:
        for member in inner.values():
            yield from _parts(member)
    elif not getattr(method, "reads_boxes", False):
        yield method
