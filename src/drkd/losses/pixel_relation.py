"""Pixel-wise relation distillation: student and teacher maps are compared after graph reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from drkd.losses.alignment import AdapterInit, check_maps, make_adapter, resample
from drkd.losses.distance import (
    ONE_MODULE,
    Distance,
    TeacherSide,
    at_least_float32,
    full_precision,
    standardise,
    tensor_distance,
    weighted_square,
)
from drkd.losses.graph_reasoning import GraphNorm, GraphReasoningUnit
from drkd.losses.instances import InstanceLayout
from drkd.losses.non_local import NonLocalBlock
from drkd.losses.object_weights import object_weights

PixelReasoning = Literal["graph", "non_local", "none"]
"""What relates the pixels of a map before maps are compared: `GraphReasoningUnit`, a `NonLocalBlock`, nothing."""

WEIGHABLE = frozenset[Distance]({"mse", "rms"})
"""The distances of maps whose cells may count unlike."""


class PixelRelationLoss(nn.Module):
    r"""L_PR of one pyramid level (DRKD, Ni et al., IJCAI 2023, arXiv:2302.05637, section 3.1).

    ``joint`` and ``frozen``: :math:`d(f(\phi_S(s)), \phi_T(t))`, the paper's form. ``shared``:
    :math:`d(\phi(f(s)), \phi(t))` with one unit and the target a constant, so the two sides are measured by the same
    ruler, equal maps give exactly zero, and the target cannot be made easier. ``fixed``: the same with a unit that is
    not trained. The teacher's map never gets a gradient.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        reasoning: ``graph`` is DRKD's. The two others are what it has to beat: ``non_local`` compares all pixels with
            all (embedded Gaussian, width ``states``), ``none`` compares the maps as they are. Both leave out what
            they have no use for.
        nodes: Graph nodes, see `GraphReasoningUnit`.
        states: Width of a node.
        normalise: Divide the node states by the number of positions.
        norm: Norm of the graph reasoning unit.
        gain: Of that norm, or without one a constant factor, see `GraphReasoningUnit`.
        activation_before_update: ReLU in the unit as released.
        distance: See `tensor_distance`.
        teacher_side: See `TeacherSide`.
        normalise_features: `standardise` both maps first.
        adapter_init: See `make_adapter`.
        object_share: Part of the term that lies on an image's objects, each alike, see `object_weights`; ``mse``
            and ``rms`` only.

    Shape:
        student: (B, Cs, h, w); resampled bilinearly to the teacher's size where it differs.
        teacher: (B, Ct, H, W).
        output: 0-d, at least float32.

    Raises:
        ValueError: If batch or channels are not as declared, or objects are to count in another distance.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        reasoning: PixelReasoning = "graph",
        nodes: int = 32,
        states: int = 64,
        normalise: bool = True,
        norm: GraphNorm = "group",
        gain: float = 1.0,
        activation_before_update: bool = True,
        distance: Distance = "mse",
        teacher_side: TeacherSide = "fixed",
        normalise_features: bool = True,
        adapter_init: AdapterInit = "identity",
        object_share: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= object_share <= 1 or (object_share > 0 and distance not in WEIGHABLE):
            raise ValueError(
                f"Expected an object share in [0, 1], 0 unless the distance is mse or rms, got {object_share}"
            )
        if teacher_side not in ("joint", "shared", "frozen", "fixed"):
            raise ValueError(f"Expected a teacher side out of joint, shared, frozen, fixed, got {teacher_side!r}")
        if reasoning not in ("graph", "non_local", "none"):
            raise ValueError(f"Expected a reasoning out of graph, non_local, none, got {reasoning!r}")

        def unit(channels: int) -> nn.Module:
            if reasoning == "none":
                return nn.Identity()
            if reasoning == "non_local":
                return NonLocalBlock(channels, inner_channels=states, norm=norm, gain=gain, similarity="gaussian")
            return GraphReasoningUnit(
                channels,
                nodes=nodes,
                states=states,
                normalise=normalise,
                norm=norm,
                gain=gain,
                activation_before_update=activation_before_update,
            )

        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.adapter = make_adapter(student_channels, teacher_channels, init=adapter_init)
        one = teacher_side in ONE_MODULE
        self.student_unit = unit(teacher_channels if one else student_channels)
        self.teacher_unit = None if one else unit(teacher_channels)
        if teacher_side == "fixed":
            self.student_unit.requires_grad_(False)
        if self.teacher_unit is not None and teacher_side == "frozen":
            self.teacher_unit.requires_grad_(False)
        self.reasoning: PixelReasoning = reasoning
        self.distance: Distance = distance
        self.teacher_side: TeacherSide = teacher_side
        self.normalise_features = normalise_features
        self.object_share = object_share

    def forward(
        self, student: Tensor, teacher: Tensor | None, weights: Tensor | None = None, *, target: Tensor | None = None
    ) -> Tensor:
        """Distance between the related maps.

        Args:
            student: See the class.
            teacher: See the class; None where its target is given.
            weights: (B, H, W) at the teacher's size, how much each cell counts, summing to one: the `weigh` of the
                boxes. Apart from here, so that a compiled loss does not depend on the number of boxes. None: all alike.
            target: The `target` of the teacher's map, made before and for this call alone, since it may be
                overwritten: the teacher's map itself can then be let go before the student's are made.
        """
        if (teacher is None) == (target is None):
            raise ValueError("PixelRelationLoss expects the teacher's map or its target, one of them")
        if target is not None:
            ours, theirs = self._related(student, target), target
        else:
            assert teacher is not None  # narrowed by the check above
            ours, theirs = self.maps(student, teacher)
        if weights is None and self.distance in WEIGHABLE and self.reasoning != "none":
            # The same sum, which keeps one map instead of two.
            batch, _, height, width = theirs.shape
            kind = at_least_float32(theirs).dtype
            weights = theirs.new_full((batch, height, width), 1 / max(batch * height * width, 1), dtype=kind)
        if weights is None:
            return tensor_distance(ours, theirs, kind=self.distance)
        with full_precision(ours):
            ours, theirs = at_least_float32(ours), at_least_float32(theirs)
            # What the reasoning has made of the maps is nobody else's.
            spend = self.reasoning != "none" and not theirs.requires_grad
            return weighted_square(ours, theirs, weights, root=self.distance == "rms", spend=spend)

    def weigh(
        self,
        teacher: Tensor,
        boxes: Sequence[Tensor],
        *,
        image_size: tuple[int, int],
        layout: InstanceLayout | None = None,
    ) -> Tensor | None:
        """The weights of the cells where objects have a share of the term; None where they have none.

        Args:
            teacher: The teacher's map.
            boxes: One (N, 4) tensor an image, xyxy px.
            image_size: Height and width of the image tensor, px.
            layout: Of the boxes, where the caller has it already.
        """
        if self.object_share == 0:
            return None
        if len(boxes) != len(teacher):
            raise ValueError(f"Expected boxes of {len(teacher)} images, got {len(boxes)}")
        map_size = (teacher.shape[-2], teacher.shape[-1])
        return object_weights(boxes, map_size=map_size, image_size=image_size, share=self.object_share, layout=layout)

    def maps(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's maps after the reasoning, both (B, Ct, H, W)."""
        check_maps(student, teacher, student_channels=self.student_channels, teacher_channels=self.teacher_channels)
        target = self.target(teacher)
        return self._related(student, target), target

    def target(self, teacher: Tensor) -> Tensor:
        """What the student's map is compared with: the teacher's after the reasoning, (B, Ct, H, W)."""
        if teacher.ndim != 4 or teacher.shape[1] != self.teacher_channels:
            raise ValueError(f"Expected a teacher's map (B, {self.teacher_channels}, H, W), got {tuple(teacher.shape)}")
        teacher = self._own(teacher.detach())
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.teacher_side == "joint"):
            return self._teacher_unit(teacher)

    def _related(self, student: Tensor, target: Tensor) -> Tensor:
        student = self._input(student, target)
        if self.teacher_unit is None:
            return cast(Tensor, self.student_unit(self.adapter(student)))
        return cast(Tensor, self.adapter(self.student_unit(student)))

    @staticmethod
    def target_spread(target: Tensor) -> Tensor:
        """Standard deviation over all cells and channels of a `target`, 0-d, without gradient."""
        return at_least_float32(target.detach()).std()

    def _teacher_unit(self, teacher: Tensor) -> Tensor:
        unit = self.student_unit if self.teacher_unit is None else self.teacher_unit
        return cast(Tensor, unit(teacher))

    @torch.no_grad()
    def graph_maps(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What the reasoning adds to the student's and to the teacher's map, for pictures; no gradient."""
        student, teacher = self._input(student, teacher), self._own(teacher)
        student = self.adapter(student) if self.teacher_unit is None else student
        return self.student_unit(student) - student, self._teacher_unit(teacher) - teacher

    def _input(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_maps(student, teacher, student_channels=self.student_channels, teacher_channels=self.teacher_channels)
        own = next(self.student_unit.parameters(), student)
        return resample(self._own(student).to(own.dtype), (teacher.shape[-2], teacher.shape[-1]))

    def _own(self, feature: Tensor) -> Tensor:
        return standardise(feature) if self.normalise_features else feature
