"""Distances against hand-computed values and at their edges."""

import pytest
import torch

from drkd.losses import InstanceLayout, instance_distance, standardise, tensor_distance
from drkd.losses.distance import weighted_square

KINDS = ["frobenius", "relative", "mse", "rms", "standardised"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    # Differences 3 and 4 against a target of norm 5; standardised: (-1, 1) against (1, -1) is 4 each, halved.
    [("frobenius", 5.0), ("relative", 1.0), ("mse", 12.5), ("rms", 12.5**0.5), ("standardised", 2.0)],
)
def test_value_by_hand(kind, expected):
    teacher = torch.tensor([4.0, 3.0]).reshape(1, 1, 1, 2)
    student = teacher - torch.tensor([4.0, -3.0]).reshape(1, 1, 1, 2)
    if kind == "standardised":
        student = torch.tensor([0.0, 6.0]).reshape(1, 1, 1, 2)
    value = tensor_distance(student, teacher, kind=kind)
    assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 1, 1), (0, 3, 3, 3)])
def test_equal_tensors_give_zero_and_finite_gradient(kind, shape):
    student = torch.randn(shape, requires_grad=True)
    value = tensor_distance(student, student.detach().clone(), kind=kind)
    value.backward()
    assert value.item() == 0
    assert student.grad.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_and_constant_tensors_stay_finite(kind):
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    value = tensor_distance(student, torch.full((2, 3, 4, 4), 0.5), kind=kind)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    assert tensor_distance(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), kind=kind).isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_compared_in_float32_and_float64_stays(kind):
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = tensor_distance(student.bfloat16(), teacher.bfloat16(), kind=kind)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(tensor_distance(student, teacher, kind=kind).item(), rel=1e-2)
    assert tensor_distance(student.double(), teacher.double(), kind=kind).dtype == torch.float64


def test_standardise_by_hand():
    feature = torch.tensor([[[[1.0, 3.0]], [[5.0, 5.0]]], [[[1.0, 3.0]], [[5.0, 5.0]]]], dtype=torch.float64)
    out = standardise(feature, eps=0.25)
    torch.testing.assert_close(out[:, 0].flatten(), torch.tensor([-1.0, 1, -1, 1]).double() / 1.25**0.5)
    assert out[:, 1].eq(0).all()


def test_standardised_distance_ignores_scale_and_shift():
    student, teacher = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    value = tensor_distance(student, teacher, kind="standardised")
    moved = tensor_distance(student * 13 + 5, teacher, kind="standardised")
    assert moved.item() == pytest.approx(value.item(), rel=1e-4)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\) and \(1, 2, 4, 4\)"):
        tensor_distance(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 4, 4), kind="mse")
    with pytest.raises(ValueError, match="cosine"):
        tensor_distance(torch.zeros(1, 2), torch.zeros(1, 2), kind="cosine")


@pytest.mark.parametrize(("kind", "expected"), [("frobenius", 5.0 + 2.0), ("norm", (3 + 4 + 2) / 3), ("mse", 29 / 6)])
def test_instance_distance_by_hand(kind, expected):
    # Image 0 has instances that differ by 3 and 4, image 1 none, image 2 one that differs by 2; two values each.
    difference = torch.tensor([[3.0, 0.0], [0.0, 4.0], [2.0, 0.0]]).reshape(3, 2, 1, 1)
    layout = InstanceLayout.build([2, 0, 1], "cpu")
    value = instance_distance(difference, torch.zeros_like(difference), layout, kind=kind)
    assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("spend", [False, True])
def test_weighted_square_is_what_it_says(layout, spend):
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 5, 3, 4, dtype=torch.float64).to(memory_format=layout) for _ in range(2))
    weights = torch.rand(2, 3, 4)
    expected = (weights * (student - teacher).square().mean(dim=1)).sum()
    found = weighted_square(student.clone(), teacher.clone(), weights, spend=spend)
    torch.testing.assert_close(found, expected)
    student.requires_grad_()
    if spend:
        ours, theirs = student.clone(), teacher.clone()
        assert torch.autograd.gradcheck(
            lambda s: weighted_square(s.clone(), teacher.clone(), weights, spend=True), student
        )
        weighted_square(ours, theirs, weights, spend=True)
        torch.testing.assert_close(theirs, student.detach() - teacher)
        torch.testing.assert_close(ours.detach(), theirs * weights.unsqueeze(1) / 5)
    else:
        teacher.requires_grad_()
        assert torch.autograd.gradcheck(lambda s, t: weighted_square(s, t, weights), (student, teacher))


@pytest.mark.parametrize("spend", [False, True])
def test_weighted_square_of_maps_that_lie_in_memory_unlike(spend):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    weights = torch.rand(2, 3, 4)
    expected = (weights * (student - teacher).square().mean(dim=1)).sum()
    leaf = student.clone().requires_grad_()
    last = teacher.contiguous(memory_format=torch.channels_last)
    found = weighted_square(leaf.clone(), last, weights, spend=spend)
    torch.testing.assert_close(found, expected)
    found.backward()
    torch.testing.assert_close(leaf.grad, 2 / 5 * weights.unsqueeze(1) * (student - teacher))


def test_weighted_square_of_millions_of_cells_is_right_to_five_digits():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 64, 256, 256), torch.randn(1, 64, 256, 256)
    weights = torch.full((1, 256, 256), 256.0**-2)
    expected = (student.double() - teacher.double()).square().mean()
    torch.testing.assert_close(weighted_square(student, teacher, weights).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (6, 3), (1, 2, 1, 1)])
def test_the_gradient_of_standardise(shape):
    torch.manual_seed(0)
    feature = (3 + 7 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(standardise, feature)
    other = feature.detach().clone().requires_grad_()
    upstream = torch.randn_like(feature)
    dims = [dim for dim in range(len(shape)) if dim != 1]
    variance, mean = torch.var_mean(other, dim=dims, correction=0, keepdim=True)
    ((other - mean) / (variance + 1e-5).sqrt()).backward(upstream)
    standardise(feature).backward(upstream)
    torch.testing.assert_close(feature.grad, other.grad)


def test_weighted_square_is_float32_under_autocast():
    maps = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    weights = torch.full((1, 4, 4), 1000.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighted_square(*maps, weights)
    torch.testing.assert_close(found, (weights * (maps[0] - maps[1]).square().mean(dim=1)).sum())


def test_standardise_takes_another_eps_and_compiles_for_any_shape():
    feature = torch.randn(2, 4, 6, 6, requires_grad=True)
    torch.testing.assert_close(standardise(feature, eps=3.0), feature_by_hand(feature, eps=3.0))
    compiled = torch.compile(standardise, backend="aot_eager", dynamic=True)
    compiled(feature).square().sum().backward()
    torch.testing.assert_close(compiled(feature), standardise(feature))


def feature_by_hand(feature, *, eps):
    variance, mean = torch.var_mean(feature, dim=(0, 2, 3), correction=0, keepdim=True)
    return (feature - mean) / (variance + eps).sqrt()


@pytest.mark.parametrize("layouts", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("spend", [False, True])
def test_the_root_of_a_weighted_square_and_its_gradient(spend, layouts):
    torch.manual_seed(0)
    student, teacher = (
        torch.randn(2, 3, 4, 5, dtype=torch.float64).to(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
        for last in layouts
    )
    weights = torch.rand(2, 4, 5, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    found = weighted_square(leaf.clone(), teacher.clone(), weights, root=True, spend=spend)
    torch.testing.assert_close(found, weighted_square(student, teacher, weights).sqrt())
    assert torch.autograd.gradcheck(
        lambda s: weighted_square(s.clone(), teacher.clone(), weights, root=True, spend=spend), leaf
    )
    equal = weighted_square(leaf.clone(), student.clone(), weights, root=True, spend=spend)
    (gradient,) = torch.autograd.grad(equal, leaf)
    assert equal.item() == 0 and gradient.eq(0).all()
    if not spend:
        target = teacher.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s, t: weighted_square(s, t, weights, root=True), (leaf, target))


def test_the_root_of_nothing_is_zero_and_of_half_precision_a_float32():
    empty = torch.zeros(0, 3, 4, 5, requires_grad=True)
    weighted_square(empty.clone(), torch.zeros(0, 3, 4, 5), torch.zeros(0, 4, 5), root=True).backward()
    assert empty.grad.shape == (0, 3, 4, 5)
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = weighted_square(student, teacher, torch.full((2, 4, 5), 1 / 40), root=True)
    torch.testing.assert_close(found, (student - teacher).square().mean().sqrt())


@pytest.mark.parametrize("root", [False, True])
def test_a_weighted_square_may_be_changed_in_place(root):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 4, 5)
    student.requires_grad_()
    weights = torch.rand(2, 4, 5)
    (expected,) = torch.autograd.grad(3 * weighted_square(student, teacher, weights, root=root), student)
    term = weighted_square(student, teacher, weights, root=root)
    term *= 3
    torch.testing.assert_close(torch.autograd.grad(term, student)[0], expected)
