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


def test_in_the_teachers_unit_the_value_does_not_depend_on_the_features_size():
    torch.manual_seed(0)
    student, teacher = 20 * torch.randn(2, 4, 6, 6), 20 * torch.randn(2, 8, 6, 6)
    loss, plain = ChannelWiseLoss(4, 8, scale="teacher_rms"), ChannelWiseLoss(4, 8)
    plain.load_state_dict(loss.state_dict())
    unit = teacher.square().mean().sqrt()
    by_hand = plain(student / unit, teacher / unit)
    torch.testing.assert_close(loss(student, teacher), by_hand)
    torch.testing.assert_close(loss(7 * student, 7 * teacher), by_hand)
    assert not torch.isclose(plain(student, teacher), by_hand, rtol=0.1)
    with pytest.raises(ValueError, match="a scale out of none, teacher_rms"):
        ChannelWiseLoss(4, 8, scale="rms")
