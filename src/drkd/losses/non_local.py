"""FKD: attention-guided features, attention and non-local relations are distilled together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from drkd.losses.alignment import (
    AdapterInit,
    FeatureScale,
    check_maps,
    check_scale,
    make_adapter,
    make_linear_adapter,
    resample,
    rescale,
)
from drkd.losses.attention import spatial_attention
from drkd.losses.distance import at_least_float32, full_precision
from drkd.losses.graph_reasoning import GraphNorm, make_norm, start_norm

PairSimilarity = Literal["dot", "gaussian"]
"""How a `NonLocalBlock` says how much one position has to tell another."""


class NonLocalBlock(nn.Module):
    r"""Non-local block (Wang et al., CVPR 2018, arXiv:1711.07971; FKD, section 3).

    .. math:: x + \mathrm{norm}(W_o y), \qquad y_i = \frac{1}{N} \sum_j \langle \theta(x_i), \phi(x_j) \rangle g(x_j)

    j runs over the N positions that a max pool leaves of phi(x) and g(x). The sum is computed as
    theta(x)^T (phi(x) g(x)^T) / N, the same number at a cost linear in the number of positions. That is the dot
    product. The embedded Gaussian, the usual block, has a softmax over j of the products over the root of their width
    in place of the products over N: every position is compared with every other.

    Deviations from the released block: a group norm, because batch norm ties the images of a batch together and fails
    on a 1x1 map of one image (``norm="batch"`` is theirs); the pool is no larger than the map (there an error); W_o has
    no bias, which a norm takes away again.

    Args:
        channels: Channels of the map.
        inner_channels: Width of theta, phi and g.
        pool: Side of the max pool, cells. mmrazor's blocks pool twice: its ``maxpool_stride`` n is a pool of 2 n here.
        norm: See `GraphNorm`; batch has an eps of 1e-5 here.
        gain: Initial weight of the norm; 0 (released) starts as the identity. Without a norm a constant factor on what
            is added, which nothing could learn away from 0. None is 0 with a norm and 1 without.
        similarity: ``dot`` (released) or ``gaussian``.

    Shape:
        input: (B, C, H, W).
        output: same, at least float32.
    """

    def __init__(
        self,
        channels: int,
        *,
        inner_channels: int,
        pool: int = 1,
        norm: GraphNorm = "group",
        gain: float | None = None,
        similarity: PairSimilarity = "dot",
    ) -> None:
        super().__init__()
        if similarity not in ("dot", "gaussian"):
            raise ValueError(f"Expected a similarity out of dot, gaussian, got {similarity!r}")
        if min(inner_channels, pool) < 1:
            raise ValueError(f"Expected inner channels and a pool above 0, got {inner_channels}, {pool}")
        self.theta = nn.Conv2d(channels, inner_channels, kernel_size=1)
        self.phi = nn.Conv2d(channels, inner_channels, kernel_size=1)
        self.value = nn.Conv2d(channels, inner_channels, kernel_size=1)
        self.output = nn.Conv2d(inner_channels, channels, kernel_size=1, bias=False)
        self.norm = make_norm(norm, channels, eps=1e-5)
        self.factor = start_norm(self.norm, float(norm == "none") if gain is None else gain)
        self.pool = pool
        self.similarity: PairSimilarity = similarity

    def forward(self, feature: Tensor) -> Tensor:
        """Add to every position what it relates to."""
        feature = feature.to(self.theta.weight.dtype)
        queries = self.theta(feature).flatten(2)
        keys, values = (self._pooled(layer(feature)) for layer in (self.phi, self.value))
        with full_precision(feature):
            # Sums over all positions leave half precision's range and digits.
            queries, keys, values = (at_least_float32(tensor) for tensor in (queries, keys, values))
            if self.similarity == "gaussian":
                queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries, keys, values))
                mixed = functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
            else:
                mixed = values @ keys.transpose(1, 2) @ queries / keys.shape[2]
            related: Tensor = self.norm(self.output(mixed.unflatten(2, (feature.shape[2], feature.shape[3]))))
            return feature + related * self.factor

    def _pooled(self, feature: Tensor) -> Tensor:
        window = min(self.pool, feature.shape[2]), min(self.pool, feature.shape[3])
        return functional.max_pool2d(feature, window).flatten(2)


class NonLocalLoss(nn.Module):
    r"""Attention-guided and non-local distillation of one pyramid level (FKD, Zhang and Ma, ICLR 2021, section 3).

    .. math:: w_f \|\sqrt{M} (K s - t)\| + w_c \|F \bar s_{HW} - \bar t_{HW}\| + w_s \|D \bar s_C - \bar t_C\|
              + w_n \|K' R_s(s) - R_t(t)\|

    norms of the whole batch, un-squared, nothing averaged. M is the mean of the two maps' `spatial_attention`, a
    constant; bars are means over space and over channels; K, K' 1x1 convolutions, F linear, D a 3x3 convolution of one
    channel, all on the student's side and always there; R a `NonLocalBlock` a side. Reference code: mmrazor's FBKD (the
    authors' repository holds none); equal to it with ``norm="batch"`` and twice its pool. Like there, the channel
    attention of the paper does not enter M, and R_t is trained by the loss; no gradient reaches the
    teacher's features.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        pool: Of the non-local blocks.
        reduction: Channels of a map over the width of its non-local block.
        norm: Of the non-local blocks.
        gain: Initial weight of that norm, see `NonLocalBlock`.
        feature_weight: w_f.
        channel_weight: w_c.
        spatial_weight: w_s.
        relation_weight: w_n.
        temperature: Of the attention, units of the feature, > 0.
        scale: ``none``, the authors', or ``teacher_rms``, a deviation: both maps are divided by the root mean square of
            the teacher's first, see `rescale`. The temperature is absolute; where the features are many times larger,
            the attention is nearly one-hot, and the feature part has next to no gradient anywhere else.
        adapter_init: Start of K, K', F and D, see `make_adapter`; ``default``, the authors', draws a random basis.

    Shape:
        student: (B, Cs, h, w); resampled bilinearly to the teacher's size where it differs.
        teacher: (B, Ct, H, W), never given a gradient.
        output: 0-d, at least float32.

    Raises:
        ValueError: If an argument is out of range or the shapes do not fit.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        pool: int = 2,
        reduction: int = 4,
        norm: GraphNorm = "group",
        gain: float | None = None,
        feature_weight: float = 7e-5,
        channel_weight: float = 4e-3,
        spatial_weight: float = 4e-3,
        relation_weight: float = 7e-5,
        temperature: float = 0.5,
        scale: FeatureScale = "none",
        adapter_init: AdapterInit = "default",
    ) -> None:
        super().__init__()
        weights = (feature_weight, channel_weight, spatial_weight, relation_weight)
        if min(weights) <= 0 or temperature <= 0 or reduction < 1:
            raise ValueError(
                "Expected weights and a temperature above 0 and a reduction of at least 1, "
                f"got {weights}, {temperature} and {reduction}"
            )
        check_scale(scale)

        def block(channels: int) -> NonLocalBlock:
            return NonLocalBlock(
                channels, inner_channels=max(channels // reduction, 1), pool=pool, norm=norm, gain=gain
            )

        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.feature_adapter = make_adapter(student_channels, teacher_channels, init=adapter_init)
        self.channel_adapter = make_linear_adapter(student_channels, teacher_channels, init=adapter_init)
        self.spatial_adapter = make_adapter(1, 1, init=adapter_init, kernel_size=3)
        if student_channels != teacher_channels:
            # The others must be drawn then, so this one is not what stands in the way.
            self.spatial_adapter.random_start = False  # type: ignore[assignment]
        self.relation_adapter = make_adapter(student_channels, teacher_channels, init=adapter_init)
        self.student_block = block(student_channels)
        self.teacher_block = block(teacher_channels)
        self.weights = weights
        self.temperature = temperature
        self.scale: FeatureScale = scale

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The authors' weighted sum."""
        parts = self.parts(student, teacher)
        return torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum()

    def parts(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Feature, channel, spatial and relation distance, each before its weight."""
        check_maps(student, teacher, student_channels=self.student_channels, teacher_channels=self.teacher_channels)
        student, teacher = rescale(student, teacher, scale=self.scale)
        dtype = self.student_block.theta.weight.dtype
        teacher = at_least_float32(teacher.detach()).to(dtype)
        student = resample(at_least_float32(student).to(dtype), (teacher.shape[-2], teacher.shape[-1]))
        with full_precision(student):
            attention = [spatial_attention(map_.detach(), temperature=self.temperature) for map_ in (student, teacher)]
            mask = ((attention[0] + attention[1]) / 2).sqrt()
            means = student.mean(dim=(2, 3)), student.mean(dim=1, keepdim=True)
            distances = (
                mask * (self.feature_adapter(student) - teacher),
                self.channel_adapter(means[0]) - teacher.mean(dim=(2, 3)),
                self.spatial_adapter(means[1]) - teacher.mean(dim=1, keepdim=True),
                self.relation_adapter(self.student_block(student)) - self.teacher_block(teacher),
            )
            feature, channel, spatial, relation = (torch.linalg.vector_norm(part) for part in distances)
        return feature, channel, spatial, relation
