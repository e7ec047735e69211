"""The released code's arithmetic done its way: a module for each thing, images one after the other, unsplit norms.

Written from its description (released by nizhenliang as Dual-Relation-Knowledge-Distillation, mmdet 2.x, two-stage
file); each image is pooled from its own map, without which the numbers would mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align


class GlobalReasoning(nn.Module):
    """States and assignment by two convolutions, a graph convolution, expansion, batch norm, residual."""

    def __init__(self, channels: int, *, states: int, nodes: int) -> None:
        super().__init__()
        self.state, self.projection = nn.Conv2d(channels, states, 1), nn.Conv2d(channels, nodes, 1)
        self.mix_nodes, self.mix_states = nn.Conv1d(nodes, nodes, 1), nn.Conv1d(states, states, 1, bias=False)
        self.expansion, self.norm = nn.Conv2d(states, channels, 1, bias=False), nn.BatchNorm2d(channels, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        """Relate all pixels."""
        count = x.shape[0]
        states = self.state(x).view(count, self.state.out_channels, -1)
        assignment = self.projection(x).view(count, self.projection.out_channels, -1)
        nodes = torch.matmul(states, assignment.permute(0, 2, 1))
        mixed = self.mix_nodes(nodes.permute(0, 2, 1).contiguous()).permute(0, 2, 1)
        nodes = self.mix_states(torch.relu(mixed + nodes))
        related = torch.matmul(nodes, assignment).view(count, -1, *x.shape[2:])
        return x + self.norm(self.expansion(related))


class ObjectRelation(nn.Module):
    """Relates the instances of one image by an embedded Gaussian with a random filter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.row, self.column, self.value = (nn.Linear(width, width // 2) for _ in range(3))
        self.output = nn.Linear(width // 2, width)

    def forward(self, instances: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        count, width = instances.shape
        logits = self.row(instances) @ self.column(instances).t()
        random = nn.Linear(width, count).to(instances.device)
        matrix = (logits * random(instances).softmax(dim=1)).softmax(dim=1)
        return self.output(matrix @ self.value(instances)) + instances


class ReleasedLosses(nn.Module):
    """All three losses over five levels, weights of the two-stage configuration.

    Args:
        channels: Of every level.
        levels: How many.
    """

    def __init__(self, channels: int = 256, *, levels: int = 5) -> None:
        super().__init__()
        sizes = [(128, 64)] * 2 + [(512, 256)] * (levels - 2)

        def units() -> nn.ModuleList:
            return nn.ModuleList(GlobalReasoning(channels, states=s, nodes=n) for s, n in sizes)

        def adapters(count: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(count))

        self.student_units, self.teacher_units, self.pixel_adapters = units(), units(), adapters(levels)
        self.student_relations, self.teacher_relations = (
            nn.ModuleList(ObjectRelation(9 * channels) for _ in range(2)) for _ in range(2)
        )
        self.relation_adapters, self.instance_adapters = adapters(2), adapters(2)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], boxes: Sequence[Tensor], *, first_stride: float
    ) -> Tensor:
        """The weighted sum."""
        total: Any = 0.0
        parts = zip(self.student_units, self.teacher_units, self.pixel_adapters, student, teacher, strict=True)
        for ours, theirs, adapter, s, t in parts:
            total = total + 1e-3 * torch.dist(adapter(ours(s)), theirs(t), p=2)
        for level in range(2):
            stride = first_stride * 2**level
            for image, own in enumerate(boxes):
                rois = torch.cat([own.new_full((len(own), 1), 0.0), own], dim=1)
                s = roi_align(student[level][image : image + 1], rois, 3, 1 / stride, -1, aligned=False)
                t = roi_align(teacher[level][image : image + 1], rois, 3, 1 / stride, -1, aligned=False)
                related = self.student_relations[level](s.flatten(1)).view_as(s)
                target = self.teacher_relations[level](t.flatten(1)).view_as(t)
                total = total + 4e-3 * torch.dist(self.relation_adapters[level](related), target, p=2)
                total = total + 2.4e-3 * torch.dist(self.instance_adapters[level](s), t, p=2)
        return total
