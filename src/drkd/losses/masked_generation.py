"""MGD: the student's masked map must suffice to generate the teacher's whole one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from drkd.losses.alignment import MapAdapter
from drkd.losses.distance import at_least_float32, full_precision


class MaskedGenerationLoss(nn.Module):
    r"""Masked generative distillation of one pyramid level (MGD, Yang et al., ECCV 2022, arXiv:2205.01529, sec. 3).

    .. math:: \frac{1}{B} \|G(M \cdot f(s)) - t\|^2, \qquad G = W_2 * \mathrm{ReLU}(W_1 * x)

    G two 3x3 convolutions with biases, f a 1x1 convolution where the channels differ; M drops each position, for all
    channels together, with probability ``masked_share``, drawn afresh at every call from torch's generator of the
    device. Squares are summed over all positions, masked or not, and divided by the batch alone. Reference code:
    yzd-v/MGD (det); equal to it.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        masked_share: lambda, share of positions that are dropped, in [0, 1].

    Shape:
        student, teacher: see `MapAdapter`.
        noise: (B, 1, H, W) uniform in [0, 1), of the teacher's size, to choose the mask; None draws it.
        output: 0-d, at least float32, squared units of the features.

    Raises:
        ValueError: If ``masked_share`` lies outside [0, 1] or the shapes do not fit.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, masked_share: float = 0.65) -> None:
        super().__init__()
        if not 0 <= masked_share <= 1:
            raise ValueError(f"Expected a masked share in [0, 1], got {masked_share}")
        self.align = MapAdapter(student_channels, teacher_channels)
        self.generator = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, kernel_size=3, padding=1),
        )
        self.masked_share = masked_share

    def forward(self, student: Tensor, teacher: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """Squared distance of the generated map to the teacher's, a batch's mean."""
        student, teacher = self.align(student, teacher)
        positions = (teacher.shape[0], 1, *teacher.shape[2:])
        if noise is None:
            noise = torch.rand(positions, device=student.device)
        elif noise.shape != positions:
            raise ValueError(f"Expected noise {positions}, got {tuple(noise.shape)}")
        kept = student.masked_fill(noise > 1 - self.masked_share, 0.0)
        generated = self.generator(kept.to(next(self.generator.parameters()).dtype))
        with full_precision(student):
            return (at_least_float32(generated) - teacher).square().sum() / teacher.shape[0]
