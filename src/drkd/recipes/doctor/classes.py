"""Do teacher, student and data mean the same classes, and does every class have boxes?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from drkd.contracts import DetectorSpec
from drkd.data.split import DatasetSplit
from drkd.recipes.doctor.finding import Finding, Severity, listing


def compare_classes(
    student: DetectorSpec, teacher: DetectorSpec, names: Sequence[str], *, missing: Sequence[str] = ()
) -> list[Finding]:
    """Compare the class names of both models with the data's.

    Args:
        student: The student.
        teacher: The teacher.
        names: The data's classes, in the order of its labels.
        missing: Classes that the teacher lists but has no output for.
    """
    findings = []
    for who, spec in (("teacher", teacher), ("student", student)):
        lacking = [name for name in names if name not in spec.class_names or (who == "teacher" and name in missing)]
        extra = [name for name in spec.class_names if name not in names]
        if lacking:
            severity: Severity = "stop" if len(lacking) == len(names) else "careful"
            findings.append(Finding(severity, "classes", f"The {who} does not know {listing(lacking)} of the data."))
        if extra:
            findings.append(
                Finding("careful", "classes", f"The {who} knows {listing(extra)}, which the data does not have.")
            )
        shared = [name for name in spec.class_names if name in names]
        # A teacher may keep an order of its own (`class_map`): it is met by name.
        if who == "student" and shared != [name for name in names if name in spec.class_names]:
            findings.append(
                Finding(
                    "stop",
                    "classes",
                    f"The {who} has the data's classes in another order ({listing(spec.class_names)}).",
                )
            )
    if not findings:
        findings.append(Finding("ok", "classes", f"Teacher, student and data agree on {len(names)} classes."))
    return findings


def count_boxes(train: DatasetSplit, val: DatasetSplit) -> tuple[list[Finding], dict[str, Any]]:
    """Count boxes by class in both splits and name the classes without any; crowds do not count."""
    findings: list[Finding] = []
    numbers: dict[str, Any] = {}
    for split in (train, val):
        labels = [record.labels[~record.crowd] for record in split.records]
        joined = torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64)
        counts = torch.bincount(joined, minlength=len(split.class_names)).tolist()
        numbers[split.name] = {
            "images": len(split),
            "boxes": dict(zip(split.class_names, counts, strict=True)),
        }
        empty = [name for name, count in zip(split.class_names, counts, strict=True) if not count]
        if len(empty) == len(split.class_names):
            findings.append(Finding("stop", "classes", f"The split '{split.name}' has no boxes at all."))
        elif empty:
            why = "it cannot be learned" if split is train else "its AP cannot be measured"
            findings.append(
                Finding("careful", "classes", f"No box of {listing(empty)} in the split '{split.name}': {why}.")
            )
    return findings, numbers
