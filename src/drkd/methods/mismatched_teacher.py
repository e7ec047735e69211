"""A control: the same method, but the teacher looks at other images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from drkd.contracts import DetectionBatch, DetectorOutput, DetectorSpec, FeatureMap, KDMethod, NotApplicableError


class MismatchedTeacher(KDMethod):
    """Give each image the teacher's maps of the next image of the batch, the last one those of the first.

    The targets keep their scale, their statistics and their smoothness and say nothing of the image, so what a method
    still gains this way is regularisation. A batch of one image, or a part of one image where a batch is seen in
    parts, has no other: its terms are zero, and its `compared_counts` too. In a recipe:

        method:
          class_path: drkd.methods.MismatchedTeacher
          init_args:
            method: {class_path: drkd.methods.DRKD}

    Args:
        student: The student's levels.
        teacher: The teacher's levels.
        method: What builds the method from the two specs. One on feature maps: predictions of other images have no
            place in it.

    Raises:
        NotApplicableError: If the method asks the teacher for more than its feature maps.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        method: Callable[[DetectorSpec, DetectorSpec], KDMethod],
    ) -> None:
        super().__init__()
        self.method = method(student, teacher)
        self.needs, self.teacher_needs = self.method.needs, self.method.teacher_needs
        asked = self.needs if self.teacher_needs is None else self.teacher_needs
        if asked != {"features"}:
            raise NotApplicableError(
                "A mismatched teacher needs a method on the teacher's feature maps alone, and "
                f"{type(self.method).__name__} asks for {', '.join(sorted(asked))}."
            )
        self.weights, self.minimum_boxes = self.method.weights, self.method.minimum_boxes
        self.balanced = self.method.balanced
        self.warmup_steps, self.decay = self.method.warmup_steps, self.method.decay
        self._compared: dict[str, Tensor] = {}

    def inner_methods(self) -> dict[str, KDMethod]:
        """The method, whose names stay."""
        return {"": self.method}

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """The method's terms, under its names."""
        others = replace(teacher, features=tuple(_turn(level) for level in teacher.features))
        terms = cast(dict[str, Tensor], self.method(student, others, batch))
        images = 0 if len(batch) == 1 else len(batch)
        # Of every term at every pass: counts are added over the parts of a batch, and one that is absent adds nothing.
        self._compared = {name: torch.full_like(term.detach(), images) for name, term in terms.items()}
        return terms if images else {name: term * 0 for name, term in terms.items()}

    def compared_counts(self) -> dict[str, Tensor]:
        """The images that were shown another's maps, none of a batch of one; or what the method says it compared."""
        own = super().compared_counts()
        return {name: own.get(name, images) * (images > 0) for name, images in self._compared.items()}


def _turn(level: FeatureMap) -> FeatureMap:
    return replace(level, tensor=torch.roll(level.tensor, -1, dims=0))
