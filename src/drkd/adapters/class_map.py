"""Joins a teacher's classes with the student's where their names or numbers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from drkd.contracts import Detector, DetectorBuilder, DrkdError


def check_targets(class_map: Mapping[str, str], class_names: Sequence[str]) -> None:
    """Raise a DrkdError if the map leads to a class that the student has not."""
    unknown = sorted(set(class_map.values()) - set(class_names))
    if unknown:
        raise DrkdError(
            f"class_map: {', '.join(unknown)} is none of the student's classes ({', '.join(class_names)}). Each line "
            "is the teacher's name, a colon, and the student's."
        )


def build_mapped(builder: DetectorBuilder, class_names: Sequence[str], class_map: Mapping[str, str]) -> Detector:
    """Build a teacher that has classes of its own, and call those that it shares by the student's names.

    Args:
        builder: Of the teacher.
        class_names: The student's classes.
        class_map: The teacher's names to the student's; a class that it lacks keeps its name.

    Raises:
        DrkdError: If the map names a class that the student or the teacher has not, or no class is shared.
    """
    check_targets(class_map, class_names)
    own = builder.own_class_names()
    if own is None:
        back = {ours: theirs for theirs, ours in class_map.items()}
        own = tuple(back.get(name, name) for name in class_names)
    absent = sorted(set(class_map) - set(own))
    if absent:
        raise DrkdError(
            f"class_map: {', '.join(absent)} is none of the teacher's classes ({', '.join(own)}). Each line is the "
            "teacher's name, a colon, and the student's."
        )
    renamed = [class_map.get(name, name) for name in own]
    clash = sorted({name for name in renamed if renamed.count(name) > 1})
    if clash:
        raise DrkdError(
            f"class_map: the teacher has a class called {', '.join(clash)} already. Map that one to something, or "
            "leave the other out."
        )
    if not set(renamed) & set(class_names):
        raise DrkdError(
            f"class_map: the teacher's classes ({', '.join(own)}) and the student's ({', '.join(class_names)}) have no "
            "name in common. Write a map file of lines like 'automobile: car'."
        )
    detector = builder.build_teacher(own)
    names = dict(zip(own, renamed, strict=True))
    layout = detector.spec.predictions
    if layout is not None:
        layout = replace(layout, missing_classes=tuple(names.get(name, name) for name in layout.missing_classes))
    detector.spec = replace(detector.spec, class_names=tuple(renamed), predictions=layout)
    return detector
