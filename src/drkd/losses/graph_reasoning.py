"""The graph reasoning unit: relations among all pixels of a map at a cost linear in their number."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from drkd.losses.distance import at_least_float32, full_precision

GraphNorm = Literal["group", "batch", "none"]
"""Norm after the reprojection; see `GraphReasoningUnit`."""


class GraphReasoningUnit(nn.Module):
    r"""Global reasoning over a graph of regions (GloRe, Chen et al., CVPR 2019, arXiv:1811.12814; DRKD, section 3.1).

    With L = h w positions, states S = theta(F) (C1, L) and assignment Q = rho(F) (C2, L), both 1x1 convolutions:

    .. math:: V = S Q^T, \quad V' = V + V W_g^T + b, \quad U = W_c\,\mathrm{ReLU}(V'), \quad
              \mathrm{out} = F + \mathrm{norm}(W_e U Q)

    V holds C2 nodes of C1 states. The paper writes ((I - A) V) W, so W_g is its -A. Nothing of size L x L exists.

    Deviations from the released unit, each an argument: V is divided by L, and the norm is a group norm, because batch
    norm ties the images of a batch together and fails on a 1x1 map of one image. The released one is
    ``normalise=False, norm="batch"``.

    Args:
        channels: Channels of the map, at least 2.
        nodes: C2, number of graph nodes.
        states: C1, width of a node.
        normalise: Divide V by L, so that its size does not follow the map's.
        norm: ``group`` (groups of at least 8 channels, at most 32 groups), ``batch`` (eps 1e-4, as released), ``none``.
        activation_before_update: ReLU before W_c, as released; False is the paper's plain linear update.
        gain: Initial weight of that norm: how loud the relations are beside a map of unit variance (released: 1).
            Without a norm a constant factor on the relations, which then have no unit variance.
        residual: Add F; False returns the relations alone.

    Shape:
        input: (B, C, h, w).
        output: same.
    """

    def __init__(
        self,
        channels: int,
        *,
        nodes: int,
        states: int,
        normalise: bool = True,
        norm: GraphNorm = "group",
        activation_before_update: bool = True,
        gain: float = 1.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if min(channels, nodes, states) < 1:
            raise ValueError(f"Expected channels, nodes and states above 0, got {channels}, {nodes}, {states}")
        self.state = nn.Conv2d(channels, states, kernel_size=1)
        self.projection = nn.Conv2d(channels, nodes, kernel_size=1)
        self.node_mixing = nn.Linear(nodes, nodes)
        self.state_update = nn.Linear(states, states, bias=False)
        self.expansion = nn.Conv2d(states, channels, kernel_size=1, bias=False)
        self.norm = make_norm(norm, channels)
        self.factor = start_norm(self.norm, gain)
        self.normalise = normalise
        self.activation_before_update = activation_before_update
        self.residual = residual

    def forward(self, feature: Tensor) -> Tensor:
        """Add to every pixel what the graph says of it."""
        if feature.ndim != 4 or feature.shape[1] != self.state.in_channels:
            raise ValueError(f"Expected a map (B, {self.state.in_channels}, h, w), got {tuple(feature.shape)}")
        feature = feature.to(self.state.weight.dtype)
        # One product reads the map for both; no convolution, which would keep the map for weights that are not trained.
        weight = torch.cat([self.state.weight, self.projection.weight]).flatten(1)
        bias = torch.cat([self.state.bias, self.projection.bias])  # type: ignore[list-item]  # both have one
        if feature.is_contiguous(memory_format=torch.channels_last):
            both = functional.linear(feature.permute(0, 2, 3, 1), weight, bias).flatten(1, 2).transpose(1, 2)
        else:
            both = weight @ feature.flatten(2) + bias.unsqueeze(1)
        with full_precision(feature):
            # A sum over all positions leaves half precision's range and digits.
            both = at_least_float32(both)
            states, assignment = both.split([self.state.out_channels, self.projection.out_channels], dim=1)
            nodes = self._reason(states, assignment)
            if isinstance(self.norm, nn.GroupNorm):
                return self._reproject(feature, nodes, assignment, self.norm)
            # So does their expansion, which no norm has tamed yet.
            relations = self.norm(self.expansion((nodes @ assignment).unflatten(2, feature.shape[-2:]))) * self.factor
        return feature + relations if self.residual else relations

    def _reason(self, states: Tensor, assignment: Tensor) -> Tensor:
        """The nodes after graph convolution, (B, C1, C2)."""
        nodes = states @ assignment.transpose(1, 2)
        if self.normalise:
            nodes = nodes / states.shape[2]
        nodes = nodes + self.node_mixing(nodes)
        if self.activation_before_update:
            nodes = torch.relu(nodes)
        return self.state_update.weight @ nodes

    def _reproject(self, feature: Tensor, nodes: Tensor, assignment: Tensor, norm: nn.GroupNorm) -> Tensor:
        r"""Expansion, group norm and residual in one product.

        The expansion :math:`E = A Q`, :math:`A = W_e U` (C, C2), is linear in the assignment, so the mean and the
        variance of its groups follow from the mean and the covariance of Q over the positions, and the normalised E is
        another such product. No map of C channels is made but the result.
        """
        expanded = self.expansion.weight.flatten(1) @ nodes
        mean = assignment.mean(dim=2, keepdim=True)
        centred = assignment - mean
        covariance = centred @ centred.transpose(1, 2) / assignment.shape[2]
        groups = (norm.num_groups, -1)
        channel_means = (expanded @ mean).squeeze(2).unflatten(1, groups)
        within = ((expanded @ covariance) * expanded).sum(dim=2).unflatten(1, groups).mean(dim=2, keepdim=True)
        between, group_means = torch.var_mean(channel_means, dim=2, correction=0, keepdim=True)
        scale = torch.rsqrt(within + between + norm.eps) * norm.weight.unflatten(0, groups)
        offset = norm.bias.unflatten(0, groups) - scale * group_means
        factors = torch.cat([expanded * scale.flatten(1).unsqueeze(2), offset.flatten(1).unsqueeze(2)], dim=2)
        terms = torch.cat([assignment, torch.ones_like(assignment[:, :1])], dim=1)
        shape = feature.shape[-2:]
        if not self.residual:
            return (factors @ terms).unflatten(2, shape)
        flat = at_least_float32(feature).flatten(2)
        if feature.is_contiguous(memory_format=torch.channels_last):
            # Position by position, so that the result is channels-last too.
            related = torch.baddbmm(flat.transpose(1, 2), terms.transpose(1, 2), factors.transpose(1, 2))
            return related.transpose(1, 2).unflatten(2, shape)
        return torch.baddbmm(flat, factors, terms).unflatten(2, shape)


def make_norm(norm: GraphNorm, channels: int, *, eps: float = 1e-4) -> nn.Module:
    """The norm of a residual branch; ``eps`` is the batch norm's."""
    if norm == "group":
        # Groups of several channels keep a variance even on a 1x1 map.
        groups = max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels // n >= 8))
        return nn.GroupNorm(groups, channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps=eps)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"Expected a norm out of group, batch, none, got {norm!r}")


def start_norm(norm: nn.Module, gain: float) -> float:
    """Give the norm of a residual branch its initial weight; without a norm the gain is returned, as a factor."""
    if isinstance(norm, nn.GroupNorm | nn.BatchNorm2d):
        nn.init.constant_(norm.weight, gain)
        return 1.0
    return gain
