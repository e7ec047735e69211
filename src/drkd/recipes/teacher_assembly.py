"""Builds the teacher or teachers of a recipe: their classes joined with the data's, their image size set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drkd.adapters.class_map import build_mapped
from drkd.adapters.resized import ResizedDetector
from drkd.contracts import Detector, DetectorBuilder, DrkdError
from drkd.recipes.class_map import read_class_map


@dataclass(frozen=True)
class WeightedTeacher:
    """One of several teachers.

    Args:
        detector: How to build it.
        weight: Of its terms, > 0.
        class_map: As the recipe's ``class_map``, for this teacher.
        teacher_size: As the recipe's ``teacher_size``, for this teacher.
    """

    detector: DetectorBuilder
    weight: float = 1.0
    class_map: str | None = None
    teacher_size: int | None = None


def build_teacher(
    builder: DetectorBuilder,
    class_names: Sequence[str],
    *,
    image_settings: Mapping[str, Any],
    class_map: str | None = None,
    teacher_size: int | None = None,
) -> Detector:
    """Build one teacher.

    Args:
        builder: How.
        class_names: The data's classes.
        image_settings: "min_size" and "size_divisor" of the data's images, px.
        class_map: A file that maps its class names to the data's, or "names" to share those of equal names; None
            expects the data's classes.
        teacher_size: Short side of the images that it sees, px; None is the data's.

    Raises:
        DrkdError: If the classes cannot be joined, the size is not positive, or the teacher cannot be built.
    """
    if class_map is None:
        teacher = builder.build_teacher(class_names)
    else:
        teacher = build_mapped(builder, class_names, read_class_map(class_map))
    side = short_side(image_settings)
    if teacher_size is not None:
        if teacher_size < 1:
            raise DrkdError(f"teacher_size: expected a positive number of px, got {teacher_size}.")
        teacher = ResizedDetector(teacher, scale=teacher_size / side, size_divisor=int(image_settings["size_divisor"]))
    teacher.expect_image_size(side)
    return teacher


def build_teachers(
    teachers: Mapping[str, WeightedTeacher], class_names: Sequence[str], *, image_settings: Mapping[str, Any]
) -> dict[str, Detector]:
    """Build several teachers, by name."""
    return {
        name: build_teacher(
            entry.detector,
            class_names,
            image_settings=image_settings,
            class_map=entry.class_map,
            teacher_size=entry.teacher_size,
        )
        for name, entry in teachers.items()
    }


def short_side(image_settings: Mapping[str, Any]) -> int:
    """Short side of the data's images, px; of several, used in training, the largest."""
    sizes = image_settings["min_size"]
    return int(sizes) if isinstance(sizes, int) else max(map(int, sizes))
