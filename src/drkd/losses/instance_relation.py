"""Instance-wise relation distillation: the relations among the objects of an image are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from drkd.losses.alignment import AdapterInit, check_maps, make_adapter
from drkd.losses.distance import ONE_MODULE, TeacherSide, full_precision
from drkd.losses.instance_feature import instance_distance
from drkd.losses.instances import InstanceLayout, count_boxes
from drkd.losses.relation_filter import FilterMode, LearnedFilter, RandomFilter, masked_out

RelationTarget = Literal["matrix", "features"]
"""What is distilled: the relation matrix (paper) or the instances mixed by it (released code)."""

RelationDistance = Literal["frobenius", "kl", "mse", "relative"]
"""How relations are compared; see `InstanceRelationLoss`."""


class InstanceRelation(nn.Module):
    r"""The embedded Gaussian of the instances of an image, and the mixing of the instances by it.

    .. math:: \psi_{ij} = \mathrm{softmax}_j(w_{ij} \cdot c \cdot g_1(x_i) \cdot g_2(x_j)), \quad Z = X + W(\psi\,g(X))

    The embeddings start with the variance of their input and no bias.

    Args:
        width: D, values of a flattened instance.
        embed: Width of the embeddings.
        logit_scale: c; the paper and the released code have 1.
        mixes: Whether ``g`` and ``W`` exist (for `mix`).
    """

    def __init__(self, width: int, *, embed: int, logit_scale: float, mixes: bool) -> None:
        super().__init__()
        self.row = nn.Linear(width, embed)
        self.column = nn.Linear(width, embed)
        self.value = nn.Linear(width, embed) if mixes else None
        self.output = nn.Linear(embed, width) if mixes else None
        self.logit_scale = logit_scale
        for layer in (self.row, self.column):
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, instances: Tensor, *, layout: InstanceLayout, weights: Tensor | None) -> Tensor:
        """Logarithm of the relation matrices, (M, Nmax, Nmax), of instances (sum N, D)."""
        rows, columns = layout.pad(self.row(instances)), layout.pad(self.column(instances))
        logits = self.logit_scale * (rows @ columns.transpose(1, 2))
        if weights is not None:
            logits = logits * weights
        return masked_out(logits, layout.mask).log_softmax(dim=2)

    def mix(self, instances: Tensor, log_matrix: Tensor, *, layout: InstanceLayout) -> Tensor:
        """Instances (sum N, D) with those that they relate to added."""
        if self.value is None or self.output is None:
            raise ValueError("This relation was built with mixes=False and cannot mix instances")
        mixed = log_matrix.exp() @ layout.pad(self.value(instances))
        return instances + self.output(layout.unpad(mixed))


class MatrixConnector(nn.Module):
    """The f of the paper on a relation matrix, whose size is free: a scalar affine map that starts as the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, matrix: Tensor) -> Tensor:
        """Scale and shift."""
        return self.scale * matrix + self.offset


class InstanceRelationLoss(nn.Module):
    r"""L_IR of one pyramid level (DRKD, Ni et al., IJCAI 2023, arXiv:2302.05637, section 3.2).

    ``matrix`` compares psi(s) with psi(t), the paper's equation; images with fewer than two instances give exactly zero
    and no gradient. Distances: ``frobenius`` (un-squared norm a matrix, summed over the groups: our reading
    of the paper, which writes a norm a pair inside the sum),
    ``kl`` (KL(psi_T || psi_S) in nats, mean over rows), ``mse`` (mean over pairs).
    ``features`` compares f(z_S) with z_T, Z = X + W(psi g(X)), the released arithmetic; one instance is enough for a
    gradient. Distances: ``frobenius`` (a group's instances together, summed over the groups: the released code's),
    ``relative``, ``mse``.

    Deviations from paper and released code: the logits are scaled and the embeddings narrow by default (at d = 2304
    rows are otherwise close to one-hot, and two released levels cost 42 M parameters); the learned filter, which reads
    the teacher's instances, is one for both sides; with ``shared`` and ``fixed`` one relation module serves the
    adapted student and the teacher; ``fixed`` leaves the filter to be learned.

    Args:
        student_channels: Channels of the student's instances.
        teacher_channels: Channels of the teacher's instances.
        size: r, cells a side of an instance.
        target: See above.
        distance: See above.
        filter_mode: ``learned`` (`LearnedFilter`), ``random`` (`RandomFilter`, one a side), ``off``.
        embed_channels: Width of the embeddings; None is half the flattened instance, as in the paper.
        logit_scale: None is 1 / sqrt(embed_channels).
        across_images: Relate all instances of the batch to each other instead of those of one image.
        teacher_side: See `TeacherSide`.
        connector: f on a matrix: ``identity`` or ``affine`` (`MatrixConnector`).
        adapter_init: See `make_adapter`.

    Shape:
        student: (sum N, Cs, r, r), image by image.
        teacher: (sum N, Ct, r, r), never given a gradient.
        boxes: one (N, 4) an image, xyxy px.
        output: 0-d, at least float32.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        size: int = 3,
        target: RelationTarget = "matrix",
        distance: RelationDistance = "kl",
        filter_mode: FilterMode = "learned",
        embed_channels: int | None = 128,
        logit_scale: float | None = None,
        across_images: bool = False,
        teacher_side: TeacherSide = "fixed",
        connector: Literal["identity", "affine"] = "identity",
        adapter_init: AdapterInit = "identity",
    ) -> None:
        super().__init__()
        _check_choices(target, distance, filter_mode, teacher_side, connector)
        one, mixes = teacher_side in ONE_MODULE, target == "features"

        def relation(channels: int) -> InstanceRelation:
            width = channels * size * size
            embed = max(width // 2, 1) if embed_channels is None else embed_channels
            scale = embed**-0.5 if logit_scale is None else logit_scale
            return InstanceRelation(width, embed=embed, logit_scale=scale, mixes=mixes)

        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.adapter: nn.Module | None = None
        if one or mixes:
            self.adapter = make_adapter(student_channels, teacher_channels, init=adapter_init)
        self.student_relation = relation(teacher_channels if one else student_channels)
        self.teacher_relation = None if one else relation(teacher_channels)
        if teacher_side == "fixed":
            self.student_relation.requires_grad_(False)
        if self.teacher_relation is not None and teacher_side == "frozen":
            self.teacher_relation.requires_grad_(False)
        self.student_filter: nn.Module | None = RandomFilter() if filter_mode == "random" else None
        self.teacher_filter: nn.Module | None = None
        if filter_mode != "off":
            learned = filter_mode == "learned"
            self.teacher_filter = LearnedFilter(teacher_channels * size * size) if learned else RandomFilter()
        self.connector: nn.Module = MatrixConnector() if connector == "affine" else nn.Identity()
        self.target: RelationTarget = target
        self.distance: RelationDistance = distance
        self.across_images = across_images
        self.teacher_side: TeacherSide = teacher_side

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], *, image_size: tuple[int, int]
    ) -> Tensor:
        """Distance between the relations."""
        layout = self._layout(student, teacher, boxes)
        with full_precision(student):
            inputs, logs = self._relate(student, teacher, boxes, layout=layout, image_size=image_size)
            if self.target == "matrix":
                return self._compare_matrices(*logs, layout=layout)
            return self._compare_features(inputs, logs, layout=layout, cells=tuple(teacher.shape[2:]))

    def matrices(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], *, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, InstanceLayout]:
        """Relation matrices of student and teacher, (M, Nmax, Nmax) each, zero where absent, and their layout."""
        layout = self._layout(student, teacher, boxes)
        with full_precision(student):
            _, logs = self._relate(student, teacher, boxes, layout=layout, image_size=image_size)
        absent = ~layout.mask.unsqueeze(2)
        return logs[0].exp().masked_fill(absent, 0.0), logs[1].exp().masked_fill(absent, 0.0), layout

    @torch.no_grad()
    def filter_weights(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], *, image_size: tuple[int, int]
    ) -> Tensor | None:
        """The teacher-side filter's weights (M, Nmax, Nmax), 0 where absent, for pictures; None where it is off."""
        if self.teacher_filter is None:
            return None
        layout = self._layout(student, teacher, boxes)
        corners = torch.cat(list(boxes)).to(teacher.device)
        dtype = self.student_relation.row.weight.dtype
        weights: Tensor = self.teacher_filter(
            teacher.to(dtype).flatten(1), corners, layout=layout, image_size=image_size
        )
        return weights.masked_fill(~layout.mask.unsqueeze(2), 0.0).masked_fill(~layout.mask.unsqueeze(1), 0.0)

    def _layout(self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor]) -> InstanceLayout:
        check_maps(student, teacher, student_channels=self.student_channels, teacher_channels=self.teacher_channels)
        counts = count_boxes(boxes)
        if sum(counts) != student.shape[0]:
            raise ValueError(f"Expected one instance a box, got {student.shape[0]} instances and {sum(counts)} boxes")
        return InstanceLayout.build([sum(counts)] if self.across_images else counts, student.device)

    def _relate(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor],
        *,
        layout: InstanceLayout,
        image_size: tuple[int, int],
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Flattened instances, and logarithms of the relation matrices, of student and teacher."""
        dtype = self.student_relation.row.weight.dtype
        student, teacher = student.to(dtype), teacher.detach().to(dtype).flatten(1)
        if self.adapter is not None and self.teacher_relation is None:
            student = self.adapter(student)
        student = student.flatten(1)
        corners = torch.cat(list(boxes)).to(student.device, non_blocking=True)
        weights: Tensor | None = None
        if self.teacher_filter is not None:
            weights = self.teacher_filter(teacher, corners, layout=layout, image_size=image_size)
        student_weights = weights
        if self.student_filter is not None:
            student_weights = self.student_filter(student, corners, layout=layout, image_size=image_size)
        related = self.student_relation(student, layout=layout, weights=student_weights)
        with self._teacher_gradient():
            relation = self.student_relation if self.teacher_relation is None else self.teacher_relation
            if weights is not None and self.teacher_side != "joint":
                weights = weights.detach()
            target = relation(teacher, layout=layout, weights=weights)
        return (student, teacher), (related, target)

    def _teacher_gradient(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.teacher_side == "joint")

    def _compare_matrices(self, student: Tensor, teacher: Tensor, *, layout: InstanceLayout) -> Tensor:
        # One instance relates to itself alone: its row says nothing, and f of it may still differ from 1.
        counts = [count for count in layout.counts if count >= 2]
        rows = layout.mask & layout.mask.sum(dim=1, keepdim=True).ge(2)
        if self.distance == "kl":
            divergence = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=2)
            return divergence.masked_fill(~rows, 0.0).sum() / max(sum(counts), 1)
        pairs = rows.unsqueeze(2) & layout.mask.unsqueeze(1)
        difference = (self.connector(student.exp()) - teacher.exp()).masked_fill(~pairs, 0.0)
        if self.distance == "frobenius":
            return torch.linalg.vector_norm(difference, dim=(1, 2)).sum()
        return difference.square().sum() / max(sum(count * count for count in counts), 1)

    def _compare_features(
        self,
        instances: tuple[Tensor, Tensor],
        logs: tuple[Tensor, Tensor],
        *,
        layout: InstanceLayout,
        cells: tuple[int, ...],
    ) -> Tensor:
        mixed = self.student_relation.mix(instances[0], logs[0], layout=layout)
        if self.adapter is not None and self.teacher_relation is not None:
            mixed = self.adapter(mixed.view(mixed.shape[0], self.student_channels, *cells))
        with self._teacher_gradient():
            relation = self.student_relation if self.teacher_relation is None else self.teacher_relation
            target = relation.mix(instances[1], logs[1], layout=layout)
        shape = (target.shape[0], self.teacher_channels, *cells)
        kind: Literal["frobenius", "relative", "mse"] = "mse"
        if self.distance in ("frobenius", "relative"):
            kind = self.distance
        return instance_distance(mixed.reshape(shape), target.view(shape), layout, kind=kind)


def _check_choices(target: str, distance: str, filter_mode: str, teacher_side: str, connector: str) -> None:
    allowed = {
        "target": (target, ("matrix", "features")),
        "filter_mode": (filter_mode, ("learned", "random", "off")),
        "teacher_side": (teacher_side, ("joint", "shared", "frozen", "fixed")),
        "connector": (connector, ("identity", "affine")),
    }
    distances = ("frobenius", "kl", "mse") if target == "matrix" else ("frobenius", "relative", "mse")
    allowed[f"distance for the target {target!r}"] = (distance, distances)
    for name, (value, choices) in allowed.items():
        if value not in choices:
            raise ValueError(f"Expected {name} out of {', '.join(choices)}, got {value!r}")
    if connector == "affine" and (target != "matrix" or distance == "kl"):
        raise ValueError(
            f"Expected the affine connector with the target matrix and a distance of frobenius or mse, "
            f"got {target!r} and {distance!r}"
        )
