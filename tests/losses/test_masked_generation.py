"""MGD by hand."""

import pytest
import torch

from drkd.losses import MaskedGenerationLoss


def simple(share):
    """G(x) = 6 max(x, 0)."""
    loss = MaskedGenerationLoss(1, 1, masked_share=share)
    for index, factor in ((0, 2.0), (2, 3.0)):
        torch.nn.init.dirac_(loss.generator[index].weight)
        torch.nn.init.zeros_(loss.generator[index].bias)
        loss.generator[index].weight.data.mul_(factor)
    return loss


def test_value_by_hand():
    student, teacher = (torch.tensor(pair).reshape(1, 1, 1, 2) for pair in ([1.0, -1.0], [5.0, 1.0]))
    assert simple(0.0)(student, teacher).item() == 1 + 1
    noise = torch.tensor([0.9, 0.1]).reshape(1, 1, 1, 2)
    assert simple(0.5)(student, teacher, noise=noise).item() == 25 + 1
    # A batch of two of the same is no louder.
    twice = [tensor.repeat(2, 1, 1, 1) for tensor in (student, teacher, noise)]
    assert simple(0.5)(*twice[:2], noise=twice[2]).item() == 26


def test_the_share_is_what_is_dropped():
    torch.manual_seed(0)
    ones = torch.ones(4, 1, 100, 100)
    # Kept positions give 36, dropped ones 0.
    kept = simple(0.65)(ones, torch.zeros_like(ones)).item() / 36 / 10000
    assert kept == pytest.approx(0.35, abs=0.01)


def test_one_mask_for_all_channels_and_a_new_one_every_time():
    torch.manual_seed(0)
    loss = MaskedGenerationLoss(3, 3)
    student = torch.randn(2, 3, 8, 8, requires_grad=True)
    grads = []
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss(student, torch.zeros_like(student)), student)
        grads.append(grad.ne(0))
        assert grad.ne(0).any(dim=1).equal(grad.ne(0).all(dim=1))
    assert not grads[0].equal(grads[1])


def test_errors():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        MaskedGenerationLoss(1, 1, masked_share=1.5)
    with pytest.raises(ValueError, match=r"noise \(1, 1, 2, 2\), got \(1, 3, 2, 2\)"):
        MaskedGenerationLoss(1, 1)(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), noise=torch.zeros(1, 3, 2, 2))
