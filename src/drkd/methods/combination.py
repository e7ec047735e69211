"""Several methods at once: their terms are summed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from drkd.contracts import Decay, DetectionBatch, DetectorOutput, DetectorSpec, DrkdError, KDMethod


class Combination(KDMethod):
    """The sum of several methods.

    A term of a member is named ``<member>.<term>/<level>``, so that two members never share one. With balanced members
    each term is as loud as its own weight says, so the whole is louder than any member: lower the factors where that is
    too much. In a recipe:

        method:
          class_path: drkd.methods.Combination
          init_args:
            methods:
              relations: {class_path: drkd.methods.DRKD}
              features: {class_path: drkd.methods.PKD, init_args: {weight: 0.5}}
            factors: {features: 0.5}

    Args:
        student: The student's levels.
        teacher: The teacher's levels.
        methods: By a name of your choice, without dots and slashes: a method, or what builds one from the two specs. A
            method is used as it is, so it must have been built for these two.
        factors: By the same names, a factor >= 0 on all weights of a member; 1 where absent. A member of factor 0 is
            neither built nor computed.
        warmup_steps: See `KDMethod`. None is the members' own, which must agree.
        decay: The same.

    Raises:
        DrkdError: If there is no member of a factor above 0, a name or a factor cannot be used, or members disagree on
            ``balanced`` (a weight is a gradient ratio or a multiplier, not both), on ``warmup_steps`` or on ``decay``.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        methods: dict[str, Callable[[DetectorSpec, DetectorSpec], KDMethod]],
        factors: dict[str, float] | None = None,
        warmup_steps: int | None = None,
        decay: Decay | None = None,
    ) -> None:
        super().__init__()
        factors = factors or {}
        _check_names(methods, factors=factors)
        built = {
            # A method is callable too, as every module is.
            name: method if isinstance(method, KDMethod) else method(student, teacher)
            for name, method in methods.items()
            if factors.get(name, 1.0) > 0
        }
        self.members = nn.ModuleDict(built)
        self.needs = frozenset().union(*(member.needs for member in built.values()))
        self.weights = {
            f"{name}.{term}": factors.get(name, 1.0) * weight
            for name, member in built.items()
            for term, weight in member.weights.items()
        }
        self.teacher_needs = frozenset().union(
            *(member.needs if member.teacher_needs is None else member.teacher_needs for member in built.values())
        )
        self.minimum_boxes = {
            f"{name}.{term}": count for name, member in built.items() for term, count in member.minimum_boxes.items()
        }
        first = next(iter(built.values()))
        _check_agreement("balanced", {name: member.balanced for name, member in built.items()})
        if warmup_steps is None:
            _check_agreement("warmup_steps", {name: member.warmup_steps for name, member in built.items()})
        if decay is None:
            _check_agreement("decay", {name: member.decay for name, member in built.items()})
        self.balanced = first.balanced
        self.warmup_steps = first.warmup_steps if warmup_steps is None else warmup_steps
        self.decay = first.decay if decay is None else decay

    def inner_methods(self) -> dict[str, KDMethod]:
        """The members."""
        return {f"{name}.": cast(KDMethod, member) for name, member in self.members.items()}

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """The members' terms, renamed."""
        terms: dict[str, Tensor] = {}
        for name, member in self.members.items():
            for term, value in cast(dict[str, Tensor], member(student, teacher, batch)).items():
                terms[f"{name}.{term}"] = value
        return terms


def _check_names(methods: Iterable[str], *, factors: Mapping[str, float]) -> None:
    names = list(methods)
    if not names:
        raise DrkdError("The combination has no methods. Give at least one under `methods`.")
    for name in names:
        if not name or "." in name or "/" in name:
            raise DrkdError(f"The combination cannot use the name {name!r} of a method: leave out dots and slashes.")
    unknown = sorted(set(factors) - set(names))
    if unknown:
        raise DrkdError(
            f"The combination has factors for {', '.join(unknown)}, but its methods are {', '.join(names)}. "
            "Use the names of `methods` in `factors`."
        )
    negative = {name: factor for name, factor in factors.items() if not factor >= 0}
    if negative:
        raise DrkdError(f"The combination's factors must be at least 0, got {negative}.")
    if not any(factors.get(name, 1.0) > 0 for name in names):
        raise DrkdError(
            f"The combination expects at least one method of a factor above 0, got {dict(factors)} for "
            f"{', '.join(names)}."
        )


def _check_agreement(field: str, values: Mapping[str, object]) -> None:
    if len(set(values.values())) > 1:
        listed = ", ".join(f"{name}: {value}" for name, value in values.items())
        raise DrkdError(f"The methods of a combination must agree on `{field}`, got {listed}. Set it alike for all.")
