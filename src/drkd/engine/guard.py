"""What stops a run whose distillation is silently off, and a first try that hands over the wrong things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from drkd.contracts import DrkdError, KDMethod


class DeadDistillationError(DrkdError):
    """A term that could have taught the student has sent it no gradient for many measurements."""


_WAY_OUT = "To train on all the same: training.dead_after=null in a recipe, dead_after=None of a Distiller."

_TEACHER = "the teacher"
"""Under this name the guard counts measurements at which the teacher's maps were constant; of several, with theirs."""


def stop_if_silent(
    squared: Mapping[str, float],
    silent: dict[str, int],
    *,
    method: KDMethod,
    scheduled: bool,
    most_boxes: int,
    compared: Mapping[str, float],
    constant: Mapping[str, bool],
    dead_after: int | None,
    step: int,
    like: Tensor,
) -> None:
    """Stop a run whose distillation is silently off.

    All processes judge alike: one that stopped alone would leave the others waiting for it.

    Args:
        squared: Squared gradient norm of each term at the student's features.
        silent: By term, how many measurements in a row it was silent; counted on.
        method: The method, for its weights and the boxes that its terms need.
        scheduled: Whether its weights are above 0 at this step.
        most_boxes: The most boxes of an image of the batch.
        compared: By term, how much it compared, see `KDMethod.compared_counts`; terms absent from it go by the boxes.
        constant: Whether a teacher's maps were, see `are_constant`, by its name; that of a single teacher is empty.
        dead_after: How many measurements in a row stop the run; None: they are counted only.
        step: For the message.
        like: A tensor on the processes' device.

    Raises:
        DeadDistillationError: If a term that could have taught was silent so often, or the teacher constant.
    """
    teachers = {f"{_TEACHER} {name}".rstrip(): not blank for name, blank in constant.items()}
    facts = {**{family: 0 < value < float("inf") for family, value in squared.items()}, **teachers}
    facts |= {f"{family} compared": compared.get(family, 1.0) > 0 for family in squared}
    most_boxes, facts = _over_processes(most_boxes, facts, like=like)
    for teacher in teachers:
        silent[teacher] = 0 if facts[teacher] else silent.get(teacher, 0) + 1
        if dead_after is not None and silent[teacher] >= dead_after:
            raise DeadDistillationError(
                f"T{teacher[1:]} teaches nothing: every channel of all its feature maps was constant in "
                f"{dead_after} measurements in a row, the last at step {step}, so the terms pull the "
                "student towards a constant. Usual causes: wrong or missing weights, images that are all one colour. "
                f"Check it: `drkd evaluate` on your validation data. {_WAY_OUT}"
            )
    for family, value in squared.items():
        could = method.weights.get(family, 1.0) > 0 and scheduled and most_boxes >= method.minimum_boxes.get(family, 0)
        if not could or not facts[f"{family} compared"]:
            continue
        dead = not facts[family]
        silent[family] = silent.get(family, 0) + 1 if dead else 0
        if dead_after is not None and silent[family] >= dead_after:
            raise DeadDistillationError(
                f"Distillation is silently off: '{family}' sent no usable gradient (squared norm {value:g}) to the "
                f"student's features in {dead_after} measurements in a row, the last at step {step}, "
                f"although its weight is {method.weights.get(family, 1.0):g} and an image held {most_boxes} "
                "boxes. Usual causes: the teacher's features are constant (untrained or wrong checkpoint), "
                "features that are detached, an adapter initialised to zero, or a gradient beyond the range of "
                "float16. Check the teacher first: `drkd evaluate` on your validation data. "
                f"{_WAY_OUT}"
            )


def are_constant(maps: Sequence[Tensor], like: Tensor) -> Tensor:
    """0-d bool: whether no channel of any map varies over images and positions; False where there is nothing to see."""
    flat = [entry.detach().transpose(0, 1).flatten(1) for entry in maps if entry.ndim == 4]
    judged = [
        (channels.amax(dim=1) - channels.amin(dim=1) <= 1e-6 * channels.abs().amax(dim=1).clamp_min(1e-12)).all()
        for channels in flat
        # A single cell of a single image cannot vary.
        if channels.shape[1] > 1
    ]
    return torch.stack(judged).all() if judged else torch.zeros((), dtype=torch.bool, device=like.device)


def check_parts(student: object, teacher: object, method: object) -> None:
    """Refuse what a first try of the Python interface gets wrong, before an attribute of it is missed."""
    teachers = [*teacher.values()] if isinstance(teacher, Mapping) else [teacher] * (teacher is not None)
    for who, entry in (("student", student), *(("teacher", other) for other in teachers)):
        if not hasattr(entry, "spec"):
            raise TypeError(
                f"Distiller expects a detector as its {who}, got {type(entry).__name__}. Wrap it: wrap_torchvision, "
                "wrap_transformers, wrap_ultralytics, or wrap_model for a model of your own."
            )
    if method is not None and not isinstance(method, KDMethod) and not callable(method):
        raise TypeError(f"Distiller expects a method, or its class such as drkd.DRKD, got {method!r}.")
    own = {id(parameter) for parameter in student.parameters()} if isinstance(student, nn.Module) else set()
    if any(
        id(parameter) in own for other in teachers if isinstance(other, nn.Module) for parameter in other.parameters()
    ):
        raise ValueError(
            "Distiller expects a teacher that shares no weights with the student: it is frozen, and the student would "
            "be too. Copy it: copy.deepcopy."
        )


def _over_processes(most_boxes: int, facts: Mapping[str, bool], *, like: Tensor) -> tuple[int, dict[str, bool]]:
    """The most boxes of an image on any process, and what holds on any; ``like`` is on their device."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return most_boxes, dict(facts)
    values = torch.tensor([most_boxes, *facts.values()], dtype=torch.int64, device=like.device)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    boxes, *held = values.tolist()
    return boxes, dict(zip(facts, map(bool, held), strict=True))
