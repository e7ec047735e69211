"""Losses with constants in units of the feature, measured in the teacher's unit (`rescale`)."""

import pytest
import torch

from drkd.losses import ChannelWiseLoss, FocalGlobalLoss, NonLocalLoss

WHERE = {"boxes": [torch.tensor([[4.0, 4.0, 20.0, 20.0]])] * 2, "image_size": (48, 48)}
SCALED = pytest.mark.parametrize(
    ("loss", "where"), [(ChannelWiseLoss, {}), (NonLocalLoss, {}), (FocalGlobalLoss, WHERE)]
)


@SCALED
def test_the_value_is_that_of_maps_divided_by_hand_and_does_not_depend_on_their_size(loss, where):
    torch.manual_seed(0)
    student, teacher = 20 * torch.randn(2, 4, 6, 6), 20 * torch.randn(2, 8, 6, 6)
    scaled, plain = loss(4, 8, scale="teacher_rms"), loss(4, 8)
    plain.load_state_dict(scaled.state_dict())
    unit = teacher.square().mean().sqrt()
    by_hand = plain(student / unit, teacher / unit, **where)
    torch.testing.assert_close(scaled(student, teacher, **where), by_hand)
    torch.testing.assert_close(scaled(7 * student, 7 * teacher, **where), by_hand)
    assert not torch.isclose(plain(student, teacher, **where), by_hand, rtol=0.1)


@SCALED
def test_another_scale_is_refused(loss, where):
    del where
    with pytest.raises(ValueError, match="a scale out of none, teacher_rms"):
        loss(4, 8, scale="rms")
