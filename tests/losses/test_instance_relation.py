"""The instance relation loss and its filters."""

import math

import pytest
import torch

from drkd.losses import (
    InstanceFeatureLoss,
    InstanceLayout,
    InstanceRelation,
    InstanceRelationLoss,
    LearnedFilter,
    RandomFilter,
)
from drkd.losses.relation_filter import pair_geometry

SIZE = (64, 64)
SIDES = ["joint", "shared", "frozen", "fixed"]
TARGETS = [("matrix", "kl"), ("matrix", "frobenius"), ("matrix", "mse"), ("features", "mse"), ("features", "frobenius")]


def make_boxes(*counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = [torch.rand(count, 2, generator=generator) * 40 for count in counts]
    return [torch.cat([c, c + 2 + torch.rand(len(c), 2, generator=generator) * 20], dim=1) for c in corners]


def make_loss(student=4, teacher=6, **options):
    torch.manual_seed(1)
    return InstanceRelationLoss(student, teacher, embed_channels=8, **options).double()


def instances(count, channels, seed=0, *, grad=True):
    generator = torch.Generator().manual_seed(seed + 100 * channels)
    return torch.randn(count, channels, 3, 3, generator=generator, dtype=torch.float64).requires_grad_(grad)


def test_matrix_by_hand():
    relation = InstanceRelation(1, embed=1, logit_scale=0.5, mixes=False).double()
    with torch.no_grad():
        relation.row.weight.fill_(1.0)
        relation.column.weight.fill_(2.0)
    # Logits w * 0.5 * x_i * 2 x_j = w x_i x_j for x = (1, 2), w_01 = 3.
    weights = torch.tensor([[[1.0, 3.0], [1.0, 1.0]]]).double()
    layout = InstanceLayout.build([2], "cpu")
    matrix = relation(torch.tensor([[1.0], [2.0]]).double(), layout=layout, weights=weights).exp()[0]
    expected = [[1 / (1 + math.exp(5)), 1 / (1 + math.exp(-5))], [1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))]]
    torch.testing.assert_close(matrix, torch.tensor(expected).double())


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("kl", (0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)) / 2),
        ("frobenius", math.sqrt(2 * 0.3**2)),
        ("mse", 2 * 0.3**2 / 4),
    ],
)
def test_distances_by_hand(distance, expected):
    loss = make_loss(distance=distance)
    student = torch.tensor([[[0.2, 0.8], [0.5, 0.5]], [[1.0, 1e-30], [1.0, 1e-30]]]).double().log()
    teacher = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.3, 0.7], [0.3, 0.7]]]).double().log()
    # The second image has one instance, so whatever its padded rows hold must not count.
    value = loss._compare_matrices(student, teacher, layout=InstanceLayout.build([2, 1], "cpu"))
    assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("filter_mode", ["learned", "random", "off"])
@pytest.mark.parametrize(("target", "distance"), TARGETS)
@pytest.mark.parametrize("counts", [(3, 0, 1, 2), (0, 0), (1, 1), (2,)])
def test_every_choice_is_finite_and_uses_every_parameter(side, filter_mode, target, distance, counts):
    affine = target == "matrix" and distance != "kl"
    loss = make_loss(
        teacher_side=side,
        filter_mode=filter_mode,
        target=target,
        distance=distance,
        connector="affine" if affine else "identity",
    )
    student, teacher = instances(sum(counts), 4), instances(sum(counts), 6)
    value = loss(student, teacher, make_boxes(*counts), image_size=SIZE)
    value.backward()
    assert value.ndim == 0 and value.isfinite() and value.dtype == torch.float64
    assert teacher.grad is None
    assert student.grad is not None and student.grad.isfinite().all()
    for name, parameter in loss.named_parameters():
        untrained = {"frozen": "teacher_relation", "fixed": "student_relation"}.get(side)
        assert parameter.requires_grad == (untrained is None or not name.startswith(untrained)), name
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if target == "matrix" and max(counts) < 2:
        assert value.item() == 0 and student.grad.eq(0).all()
    elif max(counts) >= 2:
        assert value.item() > 0 and student.grad.abs().sum() > 0


@pytest.mark.parametrize("side", ["shared", "fixed"])
@pytest.mark.parametrize("distance", ["kl", "frobenius", "mse"])
def test_equal_instances_give_zero_with_one_module_for_both_sides(distance, side):
    loss = make_loss(4, 4, distance=distance, teacher_side=side)
    student = instances(5, 4)
    value = loss(student, student.detach().clone(), make_boxes(3, 2), image_size=SIZE)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_identical_boxes_and_instances_have_uniform_rows():
    loss = make_loss()
    student, teacher = (
        instances(1, 4, grad=False).expand(3, -1, -1, -1),
        instances(1, 6, grad=False).expand(3, -1, -1, -1),
    )
    boxes = [make_boxes(1)[0].expand(3, 4)]
    ours, theirs, _ = loss.matrices(student, teacher, boxes, image_size=SIZE)
    torch.testing.assert_close(ours, torch.full_like(ours, 1 / 3))
    torch.testing.assert_close(theirs, ours)
    assert loss(student, teacher, boxes, image_size=SIZE).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("across", [False, True])
def test_relations_cross_images_only_when_asked(across):
    loss = make_loss(across_images=across)
    boxes = make_boxes(2, 3)
    teacher, student = instances(5, 6, grad=False), instances(5, 4, grad=False)
    changed = torch.cat([student[:2] + 1, student[2:]])
    before, _, layout = loss.matrices(student, teacher, boxes, image_size=SIZE)
    after, _, _ = loss.matrices(changed, teacher, boxes, image_size=SIZE)
    if across:
        assert layout.counts == (5,) and before.shape == (1, 5, 5)
        assert not torch.allclose(before[0, 2:], after[0, 2:])
    else:
        assert before[1].equal(after[1]) and not torch.allclose(before[0], after[0])
        assert before[0, 2].eq(0).all() and before[0, :, 2].eq(0).all()


@pytest.mark.parametrize(("target", "distance"), TARGETS)
@pytest.mark.parametrize("filter_mode", ["learned", "off"])
def test_order_of_images_does_not_matter(target, distance, filter_mode):
    loss = make_loss(target=target, distance=distance, filter_mode=filter_mode)
    boxes = make_boxes(2, 3)
    student, teacher = instances(5, 4, grad=False), instances(5, 6, grad=False)
    turn = [2, 3, 4, 0, 1]
    value = loss(student, teacher, boxes, image_size=SIZE)
    torch.testing.assert_close(loss(student[turn], teacher[turn], boxes[::-1], image_size=SIZE), value)


def test_padding_changes_nothing():
    loss = make_loss(distance="frobenius")
    boxes = make_boxes(2, 6, 0)
    student, teacher = instances(8, 4, grad=False), instances(8, 6, grad=False)
    together = loss(student, teacher, boxes, image_size=SIZE)
    alone = loss(student[:2], teacher[:2], boxes[:1], image_size=SIZE)
    alone = alone + loss(student[2:], teacher[2:], boxes[1:2], image_size=SIZE)
    torch.testing.assert_close(together, alone)


def test_one_instance_mixes_in_the_features_target():
    loss = make_loss(target="features", distance="mse")
    student = instances(1, 4)
    value = loss(student, instances(1, 6), make_boxes(1), image_size=SIZE)
    value.backward()
    assert value.item() > 0 and student.grad.abs().sum() > 0


@pytest.mark.parametrize("counts", [(1,), (2, 7), (0, 30)])
def test_learned_filter_has_rows_of_mean_one_and_starts_uniform(counts):
    torch.manual_seed(0)
    learned = LearnedFilter(54).double()
    layout = InstanceLayout.build(counts, "cpu")
    flat, boxes = instances(sum(counts), 6, grad=False).flatten(1) * 13, torch.cat(make_boxes(*counts)).double()

    def rows():
        weights = learned(flat, boxes, layout=layout, image_size=SIZE)
        assert weights.isfinite().all()
        return [weights[i, :count, :count] for i, count in enumerate(counts)]

    assert all(torch.allclose(row, torch.ones_like(row)) for row in rows())
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter)
    for row in rows():
        torch.testing.assert_close(row.mean(dim=1), torch.ones(len(row)).double())
        assert all(weights.max() / weights.min() <= math.exp(2 * learned.bound) + 1e-9 for weights in row)
    assert max(counts) < 2 or not torch.allclose(rows()[-1], torch.ones_like(rows()[-1]))


def test_learned_filter_learns():
    loss = make_loss(filter_mode="learned")
    optimiser = torch.optim.SGD(loss.parameters(), lr=1.0)
    student, teacher = instances(5, 4, grad=False), instances(5, 6, grad=False)
    for _ in range(3):
        optimiser.zero_grad()
        loss(student, teacher, make_boxes(5), image_size=SIZE).backward()
        optimiser.step()
    assert all(p.grad.abs().sum() > 0 for p in loss.teacher_filter.query.parameters())
    assert loss.teacher_filter.key.weight.grad.abs().sum() > 0
    assert loss.teacher_filter.geometry[0].weight.grad.abs().sum() > 0


def test_random_filter_is_fresh_and_sums_to_one():
    layout = InstanceLayout.build([4, 1], "cpu")
    flat, boxes = instances(5, 6, grad=False).flatten(1), torch.cat(make_boxes(4, 1))
    first, second = (RandomFilter()(flat, boxes, layout=layout, image_size=SIZE) for _ in range(2))
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first.sum(dim=2), torch.ones(2, 4).double())
    assert first[1, :, 1:].eq(0).all()


def test_pair_geometry_by_hand():
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 20.0], [5.0, 0.0, 25.0, 20.0]]])
    pair = pair_geometry(boxes, image_size=(40, 100))[0, 0, 1]
    assert pair.tolist() == pytest.approx([math.log(2), 0.0, 0.1, 0.0, 100 / 500])


def test_odd_boxes_leave_the_filter_finite():
    boxes = torch.tensor([[[5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 3.0, 3.0], [-900.0, 5.0, 900.0, 6.0]]])
    assert pair_geometry(boxes, image_size=SIZE).isfinite().all()


def test_half_precision_equals_float32():
    loss = make_loss().float()
    student, teacher = instances(5, 4, grad=False).float(), instances(5, 6, grad=False).float()
    value = loss(student, teacher, make_boxes(3, 2), image_size=SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(student, teacher, make_boxes(3, 2), image_size=SIZE)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, value)


def test_errors_state_what_is_allowed():
    with pytest.raises(ValueError, match=r"frobenius, kl, mse.*'relative'"):
        make_loss(distance="relative")
    with pytest.raises(ValueError, match="filter_mode"):
        make_loss(filter_mode="none")
    with pytest.raises(ValueError, match="affine"):
        make_loss(distance="kl", connector="affine")
    loss = make_loss()
    with pytest.raises(ValueError, match="got 5 instances and 3 boxes"):
        loss(instances(5, 4), instances(5, 6), make_boxes(3), image_size=SIZE)
    with pytest.raises(ValueError, match="channels"):
        loss(instances(3, 6), instances(3, 6), make_boxes(3), image_size=SIZE)


@pytest.mark.parametrize("distance", ["frobenius", "norm", "relative", "mse", "standardised"])
@pytest.mark.parametrize("counts", [(2, 0, 1), (0, 0)])
def test_instance_feature_loss(distance, counts):
    loss = InstanceFeatureLoss(4, 6, distance=distance).double()
    student, teacher = instances(sum(counts), 4), instances(sum(counts), 6)
    value = loss(student, teacher, layout=InstanceLayout.build(counts, "cpu"))
    value.backward()
    assert value.isfinite() and (value.item() > 0) == (sum(counts) > 0)
    assert teacher.grad is None and student.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    same = InstanceFeatureLoss(4, 4, distance=distance).double()
    assert same(student, student.detach(), layout=InstanceLayout.build(counts, "cpu")).item() == 0


def test_learned_filter_is_not_held_by_what_a_row_has_in_common():
    """A drift of all scores together must neither change the weights nor end the learning."""
    torch.manual_seed(0)
    learned = LearnedFilter(54).double()
    layout = InstanceLayout.build((5, 3), "cpu")
    flat, boxes = instances(8, 6, grad=False).flatten(1), torch.cat(make_boxes(5, 3)).double()
    for parameter in learned.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before = learned(flat, boxes, layout=layout, image_size=SIZE)
    with torch.no_grad():
        learned.geometry[-1].bias += 1000.0
    after = learned(flat, boxes, layout=layout, image_size=SIZE)
    torch.testing.assert_close(after, before)
    (after * torch.randn_like(after)).sum().backward()
    assert learned.key.weight.grad.abs().max() > 1e-6
