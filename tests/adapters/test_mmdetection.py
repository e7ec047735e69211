"""MMDetection's checkpoints: every name is understood, and features and predictions are those of its own arithmetic."""

import math

import pytest
import torch
from mmdetection_states import (
    STAGES,
    backbone_names,
    draw_state,
    faster_rcnn_names,
    neck_names,
    pyramid_features,
    retinanet_names,
)
from torch.nn import functional

from drkd.adapters import MMDetectionBuilder, RetinaNetBuilder
from drkd.adapters.mmdetection import fill_from_mmdetection, read_architecture
from drkd.contracts import DrkdError, NotApplicableError
from drkd.engine.distiller import Distiller
from drkd.methods import DRKD, CrossKD, LogitKD
from drkd.recipes.evaluation import measure_detector

FEATURES = frozenset({"features"})
BLOCKS = (1, 2, 1, 1)
WIDTHS = (256, 512, 1024, 2048)
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


def small_retinanet(*, extra=(2048, 64), **options):
    """A ResNeXt of one or two blocks a stage, 64 channels in the pyramid."""
    return (
        backbone_names(BLOCKS, groups=8, base_width=4, **options)
        | neck_names(WIDTHS[1:], channels=64, extra=extra)
        | retinanet_names(3, channels=64)
    )


def small_faster_rcnn(**options):
    return (
        backbone_names(BLOCKS, groups=8, base_width=4, **options)
        | neck_names(WIDTHS, channels=64)
        | faster_rcnn_names(3, channels=64)
    )


def save(state, path, **meta):
    torch.save({"meta": meta, "state_dict": state}, path)
    return str(path)


def as_mmdetection_sees(batch):
    """Normalised in 0..255, then padded with zeros."""
    images = torch.zeros_like(batch.images)
    for image, place, (height, width) in zip(batch.images, images, batch.sizes, strict=True):
        place[:, :height, :width] = (255 * image[:, :height, :width] - MEAN) / STD
    return images.double()


def features_of(builder, batch, classes=("cat", "dog", "cup")):
    detector = builder.build(classes).double()
    moved = type(batch)(batch.images.double(), batch.sizes, batch.original_sizes, batch.targets, batch.image_ids)
    return detector, [level.tensor for level in detector(moved, want=FEATURES).features]


def close(ours, theirs):
    for level, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(level.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("depth", "groups", "width", "family"),
    [(50, 1, 64, "retinanet"), (101, 64, 4, "retinanet"), (50, 1, 64, "faster_rcnn"), (101, 32, 4, "faster_rcnn")],
)
def test_every_name_of_the_full_sized_detectors_is_understood(depth, groups, width, family):
    names = backbone_names(STAGES[depth], groups=groups, base_width=width)
    if family == "retinanet":
        names |= neck_names(WIDTHS[1:], extra=(2048, 256)) | retinanet_names(80)
    else:
        names |= neck_names(WIDTHS) | faster_rcnn_names(80)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in names.items()}
        plan = read_architecture(state, "teacher.pth")
        assert (plan.family, plan.classes, plan.groups, plan.group_width) == (family, 80, groups, width)
        builder = MMDetectionBuilder(path="teacher.pth")
        model = builder._detector(plan)
        fill_from_mmdetection(model, builder._prepare(state), plan, "teacher.pth")
    published = {(50, "retinanet"): 37.74e6, (50, "faster_rcnn"): 41.53e6}.get((depth, family))
    if published:
        # As MMDetection prints them, without the frozen stem and first stage; torchvision's box head has four rows
        # of codes more, the background's.
        count = sum(parameter.numel() for parameter in model.parameters()) - (family == "faster_rcnn") * 4 * 1025
        body = model.backbone.body
        count -= sum(p.numel() for part in (body.conv1, body.bn1, body.layer1) for p in part.parameters())
        assert count == pytest.approx(published, rel=2e-4)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("extra", ["input", "output"])
def test_features_of_a_retinanet_equal_mmdetections_arithmetic(extra, relu, make_batch, tmp_path):
    state = draw_state(small_retinanet(extra=(2048 if extra == "input" else 64, 64)))
    batch = make_batch([(70, 90), (64, 96)])
    path = save(state, tmp_path / "a.pth", CLASSES=("cat", "dog", "cup"))
    builder = MMDetectionBuilder(path=path, relu_before_extra_convs=relu)
    detector, found = features_of(builder, batch)
    expected = pyramid_features(
        state, as_mmdetection_sees(batch), BLOCKS, groups=8, stages=(2, 3, 4), extra=extra, relu_before_extra=relu
    )
    close(found, expected)
    assert [level.stride for level in detector.spec.levels] == [8, 16, 32, 64, 128]


def test_features_of_a_faster_rcnn_equal_mmdetections_arithmetic(make_batch, tmp_path):
    state = draw_state(small_faster_rcnn())
    batch = make_batch([(70, 90), (64, 96)])
    path = save(state, tmp_path / "a.pth", dataset_meta={"classes": ("cat", "dog", "cup")})
    _, found = features_of(MMDetectionBuilder(path=path), batch)
    close(found, pyramid_features(state, as_mmdetection_sees(batch), BLOCKS, groups=8, stages=(1, 2, 3, 4)))


def test_a_caffe_backbone_takes_bgr_and_strides_first(make_batch, tmp_path):
    state = draw_state(small_faster_rcnn())
    # Images of hundreds instead of units.
    state["backbone.conv1.weight"] /= 58
    batch = make_batch([(64, 96)])
    builder = MMDetectionBuilder(path=save(state, tmp_path / "a.pth"), part="features", style="caffe")
    detector, found = features_of(builder, batch)
    images = (255 * batch.images.double() - MEAN.double()).flip(1)
    close(found, pyramid_features(state, images, BLOCKS, groups=8, stages=(1, 2, 3, 4), caffe=True))
    assert detector.spec.family == "pyramid"


def deform_by_sampling(state, name, x, stride):
    """A deformable convolution by bilinear sampling: channel 2k moves tap k down, 2k + 1 right."""
    where = functional.conv2d(
        x, state[f"{name}.conv_offset.weight"], state[f"{name}.conv_offset.bias"], stride=stride, padding=1
    )
    weight = state[f"{name}.weight"]
    groups = x.shape[1] // weight.shape[1]
    rows = torch.arange(where.shape[2], dtype=x.dtype).view(-1, 1) * stride - 1
    columns = torch.arange(where.shape[3], dtype=x.dtype).view(1, -1) * stride - 1
    out = 0.0
    for tap in range(9):
        y, z = rows + tap // 3 + where[:, 2 * tap], columns + tap % 3 + where[:, 2 * tap + 1]
        grid = torch.stack([2 * z / (x.shape[3] - 1) - 1, 2 * y / (x.shape[2] - 1) - 1], dim=-1)
        sample = functional.grid_sample(x, grid, align_corners=True)
        if where.shape[1] == 27:
            sample = sample * where[:, 18 + tap : 19 + tap].sigmoid()
        out = out + functional.conv2d(sample, weight[:, :, tap // 3, tap % 3, None, None], groups=groups)
    return out


@pytest.mark.parametrize("modulated", [False, True])
def test_the_papers_two_stage_teacher_gives_features_though_its_heads_are_others(modulated, make_batch, tmp_path):
    names = small_faster_rcnn(dcn=(2, 3, 4), modulated=modulated)
    # Cascade Mask R-CNN has three box heads and a mask head.
    names = {key: shape for key, shape in names.items() if "bbox_head" not in key}
    names |= {f"roi_head.bbox_head.{stage}.fc_reg.weight": (4, 1024) for stage in range(3)}
    names["roi_head.mask_head.0.convs.0.conv.weight"] = (64, 64, 3, 3)
    state = draw_state(names)
    batch = make_batch([(64, 96)])
    path = save(state, tmp_path / "a.pth")
    with pytest.raises(DrkdError, match=r"rpn_head.*part: features"):
        MMDetectionBuilder(path=path).build(("cat",))
    teacher, found = features_of(MMDetectionBuilder(path=path, part="features"), batch)
    stages, images = (1, 2, 3, 4), as_mmdetection_sees(batch)
    close(found, pyramid_features(state, images, BLOCKS, groups=8, stages=stages, deform=deform_by_sampling))
    with pytest.raises(ValueError, match="no heads"):
        teacher(batch, want=frozenset({"losses"}))
    with pytest.raises(DrkdError, match="no heads"):
        teacher.detect(batch)


@pytest.mark.parametrize("zipped", [True, False])
def test_names_and_file_format_of_early_releases_are_read(zipped, make_batch, tmp_path):
    """Deformable convolutions had their offsets beside them, and torch wrote no zip files."""
    state = draw_state(small_faster_rcnn(dcn=(2, 3, 4), modulated=False))
    old = {name.replace(".conv2.conv_offset.", ".conv2_offset."): value for name, value in state.items()}
    assert sum("conv2_offset" in name for name in old) > 1
    torch.save({"state_dict": old}, tmp_path / "old.pth", _use_new_zipfile_serialization=zipped)
    batch = make_batch([(64, 96)])
    read = [
        features_of(MMDetectionBuilder(path=path, part="features"), batch)[1]
        for path in (save(state, tmp_path / "new.pth"), str(tmp_path / "old.pth"))
    ]
    assert all(torch.equal(new, old) for new, old in zip(*read, strict=True))


def test_a_teacher_read_from_mmdetection_teaches(make_batch, tmp_path, builder):
    path = save(draw_state(small_retinanet()), tmp_path / "a.pth")
    teacher = MMDetectionBuilder(path=path, part="features").build(("cat", "dog", "cup"))
    losses = Distiller(builder.build(("cat", "dog", "cup")), teacher, DRKD)(make_batch([(64, 96), (64, 96)]))
    assert losses["kd/pixel_relation"] > 0 and torch.isfinite(losses["kd/instance"])


def test_anchors_have_exact_sides_and_strides(make_batch, tmp_path):
    path = save(draw_state(small_retinanet()), tmp_path / "a.pth")
    detector = MMDetectionBuilder(path=path, classes=("cat", "dog", "cup")).build(("cat", "dog", "cup"))
    out = detector(make_batch([(160, 160)]), want=frozenset({"predictions"})).predictions
    # 160 px: 20, 10, 5, 3 and 2 cells a side; torchvision would put those of the coarsest 80 px apart, not 128.
    assert out.counts == tuple(9 * cells**2 for cells in (20, 10, 5, 3, 2))
    expected = []
    for stride, cells in zip((8, 16, 32, 64, 128), (20, 10, 5, 3, 2), strict=True):
        for row in range(cells):
            for column in range(cells):
                for ratio in (0.5, 1.0, 2.0):
                    for octave in range(3):
                        side = 4 * stride * 2 ** (octave / 3)
                        w, h = side / math.sqrt(ratio) / 2, side * math.sqrt(ratio) / 2
                        x, y = column * stride, row * stride
                        expected.append([x - w, y - h, x + w, y + h])
    torch.testing.assert_close(out.anchors, torch.tensor(expected), rtol=1e-5, atol=1e-3)


def test_predictions_on_rounded_anchors_are_not_compared_with_them(tmp_path):
    path = save(draw_state(small_retinanet()), tmp_path / "a.pth")
    teacher = MMDetectionBuilder(path=path, classes=("cat", "dog", "cup")).build(("cat", "dog", "cup"))
    student = RetinaNetBuilder(fpn_channels=64, backbone_weights=None).build(("cat", "dog", "cup"))
    for method in (CrossKD, LogitKD):
        with pytest.raises(NotApplicableError, match="equal anchors"):
            method(student.spec, teacher.spec)


def test_what_a_detector_costs_is_measured_through_drkd(tmp_path):
    path = save(draw_state(small_faster_rcnn()), tmp_path / "a.pth")
    detector = MMDetectionBuilder(path=path, classes=("cat", "dog", "cup")).build(("cat", "dog", "cup"))
    seen = []
    with detector.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:])):
        cost = measure_detector(detector, (64, 96))
    assert cost.flops > 0 and cost.image_size == (64, 96)
    assert {*seen} == {(64, 96)}  # padded to 32, as torchvision's Faster R-CNN, and not to the coarsest stride


def test_boxes_are_pooled_aligned_and_the_background_comes_last(make_batch, tmp_path):
    state = {name: value.float() for name, value in draw_state(small_faster_rcnn()).items()}
    path = save(state, tmp_path / "a.pth")
    batch = make_batch([(64, 96)])
    detector = MMDetectionBuilder(path=path, classes=("cat", "dog", "cup")).build(("cup", "cat"))
    # A box of 40 cells of the finest level would go to a coarser one; 30 px stay on the finest.
    box = torch.tensor([[10.0, 7.0, 40.0, 38.0]])
    output = detector(batch, want=frozenset({"features", "region_head"}))
    found = output.region_head([box])
    finest = output.features[0].tensor[0]
    # MMDetection: corners at x / 4 - 0.5, as many samples a cell as its side has pixels, rounded up.
    start, side = torch.tensor([10 / 4 - 0.5, 7 / 4 - 0.5]), torch.tensor([30 / 4 / 7, 31 / 4 / 7])
    pooled = torch.zeros(64, 7, 7)
    count = [math.ceil(step) for step in side.tolist()]
    for row in range(7):
        for column in range(7):
            for i in range(count[1]):
                for j in range(count[0]):
                    y = float(start[1] + side[1] * (row + (i + 0.5) / count[1]))
                    x = float(start[0] + side[0] * (column + (j + 0.5) / count[0]))
                    grid = torch.tensor([[[[2 * x / 23 - 1, 2 * y / 15 - 1]]]])
                    sample = functional.grid_sample(finest[None], grid, align_corners=True, padding_mode="border")
                    pooled[:, row, column] += sample.flatten() / (count[0] * count[1])

    def linear(name, x):
        return functional.linear(
            x, state[f"roi_head.bbox_head.{name}.weight"], state[f"roi_head.bbox_head.{name}.bias"]
        )

    hidden = linear("shared_fcs.1", linear("shared_fcs.0", pooled.flatten()[None]).relu()).relu()
    # cat, dog, cup, background in the file.
    torch.testing.assert_close(found.logits, linear("fc_cls", hidden)[:, [2, 0, 3]], rtol=1e-3, atol=1e-4)
    codes = linear("fc_reg", hidden).view(1, 3, 4)[:, [2, 0]] * torch.tensor([0.1, 0.1, 0.2, 0.2])
    torch.testing.assert_close(found.boxes, codes, rtol=1e-3, atol=1e-5)


def test_dense_predictions_are_those_of_the_heads_weights(make_batch, tmp_path):
    state = {name: value.float() for name, value in draw_state(small_retinanet()).items()}
    detector = MMDetectionBuilder(path=save(state, tmp_path / "a.pth"), classes=("cat", "dog", "cup")).build(("dog",))
    output = detector(make_batch([(64, 96)]), want=frozenset({"features", "predictions"}))
    x = y = output.features[-1].tensor
    for index in range(4):
        names = [f"bbox_head.{branch}_convs.{index}.conv" for branch in ("cls", "reg")]
        x, y = (
            functional.conv2d(entry, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
            for entry, name in zip((x, y), names, strict=True)
        )
    scores = functional.conv2d(x, state["bbox_head.retina_cls.weight"], state["bbox_head.retina_cls.bias"], padding=1)
    codes = functional.conv2d(y, state["bbox_head.retina_reg.weight"], state["bbox_head.retina_reg.bias"], padding=1)
    last = slice(-9, None)  # one cell at the coarsest level
    torch.testing.assert_close(output.predictions.logits[0, last, 0], scores.view(9, 3)[:, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.predictions.boxes[0, last], codes.view(9, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("neck.lateral_convs.1.conv.bias"), r"1 missing: neck\.lateral_convs\.1\.conv\.bias"),
        (
            lambda s: s.update({"neck.lateral_convs.1.bn.weight": torch.ones(64)}),
            r"not understood: neck\.lateral_convs",
        ),
        (lambda s: s.update({"bbox_head.atss_cls.weight": torch.ones(3)}), r"not understood: bbox_head\.atss_cls"),
        (
            lambda s: s.update({"backbone.layer3.0.bn2.weight": torch.ones(3)}),
            r"of another shape: backbone\.layer3\.0\.bn2\.weight \(expected \(128,\), got \(3,\)\)",
        ),
        (lambda s: s.pop("backbone.conv1.weight"), "no MMDetection checkpoint"),
        (lambda s: s.update({"bbox_head.retina_reg.weight": torch.ones(4, 64, 3, 3)}), "not those of RetinaNet"),
    ],
)
def test_a_mismatch_names_the_files_own_keys(change, expected, tmp_path):
    state = draw_state(small_retinanet())
    change(state)
    with pytest.raises(DrkdError, match=expected):
        MMDetectionBuilder(path=save(state, tmp_path / "a.pth"), classes=("a", "b", "c")).build(("a",))


def test_classes_are_needed_and_must_fit(tmp_path):
    path = save(draw_state(small_retinanet()), tmp_path / "a.pth")
    with pytest.raises(DrkdError, match="3 classes and there are no class names"):
        MMDetectionBuilder(path=path).build(("cat",))
    with pytest.raises(DrkdError, match="3 classes and there are 2 class names"):
        MMDetectionBuilder(path=path, classes=("cat", "dog")).build(("cat",))
    with pytest.raises(DrkdError, match="none of your classes"):
        MMDetectionBuilder(path=path, classes=("cat", "dog", "cup")).build(("boat",))
    with pytest.raises(DrkdError, match="style: expected one of"):
        MMDetectionBuilder(path=path, style="detectron")


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    torch.save({"state_dict": {}, "meta": MMDetectionBuilder}, tmp_path / "a.pth")
    with pytest.raises(DrkdError, match="could run code"):
        MMDetectionBuilder(path=str(tmp_path / "a.pth")).build(("cat",))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("backbone.layer1.0.conv2.weight", lambda tensor: None),
        ("backbone.layer1.0.conv2.weight", lambda tensor: tensor.flatten()[:1].reshape(())),
        ("backbone.layer1.0.conv2.weight", lambda tensor: tensor.new_zeros(0)),
        ("neck.lateral_convs.0.conv.weight", lambda tensor: tensor.flatten()),
        ("backbone.layer4.0.bn1.weight", lambda tensor: tensor.to_sparse()),
    ],
)
def test_damage_is_one_paragraph(name, change, tmp_path):
    state = draw_state(small_retinanet())
    state[name] = change(state[name])
    path = save({key: value for key, value in state.items() if value is not None}, tmp_path / "damaged.pth")
    with pytest.raises(DrkdError, match=r"damaged\.pth: ") as caught:
        MMDetectionBuilder(path=path, part="features").build(("cat",))
    assert "\n" not in str(caught.value)
