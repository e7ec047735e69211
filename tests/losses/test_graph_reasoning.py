"""The graph reasoning unit in one product equals the unit layer by layer, in value and in every gradient."""

import pytest
import torch

from drkd.losses import GraphReasoningUnit, PixelRelationLoss


def layer_by_layer(unit, feature):
    states, assignment = unit.state(feature).flatten(2), unit.projection(feature).flatten(2)
    nodes = states @ assignment.transpose(1, 2) / states.shape[2]
    nodes = torch.relu(nodes + unit.node_mixing(nodes))
    mixed = unit.state_update.weight @ nodes @ assignment
    relations = unit.norm(unit.expansion(mixed.unflatten(2, feature.shape[-2:])))
    return feature + relations if unit.residual else relations


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("cells", [(9, 13), (1, 1)])
@pytest.mark.parametrize("residual", [True, False])
def test_one_product_equals_the_layers(dtype, tolerance, channels_last, cells, residual):
    torch.manual_seed(0)
    unit = GraphReasoningUnit(64, nodes=8, states=16, gain=0.3, residual=residual).to(dtype)
    torch.nn.init.normal_(unit.norm.bias)
    feature, weight = torch.randn(2, 64, *cells, dtype=dtype) + 1, torch.randn(2, 64, *cells, dtype=dtype)
    if channels_last:
        feature = feature.contiguous(memory_format=torch.channels_last)
    feature.requires_grad_()
    found = []
    for compute in (layer_by_layer, lambda unit, feature: unit(feature)):
        unit.zero_grad()
        feature.grad = None
        related = compute(unit, feature)
        (related * weight).sum().backward()
        found.append([related.detach(), feature.grad, *(parameter.grad for parameter in unit.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=10 * tolerance, atol=tolerance * (1 + float(expected.abs().max()))
        )
    if channels_last and residual:
        assert related.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", ["batch", "none", "group"])
def test_sums_over_a_large_map_stay_in_range_under_float16(norm):
    torch.manual_seed(0)
    unit = GraphReasoningUnit(64, nodes=16, states=32, normalise=False, norm=norm)
    # As loud as maps of detectors are.
    feature = 13 * torch.randn(2, 64, 50, 84)
    plain = unit(feature)
    with torch.autocast("cpu", dtype=torch.float16):
        half = unit(feature.half())
    assert plain.abs().max() > 65504 or norm != "none", "the case is of no use with sums so small"
    torch.testing.assert_close(half, plain, rtol=0.05, atol=0.05 * float(plain.abs().max()))


@pytest.mark.parametrize("reasoning", ["graph", "non_local"])
@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_a_gain_says_how_loud_the_relations_are_with_any_norm(norm, reasoning):
    feature, added = torch.randn(2, 16, 5, 7), []
    for gain in (1.0, 0.3):
        torch.manual_seed(0)
        loss = PixelRelationLoss(16, 16, reasoning=reasoning, nodes=4, states=8, norm=norm, gain=gain)
        added.append(loss.student_unit(feature) - feature)
    assert added[0].abs().max() > 0.01
    torch.testing.assert_close(added[1], 0.3 * added[0], rtol=1e-4, atol=1e-6)
