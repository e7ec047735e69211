"""Which level of the student's pyramid learns from which level of the teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from drkd.contracts import DetectorOutput, DetectorSpec, DrkdError, FeatureLevel, FeatureMap

MissingLevels = Literal["skip", "nearest"]
"""What becomes of a student level whose stride the teacher lacks; see `match_levels`."""

Levels = Sequence[str] | Mapping[str, str]
"""Names of student levels, or for each of them the name of the teacher's level that it learns from."""


@dataclass(frozen=True)
class LevelPair:
    """A level of the student and the level of the teacher that it learns from."""

    student: FeatureLevel
    teacher: FeatureLevel

    @property
    def name(self) -> str:
        """The student's name for the level."""
        return self.student.name


def match_levels(
    student: DetectorSpec,
    teacher: DetectorSpec,
    *,
    names: Levels | None = None,
    missing: MissingLevels = "skip",
    tolerance: float = 0.5,
) -> tuple[LevelPair, ...]:
    """Pair each level of the student with the teacher's of nearest stride, finest first.

    Of several teacher levels equally near, one that is not taken yet goes first, so that repeated strides pair up in
    order. A student level without a teacher level within the tolerance is left out, or learns from the nearest one,
    resampled, with ``missing="nearest"``. Teacher levels that no student level is near to teach nothing.

    Strides say where a map's cells lie, not which objects a detector looks for there: with a two-stage teacher and a
    one-stage student a level of the same stride holds larger objects. Names as pairs say which level teaches which,
    whatever their strides.

    Args:
        student: The student's pyramid.
        teacher: The teacher's pyramid.
        names: Student levels to use, or pairs of a student's and a teacher's level; None is all.
        missing: "skip" or "nearest", see above.
        tolerance: Largest difference of two strides, octaves. Maps of unequal strides are resampled by the losses.

    Raises:
        DrkdError: If a name is unknown or no level finds a partner.
    """
    known = [level.name for level in student.levels]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise DrkdError(
            f"The method was asked for the feature levels {', '.join(unknown)}, but the student has only "
            f"{', '.join(known)}. Change `levels` of the method."
        )
    if missing not in ("skip", "nearest"):
        raise DrkdError(f"missing_levels: expected skip or nearest, got {missing!r}.")
    if isinstance(names, Mapping):
        return _named_pairs(student, teacher, names)
    limit = tolerance if missing == "skip" else math.inf
    taken: set[int] = set()
    pairs: list[LevelPair] = []
    for level in sorted(student.levels, key=lambda level: level.stride):
        if names is not None and level.name not in names:
            continue
        distances = [abs(math.log2(other.stride / level.stride)) for other in teacher.levels]
        near = [(distance, index in taken, index) for index, distance in enumerate(distances) if distance <= limit]
        if near:
            chosen = min(near)[2]
            taken.add(chosen)
            pairs.append(LevelPair(level, teacher.levels[chosen]))
    if not pairs:
        raise DrkdError(
            f"No level of the student's pyramid (strides {_strides(student)}) comes within {tolerance:g} octaves of a "
            f"level of the teacher's (strides {_strides(teacher)}), so there is nothing to distil. Choose a teacher or "
            "a student whose pyramids overlap, or set missing_levels: nearest on the method."
        )
    return tuple(pairs)


def _named_pairs(student: DetectorSpec, teacher: DetectorSpec, names: Mapping[str, str]) -> tuple[LevelPair, ...]:
    theirs = {level.name: level for level in teacher.levels}
    unknown = sorted(set(names.values()) - set(theirs))
    if unknown or not names:
        raise DrkdError(
            f"The method was asked for the teacher's feature levels {', '.join(unknown) or 'by an empty map'}, and the "
            f"teacher has {', '.join(theirs)}. Change `levels` of the method."
        )
    ours = sorted((level for level in student.levels if level.name in names), key=lambda level: level.stride)
    return tuple(LevelPair(level, theirs[names[level.name]]) for level in ours)


def finest(pairs: tuple[LevelPair, ...], count: int | None, *, name: str) -> tuple[LevelPair, ...]:
    """So many of the pairs, finest first; None is all.

    Raises:
        ValueError: If that is none of them; ``name`` is the argument's.
    """
    if count is not None and count < 1:
        raise ValueError(f"Expected {name} of at least 1, or None for all levels, got {count}")
    return pairs[:count]


def maps_by_name(features: Sequence[FeatureMap]) -> dict[str, Tensor]:
    """The tensors of a detector's features by level name."""
    return {feature.name: feature.tensor for feature in features}


def paired_maps(
    pairs: Sequence[LevelPair], student: DetectorOutput, teacher: DetectorOutput
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Go through the pairs: the level's name, the student's map and the teacher's, which is a constant from here on.

    Raises:
        ValueError: If a level was not computed.
    """
    ours, theirs = maps_by_name(student.features), maps_by_name(teacher.features)
    for pair in pairs:
        if pair.student.name not in ours or pair.teacher.name not in theirs:
            raise ValueError(
                f"Expected the student's level {pair.student.name} and the teacher's {pair.teacher.name}, "
                f"got {', '.join(ours) or 'none'} and {', '.join(theirs) or 'none'}"
            )
        yield pair.name, ours[pair.student.name], theirs[pair.teacher.name].detach()


def spec_of_maps(features: Mapping[str, Tensor], *, image_size: tuple[int, int]) -> DetectorSpec:
    """Read channels and strides off feature maps (B, C, h, w) of images of a height and width in px.

    Raises:
        ValueError: If a map is not (B, C, h, w).
    """
    levels = []
    for name, tensor in features.items():
        if tensor.ndim != 4:
            raise ValueError(f"Expected feature maps (B, C, h, w), got {tuple(tensor.shape)} for {name!r}")
        stride = math.sqrt(image_size[0] / tensor.shape[2] * image_size[1] / tensor.shape[3])
        levels.append(FeatureLevel(name, int(tensor.shape[1]), stride))
    return DetectorSpec(tuple(sorted(levels, key=lambda level: level.stride)), ())


def _strides(spec: DetectorSpec) -> str:
    return ", ".join(f"{level.stride:g}" for level in spec.levels)
