"""FKD and its non-local block by hand."""

import pytest
import torch

from drkd.losses import NonLocalBlock, NonLocalLoss


def fixed(layer, weight):
    torch.nn.init.constant_(layer.weight, weight)
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)


# y_i = (2 x_i) sum_j x_j (3 x_j) / 2 = 15 x_i; pooled to its maximum: (2 x_i) 2 (3 * 2) = 24 x_i.
@pytest.mark.parametrize(("pool", "expected"), [(1, [16.0, 32.0]), (2, [25.0, 50.0]), (8, [25.0, 50.0])])
def test_block_by_hand(pool, expected):
    block = NonLocalBlock(1, inner_channels=1, pool=pool, norm="none")
    for layer, weight in ((block.theta, 2.0), (block.phi, 1.0), (block.value, 3.0), (block.output, 1.0)):
        fixed(layer, weight)
    feature = torch.tensor([1.0, 2.0]).reshape(1, 1, 1, 2)
    assert block(feature).flatten().tolist() == pytest.approx(expected)


def test_block_equals_the_quadratic_form():
    torch.manual_seed(0)
    block = NonLocalBlock(6, inner_channels=3, norm="none").double()
    feature = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    theta, phi, value = (layer(feature).flatten(2) for layer in (block.theta, block.phi, block.value))
    similarity = theta.transpose(1, 2) @ phi / 20
    mixed = (similarity @ value.transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 5))
    torch.testing.assert_close(block(feature), feature + block.output(mixed))


def test_the_gaussian_block_is_a_softmax_over_pairs():
    torch.manual_seed(0)
    block = NonLocalBlock(6, inner_channels=3, norm="none", similarity="gaussian").double()
    feature = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    theta, phi, value = (layer(feature).flatten(2) for layer in (block.theta, block.phi, block.value))
    weights = (theta.transpose(1, 2) @ phi / 3**0.5).softmax(dim=2)
    mixed = (weights @ value.transpose(1, 2)).transpose(1, 2).unflatten(2, (4, 5))
    torch.testing.assert_close(block(feature), feature + block.output(mixed))
    with pytest.raises(ValueError, match="a similarity out of dot, gaussian"):
        NonLocalBlock(6, inner_channels=3, similarity="cosine")


def test_block_starts_as_the_identity():
    feature = torch.randn(2, 8, 4, 5)
    assert NonLocalBlock(8, inner_channels=2)(feature).equal(feature)
    # Without a norm there is nothing that could learn to leave the identity.
    plain, loud = (NonLocalBlock(8, inner_channels=2, norm="none", gain=gain) for gain in (None, 2.0))
    loud.load_state_dict(plain.state_dict())
    assert not plain(feature).equal(feature)
    torch.testing.assert_close(loud(feature) - feature, 2 * (plain(feature) - feature))


def test_value_by_hand():
    # At a huge temperature the attention is even.
    loss = NonLocalLoss(1, 1, temperature=1e9, feature_weight=2.0, channel_weight=3.0, spatial_weight=5.0)
    for layer in (loss.feature_adapter, loss.channel_adapter, loss.relation_adapter, loss.spatial_adapter):
        fixed(layer, 1.0)
    torch.nn.init.dirac_(loss.spatial_adapter.weight)
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    assert [part.item() for part in loss.parts(student, teacher)] == pytest.approx([5.0, 3.5, 5.0, 5.0])
    assert loss(student, teacher).item() == pytest.approx(10 + 10.5 + 25 + 7e-5 * 5)


def test_attention_is_a_constant_and_of_both_sides():
    loss = NonLocalLoss(1, 1)
    fixed(loss.feature_adapter, 1.0)
    student = torch.zeros(1, 1, 1, 2, requires_grad=True)
    teacher = torch.tensor([0.5, 0.0]).reshape(1, 1, 1, 2)
    # Attention of the student (1, 1), of the teacher 2 softmax(1, 0): the mean weighs the first position's 0.5.
    share = 2 * torch.tensor([1.0, 0.0]).softmax(dim=0)[0]
    part = loss.parts(student, teacher)[0]
    assert part.item() == pytest.approx((((1 + share) / 2).sqrt() * 0.5).item())


def test_errors():
    with pytest.raises(ValueError, match="pool above 0, got 1, 0"):
        NonLocalBlock(4, inner_channels=1, pool=0)
    with pytest.raises(ValueError, match="above 0"):
        NonLocalLoss(1, 1, feature_weight=0.0)


def test_in_the_teachers_unit_large_features_have_a_gradient_in_many_places():
    torch.manual_seed(0)
    student = (20 * torch.randn(1, 32, 16, 16)).requires_grad_()
    teacher = 20 * torch.randn(1, 32, 16, 16)
    loud = {}
    for scale in ("none", "teacher_rms"):
        part = NonLocalLoss(32, 32, scale=scale).parts(student, teacher)[0]
        size = torch.autograd.grad(part, student)[0].square().sum(dim=1).sqrt()
        loud[scale] = (size > size.max() / 100).sum().item()
    assert loud["teacher_rms"] == 256 and loud["none"] < 64
