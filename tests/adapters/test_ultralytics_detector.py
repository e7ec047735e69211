"""What Ultralytics' YOLOs show through the contract, against Ultralytics' own code."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.adapters.yolos import CLASSES, build_yolo, lively

from drkd.adapters import FCOSBuilder, wrap_ultralytics
from drkd.adapters.ultralytics_detector import UltralyticsDetector, find_names
from drkd.contracts import BoxTargets, DetectionBatch, DrkdError
from drkd.methods import LD, CrossKD, LogitKD

pytest.importorskip("ultralytics")

FEATURES = frozenset({"features"})
LOSSES = frozenset({"losses"})
ALL = frozenset({"features", "losses", "predictions", "assignment"})
SIZES = [(64, 64), (50, 40)]
# Bins, one number a side, and a second head.
KINDS = pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml", "yolov10n.yaml", "yolo26n.yaml"])


def with_clear_boxes(batch):
    """Boxes so large that some prediction of an untrained model overlaps each of them."""
    boxes = torch.tensor([[2.0, 2.0, 26.0, 26.0], [20.0, 6.0, 39.0, 44.0], [4.0, 28.0, 30.0, 49.0]])
    return replace(batch, targets=tuple(replace(target, boxes=boxes) for target in batch.targets))


def plain_arguments(batch):
    """Ultralytics' own form of a batch without padding."""
    height, width = batch.image_size
    rows = [(index, target) for index, target in enumerate(batch.targets)]
    boxes = torch.cat([target.boxes for _, target in rows]) / torch.tensor([width, height, width, height])
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return {
        "img": batch.images,
        "batch_idx": torch.cat([torch.full((len(target.boxes),), index) for index, target in rows]),
        "cls": torch.cat([target.labels for _, target in rows]).float(),
        "bboxes": torch.cat([centres, sides], dim=1),
    }


@KINDS
def test_features_are_what_enters_the_head_at_the_declared_strides(name, make_batch):
    detector = build_yolo(name).eval()
    batch = make_batch([(64, 96), (64, 96)])
    seen = []
    head = detector.model.model[-1]
    handle = head.register_forward_pre_hook(lambda _, arguments: seen.append(list(arguments[0])))
    with torch.no_grad():
        detector.model(batch.images)
        handle.remove()
        found = detector(batch, want=FEATURES).features
    assert [level.name for level in detector.spec.levels] == ["p3", "p4", "p5"]
    for level, ours, theirs in zip(detector.spec.levels, found, seen[0], strict=True):
        assert torch.equal(ours.tensor, theirs)
        assert ours.tensor.shape[1] == level.channels and ours.stride_y == ours.stride_x == level.stride


def test_the_head_does_not_run_for_features_alone(make_batch):
    detector = build_yolo()
    ran = []
    # Activations are one module for the whole model.
    for module in (m for m in detector.model.model[-1].modules() if isinstance(m, torch.nn.Conv2d)):
        module.register_forward_hook(lambda *_: ran.append(1))
    detector(make_batch(SIZES), want=FEATURES)
    assert not ran
    detector(make_batch(SIZES), want=LOSSES)
    assert ran


@KINDS
@pytest.mark.parametrize("mode", [True, False])
def test_losses_equal_ultralytics_but_for_the_batch_size(name, mode, make_batch):
    detector = build_yolo(name).train(mode)
    batch = make_batch([(64, 96)] * 3)
    state = {key: value.clone() for key, value in detector.model.state_dict().items()}
    losses = detector(batch, want=LOSSES).losses
    detector.model.load_state_dict(state)
    model = detector.model
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=100)
    expected, _ = model.loss(plain_arguments(batch))
    assert list(losses)[:2] == ["box_loss", "cls_loss"] and len(losses) == 3
    torch.testing.assert_close(torch.stack(list(losses.values())) * 3, expected, rtol=1e-5, atol=1e-6)


def test_the_models_own_gains_count(make_batch):
    batch = make_batch(SIZES)
    plain, changed = build_yolo(), build_yolo()
    changed.model.args = {"cls": 1.5}
    for name, factor in (("cls_loss", 3.0), ("box_loss", 1.0)):
        first, second = (each(batch, want=LOSSES).losses[name] for each in (plain, changed))
        torch.testing.assert_close(second, first * factor)


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolo26n.yaml"])
def test_losses_are_finite_and_fall(name, make_batch):
    detector = build_yolo(name).train()
    batch = make_batch([(64, 64)] * 6 + [(50, 40)] * 2)
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-3)
    totals = []
    for _ in range(20):
        total = sum(detector(batch, want=LOSSES).losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert all(torch.isfinite(torch.tensor(totals)))
    # The matching changes from step to step, so what is compared is not single steps.
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])


@KINDS
def test_empty_images_and_ignored_boxes(name, make_batch):
    detector = build_yolo(name)
    batch = with_clear_boxes(make_batch(SIZES))
    one, two = batch.targets
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    partly = replace(one, ignore=torch.tensor([True, False, True]))
    kept = BoxTargets(one.boxes[1:2], one.labels[1:2], one.ignore[1:2])
    detector.eval()
    empty = detector(replace(batch, targets=(nothing, nothing)), want=ALL)
    assert (empty.assignment == -1).all() and empty.losses["box_loss"] == 0
    assert all(loss.isfinite() for loss in empty.losses.values())
    ignored, without = (detector(replace(batch, targets=(own, two)), want=ALL) for own in (partly, kept))
    assert all(torch.equal(loss, without.losses[key]) for key, loss in ignored.losses.items())
    # The box keeps its number among the batch's.
    assert set(ignored.assignment[0].tolist()) == {-1, 1} and set(without.assignment[0].tolist()) == {-1, 0}
    assert torch.equal(ignored.assignment[1], without.assignment[1])


@KINDS
def test_predictions_decode_to_ultralytics_boxes(name, make_batch):
    detector = lively(build_yolo(name))
    batch = make_batch([(64, 96)])
    with torch.no_grad():
        found = detector(batch, want=frozenset({"predictions"})).predictions
        decoded, _ = detector.model(batch.images)
    sides = found.anchors[:, 2:] - found.anchors[:, :2]
    centres = (found.anchors[:, 2:] + found.anchors[:, :2]) / 2
    boxes = torch.cat([centres - found.boxes[0, :, :2] * sides, centres + found.boxes[0, :, 2:] * sides], dim=1)
    theirs = decoded[0, :4].T
    theirs = torch.cat([theirs[:, :2] - theirs[:, 2:] / 2, theirs[:, :2] + theirs[:, 2:] / 2], dim=1)
    torch.testing.assert_close(boxes, theirs, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.logits[0].sigmoid(), decoded[0, 4:].T)
    assert found.counts == (96, 24, 6)
    assert (found.bins is None) == (name == "yolo26n.yaml") == (detector.spec.predictions.box_bins == 0)
    if found.bins is not None:
        expected = (found.bins.softmax(-1) * torch.arange(16.0)).sum(-1)
        torch.testing.assert_close(found.boxes, expected, rtol=1e-5, atol=1e-5)


def test_the_assignment_is_what_the_losses_match(make_batch):
    detector = lively(build_yolo())
    batch = with_clear_boxes(make_batch([(64, 64), (64, 64)]))
    found = detector(batch, want=ALL)
    assert found.assignment.shape == found.predictions.logits.shape[:2]
    centres = (found.predictions.anchors[:, 2:] + found.predictions.anchors[:, :2]) / 2
    for own, target in zip(found.assignment, batch.targets, strict=True):
        matched = own >= 0
        assert set(own[matched].tolist()) == {0, 1, 2}
        boxes = target.boxes[own[matched]]
        # Ultralytics lets small boxes reach as far as the second stride.
        grown = (16 - (boxes[:, 2:] - boxes[:, :2])).clamp_min(0) / 2
        inside = (centres[matched] > boxes[:, :2] - grown) & (centres[matched] < boxes[:, 2:] + grown)
        assert inside.all()


def test_boxes_are_detected_in_pixels_of_the_original(make_batch):
    detector = lively(build_yolo(score_threshold=0.2))
    batch = make_batch([(64, 96), (40, 60)], original_sizes=[(128, 192), (120, 60)])
    first, second = detector.detect(batch)
    same_first, same_second = detector.detect(replace(batch, original_sizes=batch.sizes))
    assert len(first.boxes) > 3 and len(second.boxes) > 3
    assert (first.scores[:-1] >= first.scores[1:]).all()
    torch.testing.assert_close(first.boxes, same_first.boxes * 2)
    torch.testing.assert_close(second.boxes, same_second.boxes * torch.tensor([1.0, 3.0, 1.0, 3.0]))
    assert second.boxes[:, 2].max() <= 60 and second.boxes[:, 3].max() <= 120


def test_padding_does_not_matter_but_its_grey_does(make_batch):
    detector = lively(build_yolo(score_threshold=0.2))
    batch = make_batch([(64, 96), (40, 60)])
    noise = batch.images.clone()
    noise[1, :, 40:], noise[1, :, :, 60:] = 0.9, 0.9
    for ours, theirs in zip(detector.detect(batch), detector.detect(replace(batch, images=noise)), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
    grey = batch.images.clone()
    grey[1, :, 40:], grey[1, :, :, 60:] = 114 / 255, 114 / 255
    whole = replace(batch, images=grey, sizes=((64, 96), (64, 96)))
    ours, theirs = (detector(each, want=FEATURES).features[0].tensor for each in (batch, whole))
    assert torch.equal(ours, theirs)


def test_a_detection_leaves_nothing_behind_in_a_teacher(make_batch):
    detector = build_yolo().eval().requires_grad_(False)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    head = detector.model.model[-1]
    grid = head.shape
    batch = make_batch(SIZES)
    with torch.inference_mode():
        detector.detect(batch)
    output = detector(batch, want=ALL)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert head.shape is grid and not any(level.tensor.requires_grad for level in output.features)
    assert not any(parameter.grad is not None for parameter in detector.parameters())


def test_labels_come_back_in_any_order(make_batch):
    batch = make_batch([(64, 64)])
    detector = lively(build_yolo(score_threshold=0.2))
    turned = wrap_ultralytics(detector.model, ("cup", "cat", "dog"), score_threshold=0.2).eval()
    assert turned.label_ids == (2, 0, 1)
    ours, theirs = detector.detect(batch)[0], turned.detect(batch)[0]
    assert set(ours.labels.tolist()) == {0, 1, 2}
    assert torch.equal(theirs.labels, (ours.labels + 1) % 3)
    # The same objects under the turned numbers cost the same.
    (target,) = batch.targets
    renamed = replace(batch, targets=(replace(target, labels=(target.labels + 1) % 3),))
    first, second = detector(batch, want=ALL), turned(renamed, want=ALL)
    assert all(torch.equal(loss, second.losses[name]) for name, loss in first.losses.items())
    assert torch.equal(first.predictions.logits[..., [2, 0, 1]], second.predictions.logits)


def test_classes_that_the_model_lacks(make_batch):
    detector = lively(build_yolo())
    part = wrap_ultralytics(detector.model, ("dog", "zebra"), score_threshold=0.2).eval()
    assert part.missing_classes == ("zebra",) and part.spec.predictions.missing_classes == ("zebra",)
    assert set(part.detect(make_batch([(64, 64)]))[0].labels.tolist()) == {0}
    assert len(part(make_batch(SIZES), want=FEATURES).features) == 3
    with pytest.raises(ValueError, match=r"no output for \['zebra'\]"):
        part(make_batch(SIZES), want=LOSSES)
    with pytest.raises(
        DrkdError, match=r"none of \['zebra'\] is a class of this YOLO, which knows 3 \(cat, dog, cup\)"
    ):
        wrap_ultralytics(detector.model, ("zebra",))


def test_a_batch_of_sides_that_no_grid_fits(make_batch):
    batch = make_batch([(64, 64)])
    odd = DetectionBatch(batch.images[..., :50, :], ((50, 64),), ((50, 64),), batch.targets, (0,))
    with pytest.raises(DrkdError, match=r"multiples of 32 px, got 50 x 64. Set data.size_divisor to 32"):
        build_yolo()(odd, want=FEATURES)


def test_what_cannot_be_wanted_or_wrapped(make_batch):
    with pytest.raises(ValueError, match="want: expected any of"):
        build_yolo()(make_batch(SIZES), want=frozenset({"head_tail"}))
    with pytest.raises(ValueError, match="needs eval mode"):
        build_yolo().train().detect(make_batch(SIZES))
    with pytest.raises(DrkdError, match=r"expected a detection model of Ultralytics'.*got Linear"):
        wrap_ultralytics(torch.nn.Linear(1, 1))


def test_autocast_and_half_precision_maps(make_batch):
    detector = build_yolo().train()
    batch = make_batch(SIZES)
    plain = build_yolo().train()(batch, want=ALL).losses
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = detector(batch, want=ALL)
    assert all(loss.dtype == torch.float32 for loss in found.losses.values())
    total, expected = (sum(each.values()) for each in (found.losses, plain))
    assert total.item() == pytest.approx(expected.item(), rel=0.2)
    total.backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)


@pytest.mark.parametrize(("method", "terms"), [(LD, 3), (LogitKD, 2)])
def test_prediction_methods_teach_the_head(method, terms, make_batch):
    student, teacher = build_yolo("yolov8n.yaml"), lively(build_yolo("yolo11s.yaml", ("cup", "dog", "cat", "bus")))
    kd = method(student.spec, teacher.spec)
    batch = make_batch(SIZES)
    with torch.no_grad():
        theirs = teacher(batch, want=kd.teacher_needs)
    found = kd(student(batch, want=kd.needs), theirs, batch)
    assert len(found) == terms and all(term.isfinite() and term > 0 for term in found.values())
    sum(found.values()).backward()
    branches = student.model.model[-1]
    for branch in (branches.cv2, branches.cv3):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in branch.parameters())
    assert any((p.grad != 0).any() for p in branches.cv2.parameters())
    # A student that already says what the teacher says has nothing to learn.
    own = kd.__class__(teacher.spec, teacher.spec)
    classes = replace(batch, targets=tuple(replace(t, labels=t.labels) for t in batch.targets))
    same = own(teacher(classes, want=own.needs), teacher(classes, want=own.teacher_needs), classes)
    assert all(term.item() == pytest.approx(0, abs=1e-5) for term in same.values())


def test_pairs_whose_predictions_do_not_fit_say_why():
    bins, none = build_yolo("yolo11n.yaml").spec, build_yolo("yolo26n.yaml").spec
    fcos = FCOSBuilder(backbone="resnet18", fpn_channels=64, extra="none", num_convs=1).build(CLASSES).spec
    with pytest.raises(DrkdError, match="got 0 bins from the student"):
        LD(none, bins)
    with pytest.raises(DrkdError, match=r"centres at 0 of a cell \(student: fcos\) and at 0.5"):
        LogitKD(fcos, bins)
    with pytest.raises(DrkdError, match="CrossKD passes the student's head features"):
        CrossKD(bins, bins)


@KINDS
@pytest.mark.parametrize("several", [True, False])
def test_classes_that_nobody_asked_for_take_no_places(name, several, make_batch):
    model = lively(build_yolo(name)).model
    batch = make_batch(SIZES)
    head = model.model[-1]
    # With so many places no limit of the head's is met.
    head.max_det = 10**4
    with torch.no_grad():
        branches = [*head.cv3, *(getattr(head, "one2one_cv3", None) or ())]
        for branch in branches:
            branch[-1].bias[:2] = -30.0
        options = {"several_labels": several, "detections_per_image": 10**4}
        alone = UltralyticsDetector(model, CLASSES, label_ids=[0, 1, 2], **options).eval().detect(batch)
        for branch in branches:
            branch[-1].bias[:2] = 5.0
        head.max_det = 4
        options["detections_per_image"] = 4
        only = UltralyticsDetector(model, ["cup"], label_ids=[2], **options).eval().detect(batch)
    assert not any(layer._forward_hooks for layer in branches)
    for entry, everything in zip(only, alone, strict=True):
        expected = everything.scores[everything.labels == 2][:4]
        assert len(expected) == 4
        torch.testing.assert_close(entry.scores, expected)


def test_digits_as_names_are_found_by_name_and_numbers_by_place():
    assert find_names(["0", "1", "2"], ["1", "2", "0"]) == [1, 2, 0]
    assert find_names(["0", "1", "2"], ["cat", "dog", "cup"]) == [0, 1, 2]


def test_a_fused_model_teaches_and_is_not_trained(make_batch):
    model = build_yolo("yolo11n.yaml").model.eval().fuse()
    detector, batch = wrap_ultralytics(model, CLASSES), make_batch(SIZES)
    assert detector(batch, want=FEATURES).features
    with pytest.raises(DrkdError, match="fused for inference cannot be saved or trained"):
        detector(batch, want=LOSSES)
