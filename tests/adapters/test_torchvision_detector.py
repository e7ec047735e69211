"""The wrapped detectors against torchvision's own forward."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection import (
    KeypointRCNN,
    RetinaNet,
    fasterrcnn_mobilenet_v3_large_fpn,
    ssdlite320_mobilenet_v3_large,
)

from drkd.adapters import FasterRCNNBuilder, RetinaNetBuilder, TorchvisionDetector, wrap_torchvision
from drkd.contracts import BoxTargets, DrkdError

CLASSES = ("cat", "dog", "cup")
ALL = frozenset({"features", "losses"})
LOSSES = frozenset({"losses"})
FEATURES = frozenset({"features"})


def plain_losses(detector, batch, *, seed):
    """Losses of the plain model on the batch's images, with its own transform made to resize nothing."""
    model = copy.deepcopy(detector.model).train()
    model.transform._skip_resize = True
    offset = 1 if detector.spec.family == "faster_rcnn" else 0
    images = [image[:, :h, :w] for image, (h, w) in zip(batch.images, batch.sizes, strict=True)]
    targets = [{"boxes": t.boxes, "labels": t.labels + offset} for t in batch.targets]
    torch.manual_seed(seed)
    return model(images, targets)


@pytest.mark.parametrize("sizes", [[(64, 64), (64, 64)], [(64, 50), (33, 64)]])
def test_losses_equal_the_plain_models(builder, make_batch, sizes):
    detector = builder.build(CLASSES).train()
    batch = make_batch(sizes)
    expected = plain_losses(detector, batch, seed=1)
    torch.manual_seed(1)
    got = detector(batch, want=LOSSES).losses
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)


def test_losses_do_not_depend_on_the_first_batchs_size(builder, make_batch):
    detector = builder.build(CLASSES).train()
    fresh = copy.deepcopy(detector)
    # A valid part of under half the padded size: torchvision would keep scales twice too large from here on.
    first = make_batch([(32, 32)])
    padded = torch.zeros(1, 3, 96, 96)
    padded[..., :32, :32] = first.images
    for model in (detector, fresh):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.eval()
    detector(replace(first, images=padded), want=LOSSES)
    batch = make_batch([(64, 64)])
    torch.manual_seed(1)
    got = detector(batch, want=LOSSES).losses
    torch.manual_seed(1)
    expected = fresh(batch, want=LOSSES).losses
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_losses_come_in_eval_mode_and_change_no_state(builder, make_batch):
    detector = builder.build(CLASSES).eval()
    before = copy.deepcopy(detector.state_dict())
    output = detector(make_batch([(64, 64)]), want=ALL)
    assert sum(output.losses.values()).isfinite()
    assert not any(part.training for part in detector.modules())
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert set(before) == {f"model.{name}" for name in detector.model.state_dict()}


def test_only_what_is_wanted_is_computed(builder, make_batch):
    detector = builder.build(CLASSES).eval()
    batch = make_batch([(64, 64)])
    called = []
    head = detector.model.rpn if detector.spec.family == "faster_rcnn" else detector.model.head
    head.register_forward_hook(lambda *_: called.append(1))
    output = detector(batch, want=FEATURES)
    assert output.features and not output.losses and not called
    output = detector(batch, want=LOSSES)
    assert output.losses and not output.features and called
    with pytest.raises(ValueError, match=r"want: expected any of .*'losses'.*got"):
        detector(batch, want=frozenset({"logits"}))


def test_features_are_the_specs(builder, make_batch):
    detector = builder.build(CLASSES)
    maps = detector(make_batch([(64, 96), (60, 90)]), want=FEATURES).features
    assert [m.name for m in maps] == [level.name for level in detector.spec.levels]
    for found, level in zip(maps, detector.spec.levels, strict=True):
        assert found.tensor.shape[1] == level.channels
        assert found.stride_y == 64 / found.tensor.shape[2] and found.stride_x == 96 / found.tensor.shape[3]
        assert level.name == f"p{int(level.stride).bit_length() - 1}"
        # A level coarser than the image has one cell.
        assert found.stride_y == min(level.stride, 64)


def test_the_dry_run_leaves_statistics_and_modes_alone():
    model = RetinaNetBuilder(backbone="resnet18", width=0.25, fpn_channels=16).build(CLASSES).model.train()
    before = copy.deepcopy(model.state_dict())
    wrap_torchvision(model, CLASSES)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_boxes(builder, make_batch):
    detector = builder.build(CLASSES).train()
    some, none = make_batch([(64, 64)]), make_batch([(64, 64)], boxes=0)
    mixed = replace(make_batch([(64, 64), (64, 64)]), targets=(some.targets[0], none.targets[0]))
    for batch in (make_batch([(64, 64), (50, 40)], boxes=0), mixed):
        total = sum(detector(batch, want=LOSSES).losses.values())
        assert total.isfinite()
        total.backward()


def test_ignored_boxes_do_not_train(builder, make_batch):
    detector = builder.build(CLASSES).eval()
    batch = make_batch([(64, 64)])
    target = batch.targets[0]
    crowd = BoxTargets(
        torch.cat([target.boxes, torch.tensor([[0.0, 0.0, 64.0, 64.0]])]),
        torch.cat([target.labels, torch.tensor([0])]),
        torch.tensor([False, False, False, True]),
    )
    torch.manual_seed(1)
    expected = detector(batch, want=LOSSES).losses
    torch.manual_seed(1)
    got = detector(replace(batch, targets=(crowd,)), want=LOSSES).losses
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_detections_are_in_px_of_the_original_image(builder, make_batch):
    detector = builder.build(CLASSES).eval()
    batch = make_batch([(64, 48), (40, 64)], original_sizes=[(200, 150), (80, 128)])
    model = copy.deepcopy(detector.model)
    # With these, torchvision keeps the scale of images whose long side is 64 px.
    model.transform.min_size, model.transform.max_size = (64,), 64
    with torch.no_grad():
        plain = model([image[:, :h, :w] for image, (h, w) in zip(batch.images, batch.sizes, strict=True)])
    offset = 1 if detector.spec.family == "faster_rcnn" else 0
    for found, expected, (h, w), (height, width) in zip(
        detector.detect(batch), plain, batch.sizes, batch.original_sizes, strict=True
    ):
        assert len(found.boxes) > 0 and found.boxes.dtype == torch.float32
        scale = torch.tensor([width / w, height / h]).repeat(2)
        torch.testing.assert_close(found.boxes, expected["boxes"] * scale, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(found.scores, expected["scores"])
        assert torch.equal(found.labels, expected["labels"] - offset)
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([width, height]).repeat(2)).all()
        assert found.boxes[:, 2].max() > w
        assert (found.scores.diff() <= 0).all()


def test_detect_refuses_train_mode(builder, make_batch):
    with pytest.raises(ValueError, match="eval mode"):
        builder.build(CLASSES).train().detect(make_batch([(64, 64)]))


def test_labels_make_a_round_trip(builder):
    detector = builder.build(CLASSES)
    labels = torch.arange(len(CLASSES))
    offset = 1 if detector.spec.family == "faster_rcnn" else 0
    assert torch.equal(detector._to_model[labels], labels + offset)
    assert torch.equal(detector._to_ours[detector._to_model[labels]], labels)


def test_channels_last_is_kept(builder, make_batch):
    detector = builder.build(CLASSES).to(memory_format=torch.channels_last).eval()
    batch = make_batch([(64, 64), (40, 64)])
    batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
    assert detector._normalise(batch).tensors.is_contiguous(memory_format=torch.channels_last)
    assert detector(batch, want=FEATURES).features[0].tensor.is_contiguous(memory_format=torch.channels_last)


def test_padding_is_zero_after_normalisation(make_batch):
    detector = RetinaNetBuilder(backbone="resnet18", width=0.25, fpn_channels=16).build(CLASSES)
    values = detector._normalise(make_batch([(64, 64), (33, 40)])).tensors
    assert (values[1, :, 33:] == 0).all() and (values[1, :, :, 40:] == 0).all()
    assert (values[1, :, :33, :40] != 0).any() and (values[0] != 0).any()


def test_strides_may_repeat(make_batch):
    model = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=3)
    detector = wrap_torchvision(model, ("a", "b")).train()
    assert [(level.name, level.stride) for level in detector.spec.levels] == [("0", 32.0), ("1", 32.0), ("pool", 64.0)]
    batch = make_batch([(64, 64)])
    batch = replace(batch, targets=(replace(batch.targets[0], labels=torch.tensor([0, 1, 0])),))
    detector.eval()
    torch.manual_seed(1)
    got = detector(batch, want=LOSSES).losses
    assert sum(got.values()).isfinite()


def test_wrapping_infers_labels():
    model = RetinaNetBuilder(backbone="resnet18", width=0.25, fpn_channels=16).build(CLASSES).model
    # Three classes from label 0, or two from label 1? A guess trained every class on its neighbour's output.
    with pytest.raises(ValueError, match=r"class_names: expected the names.*3 classes with labels 0\.\.2, or 2 with"):
        wrap_torchvision(model)
    two_stage = FasterRCNNBuilder(backbone="resnet18", width=0.25, fpn_channels=16).build(CLASSES).model
    assert wrap_torchvision(two_stage).spec.class_names == ("0", "1", "2")
    assert wrap_torchvision(two_stage).label_ids == (1, 2, 3)
    assert wrap_torchvision(model, CLASSES).label_ids == (0, 1, 2)
    assert wrap_torchvision(model, CLASSES[:2]).label_ids == (1, 2)
    with pytest.raises(ValueError, match="3 outputs"):
        wrap_torchvision(model, ("a",))
    with pytest.raises(ValueError, match="one label below 3"):
        TorchvisionDetector(model, CLASSES, label_ids=(1, 2, 3))
    with pytest.raises(ValueError, match="expected torchvision's"):
        wrap_torchvision(torch.nn.Linear(1, 1))


def test_coco_models_are_matched_by_name(make_batch):
    backbone = RetinaNetBuilder(backbone="resnet18", width=0.25, fpn_channels=16).build(CLASSES).model.backbone
    model = RetinaNet(backbone, 91)
    everything = wrap_torchvision(model)
    assert len(everything.spec.class_names) == 80 and everything.spec.class_names[0] == "person"
    detector = wrap_torchvision(model, ("dog", "unicorn", "cat"))
    assert detector.label_ids == (18, -1, 17)
    assert detector.missing_classes == ("unicorn",)
    assert detector._to_ours.tolist().count(-1) == 89
    with pytest.raises(ValueError, match="no output for"):
        detector(make_batch([(64, 64)]), want=LOSSES)
    model.score_thresh = 0.0
    labels = detector.eval().detect(make_batch([(64, 64)]))[0].labels
    assert set(labels.tolist()) <= {0, 2}
    with pytest.raises(DrkdError, match="none of"):
        wrap_torchvision(model, ("unicorn",))


def test_other_detectors_are_refused():
    model = KeypointRCNN.__new__(KeypointRCNN)
    with pytest.raises(ValueError, match="got KeypointRCNN"):
        wrap_torchvision(model)


def test_classes_that_nobody_asked_for_take_no_places(builder, make_batch):
    model = builder.build(CLASSES).model.eval()
    first = 1 if hasattr(model, "roi_heads") else 0
    owner = model.roi_heads if first else model
    batch = make_batch([(64, 64), (50, 40)])
    with torch.no_grad():
        predictor = model.roi_heads.box_predictor.cls_score if first else model.head.classification_head.cls_logits
        # Every box is one of the first two classes far sooner than the third.
        predictor.bias.view(-1, len(CLASSES) + first)[:, first : first + 2] += 3.0
    owner.detections_per_img = 10**6
    everything = wrap_torchvision(model, CLASSES, label_ids=[first, first + 1, first + 2]).eval().detect(batch)
    owner.detections_per_img = 4
    found = wrap_torchvision(model, ["cup"], label_ids=[first + 2]).eval().detect(batch)
    assert owner.detections_per_img == 4
    for entry, whole in zip(found, everything, strict=True):
        expected = whole.scores[whole.labels == 2][:4]
        assert len(expected) == 4 and (entry.labels == 0).all()
        torch.testing.assert_close(entry.scores, expected)


def test_a_model_inside_another_is_said_to_be_inside() -> None:
    plain = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    for outer, name in ((torch.compile(plain), "_orig_mod"), (nn.DataParallel(plain), "module")):
        with pytest.raises(ValueError, match=rf"which holds a SSD: hand over the plain model, model\.{name},"):
            wrap_torchvision(outer, CLASSES)


@pytest.mark.parametrize(("labels", "words"), [([0, 1], "from 1 since output 0"), ([1, 1], "a different label")])
def test_labels_of_the_background_and_labels_given_twice_are_refused(labels, words):
    model = FasterRCNNBuilder(width=0.25, fpn_channels=32, representation_size=16).build(("cat", "dog")).model
    with pytest.raises(ValueError, match=words):
        wrap_torchvision(model, ("cat", "dog"), label_ids=labels)
    assert wrap_torchvision(model, ("cat", "dog"), label_ids=[2, -1]).label_ids == (2, -1)


def test_a_model_that_trains_within_detects_nothing(make_batch):
    detector = RetinaNetBuilder(width=0.25, fpn_channels=32, extra="none").build(CLASSES).eval()
    batch = make_batch([(64, 64)])
    assert len(detector.detect(batch)) == 1
    detector.model.train()
    with pytest.raises(ValueError, match=r"call \.eval\(\) on the wrapped detector"):
        detector.detect(batch)
