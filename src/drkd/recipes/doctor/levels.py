"""Which level learns from which, and whether the teacher's small objects are among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from drkd.adapters.labels import TWO_STAGE
from drkd.contracts import DetectorSpec
from drkd.methods.levels import LevelPair
from drkd.recipes.doctor.finding import Finding

_OCTAVE = 1.5


def judge_levels(student: DetectorSpec, teacher: DetectorSpec, method: nn.Module | None) -> list[Finding]:
    """Say which levels are paired; be careful where a two-stage teacher's finest level teaches no one-stage student.

    Two-stage detectors have small objects on their level of stride 4, where most one-stage detectors have no level.

    Args:
        student: Levels and family.
        teacher: The same of the teacher, or of the member whose levels these are.
        method: Whose pairs; a method without any is left alone.
    """
    pairs = [pair for pair in pairs_of(method) if pair.teacher in teacher.levels]
    if not pairs:
        return []
    said = ", ".join(f"{pair.name} from {pair.teacher.name}" for pair in pairs)
    finest = min(level.stride for level in student.levels)
    order = sorted(teacher.levels, key=lambda level: level.stride)
    finer = [level for level in order if level.stride * _OCTAVE < finest]
    crosses = teacher.family in TWO_STAGE and student.family not in TWO_STAGE
    if crosses and finer and not any(pair.teacher in finer for pair in pairs):
        shifted = ", ".join(f"{pair.name}: {order[max(0, order.index(pair.teacher) - 1)].name}" for pair in pairs)
        text = (
            f"The two-stage teacher has its small objects on {finer[-1].name} (stride {finer[-1].stride:g} px), and no "
            f"level of this one-stage student learns from it ({said}). Try `levels: {{{shifted}}}` on the method "
            "(docs/pairs.md)."
        )
        return [Finding("careful", "levels", text)]
    return [Finding("ok", "levels", f"Levels of the student learn from the teacher's: {said}.")]


def pairs_of(method: Any) -> Sequence[LevelPair]:
    """The pairs of levels of a method, or of those that it is made of; each once, finest first."""
    found: dict[tuple[str, str], LevelPair] = {}
    for part in () if method is None else method.modules():
        for name in ("pairs", "pixel_pairs", "instance_pairs"):
            for pair in getattr(part, name, ()):
                if isinstance(pair, LevelPair):
                    found[pair.student.name, pair.teacher.name] = pair
    return sorted(found.values(), key=lambda pair: pair.student.stride)
