"""Parity of CrossKD, LD and DeFeat with their authors' numbers, in float64 to 1e-10 and in float32 to 2e-6."""

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from torch.nn import functional

from drkd.losses import (
    align_scale,
    bin_divergence,
    choose_levels,
    decode_offsets,
    decoupled_distance,
    foreground_mask,
    overlap_distance,
    quality_focal_distance,
)

FOLDER = Path(__file__).parent / "goldens"
FILES = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in ("crosskd", "ld", "defeat")}
CASES = {name: {case["case"]: case for case in content["cases"]} for name, content in FILES.items()}
TOLERANCE = {"float64": 1e-10, "float32": 2e-6}
PRECISIONS = pytest.mark.parametrize("precision", ["float64", "float32"])


def cases(name, prefix=""):
    return pytest.mark.parametrize("case", [case for key, case in CASES[name].items() if key.startswith(prefix)])


def draw(entry, precision):
    values = numpy.random.RandomState(entry["seed"]).standard_normal(entry["shape"]) * entry.get("scale", 1.0)
    return torch.from_numpy(values.astype(numpy.float32)).to(getattr(torch, precision)).requires_grad_()


def close(value, expected, precision):
    torch.testing.assert_close(
        torch.as_tensor(value).detach().double(),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=TOLERANCE[precision],
        atol=1e-12,
    )


def check_gradients(case, precision, students, teachers=()):
    for tensor, expected in zip(students, case[precision]["grad_norm_student"], strict=True):
        close(tensor.grad.double().norm(), expected, precision)
    assert all(tensor.grad is None for tensor in teachers)


def rows(maps, width):
    """(B, A * width, h, w) to (B, h * w * A, width)."""
    return maps.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def grid_anchors(height, width, stride, count, precision):
    sides = torch.tensor(
        [[4.0, 4.0], [4 * math.sqrt(2), 2 * math.sqrt(2)], [2 * math.sqrt(2), 4 * math.sqrt(2)]], dtype=torch.float64
    )
    halves = sides[:count] * stride / 2
    y, x = torch.meshgrid(torch.arange(height) * stride, torch.arange(width) * stride, indexing="ij")
    centres = torch.stack([x, y], dim=-1).double().view(-1, 1, 2)
    return torch.cat([centres - halves, centres + halves], dim=-1).view(-1, 4).float().to(getattr(torch, precision))


@PRECISIONS
@cases("crosskd", "crosskd_retina")
def test_crosskd(case, precision):
    run_crosskd(case, precision, zero_every=None)


@PRECISIONS
@pytest.mark.parametrize(
    ("name", "zero_every"), [("crosskd_zero_label_weights_nonsquare", 4), ("crosskd_all_label_weights_zero", 1)]
)
def test_crosskd_with_weights(name, zero_every, precision):
    run_crosskd(CASES["crosskd"][name], precision, zero_every=zero_every)


def run_crosskd(case, precision, *, zero_every):
    golden, anchors_per_cell = case[precision], case["anchors_per_cell"]
    normaliser = torch.tensor(case["avg_factor"], dtype=getattr(torch, precision))
    students, teachers, total = {"cls": [], "reg": []}, [], 0
    for level, (ours, theirs) in enumerate(zip(case["student_reused"], case["teacher"], strict=True)):
        student, teacher = ({key: draw(entry[key], precision) for key in ("cls", "reg")} for entry in (ours, theirs))
        for key in ("cls", "reg"):
            students[key].append(student[key])
            teachers.append(teacher[key])
        height, width = student["cls"].shape[-2:]
        anchors = grid_anchors(height, width, case["strides"][level], anchors_per_cell, precision)
        logits = [rows(entry["cls"], case["num_classes"]) for entry in (student, teacher)]
        boxes = [decode_offsets(rows(entry["reg"], 4), anchors) for entry in (student, teacher)]
        weight = torch.ones(logits[0].shape[:2], dtype=normaliser.dtype)
        if zero_every:
            weight.view(-1)[::zero_every] = 0
        classes = quality_focal_distance(*logits, weight, normaliser=normaliser)
        overlap = overlap_distance(*boxes, weight * logits[1].sigmoid().amax(dim=-1), normaliser=normaliser)
        close(classes, golden["terms"][f"loss_cls_kd_{level}"], precision)
        close(overlap, golden["terms"][f"loss_reg_kd_{level}"], precision)
        total = total + classes + overlap
    close(total, golden["total"], precision)
    total.backward()
    check_gradients(case, precision, [*students["cls"], *students["reg"]], teachers)


@PRECISIONS
def test_align_scale(precision):
    case = CASES["crosskd"]["crosskd_align_scale"]
    student, teacher = draw(case["student"][0], precision), draw(case["teacher"][0], precision)
    out = align_scale(student, teacher)
    total = (out * draw(case["w"], precision).detach()).sum()
    total.backward()
    close(total, case[precision]["total"], precision)
    close(out.norm(), case[precision]["terms"]["out_l2"], precision)
    close(out.flatten()[:3], case[precision]["terms"]["out_first"], precision)
    check_gradients(case, precision, [student], [teacher])


@PRECISIONS
@pytest.mark.parametrize("name", [name for name, case in CASES["ld"].items() if "call" in case])
def test_ld_rows(name, precision):
    case = CASES["ld"][name]
    student, teacher = draw(case["student"][0], precision), draw(case["teacher"][0], precision)
    call, ctor = case["call"], case["ctor"]
    assert call["weight"] is None and call["avg_factor"] is None
    if call["reduction_override"] == "none":
        for row, expected in enumerate(case[precision]["terms"]["loss"]):
            close(bin_divergence(student[row], teacher[row], temperature=ctor["T"]), expected, precision)
        total = ctor["loss_weight"] * bin_divergence(student, teacher, temperature=ctor["T"], normaliser=1.0)
    else:
        total = ctor["loss_weight"] * bin_divergence(student, teacher, temperature=ctor["T"])
    close(total, case[precision]["total"], precision)
    total.backward()
    check_gradients(case, precision, [student], [teacher])


@PRECISIONS
@cases("ld", "ld_head_maps")
def test_ld_head(case, precision):
    """As the method has it: every anchor counts, with weight 0 where the authors pick none."""
    golden, weights, temperatures = case[precision], case["ctor"]["loss_weight"], case["ctor"]["T"]
    (box_s, logits_s), (box_t, logits_t) = ([draw(e, precision) for e in case[side]] for side in ("student", "teacher"))
    bins = [rows(entry, case["reg_max"] + 1).unflatten(1, (-1, 4)) for entry in (box_s, box_t)]
    logits = [rows(entry, case["num_classes"]) for entry in (logits_s, logits_t)]
    positive, value = torch.zeros(2, *logits[0].shape[:2], dtype=box_s.dtype)
    positive.view(-1)[case["positive_flat_index_in_N_H_W"]] = 1
    for index, amount in case["vlr_flat_index_and_value"]:
        value.view(-1)[index] = amount
    confidence = positive * logits[0].detach().sigmoid().amax(dim=-1)
    close(confidence.sum(), golden["aux"]["weight_targets_sum"], precision)

    def sides(weight, key, normaliser):
        weight = weight.unsqueeze(-1).expand(*weight.shape, 4)
        return weights[key] * bin_divergence(*bins, weight, temperature=temperatures[key], normaliser=normaliser)

    terms = {
        "loss_ld": sides(confidence, "ld", 4.0),
        "loss_ld_vlr": sides(value, "ld_vlr", 16.0),
        "loss_kd": weights["kd"]
        * bin_divergence(*logits, positive, temperature=temperatures["kd"], normaliser=positive.sum()),
    }
    for name, term in terms.items():
        close(term, golden["terms"][name], precision)
    total = sum(terms.values())
    close(total, golden["total"], precision)
    total.backward()
    check_gradients(case, precision, [box_s, logits_s], [box_t, logits_t])


@PRECISIONS
@cases("defeat", "defeat_neck")
def test_defeat_neck(case, precision):
    golden, ctor = case[precision], case["ctor"]["kd_cfg"]
    parameters = {
        name: draw({"seed": seed, "shape": shape, "scale": 0.05}, precision)
        for name, shape, seed in FILES["defeat"]["param_sets"][case["params"]]
        if name.startswith("neck")
    }
    students, teachers = ([draw(entry, precision) for entry in case[side][:5]] for side in ("student", "teacher"))
    boxes = [torch.tensor(own).view(-1, 4) for own in case["boxes"]]
    level_of = choose_levels(torch.cat(boxes), case["ctor"]["strides"])
    fronts, backs = [], []
    for level, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        size = (student.shape[2], student.shape[3])
        mask = foreground_mask(boxes, size, image_size=tuple(case["img_hw"]), counted=level_of == level)
        assert mask.sum(dim=(1, 2)).tolist() == golden["aux"]["neck_mask_ones"][level]
        if level in (1, 2):
            drawn = ["/".join("".join(map(str, row)) for row in own.int().tolist()) for own in mask]
            assert drawn == golden["aux"]["neck_mask_rows_levels1_2"][level - 1]
        names = [f"neck_adapt.{level}.0.{kind}" for kind in ("weight", "bias")]
        adapted = functional.conv2d(student, *(parameters[name] for name in names), padding=1)
        front, back = decoupled_distance(adapted, teacher, mask)
        fronts.append(front)
        backs.append(back)
    front = ctor["hint_neck_w"] * sum(fronts) / len(fronts)
    back = ctor["hint_neck_back_w"] * sum(backs) / len(backs)
    close(front, golden["terms"]["losskd_neck"], precision)
    close(back, golden["terms"]["losskd_neck_back"], precision)
    (front + back).backward()
    for tensor, expected in zip(students, golden["grad_norm_student"], strict=False):
        close(tensor.grad.double().norm(), expected, precision)
    assert all(tensor.grad is None for tensor in teachers)
    squared = sum(parameter.grad.double().square().sum() for parameter in parameters.values())
    close(squared.sqrt(), golden["grad_norm_params"]["neck_adapt"], precision)
