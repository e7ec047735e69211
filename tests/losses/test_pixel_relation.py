"""Graph reasoning and the pixel relation loss beyond parity."""

import pytest
import torch

from drkd.losses import GraphReasoningUnit, PearsonLoss, PixelRelationLoss

SIDES = pytest.mark.parametrize("side", ["joint", "shared", "frozen", "fixed"])


def test_unit_by_hand():
    unit = GraphReasoningUnit(1, nodes=1, states=1, norm="none", normalise=True).double()
    values = {"state": 2.0, "projection": 1.0, "expansion": 5.0, "node_mixing": -3.0, "state_update": 0.5}
    with torch.no_grad():
        for name, value in values.items():
            getattr(unit, name).weight.fill_(value)
            if getattr(unit, name).bias is not None:
                getattr(unit, name).bias.zero_()
        unit.node_mixing.bias.fill_(50.0)
    # S = 2x, Q = x, V = (2 + 8) / 2 = 5, V' = 5 - 15 + 50 = 40, U = 20, out = x + 5 * 20 * x.
    feature = torch.tensor([1.0, 2.0]).double().reshape(1, 1, 1, 2)
    assert unit(feature).flatten().tolist() == pytest.approx([101.0, 202.0])
    # Without the bias V' = -10: ReLU cuts it, the plain update does not.
    torch.nn.init.zeros_(unit.node_mixing.bias)
    assert unit(feature).flatten().tolist() == pytest.approx([1.0, 2.0])
    unit.activation_before_update = False
    assert unit(feature).flatten().tolist() == pytest.approx([1 - 25.0, 2 - 50.0])


def test_without_graph_adapter_and_objects_it_is_pkd():
    """What DRKD's pixel relations have beyond plain imitation is these three: the direction is else PKD's own."""
    torch.manual_seed(0)
    teacher = torch.randn(4, 8, 6, 5) * (1 + torch.rand(8, 1, 1)) + 2
    student = (teacher + torch.randn(4, 8, 6, 5)).requires_grad_()
    options = {"object_share": 0.0, "adapter_init": "none", "teacher_side": "fixed"}
    plain, graph = (PixelRelationLoss(8, 8, reasoning=kind, gain=0.3, **options) for kind in ("none", "graph"))
    found = [
        torch.autograd.grad(loss(student, teacher), student)[0].flatten() for loss in (PearsonLoss(8, 8), plain, graph)
    ]
    alike = [float(torch.nn.functional.cosine_similarity(found[0], other, dim=0)) for other in found[1:]]
    assert alike[0] == pytest.approx(1, abs=1e-4) and alike[1] < 0.99
    assert float(found[1].norm() / found[0].norm()) == pytest.approx(2, rel=2e-2)


@pytest.mark.parametrize("channels", [8, 16, 24, 96, 100, 256])
def test_group_norm_survives_one_pixel_of_one_image(channels):
    unit = GraphReasoningUnit(channels, nodes=4, states=8)
    feature = torch.randn(1, channels, 1, 1, requires_grad=True)
    out = unit(feature)
    out.square().sum().backward()
    assert out.isfinite().all() and feature.grad.isfinite().all()


def test_images_of_a_batch_do_not_mix():
    unit = GraphReasoningUnit(16, nodes=4, states=8)
    feature = torch.randn(3, 16, 5, 7)
    torch.testing.assert_close(unit(feature)[1:2], unit(feature[1:2]))


@SIDES
def test_teacher_features_get_no_gradient(side):
    loss = PixelRelationLoss(8, 16, nodes=4, states=8, teacher_side=side)
    student = torch.randn(2, 8, 6, 5, requires_grad=True)
    teacher = torch.randn(2, 16, 6, 5, requires_grad=True)
    value = loss(student, teacher)
    value.backward()
    assert value.ndim == 0 and value.dtype == torch.float32
    assert teacher.grad is None and student.grad.abs().sum() > 0
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    if side in ("shared", "fixed"):
        assert loss.teacher_unit is None
        assert all(p.requires_grad == (side == "shared") for p in loss.student_unit.parameters())
    else:
        assert all(p.requires_grad == (side == "joint") for p in loss.teacher_unit.parameters())


def test_shared_side_gives_zero_for_equal_maps():
    loss = PixelRelationLoss(8, 8, nodes=4, states=8)
    feature = torch.randn(2, 8, 6, 5, requires_grad=True)
    value = loss(feature, feature.detach().clone())
    value.backward()
    assert value.item() == 0 and feature.grad.eq(0).all()


def test_shared_target_is_a_constant():
    loss = PixelRelationLoss(8, 8, nodes=4, states=8)
    related, target = loss.maps(torch.randn(2, 8, 6, 5), torch.randn(2, 8, 6, 5))
    assert related.requires_grad and not target.requires_grad


def test_normalised_maps_make_the_scale_irrelevant():
    torch.manual_seed(0)
    loss = PixelRelationLoss(8, 8, nodes=4, states=8).double()
    student, teacher = torch.randn(2, 2, 8, 6, 5, dtype=torch.float64)
    assert loss(student * 13 + 1, teacher * 0.2).item() == pytest.approx(loss(student, teacher).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs"), [((6, 5), (12, 10)), ((12, 10), (6, 5)), ((6, 10), (6, 5)), ((2, 2), (1, 1))]
)
def test_unequal_sizes_are_resampled_to_the_teachers(ours, theirs):
    loss = PixelRelationLoss(8, 16, nodes=4, states=8)
    related, target = loss.maps(torch.randn(2, 8, *ours), torch.randn(2, 16, *theirs))
    assert related.shape == target.shape == (2, 16, *theirs)


@SIDES
def test_autocast_and_channels_last(side):
    torch.manual_seed(0)
    loss = PixelRelationLoss(16, 16, nodes=4, states=8, teacher_side=side)
    student, teacher = torch.randn(2, 2, 16, 8, 8)
    value = loss(student, teacher).item()
    last = torch.channels_last
    moved = loss(student.to(memory_format=last), teacher.to(memory_format=last))
    assert moved.item() == pytest.approx(value, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(student.bfloat16(), teacher.bfloat16())
    assert cast.dtype == torch.float32
    assert cast.item() == pytest.approx(value, rel=0.05)
    assert loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_errors_state_expected_and_got():
    loss = PixelRelationLoss(8, 16)
    with pytest.raises(ValueError, match="Expected 8 student and 16 teacher channels, got 16 and 8"):
        loss(torch.zeros(1, 16, 4, 4), torch.zeros(1, 8, 4, 4))
    with pytest.raises(ValueError, match="one batch"):
        loss(torch.zeros(1, 8, 4, 4), torch.zeros(2, 16, 4, 4))
    student, teacher = torch.zeros(1, 8, 4, 4), torch.zeros(1, 16, 4, 4)
    for reasoning in ("graph", "non_local", "none"):
        own = PixelRelationLoss(8, 16, reasoning=reasoning)
        with pytest.raises(ValueError, match=r"Expected a teacher's map \(B, 16, H, W\), got \(1, 8, 4, 4\)"):
            own.target(torch.zeros(1, 8, 4, 4))
    for given in ({"teacher": None}, {"teacher": teacher, "target": loss.target(teacher)}):
        with pytest.raises(ValueError, match="the teacher's map or its target, one of them"):
            loss(student, **given)
    with pytest.raises(ValueError, match="teacher side"):
        PixelRelationLoss(8, 16, teacher_side="none")
    with pytest.raises(ValueError, match="norm"):
        PixelRelationLoss(8, 16, norm="layer")
    with pytest.raises(ValueError, match="a reasoning out of graph, non_local, none, got 'attention'"):
        PixelRelationLoss(8, 16, reasoning="attention")


def test_without_reasoning_the_maps_themselves_are_compared():
    loss = PixelRelationLoss(8, 8, reasoning="none", normalise_features=False)
    student, teacher = torch.randn(2, 2, 8, 6, 5, dtype=torch.float64)
    assert not list(loss.student_unit.parameters())
    loss = loss.double()
    assert loss(student, teacher).item() == pytest.approx((student - teacher).square().mean().item())


@SIDES
def test_non_local_reasoning_relates_every_pixel_to_every_other(side):
    torch.manual_seed(0)
    loss = PixelRelationLoss(8, 16, reasoning="non_local", states=4, gain=0.3, teacher_side=side)
    student, teacher = torch.randn(2, 8, 6, 5, requires_grad=True), torch.randn(2, 16, 6, 5)
    loss(student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0
    assert all(p.grad is not None for p in loss.parameters() if p.requires_grad)
    moved = teacher.clone()
    moved[:, :, 0, 0] += 5
    before, after = loss.maps(student, teacher)[1], loss.maps(student, moved)[1]
    assert (after - before).abs().sum(dim=1).gt(0).all(), "one pixel moves, and all others hear of it"


@SIDES
def test_the_spread_of_the_target_is_that_of_what_is_compared_with(side):
    torch.manual_seed(0)
    loss = PixelRelationLoss(8, 16, nodes=4, states=8, teacher_side=side)
    student, teacher = torch.randn(2, 8, 6, 5), torch.randn(2, 16, 6, 5)
    expected = loss.maps(student, teacher)[1].std().item()
    target = loss.target(teacher.requires_grad_())
    assert loss.target_spread(target).item() == pytest.approx(expected)
    assert not loss.target_spread(target).requires_grad


@SIDES
@pytest.mark.parametrize("reasoning", ["graph", "non_local", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_target_made_before_gives_what_the_teachers_map_gives(side, reasoning, weighted):
    torch.manual_seed(0)
    loss = PixelRelationLoss(16, 16, nodes=4, states=8, teacher_side=side, reasoning=reasoning)
    student, teacher = torch.randn(2, 3, 16, 6, 5)
    weights = torch.rand(3, 6, 5) if weighted else None
    before = student.clone(), teacher.clone()
    found = []
    for options in ({"teacher": teacher}, {"teacher": None, "target": loss.target(teacher)}):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, weights=weights, **options)
        # Gradient ratios are measured by several passes through one graph.
        first, again = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, again)
        found.append((value.detach(), first))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


@pytest.mark.parametrize("reasoning", ["graph", "non_local"])
def test_an_unweighted_mean_square_is_one_in_double_precision(reasoning):
    torch.manual_seed(0)
    loss = PixelRelationLoss(16, 16, nodes=4, states=8, reasoning=reasoning).double()
    student, teacher = torch.randn(2, 3, 16, 7, 5, dtype=torch.float64)
    ours, theirs = loss.maps(student, teacher)
    torch.testing.assert_close(loss(student, teacher), (ours - theirs).square().mean(), rtol=1e-13, atol=0)


def test_a_fixed_target_stays_where_it_is_while_a_shared_one_moves():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 6, 5), torch.randn(2, 16, 6, 5)
    moved = {}
    for side in ("shared", "fixed"):
        loss = PixelRelationLoss(8, 16, nodes=4, states=8, gain=0.3, teacher_side=side)
        before = loss.maps(student, teacher)[1].clone()
        optimizer = torch.optim.AdamW([p for p in loss.parameters() if p.requires_grad], lr=4e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss(student, teacher).backward()
            optimizer.step()
        moved[side] = (loss.maps(student, teacher)[1] - before).abs().max().item()
    assert moved["fixed"] == 0 and moved["shared"] > 0.1


def test_a_fixed_side_is_zero_for_equal_maps():
    loss = PixelRelationLoss(8, 8, nodes=4, states=8, teacher_side="fixed")
    maps = torch.randn(2, 8, 6, 5)
    assert loss(maps, maps.clone()).item() == pytest.approx(0, abs=1e-10)
