"""Parity with the released code's numbers, in float64 to 1e-10 and in float32 to 2e-6."""

import pytest
import torch
from golden_values import PRECISIONS, Goldens, close, draw, inputs, norm
from torch import nn

from drkd.contracts import DetectorSpec, FeatureLevel
from drkd.losses import GraphReasoningUnit, InstanceLayout, InstanceRelation
from drkd.losses.relation_filter import filter_by_projection
from drkd.methods import ReleasedDRKD

GOLDENS = Goldens("drkd")
CASES = GOLDENS.cases
RENAMED = {
    "conv_state": "state",
    "conv_proj": "projection",
    "gcn.conv1": "node_mixing",
    "gcn.conv2": "state_update",
    "conv_extend": "expansion",
    "blocker": "norm",
    "theta.0": "row",
    "phi.0": "column",
    "g.0": "value",
    "W": "output",
}
FULL = [
    "full_two_stage_base_own_image",
    "full_two_stage_three_levels_b1",
    "full_two_stage_base",
    "full_two_stage_edge_boxes",
    "full_two_stage_nonsquare",
]


def released_state(module, named, prefix=""):
    """The module's own names, from the released ones."""
    state = module.state_dict()
    for name, value in named:
        owner, _, kind = name.removeprefix(prefix).rpartition(".")
        target = f"{RENAMED.get(owner, owner)}.{kind}".removeprefix(".")
        state[target] = value.reshape(state[target].shape)
    return state


@PRECISIONS
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("glore")])
def test_graph_reasoning_unit_equals_released(name, precision):
    case = CASES[name]
    nodes = case["ctor"]["num_mid"]
    unit = GraphReasoningUnit(
        case["ctor"]["num_in"], nodes=nodes, states=2 * nodes, normalise=case["ctor"]["normalize"], norm="batch"
    )
    unit.load_state_dict(released_state(unit, GOLDENS.parameters(case)))
    unit.to(getattr(torch, precision))
    feature = inputs(case["input"]["x"], precision)
    out = unit(feature)
    total = (out * inputs(case["input"]["w"], precision).detach()).sum()
    total.backward()
    golden = case[precision]
    close(total, golden["total"], precision)
    close(out.norm(), golden["terms"]["out_l2"], precision)
    close(out.flatten()[:3], golden["terms"]["out_first"], precision)
    close(out.flatten()[-3:], golden["terms"]["out_last"], precision)
    close(feature.grad.norm(), golden["grad_norm_student"][0], precision)
    close(norm(p.grad for p in unit.parameters()), golden["grad_norm_params"]["unit"], precision)


@PRECISIONS
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("object_relation")])
def test_object_relation_equals_released(name, precision):
    case = CASES[name]
    width = case["ctor"]["in_channels"]
    relation = InstanceRelation(width, embed=width // 2, logit_scale=1.0, mixes=True)
    relation.load_state_dict(released_state(relation, GOLDENS.parameters(case)))
    relation.to(getattr(torch, precision))
    feature = inputs(case["input"]["x"], precision)
    instances = feature.flatten(1)
    layout = InstanceLayout.build([len(instances)], "cpu")
    weights = None
    if "filter" in case:
        weight, bias = (inputs(case["filter"][key], precision).detach()[None] for key in ("weight", "bias"))
        weights = filter_by_projection(instances[None], weight, bias, mask=layout.mask)
    log_matrix = relation(instances, layout=layout, weights=weights)
    out = relation.mix(instances, log_matrix, layout=layout).view_as(feature)
    total = (out * inputs(case["input"]["w"], precision).detach()).sum()
    total.backward()
    golden = case[precision]
    close(total, golden["total"], precision)
    close(out.norm(), golden["terms"]["out_l2"], precision)
    if "relation" in golden["terms"]:
        close(log_matrix.exp().flatten(), torch.tensor(golden["terms"]["relation"]).double().flatten(), "float32")
    close(feature.grad.norm(), golden["grad_norm_student"][0], precision)
    close(norm(p.grad for p in relation.parameters()), golden["grad_norm_params"]["relation"], precision)


class SeededFilter(nn.Module):
    """The goldens' filter matrices: a pair for each image."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, instances, boxes, *, layout, image_size):
        padded = layout.pad(instances)
        weight, bias = torch.zeros_like(padded), torch.zeros_like(padded[:, :, 0])
        for image, count in enumerate(layout.counts):
            weight[image, :count] = draw(self.base + 2 * image, (count, padded.shape[2]), 0.05)
            bias[image, :count] = draw(self.base + 2 * image + 1, (count,), 0.05)
        return filter_by_projection(padded, weight, bias, mask=layout.mask)


def released_method(case, precision, strides, **options):
    levels = tuple(FeatureLevel(f"p{index}", 16, stride) for index, stride in enumerate(strides))
    spec = DetectorSpec(levels, ())
    kd = ReleasedDRKD(spec, spec, nodes=(4, 4, 16), states=(8, 8, 32), **options)
    groups = {
        "student_non_local": [loss.student_unit for loss in kd.pixel_losses],
        "teacher_non_local": [loss.teacher_unit for loss in kd.pixel_losses],
        "non_local_adaptation": [loss.adapter for loss in kd.pixel_losses],
        "student_relation": [loss.student_relation for loss in kd.relation_losses],
        "teacher_relation": [loss.teacher_relation for loss in kd.relation_losses],
        "relation_adaptation": [loss.adapter for loss in kd.relation_losses],
        "for_adaptation": [loss.adapter for loss in kd.instance_losses],
    }
    named = list(GOLDENS.parameters(case))
    for group, modules in groups.items():
        for index, module in enumerate(modules):
            prefix = f"{group}.{index}."
            mine = [(name, value) for name, value in named if name.startswith(prefix)]
            assert mine
            module.load_state_dict(released_state(module, mine, prefix))
    for index, loss in enumerate(kd.relation_losses if "filters" in case else ()):
        loss.student_filter = SeededFilter(case["filters"]["base"][f"student_level{index}"])
        loss.teacher_filter = SeededFilter(case["filters"]["base"][f"teacher_level{index}"])
    return kd.to(getattr(torch, precision)), groups


def run_case(case, precision, strides, **options):
    kd, groups = released_method(case, precision, strides, **options)
    student = {f"p{i}": inputs(entry, precision) for i, entry in enumerate(case["student"])}
    teacher = {f"p{i}": inputs(entry, precision) for i, entry in enumerate(case["teacher"])}
    boxes = [torch.tensor(image, dtype=getattr(torch, precision)).reshape(-1, 4) for image in case["boxes"]]
    size = tuple(strides[0] * cells for cells in student["p0"].shape[2:])
    terms = kd.from_features(student, teacher, boxes, image_size=size)
    if "image 0" in case["roi_source"]:
        # The released defect: every instance is pooled from the first image.
        first = [{k: v[:1].expand_as(v) for k, v in maps.items()} for maps in (student, teacher)]
        defective = kd.from_features(*first, boxes, image_size=size)
        terms = {name: (term if name.startswith("pixel") else defective[name]) for name, term in terms.items()}
    kd.total(terms).backward()
    assert all(tensor.grad is None for tensor in teacher.values())
    return kd, groups, terms, student


@PRECISIONS
@pytest.mark.parametrize("name", FULL)
def test_two_stage_losses_equal_released(name, precision):
    case = CASES[name]
    strides = [4, 8, 16, 32, 64][: len(case["student"])]
    kd, groups, terms, student = run_case(case, precision, strides)
    golden = case[precision]
    families = {"pixel_relation": "kd_glore_loss", "instance_relation": "kd_relation_loss", "instance": "kd_fore_loss"}
    for family, released in families.items():
        mine = {name: term for name, term in terms.items() if name.startswith(f"{family}/")}
        close(kd.total(mine), golden["terms"][released], precision)
    close(kd.total(terms), golden["total"], precision)
    for tensor, expected in zip(student.values(), golden["grad_norm_student"], strict=True):
        close(tensor.grad.norm(), expected, precision)
    for group, modules in groups.items():
        gradients = [parameter.grad for module in modules for parameter in module.parameters()]
        close(norm(gradients), golden["grad_norm_params"][group], precision)


@PRECISIONS
def test_single_stage_relation_equals_released(precision):
    case = CASES["full_single_stage_strides_8_16_32"]
    options = {"pixel_weight": 0.0, "instance_weight": 0.0, "relation_weight": 5e-3, "relation_filter": "off"}
    kd, _, terms, student = run_case(case, precision, [8, 16, 32], **options)
    golden = case[precision]
    close(kd.total(terms), golden["total"], precision)
    for tensor, expected in zip(student.values(), golden["grad_norm_student"], strict=True):
        assert (tensor.grad is None) == (expected is None)
        if expected is not None:
            close(tensor.grad.norm(), expected, precision)
