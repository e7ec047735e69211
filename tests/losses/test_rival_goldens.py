"""Parity of the rival methods' losses with their authors' (or the named port's) code, see goldens/README.md."""

import numpy
import pytest
import torch
from golden_values import PRECISIONS, Goldens, close, inputs, load_renamed, norm

from drkd.losses import (
    ChannelWiseLoss,
    FineGrainedLoss,
    FocalGlobalLoss,
    MaskedGenerationLoss,
    NonLocalBlock,
    NonLocalLoss,
    PearsonLoss,
    foreground_weights,
)

CWD, FGD, FGFI, FKD, MGD, PKD = (Goldens(name) for name in ("cwd", "fgd", "fgfi", "fbkd", "mgd", "pkd"))


def maps(case, precision):
    return [[inputs(entry, precision) for entry in case[role]] for role in ("student", "teacher")]


def box_lists(case, precision):
    return [torch.tensor(image, dtype=getattr(torch, precision)).reshape(-1, 4) for image in case["boxes"]]


def check(total, case, precision, student, teacher):
    total.backward()
    close(total, case[precision]["total"], precision)
    for feature, expected in zip(student, case[precision]["grad_norm_student"], strict=True):
        close(feature.grad.norm(), expected, precision)
    # The originals let gradient through to the teacher's map; ours never do.
    assert all(feature.grad is None for feature in teacher)


def mask_rows(mask):
    return ["/".join("".join("1" if cell else "0" for cell in row) for row in image[0]) for image in mask.tolist()]


@PRECISIONS
@pytest.mark.parametrize("name", ["cwd_tau1_w10_pyramid", "cwd_tau05_1x1_and_large_logits"])
def test_channel_wise(name, precision):
    case = CWD.cases[name]
    student, teacher = maps(case, precision)
    channels = student[0].shape[1]
    loss = ChannelWiseLoss(channels, channels, temperature=case["ctor"]["tau"])
    values = [case["ctor"]["loss_weight"] * loss(*pair) for pair in zip(student, teacher, strict=True)]
    for index, value in enumerate(values):
        close(value, case[precision]["terms"][f"level{index}"], precision)
    check(sum(values), case, precision, student, teacher)


@PRECISIONS
def test_channel_wise_of_equal_maps(precision):
    (student,), (teacher,) = maps(CWD.cases["cwd_identical"], precision)
    value = ChannelWiseLoss(16, 16)(student, teacher)
    value.backward()
    assert value.item() == 0
    assert student.grad.norm() < {"float64": 1e-15, "float32": 1e-7}[precision]


@PRECISIONS
def test_channel_wise_has_the_cross_entropys_gradient(precision):
    # This port leaves the teacher's entropy in its value, which no gradient sees; the paper's divergence does not.
    case = CWD.cases["cwd_pppppM_cross_entropy_variant"]
    (student,), (teacher,) = maps(case, precision)
    (5.0 * ChannelWiseLoss(16, 16, temperature=2.0)(student, teacher)).backward()
    close(student.grad.norm(), case[precision]["grad_norm_student"][0], precision)


@PRECISIONS
def test_pearson_pyramid(precision):
    case = PKD.cases["pkd_w6_pyramid"]
    student, teacher = maps(case, precision)
    loss = PearsonLoss(16, 16)
    values = [loss(*pair) for pair in zip(student, teacher, strict=True)]
    for index, value in enumerate(values):
        close(value, case[precision]["terms"][f"level{index}_unweighted"], precision)
    check(6 * sum(values), case, precision, student, teacher)


@PRECISIONS
def test_pearson_with_the_teacher_resized(precision):
    # drkd resamples the student to the teacher's size; the case has it the other way round, so it is done here first.
    case = PKD.cases["pkd_resize_teacher_down"]
    student, (whole,) = maps(case, precision)
    teacher = [torch.nn.functional.interpolate(whole.detach(), (6, 10), mode="bilinear", align_corners=False)]
    check(10 * PearsonLoss(16, 16)(student[0], teacher[0]), case, precision, student, teacher)


@PRECISIONS
def test_pearson_of_a_constant_channel(precision):
    # The value is the released one. Its gradient (norm 10874, all of it at the constant channel) is not followed.
    case = PKD.cases["pkd_constant_channel"]
    (student,), (teacher,) = maps(case, precision)
    with torch.no_grad():
        student[:, 3] = 0.5
    value = PearsonLoss(16, 16)(student, teacher)
    value.backward()
    close(value, case[precision]["total"], precision)
    assert student.grad.norm() < 10


CONTEXT = {
    "conv_mask_{}": "{}_context.position",
    "channel_add_conv_{}.0": "{}_context.transform.0",
    "channel_add_conv_{}.1": "{}_context.transform.1",
    "channel_add_conv_{}.3": "{}_context.transform.3",
}


@PRECISIONS
@pytest.mark.parametrize("name", list(FGD.cases))
def test_focal_global(name, precision):
    case = FGD.cases[name]
    (student,), (teacher,) = maps(case, precision)
    names = ("alpha", "beta", "gamma", "lambda")
    alpha, beta, gamma, lambda_ = (case["ctor"][f"{weight}_fgd"] for weight in names)
    loss = FocalGlobalLoss(
        16,
        16,
        foreground_weight=alpha,
        background_weight=beta,
        attention_weight=gamma,
        relation_weight=lambda_,
        temperature=case["ctor"]["temp"],
    )
    renamed = {
        old.format(letter): new.format(side)
        for old, new in CONTEXT.items()
        for letter, side in (("s", "student"), ("t", "teacher"))
    }
    load_renamed(loss, FGD.parameters(case), renamed)
    loss.to(getattr(torch, precision))
    # The original scales each image's boxes by its unpadded size, which shifts them on the padded map. drkd scales by
    # the padded size: the shift is made here.
    height, width = (max(sides) for sides in zip(*case["img_shape_hw"], strict=True))
    boxes = [
        image * image.new_tensor([width / w, height / h] * 2)
        for image, (h, w) in zip(box_lists(case, precision), case["img_shape_hw"], strict=True)
    ]
    golden = case[precision]
    parts = loss.parts(student, teacher, boxes, image_size=(height, width))
    for part, term in zip(parts, ("fg", "bg", "mask", "rela"), strict=True):
        close(part, golden["terms"][f"{term}_unweighted"], precision)
    check(loss(student, teacher, boxes, image_size=(height, width)), case, precision, [student], [teacher])
    close(norm(p.grad for p in loss.parameters()), golden["grad_norm_params"]["all"], precision)
    foreground, background = foreground_weights(boxes, teacher, image_size=(height, width))
    close(foreground.sum(dim=(1, 2, 3)), golden["aux"]["mask_fg_sum"], precision)
    close(background.sum(dim=(1, 2, 3)), golden["aux"]["mask_bg_sum"], precision)
    assert foreground.ne(0).sum(dim=(1, 2, 3)).tolist() == golden["aux"]["mask_fg_nonzero"]
    assert background.ne(0).sum(dim=(1, 2, 3)).tolist() == golden["aux"]["mask_bg_nonzero"]


@PRECISIONS
@pytest.mark.parametrize("name", list(MGD.cases))
def test_masked_generation(name, precision):
    case = MGD.cases[name]
    (student,), (teacher,) = maps(case, precision)
    loss = MaskedGenerationLoss(16, 16, masked_share=case["ctor"]["lambda_mgd"])
    renamed = {"generation.0": "generator.0", "generation.2": "generator.2"}
    load_renamed(loss, MGD.parameters(case), renamed)
    loss.to(getattr(torch, precision))
    noise = None
    if "numpy_seed" in case["mask"]:
        random = numpy.random.RandomState(case["mask"]["numpy_seed"])
        shape = (student.shape[0], 1, *student.shape[2:])
        noise = torch.from_numpy(random.random_sample(shape).astype(numpy.float32))
    torch.manual_seed(case["mask"].get("torch_manual_seed", 0))
    value = loss(student, teacher, noise=noise)
    check(case["ctor"]["alpha_mgd"] * value, case, precision, [student], [teacher])
    close(value, case[precision]["terms"]["dis_loss_unweighted"], precision)
    close(norm(p.grad for p in loss.parameters()), case[precision]["grad_norm_params"]["generation"], precision)


def non_local_names(side, block, *, sub_sample):
    inner = ".0.0.conv" if sub_sample else ".conv"
    return {
        f"{side}_connector.{side}_non_local.{old}": f"{block}.{new}"
        for old, new in {
            f"g{inner}": "value",
            f"phi{'.0' + inner[2:] if sub_sample else inner}": "phi",
            "theta.conv": "theta",
            "conv_out.conv": "output",
            "conv_out.bn": "norm",
        }.items()
    }


@PRECISIONS
@pytest.mark.parametrize("name", FKD.named("fbkd"))
def test_non_local_loss(name, precision):
    case = FKD.cases[name]
    options = case["ctor"]["connectors"]
    # The port pools twice: once by 2 in its base class, once more by its own stride.
    pool = 2 * options["maxpool_stride"] if options["sub_sample"] else 1
    weights = {}
    if case["ctor"]["loss"]:
        weights = {f"{part}_weight": 1.0 for part in ("feature", "channel", "spatial", "relation")}
    loss = NonLocalLoss(16, 16, pool=pool, reduction=options["reduction"], norm="batch", **weights)
    renamed = {
        "student_connector.channel_wise_adaptation": "channel_adapter",
        "student_connector.spatial_wise_adaptation": "spatial_adapter",
        "student_connector.adaptation_layers": "feature_adapter",
        "student_connector.non_local_adaptation": "relation_adapter",
        **non_local_names("student", "student_block", sub_sample=options["sub_sample"]),
        **non_local_names("teacher", "teacher_block", sub_sample=options["sub_sample"]),
    }
    load_renamed(loss, FKD.parameters(case), renamed)
    loss.to(getattr(torch, precision))
    (student,), (teacher,) = maps(case, precision)
    golden = case[precision]
    for part, term in zip(loss.parts(student, teacher), ("feat", "channel", "spatial", "nonlocal"), strict=True):
        close(part, golden["terms"][f"{term}_unweighted"], precision)
    total = case["ctor"]["loss"].get("loss_weight", 1.0) * loss(student, teacher)
    check(total, case, precision, [student], [teacher])
    groups = {True: [], False: []}
    for parameter_name, parameter in loss.named_parameters():
        groups[parameter_name.startswith("teacher")].append(parameter.grad)
    close(norm(groups[False]), golden["grad_norm_params"]["student_connector"], precision)
    close(norm(groups[True]), golden["grad_norm_params"]["teacher_connector"], precision)


@PRECISIONS
@pytest.mark.parametrize("name", FKD.named("nld_block"))
def test_non_local_block(name, precision):
    case = FKD.cases[name]
    options = case["ctor"]
    named = list(FKD.parameters(case))
    adapter = torch.nn.Conv2d(16, 16, 1)
    load_renamed(torch.nn.ModuleDict({"a": adapter}), named, {"non_local_adaptation": "a"})
    blocks = {}
    for side in ("student", "teacher"):
        block = NonLocalBlock(
            16,
            inner_channels=options.get("inter_channels", 8),
            pool=options.get("downsample_stride", 2),
            norm="batch",
        )
        old = {"g.0": "value", "phi.0": "phi", "theta": "theta", "W.0": "output", "W.1": "norm"}
        prefix = f"{side}_non_local."
        # Batch norm takes the bias of W away again, so that block has none.
        load_renamed(block, named, {prefix + key: value for key, value in old.items()}, skip=(f"{prefix}W.0.bias",))
        blocks[side] = block.to(getattr(torch, precision))
    adapter.to(getattr(torch, precision))
    (student,), (teacher,) = maps(case, precision)
    total = (adapter(blocks["student"](student)) - blocks["teacher"](teacher.detach())).norm()
    check(total, case, precision, [student], [teacher])
    for side, block in blocks.items():
        expected = case[precision]["grad_norm_params"][f"{side}_non_local"]
        close(norm(p.grad for p in block.parameters()), expected, precision)


@PRECISIONS
@pytest.mark.parametrize("name", ["fgfi_base", "fgfi_nonsquare_small_scales"])
def test_fine_grained_on_one_map(name, precision):
    case = FGFI.cases[name]
    (student,), (teacher,) = maps(case, precision)
    boxes = box_lists(case, precision)
    size = tuple(16 * cells for cells in case["map_hw"])
    loss = FineGrainedLoss(
        16, 16, scales=case["ctor"]["scales"], ratios=case["ctor"]["ratios"], anchor_style="inclusive", activation=True
    )
    load_renamed(loss, FGFI.parameters(case), {"stu_feature_adap.0": "align.adapter"})
    loss.to(getattr(torch, precision))
    golden = case[precision]
    assert mask_rows(loss.mask(teacher, boxes, image_size=size)) == golden["aux"]["mask_rows"]
    value = case["ctor"]["imitation_loss_weigth"] * loss(student, teacher, boxes, image_size=size)
    check(value, case, precision, [student], [teacher])
    close(norm(p.grad for p in loss.parameters()), golden["grad_norm_params"]["adap"], precision)


@PRECISIONS
def test_fine_grained_without_boxes(precision):
    # The original divides 0 by 0 here (every number of the case is NaN); drkd gives 0 and zero gradients.
    case = FGFI.cases["fgfi_only_no_box_images"]
    assert case[precision]["total"] == "nan"
    (student,), (teacher,) = maps(case, precision)
    loss = FineGrainedLoss(16, 16, anchor_style="inclusive", activation=True).to(getattr(torch, precision))
    value = loss(student, teacher, box_lists(case, precision), image_size=(128, 128))
    value.backward()
    assert value.item() == 0 and student.grad.eq(0).all()


@PRECISIONS
@pytest.mark.parametrize("name", FGFI.named("fgfi_pyramid"))
def test_fine_grained_on_a_pyramid(name, precision):
    case = FGFI.cases[name]
    student, teacher = maps(case, precision)
    boxes = box_lists(case, precision)
    golden = case[precision]
    named = list(FGFI.parameters(case))
    bounds = [0.0, 112.0, 224.0, 448.0, 896.0, float("inf")]
    values, masks, losses = [], [], []
    for level, pair in enumerate(zip(student, teacher, strict=True)):
        loss = FineGrainedLoss(16, 16, box_sizes=(bounds[level], bounds[level + 1]))
        load_renamed(loss, named, {f"neck_adapt.{level}.0": "align.adapter"})
        losses.append(loss.to(getattr(torch, precision)))
        masks.append(loss.mask(pair[1], boxes, image_size=(128, 128)))
        values.append(loss(*pair, boxes, image_size=(128, 128)))
    assert [mask.sum(dim=(1, 2, 3)).tolist() for mask in masks] == golden["aux"]["neck_mask_ones"]
    assert [mask_rows(mask) for mask in masks[1:3]] == golden["aux"]["neck_mask_rows_levels1_2"]
    # That port divides by the channels too, takes the mean over the levels and weighs by 3.
    check(3 * sum(values) / len(values) / 16, case, precision, student, teacher)
    gradients = [parameter.grad for loss in losses for parameter in loss.parameters()]
    close(norm(gradients), golden["grad_norm_params"]["neck_adapt"], precision)
