"""What the wrapped detectors show of their predictions, against torchvision's own heads."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead

from drkd.adapters import FasterRCNNBuilder, FCOSBuilder, RetinaNetBuilder, wrap_torchvision
from drkd.contracts import BoxTargets, DetectionBatch

CLASSES = ("cat", "dog", "cup")
SIZES = [(64, 64), (50, 40)]
DENSE = frozenset({"features", "losses", "predictions", "assignment", "head_features", "head_tail"})
TWO_STAGE = frozenset({"features", "losses", "regions", "region_head"})


@pytest.fixture(params=[RetinaNetBuilder, FCOSBuilder])
def dense(request):
    torch.manual_seed(0)
    sizes = ((8,), (16,), (32,)) if request.param is FCOSBuilder else ((12, 16), (24, 32), (48, 64))
    options = {"head_norm": "group"} if request.param is RetinaNetBuilder else {}
    detector = request.param(
        backbone="resnet18", width=0.25, fpn_channels=64, extra="none", anchor_sizes=sizes, **options
    ).build(CLASSES)
    return lively(detector)


@pytest.fixture
def two_stage():
    torch.manual_seed(0)
    return lively(
        FasterRCNNBuilder(
            backbone="resnet18",
            width=0.25,
            fpn_channels=16,
            representation_size=32,
            rpn_batch_size=32,
            roi_batch_size=24,
            anchor_sizes=((8,), (16,), (32,), (64,), (96,)),
        ).build(CLASSES)
    )


def lively(detector):
    """Weights large enough for predictions to differ from place to place."""
    with torch.no_grad():
        for name, parameter in detector.model.named_parameters():
            if "head" in name and name.endswith("weight") and parameter.ndim > 1:
                parameter.normal_(std=0.05)
    return detector.eval()


def head_outputs(detector, batch):
    """Outputs and anchors of the plain head."""
    images = detector._normalise(batch)
    maps = list(detector._pyramid(images.tensors).values())
    return detector.model.head(maps), detector.model.anchor_generator(images, maps)


def test_predictions_equal_the_plain_heads(dense, make_batch):
    batch = make_batch(SIZES)
    outputs, anchors = head_outputs(dense, batch)
    plain = dense(batch, want=frozenset({"predictions"})).predictions
    inside = dense(batch, want=DENSE).predictions
    for found in (plain, inside):
        torch.testing.assert_close(found.logits, outputs["cls_logits"])
        torch.testing.assert_close(found.boxes, outputs["bbox_regression"])
        assert all(torch.equal(found.anchors, entry) for entry in anchors)
        assert sum(found.counts) == found.logits.shape[1] == found.anchors.shape[0]
        assert found.bins is None
    if dense.spec.family == "fcos":
        torch.testing.assert_close(inside.centerness, outputs["bbox_ctrness"].squeeze(2))
    else:
        assert inside.centerness is None


def test_the_layout_says_what_is_predicted_where(dense, two_stage, make_batch):
    layout = dense.spec.predictions
    found = dense(make_batch(SIZES), want=frozenset({"predictions"})).predictions
    assert layout.kind == {"fcos": "points", "retinanet": "anchors"}[dense.spec.family]
    assert (layout.head_channels, layout.head_depth, layout.box_bins) == (64, 4, 0)
    start = 0
    for sides, count in zip(layout.anchors, found.counts, strict=True):
        first = found.anchors[start : start + len(sides)]
        torch.testing.assert_close(first[:, 2:] - first[:, :2], torch.tensor(sides))
        start += count
    assert two_stage.spec.predictions.kind == "regions"


def test_losses_do_not_change_with_what_else_is_wanted(builder, make_batch):
    detector = builder.build(CLASSES).train()
    everything = TWO_STAGE if detector.spec.family == "faster_rcnn" else DENSE
    batch = make_batch(SIZES)
    for other in (everything, everything - {"features", "head_features"}):
        model = copy.deepcopy(detector)
        torch.manual_seed(1)
        expected = detector(batch, want=frozenset({"losses"})).losses
        detector.load_state_dict(model.state_dict())
        torch.manual_seed(1)
        got = detector(batch, want=other).losses
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)
    without = detector(batch, want=everything - {"losses"})
    assert not without.losses


@pytest.mark.parametrize("want", ["predictions", "assignment", "head_features", "head_tail"])
def test_only_what_is_wanted_comes(dense, make_batch, want):
    output = dense(make_batch(SIZES), want=frozenset({want}))
    assert not output.features and not output.losses
    for name in DENSE - {"features", "losses"}:
        assert (getattr(output, name) is not None) == (name == want)


def test_a_closure_computes_nothing_until_called(dense, two_stage, make_batch):
    called = []
    for part in (*dense.model.head.modules(), *two_stage.model.rpn.modules(), *two_stage.model.roi_heads.modules()):
        part.register_forward_hook(lambda *_: called.append(1))
    batch = make_batch(SIZES)
    tail = dense(batch, want=frozenset({"features", "head_tail"})).head_tail
    head = two_stage(batch, want=frozenset({"features", "region_head"})).region_head
    assert not called
    head(batch.boxes)
    assert called
    maps = [level.tensor for level in dense(batch, want=frozenset({"features"})).features]
    called.clear()
    tail(maps, maps, after=4)
    assert called


def test_the_head_runs_once(dense, make_batch):
    called = []
    for branch in (dense.model.head.classification_head, dense.model.head.regression_head):
        next(iter(branch.conv)).register_forward_hook(lambda *_: called.append(1))
    dense(make_batch(SIZES), want=DENSE)
    assert len(called) == 2 * len(dense.spec.levels)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_the_tail_on_the_first_convolutions_is_the_whole_head(dense, make_batch, after):
    batch = make_batch(SIZES)
    output = dense(batch, want=DENSE)
    inside = output.head_features
    assert len(inside.classification) == len(inside.regression) == 4
    maps = [level.tensor for level in output.features]
    classification = inside.classification[after - 1] if after else maps
    regression = inside.regression[after - 1] if after else maps
    got = output.head_tail(classification, regression, after=after)
    torch.testing.assert_close(got.logits, output.predictions.logits)
    torch.testing.assert_close(got.boxes, output.predictions.boxes)
    assert got.counts == output.predictions.counts and torch.equal(got.anchors, output.predictions.anchors)
    if dense.spec.family == "fcos":
        torch.testing.assert_close(got.centerness, output.predictions.centerness)


def test_gradient_flows_through_a_frozen_tail(dense, make_batch):
    dense.requires_grad_(False)
    with torch.no_grad():
        output = dense(make_batch(SIZES), want=frozenset({"features", "head_tail"}))
    maps = [level.tensor.clone().requires_grad_() for level in output.features]
    found = output.head_tail(maps, maps, after=2)
    (found.logits.sum() + found.boxes.sum()).backward()
    assert all(entry.grad.abs().sum() > 0 for entry in maps)
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_a_head_of_another_kind_is_not_cut(make_batch):
    class OwnBranch(RetinaNetClassificationHead):
        def forward(self, x):
            return 2 * super().forward(x)

    class OwnHead(RetinaNetHead):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.classification_head.__class__ = type(
                "Own",
                (type(self.classification_head),),
                {"forward": lambda own, x: own.__class__.__base__.forward(own, x)},
            )

    backbone = RetinaNetBuilder(backbone="resnet18", width=0.25, fpn_channels=32).build(CLASSES).model.backbone
    detector = wrap_torchvision(RetinaNet(backbone, 3, head=OwnHead(32, 9, 3)), CLASSES).eval()
    assert detector.spec.predictions.head_depth == 0
    assert detector(make_batch(SIZES), want=frozenset({"predictions"})).predictions is not None
    with pytest.raises(ValueError, match="expected any of"):
        detector(make_batch(SIZES), want=frozenset({"head_tail"}))


def test_the_assignment_is_torchvisions(dense, make_batch):
    batch = make_batch(SIZES)
    seen = []
    plain = dense.model.head.compute_loss
    dense.model.head.compute_loss = lambda *rest: seen.append(rest[-1]) or plain(*rest)
    dense(batch, want=frozenset({"losses"}))
    del dense.model.head.compute_loss
    got = dense(batch, want=frozenset({"assignment"})).assignment
    assert torch.equal(got, torch.stack(seen[0]))
    assert (got >= 0).any() and (got == -1).any()


def test_the_assignment_by_hand():
    # One level of stride 16 on 32 x 32 px: four cells, each with one anchor of 16 px about (0, 0), (16, 0), ...
    builder = RetinaNetBuilder(
        backbone="resnet18",
        width=0.25,
        fpn_channels=32,
        stages=(3,),
        extra="none",
        anchor_sizes=((16,),),
        anchor_ratios=(1.0,),
    )
    detector = builder.build(CLASSES).eval()
    boxes = torch.tensor([[9.0, 9.0, 23.0, 23.0]])
    batch = DetectionBatch.from_lists([torch.rand(3, 32, 32)], [{"boxes": boxes, "labels": torch.tensor([1])}])
    output = detector(batch, want=frozenset({"assignment", "predictions"}))
    assert output.predictions.anchors.tolist()[3] == [8.0, 8.0, 24.0, 24.0]
    assert output.assignment.tolist() == [[-1, -1, -1, 0]]


def test_ignored_boxes_keep_their_number(dense, make_batch):
    batch = make_batch([(64, 64), (64, 64)])
    expected = dense(batch, want=frozenset({"assignment"})).assignment
    targets = [
        BoxTargets(
            torch.cat([torch.tensor([[0.0, 0.0, 64.0, 64.0]]), target.boxes]),
            torch.cat([torch.tensor([0]), target.labels]),
            torch.tensor([True, False, False, False]),
        )
        for target in batch.targets
    ]
    crowded = replace(batch, targets=(targets[0], replace(batch.targets[1], ignore=torch.ones(3, dtype=torch.bool))))
    got = dense(crowded, want=frozenset({"assignment"})).assignment
    assert torch.equal(got[0], torch.where(expected[0] >= 0, expected[0] + 1, expected[0]))
    assert (got[1] < 0).all()


def test_no_boxes(dense, two_stage, make_batch):
    batch = make_batch(SIZES, boxes=0)
    assert (dense(batch, want=frozenset({"assignment"})).assignment == -1).all()
    regions = two_stage(batch, want=frozenset({"regions"})).regions
    assert (regions.labels == len(CLASSES)).all()
    empty = two_stage(batch, want=frozenset({"region_head"})).region_head(batch.boxes)
    assert empty.logits.shape == (0, 4) and empty.boxes.shape == (0, 3, 4)


def test_regions_are_those_of_the_losses(two_stage, make_batch, monkeypatch):
    batch = make_batch(SIZES)
    seen = {}
    heads = two_stage.model.roi_heads
    heads.box_predictor.register_forward_hook(lambda _, __, out: seen.setdefault("outputs", []).append(out))
    choose = type(heads).select_training_samples
    monkeypatch.setattr(
        type(heads),
        "select_training_samples",
        lambda *rest: seen.setdefault("chosen", []).append(choose(*rest)) or seen["chosen"][-1],
    )
    output = two_stage(batch, want=TWO_STAGE)
    assert len(seen["outputs"]) == len(seen["chosen"]) == 1
    (logits, codes), (regions, _, labels, _) = seen["outputs"][0], seen["chosen"][0]
    found = output.regions
    assert all(torch.equal(a, b) for a, b in zip(found.regions, regions, strict=True))
    assert torch.equal(found.labels, torch.cat(labels).sub(1).remainder(4))
    assert torch.equal(found.logits, logits[:, [1, 2, 3, 0]])
    weights = torch.tensor([10.0, 10.0, 5.0, 5.0])
    torch.testing.assert_close(found.boxes, codes.reshape(-1, 4, 4)[:, 1:] / weights)
    assert (found.labels < 3).any() and (found.labels == 3).any()
    torch.testing.assert_close(
        output.losses["loss_classifier"], torch.nn.functional.cross_entropy(found.logits, found.labels)
    )


def test_the_region_head_equals_the_box_heads_on_the_same_boxes(two_stage, make_batch):
    batch = make_batch(SIZES)
    output = two_stage(batch, want=TWO_STAGE)
    got = output.region_head(output.regions.regions)
    torch.testing.assert_close(got.logits, output.regions.logits)
    torch.testing.assert_close(got.boxes, output.regions.boxes)
    assert got.labels is None
    # At a padded size that is not the first one's too.
    larger = make_batch([(96, 128)])
    heads, images = two_stage.model.roi_heads, two_stage._normalise(larger)
    heads.box_roi_pool.scales = None
    pooled = heads.box_roi_pool(two_stage._pyramid(images.tensors), list(larger.boxes), images.image_sizes)
    logits, _ = heads.box_predictor(heads.box_head(pooled))
    got = two_stage(larger, want=frozenset({"region_head"})).region_head(larger.boxes)
    torch.testing.assert_close(got.logits, logits[:, [1, 2, 3, 0]])


@pytest.mark.parametrize("family", ["dense", "two_stage"])
def test_classes_come_in_drkds_order(dense, two_stage, make_batch, family):
    model = (dense if family == "dense" else two_stage).model
    plain = wrap_torchvision(model, CLASSES).eval()
    first = int(family == "two_stage")
    turned = wrap_torchvision(model, ("cup", "cat"), label_ids=(2 + first, first)).eval()
    batch = make_batch(SIZES)
    batch = replace(batch, targets=tuple(replace(t, labels=torch.tensor([1, 1, 0])) for t in batch.targets))
    order = [2, 0]
    if family == "dense":
        want = frozenset({"predictions"})
        expected, got = plain(batch, want=want).predictions, turned(batch, want=want).predictions
        assert torch.equal(got.logits, expected.logits[..., order])
        assert torch.equal(got.boxes, expected.boxes)
    else:
        want = frozenset({"regions"})
        torch.manual_seed(1)
        got = turned(batch, want=want).regions
        expected = plain(batch, want=frozenset({"region_head"})).region_head(got.regions)
        torch.testing.assert_close(got.logits, expected.logits[:, [*order, 3]])
        torch.testing.assert_close(got.boxes, expected.boxes[:, order])
        assert set(got.labels.tolist()) == {0, 1, 2}
    blind = wrap_torchvision(model, ("cat", "ufo"), label_ids=(first, -1)).eval()
    assert blind.spec.predictions.missing_classes == blind.missing_classes == ("ufo",)
    # The class that the head does not know has a place, so that methods can leave it out; the others stay.
    if family == "dense":
        got = blind(batch, want=frozenset({"predictions"})).predictions
        assert got.logits.shape[-1] == 2
        assert torch.equal(got.logits[..., 0], expected.logits[..., 0])
    else:
        got = blind(batch, want=frozenset({"region_head"})).region_head(got.regions)
        assert got.logits.shape[-1] == 3
        torch.testing.assert_close(got.logits[:, 0], expected.logits[:, 0])


def test_what_a_detector_has_not_is_refused(dense, two_stage, make_batch):
    with pytest.raises(ValueError, match=r"expected any of .*'predictions'.* got \['regions'\]"):
        dense(make_batch(SIZES), want=frozenset({"regions"}))
    with pytest.raises(ValueError, match=r"expected any of .*'regions'.* got \['predictions'\]"):
        two_stage(make_batch(SIZES), want=frozenset({"predictions"}))


def test_train_and_eval_mode_show_the_same(dense, two_stage, make_batch):
    batch = make_batch(SIZES)
    for detector, want in ((dense, DENSE), (two_stage, TWO_STAGE)):
        before = copy.deepcopy(detector.state_dict())
        for mode in (False, True):
            detector.train(mode)
            output = detector(batch, want=want)
            assert all(getattr(output, name) for name in want if name in ("features", "losses"))
            assert all(getattr(output, name) is not None for name in want)
            assert detector.training == mode and all(part.training == mode for part in detector.modules())
            detector.load_state_dict(before)


def test_half_precision_and_channels_last(dense, two_stage, make_batch):
    batch = make_batch(SIZES)
    for detector, want in ((dense, DENSE), (two_stage, TWO_STAGE)):
        detector.to(memory_format=torch.channels_last).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = detector(batch, want=want)
            if output.region_head is not None:
                assert output.region_head(output.regions.regions).logits.isfinite().all()
            else:
                inside = output.head_features
                found = output.head_tail(inside.classification[2], inside.regression[2], after=3)
                assert found.logits.isfinite().all()
        assert sum(output.losses.values()).isfinite()
