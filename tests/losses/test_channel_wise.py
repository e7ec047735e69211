"""CWD by hand."""

import math

import pytest
import torch

from drkd.losses import ChannelWiseLoss


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_value_by_hand(temperature):
    # Two positions: the teacher's softmax is (3/4, 1/4) at every temperature here, the student's is even.
    teacher = temperature * torch.tensor([math.log(3.0), 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    value = ChannelWiseLoss(1, 1, temperature=temperature)(torch.zeros_like(teacher), teacher)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert value.item() == pytest.approx(temperature**2 * divergence, rel=1e-12)


def test_is_blind_to_a_channels_level():
    student, teacher = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    loss = ChannelWiseLoss(3, 3)
    assert loss(student + 7, teacher - 3).item() == pytest.approx(loss(student, teacher).item(), rel=1e-10)


def test_temperature_out_of_range():
    with pytest.raises(ValueError, match="above 0, got 0"):
        ChannelWiseLoss(1, 1, temperature=0)
