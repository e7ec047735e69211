"""Weights that give every object the same say."""

from __future__ import annotations

import pytest
import torch

from drkd.losses.distance import tensor_distance
from drkd.losses.object_weights import object_weights

_SIZE = (64, 64)
_MAP = torch.zeros(2, 3, 8, 8)


def _weights(boxes: list[torch.Tensor], share: float = 0.5) -> torch.Tensor:
    return object_weights(boxes, _MAP, image_size=_SIZE, share=share)


def test_a_small_and_a_large_object_have_the_same_say() -> None:
    large, small = torch.tensor([0.0, 0, 32, 32]), torch.tensor([40.0, 40, 48, 48])
    weights = _weights([torch.stack([large, small]), torch.zeros(0, 4)])
    assert weights.shape == (2, 1, 8, 8)
    beyond = weights - 0.5  # what the objects get on top of the share of all positions
    assert beyond[0, 0, :4, :4].sum().item() == pytest.approx(beyond[0, 0, 5, 5].item())
    assert beyond.sum().item() == pytest.approx(0.5 * 128)
    assert weights[1].unique().tolist() == [0.5]


def test_a_cell_counts_by_the_part_that_the_box_covers() -> None:
    weights = _weights([torch.tensor([[4.0, 0, 16, 8]]), torch.zeros(0, 4)], share=0.9)
    beyond = weights[0, 0, 0] - 0.1
    assert beyond[1].item() == pytest.approx(2 * beyond[0].item())
    assert beyond[2:].abs().max().item() < 1e-6


@pytest.mark.parametrize(
    "boxes", [torch.zeros(0, 4), torch.tensor([[8.0, 8, 8, 20]]), torch.tensor([[100.0, 100, 120, 120]])]
)
def test_without_an_object_on_the_map_all_positions_are_alike(boxes: torch.Tensor) -> None:
    assert _weights([boxes, torch.zeros(0, 4)]).unique().tolist() == [1.0]


def test_a_box_that_leaves_the_image_counts_by_what_is_inside() -> None:
    boxes = [torch.tensor([[-100.0, -100, 8, 8], [20, 20, 40, 40]]), torch.zeros(0, 4)]
    weights = _weights(boxes) - 0.5
    assert weights[0, 0, 0, 0].item() == pytest.approx(weights[0, 0, 2:6, 2:6].sum().item(), rel=1e-5)
    assert weights.isfinite().all()


def test_a_weighted_distance_is_the_weighted_mean() -> None:
    student, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    weights = _weights([torch.tensor([[0.0, 0, 16, 16]])] * 2)
    expected = ((student - teacher) ** 2 * weights).mean()
    assert torch.equal(tensor_distance(student, teacher, kind="mse", weights=weights), expected)
    even = tensor_distance(student, teacher, kind="mse", weights=torch.ones(1))
    torch.testing.assert_close(even, tensor_distance(student, teacher, kind="mse"))
    with pytest.raises(ValueError, match="weights with the distance mse only"):
        tensor_distance(student, teacher, kind="relative", weights=weights)
