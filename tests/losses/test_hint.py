"""FitNet's hint by hand."""

import torch

from drkd.losses import HintLoss


def test_value_by_hand():
    teacher = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    assert HintLoss(1, 1)(torch.zeros_like(teacher), teacher).item() == 12.5


def test_the_adapter_starts_as_the_identity_where_it_can():
    feature = torch.randn(2, 4, 3, 5)
    assert HintLoss(4, 4)(feature, feature).item() == 0
    assert len(list(HintLoss(4, 4).parameters())) == 2
    assert list(HintLoss(4, 4, always_adapt=False).parameters()) == []
    assert len(list(HintLoss(4, 8, always_adapt=False).parameters())) == 2
