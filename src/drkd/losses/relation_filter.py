"""Relation filters: the weight w_ij of each pair of instances in the instance relation matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from drkd.losses.distance import full_precision
from drkd.losses.instances import InstanceLayout

FilterMode = Literal["learned", "random", "off"]
"""Which filter weighs the pairs: learned, the released code's random one, or none."""


def masked_out(logits: Tensor, mask: Tensor) -> Tensor:
    """Give absent columns a logit of practically minus infinity.

    Finite, because a row without any instance would otherwise be NaN, in value and in gradient.

    Args:
        logits: (M, N, N).
        mask: (M, N) bool, True where there is an instance.
    """
    return logits.masked_fill(~mask.unsqueeze(1), torch.finfo(logits.dtype).min / 4)


class LearnedFilter(nn.Module):
    r"""A filter learned with the relations, for any number of instances (DRKD, arXiv:2302.05637, equation of psi).

    A score per ordered pair, from a low-rank bilinear form of the teacher's instances and from a small network on the
    pair's geometry; :math:`w_{ij} = N \cdot \mathrm{softmax}_j(\mathrm{score}_{ij})` has mean 1 in each row, so that it
    can shift weight but not vanish. It starts uniform. The scores are centred in each row, then bounded, so that the
    filter cannot lower the loss by leaving one easy pair alone.

    The paper does not say how w is made; the released code makes it at random (`RandomFilter`).

    Args:
        width: Values of a flattened instance, C r r.
        rank: Width of the low-rank embedding.
        hidden: Width of the geometry network.
        bound: Largest absolute score; the weights of a row differ by a factor of exp(2 bound) at most.
    """

    def __init__(self, width: int, *, rank: int = 16, hidden: int = 16, bound: float = 2.0) -> None:
        super().__init__()
        self.query = nn.Linear(width, rank)
        self.key = nn.Linear(width, rank)
        self.geometry = nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.bound = bound
        # Zero scores at the start; the other factor of each product is not zero, so both can learn.
        last = self.geometry[-1]
        for layer in (self.query, last):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, instances: Tensor, boxes: Tensor, *, layout: InstanceLayout, image_size: tuple[int, int]
    ) -> Tensor:
        """Weights (M, Nmax, Nmax) for instances (sum N, D) and boxes (sum N, 4) xyxy px; finite where absent."""
        with full_precision(instances):
            instances = functional.layer_norm(instances.detach().to(self.query.weight.dtype), instances.shape[1:])
            query, key = layout.pad(self.query(instances)), layout.pad(self.key(instances))
            geometry = pair_geometry(layout.pad(boxes.to(instances.dtype)), image_size=image_size)
            scores = query @ key.transpose(1, 2) / query.shape[2] ** 0.5 + self.geometry(geometry).squeeze(3)
            count = layout.mask.sum(dim=1).to(scores.dtype).view(-1, 1, 1)
            # What a row has in common says nothing to the softmax, but would drift until the bound held every score.
            present = layout.mask.unsqueeze(1)
            scores = scores - scores.masked_fill(~present, 0.0).sum(dim=2, keepdim=True) / count.clamp_min(1.0)
            scores = self.bound * torch.tanh(scores / self.bound)
            return count * masked_out(scores, layout.mask).softmax(dim=2)


class RandomFilter(nn.Module):
    """The released code's filter: a fresh random linear layer at every call, never trained, softmaxed over the row.

    Its weights sum to 1 in each row (mean 1/N). Each image gets a layer of its own, as released. It exists for ablation
    and parity; the gradient reaches the instances through it, as released.
    """

    def forward(
        self, instances: Tensor, boxes: Tensor, *, layout: InstanceLayout, image_size: tuple[int, int]
    ) -> Tensor:
        """Weights (M, Nmax, Nmax) for instances (sum N, D); the boxes are not used."""
        with full_precision(instances):
            padded = layout.pad(instances)
            bound = padded.shape[2] ** -0.5
            weight = torch.empty_like(padded).uniform_(-bound, bound)
            bias = torch.empty_like(padded[:, :, 0]).uniform_(-bound, bound)
            return filter_by_projection(padded, weight, bias, mask=layout.mask)


def filter_by_projection(padded: Tensor, weight: Tensor, bias: Tensor, *, mask: Tensor) -> Tensor:
    """The released code's filter from explicit matrices: softmax over j of x_i . F_j + c_j.

    Args:
        padded: (M, N, D) instances.
        weight: (M, N, D), F.
        bias: (M, N), c.
        mask: (M, N) bool, True where there is an instance.

    Returns:
        (M, N, N).
    """
    return masked_out(padded @ weight.transpose(1, 2) + bias.unsqueeze(1), mask).softmax(dim=2)


def pair_geometry(boxes: Tensor, *, image_size: tuple[int, int]) -> Tensor:
    """Describe each ordered pair of boxes: log size ratios, centre offsets, overlap.

    Args:
        boxes: (M, N, 4) xyxy px; sides below 1 px count as 1 px.
        image_size: Height and width, px.

    Returns:
        (M, N, N, 5): log(w_j / w_i), log(h_j / h_i), offsets x and y of j from i in units of the image, IoU.
    """
    corner, opposite = boxes[..., :2], boxes[..., 2:]
    sides = (opposite - corner).clamp_min(1.0)
    centres = (corner + opposite) / 2
    ratios = sides.log().unsqueeze(1) - sides.log().unsqueeze(2)
    offsets = centres.unsqueeze(1) - centres.unsqueeze(2)
    overlap = torch.minimum(opposite.unsqueeze(1), opposite.unsqueeze(2)) - torch.maximum(
        corner.unsqueeze(1), corner.unsqueeze(2)
    )
    intersection = overlap.clamp_min(0.0).prod(dim=3)
    areas = sides.prod(dim=2)
    iou = intersection / (areas.unsqueeze(1) + areas.unsqueeze(2) - intersection)
    return torch.stack(
        (ratios[..., 0], ratios[..., 1], offsets[..., 0] / image_size[1], offsets[..., 1] / image_size[0], iou), dim=3
    )
