"""Several teachers at once: each teaches by a method of its own, and their weighted terms are summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor, nn

from drkd.contracts import (
    DetectionBatch,
    Detections,
    Detector,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    KDMethod,
    Want,
)

Factory = Callable[[DetectorSpec, DetectorSpec], KDMethod]


class TeacherGroup(Detector):
    """Teachers side by side; each computes what its own method needs of it.

    Args:
        teachers: By name.
        wants: By the same names.
    """

    def __init__(self, teachers: Mapping[str, Detector], wants: Mapping[str, frozenset[Want]]) -> None:
        super().__init__()
        self.members = nn.ModuleDict(teachers)
        self.model = self.members
        self.wants = dict(wants)
        # For messages; methods are built from the members' own.
        self.spec = next(iter(teachers.values())).spec

    @property
    def can_detect(self) -> bool:
        """No: one of the members may."""
        return False

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """The outputs of all, in ``members``."""
        return DetectorOutput(
            members={name: teacher(batch, want=want & self.wants[name]) for name, teacher in self.members.items()}
        )

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Not of a group.

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"a group of teachers does not detect: ask one of its members ({', '.join(self.members)})")


class PerTeacher(KDMethod):
    """A method for each teacher; a term is named ``<teacher>.<term>/<level>``.

    With balanced methods a teacher's weight is how loud each of its terms is beside the task; otherwise a factor.

    Args:
        methods: By the teacher's name.
        weights: By the same names, > 0; 1 where absent.

    Raises:
        DrkdError: If a name or a weight cannot be used, or the methods differ in ``balanced``, ``warmup_steps`` or
            ``decay``.
    """

    def __init__(self, methods: Mapping[str, KDMethod], weights: Mapping[str, float]) -> None:
        super().__init__()
        _check(methods, weights)
        self.members = nn.ModuleDict(methods)
        self.needs = frozenset().union(*(member.needs for member in methods.values()))
        self.teacher_needs = frozenset().union(*(needed_of(member) for member in methods.values()))
        self.weights = {
            f"{name}.{term}": weights.get(name, 1.0) * weight
            for name, member in methods.items()
            for term, weight in member.weights.items()
        }
        self.minimum_boxes = {
            f"{name}.{term}": count for name, member in methods.items() for term, count in member.minimum_boxes.items()
        }
        first = next(iter(methods.values()))
        self.balanced, self.warmup_steps, self.decay = first.balanced, first.warmup_steps, first.decay

    def inner_methods(self) -> dict[str, KDMethod]:
        """The members."""
        return {f"{name}.": cast(KDMethod, member) for name, member in self.members.items()}

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """The terms of all."""
        terms: dict[str, Tensor] = {}
        for name, member in self.members.items():
            found = cast(dict[str, Tensor], member(student, teacher.members[name], batch))
            terms.update({f"{name}.{term}": value for term, value in found.items()})
        return terms


def needed_of(method: KDMethod) -> frozenset[Want]:
    """What a method needs of its teacher."""
    return method.needs if method.teacher_needs is None else method.teacher_needs


def join_teachers(
    student: DetectorSpec,
    teachers: Mapping[str, Detector],
    method: Factory,
    *,
    weights: Mapping[str, float] | None = None,
) -> tuple[TeacherGroup, PerTeacher]:
    """Make one teacher and one method of several teachers, for a `Distiller`.

    Args:
        student: The student's spec.
        teachers: By a name of your choice, without dots and slashes.
        method: Builds the method of each teacher.
        weights: By the same names, > 0; 1 where absent.

    Raises:
        DrkdError: If there is no teacher, or a name or a weight cannot be used.
    """
    _check(teachers, weights or {})
    methods = {name: method(student, teacher.spec) for name, teacher in teachers.items()}
    wants = {name: needed_of(member) for name, member in methods.items()}
    return TeacherGroup(teachers, wants), PerTeacher(methods, weights or {})


def _check(members: Mapping[str, nn.Module], weights: Mapping[str, float]) -> None:
    if not members:
        raise DrkdError("teachers: expected at least one teacher, got none.")
    wrong = [name for name in members if not name or "." in name or "/" in name]
    if wrong:
        raise DrkdError(f"teachers: the name {wrong[0]!r} cannot be used: leave out dots and slashes.")
    unknown = sorted(set(weights) - set(members))
    if unknown:
        raise DrkdError(f"teachers: there are weights for {', '.join(unknown)}, but only {', '.join(members)}.")
    negative = {name: weight for name, weight in weights.items() if not weight > 0}
    if negative:
        raise DrkdError(f"teachers: weights must be above 0, got {negative}. Leave a teacher out that teaches nothing.")
    for field in ("balanced", "warmup_steps", "decay"):
        found = {name: getattr(member, field) for name, member in members.items() if isinstance(member, KDMethod)}
        if len(set(found.values())) > 1:
            raise DrkdError(f"teachers: their methods must agree on `{field}`, got {found}.")
