"""SSD300, SSDLite and Mask R-CNN: the same promises as the other detectors, and what is theirs alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from drkd.adapters import (
    MaskRCNNBuilder,
    SSD300Builder,
    SSDLiteBuilder,
    ZooBuilder,
    load_detector,
    save_student,
    wrap_torchvision,
)
from drkd.contracts import BoxTargets, DetectionBatch, DrkdError

CLASSES = ("cat", "dog", "cup")
ALL = frozenset({"features", "losses"})
# Small arguments of each, for the contract tests too.
BUILDERS = {
    "mask_rcnn": MaskRCNNBuilder(
        backbone="resnet18",
        width=0.125,
        fpn_channels=16,
        representation_size=16,
        rpn_post_nms_train=50,
        rpn_post_nms_test=50,
        roi_batch_size=32,
        mask_layers=(8,),
        mask_channels=8,
        score_threshold=0.0,
        anchor_sizes=((8,), (16,), (32,), (64,), (96,)),
    ),
    "ssd": SSD300Builder(width=0.0625, image_std=(0.25, 0.25, 0.25), score_threshold=0.0),
    "ssdlite": SSDLiteBuilder(width=0.25, size=96, score_threshold=0.0),
}
SETTINGS = {"min_size": 64, "max_size": 96, "size_divisor": 32}


@pytest.fixture(params=list(BUILDERS))
def detector(request):
    return BUILDERS[request.param].build(CLASSES)


def objects(count=2, size=(64, 96), *, masks=True):
    """Images with one bright box each, of a class that its colour tells."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for index in range(count):
        image = 0.1 * torch.rand(3, *size, generator=generator)
        x, y = torch.randint(0, 30, (2,), generator=generator).tolist()
        image[index % 3, y : y + 30, x : x + 40] = 1.0
        target = {"boxes": torch.tensor([[x, y, x + 40.0, y + 30.0]]), "labels": torch.tensor([index % 3])}
        if masks:
            target["masks"] = torch.zeros(1, *size)
            target["masks"][0, y : y + 30, x : x + 40] = 1
        images.append(image)
        targets.append(target)
    return DetectionBatch.from_lists(images, targets)


def plain(detector):
    """The plain model with a transform that resizes an R-CNN's images not at all."""
    model = copy.deepcopy(detector.model)
    if model.transform.fixed_size is None:
        model.transform.min_size, model.transform.max_size = (64,), 96
    return model


def test_losses_equal_the_plain_models(detector):
    batch = objects()
    model = plain(detector).train()
    # A draw of the size would shift the sampling of regions.
    model.transform._skip_resize = model.transform.fixed_size is None
    detector.train()
    targets = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks.to(torch.uint8)} for t in batch.targets]
    torch.manual_seed(1)
    expected = model(list(batch.images), targets)
    torch.manual_seed(1)
    got = detector(batch, want=ALL).losses
    assert set(got) == set(expected) and ("loss_mask" in got) == (detector.spec.family == "mask_rcnn")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-4, rtol=1e-4)


def test_features_at_the_declared_strides(detector):
    size = 96 if detector.spec.family == "ssdlite" else 300 if detector.spec.family == "ssd" else 256
    for side in (size, 64):
        detector.expect_image_size(side)
        with torch.no_grad():
            maps = detector.eval()(objects(1, (side, side)), want=frozenset({"features"})).features
        for found, level in zip(maps, detector.spec.levels, strict=True):
            assert found.tensor.shape[1] == level.channels and found.name == level.name
            padded = -(-side // 32) * 32
            assert found.stride_y == pytest.approx(min(level.stride, side) * padded / side)


def test_detections_are_the_plain_models_in_px_of_the_original(detector):
    batch = objects()
    # The first image is smaller than the batch and was 3 times as large.
    sizes = ((48, 64), (64, 96))
    images = batch.images.clone()
    images[0, :, 48:], images[0, :, :, 64:] = 0, 0
    batch = replace(batch, images=images, sizes=sizes, original_sizes=((144, 192), (64, 96)))
    model = plain(detector.eval())
    if model.transform.fixed_size is None:
        model.transform.min_size, model.transform.max_size = (48,), 96
        expected = [model([images[0, :, :48, :64]])[0]]
        model.transform.min_size = (64,)
        expected += model([images[1]])
    else:
        expected = model([images[0, :, :48, :64], images[1]])
    for found, want, scale in zip(detector.detect(batch), expected, (3.0, 1.0), strict=True):
        assert len(found.boxes) > 0
        if detector.spec.family != "mask_rcnn":
            torch.testing.assert_close(found.boxes, want["boxes"] * scale, atol=1e-2, rtol=1e-4)
            assert torch.equal(found.labels, want["labels"] - 1)
        assert found.boxes[:, 2].max() <= 96 * 2 and found.boxes[:, 3].max() <= 48 * 3
        assert not hasattr(found, "masks")
    with pytest.raises(ValueError, match="eval mode"):
        detector.train().detect(batch)


@pytest.mark.parametrize("name", ["mask_rcnn", "ssdlite"])
def test_losses_fall(name):
    torch.manual_seed(0)
    detector = BUILDERS[name].build(CLASSES).train()
    batch = objects(8)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=2e-3)
    totals = []
    for _ in range(20):
        optimizer.zero_grad()
        torch.manual_seed(2)
        total = sum(detector(batch, want=ALL).losses.values())
        total.backward()
        optimizer.step()
        totals.append(float(total))
    assert all(value < float("inf") for value in totals) and min(totals[-3:]) < 0.8 * totals[0], totals


def test_losses_of_ssd300_fall():
    # As above on fewer images: 300 px cost a second a step.
    torch.manual_seed(0)
    detector = BUILDERS["ssd"].build(CLASSES).train()
    batch = objects(2)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    totals = []
    for _ in range(20):
        optimizer.zero_grad()
        total = sum(detector(batch, want=ALL).losses.values())
        total.backward()
        optimizer.step()
        totals.append(float(total))
    assert min(totals[-3:]) < 0.8 * totals[0], totals


def test_no_state_changes_in_eval_mode(detector):
    detector.eval().requires_grad_(False)
    before = copy.deepcopy(detector.state_dict())
    pools = [part.scales for part in detector.model.modules() if hasattr(part, "featmap_names")]
    want = frozenset({"features", "regions" if detector.spec.family == "mask_rcnn" else "predictions"})
    detector(objects(masks=False), want=want)
    detector.detect(objects(masks=False))
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert not any(part.training for part in detector.modules())
    assert pools == [part.scales for part in detector.model.modules() if hasattr(part, "featmap_names")]


def test_a_mask_loss_without_masks_is_refused_and_regions_are_not():
    detector = BUILDERS["mask_rcnn"].build(CLASSES)
    batch = objects(masks=False)
    with pytest.raises(DrkdError, match=r"data\.masks: true"):
        detector(batch, want=ALL)
    assert detector(batch, want=frozenset({"regions"})).regions is not None
    none = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    losses = detector(replace(batch, targets=(none, none)), want=ALL).losses
    assert "loss_mask" in losses and sum(losses.values()).isfinite()


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
def test_default_boxes_are_in_px_of_the_batch(name):
    detector = BUILDERS[name].build(CLASSES).eval()
    batch = objects()
    with torch.no_grad():
        found = detector(batch, want=frozenset({"predictions", "assignment"}))
    predictions, size = found.predictions, detector.model.transform.fixed_size[0]
    assert predictions.logits.shape[2] == len(CLASSES) + 1 and sum(predictions.counts) == predictions.anchors.shape[0]
    images = ImageList(torch.zeros(1, 3, size, size), [(size, size)])
    maps = [
        torch.zeros(1, 1, *entry.tensor.shape[-2:]) for entry in detector(batch, want=frozenset({"features"})).features
    ]
    own = detector.model.anchor_generator(images, maps)[0]
    torch.testing.assert_close(predictions.anchors, own * torch.tensor([96 / size, 64 / size] * 2))
    matched = found.assignment[0] == 0
    assert matched.any() and set(found.assignment.unique().tolist()) <= {-1, 0}
    # What is matched lies over the box, in px of the batch.
    centres = (predictions.anchors[matched, :2] + predictions.anchors[matched, 2:]) / 2
    box = batch.targets[0].boxes[0]
    assert bool(((centres > box[:2] - 20) & (centres < box[2:] + 20)).all())


def test_labels_and_normalisation_of_a_wrapped_model():
    model = BUILDERS["ssdlite"].build(CLASSES).model.eval()
    model.detections_per_img = 10**6  # of either; a cut would leave the first more of its two classes
    ours = wrap_torchvision(model, ["dog", "cup", "owl"], label_ids=[2, 3, -1]).eval()
    batch = objects()
    everything = wrap_torchvision(model, CLASSES).eval()
    assert everything.label_ids == (1, 2, 3) and ours.missing_classes == ("owl",)
    for found, all_of_them in zip(ours.detect(batch), everything.detect(batch), strict=True):
        kept = all_of_them.labels > 0
        assert torch.equal(found.labels, all_of_them.labels[kept] - 1) and torch.equal(
            found.boxes, all_of_them.boxes[kept]
        )
    # [0, 1] RGB goes in whatever the model's mean and deviation are.
    other = copy.deepcopy(model)
    other.transform.image_mean, other.transform.image_std = [0.0] * 3, [1.0] * 3
    normalised = replace(batch, images=(batch.images - 0.5) / 0.5)
    with torch.no_grad():
        one = everything(batch, want=frozenset({"features"})).features
        two = wrap_torchvision(other, CLASSES).eval()(normalised, want=frozenset({"features"})).features
    torch.testing.assert_close(one[0].tensor, two[0].tensor, atol=1e-5, rtol=1e-4)


# Run without drkd, as in test_plain_torchvision.
SCRIPT = """
import os, sys
sys.modules["drkd"] = None
import torch
for folder in sorted(os.listdir()):
    os.chdir(folder)
    names = {}
    exec(torch.load("student.pt", weights_only=True)["code"], names)
    with torch.no_grad():
        found = names["model"](list(torch.load("images.pt")))
    torch.save([{key: entry[key] for key in ("boxes", "labels")} for entry in found], "found.pt")
    os.chdir("..")
"""


def test_saved_files_load_in_drkd_and_in_plain_torchvision(tmp_path):
    batch = objects()
    zoo = ZooBuilder(name="ssdlite320_mobilenet_v3_large", head="new")
    built = {}
    for name, builder in {**BUILDERS, "zoo": zoo}.items():
        detector = builder.build(CLASSES).eval()
        file = tmp_path / name / "student.pt"
        save_student(file, detector, builder=builder, image_settings=SETTINGS)
        torch.save(batch.images, file.with_name("images.pt"))
        again = load_detector(file, class_names=("cup", "cat", "dog"))
        one, two = detector.detect(batch), again.detect(batch)
        order = torch.tensor([1, 2, 0])
        assert all(
            torch.equal(a.boxes, b.boxes) and torch.equal(order[a.labels], b.labels)
            for a, b in zip(one, two, strict=True)
        )
        built[name] = detector
    environment = {"PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, detector in built.items():
        found = torch.load(tmp_path / name / "found.pt", weights_only=True)
        for mine, theirs in zip(detector.detect(batch), found, strict=True):
            torch.testing.assert_close(mine.boxes, theirs["boxes"], atol=1e-3, rtol=1e-4)
            assert torch.equal(mine.labels, theirs["labels"] - 1), name


def test_weights_of_another_number_of_classes_fill_all_but_the_last_layers(tmp_path):
    for name in ("ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn_v2"):
        source = ZooBuilder(name=name, head="new").build(("a", "b")).model.state_dict()
        torch.save(source, tmp_path / "w.pt")
        filled = ZooBuilder(name=name, head="new", weights=str(tmp_path / "w.pt")).build(CLASSES).model.state_dict()
        same = [
            key for key in source if source[key].shape == filled[key].shape and torch.equal(source[key], filled[key])
        ]
        fresh = set(source) - set(same)
        assert fresh and all("classification_head" in key or "predictor" in key for key in fresh)


def test_the_classifiers_weights_fill_a_body(tmp_path):
    from torchvision.models import mobilenet_v3_large

    network = mobilenet_v3_large(width_mult=0.25)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    detector = SSDLiteBuilder(width=0.25, backbone_weights=str(tmp_path / "m.pt")).build(CLASSES)
    assert torch.equal(detector.model.backbone.features[0][0][0].weight, network.features[0][0].weight)
    torch.save({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(DrkdError, match="another network"):
        SSDLiteBuilder(backbone_weights=str(tmp_path / "w.pt")).build(CLASSES)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (SSDLiteBuilder, {"size": 100}, "multiple of 32 px, got 100"),
        (SSD300Builder, {"width": 0}, "positive"),
        (SSD300Builder, {"width": 0.5, "backbone_weights": "imagenet"}, "width 1, got width 0.5"),
        (SSD300Builder, {"foreground_iou": 2}, "between 0 and 1"),
        (MaskRCNNBuilder, {"mask_layers": ()}, "mask_layers"),
    ],
)
def test_bad_settings_are_refused(kind, arguments, message):
    with pytest.raises(DrkdError, match=message):
        kind(**arguments)


def test_a_narrow_ssd300_of_half_precision_is_rebuilt_in_float32(tmp_path):
    builder, file = SSD300Builder(width=0.125), tmp_path / "student.pt"
    save_student(file, builder.build(("cat",)), builder=builder, image_settings=SETTINGS, half=True)
    names = {}
    exec(torch.load(file, weights_only=True)["code"].replace('"student.pt"', repr(str(file))), names)
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32}
