"""Under autocast boxes stay in float32: bfloat16 knows a place beyond 512 px to 4 px only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torchvision.models.detection.roi_heads import RoIHeads

from drkd.adapters import MaskRCNNBuilder, SSDLiteBuilder
from drkd.adapters.box_precision import exact_regions, float32_likes, widen
from drkd.adapters.torchvision import PyramidBuilder
from drkd.contracts import BoxTargets, DetectionBatch, Detector

CLASSES = ("cat", "dog", "cup")
# Far out, with sides that bfloat16 does not know there.
FAR = torch.tensor([[701.3, 11.7, 712.9, 24.2], [1001.2, 30.1, 1017.7, 51.9]])


def _wide_batch(device: str = "cpu") -> DetectionBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 1088, generator=generator)
    targets = tuple(BoxTargets(FAR.clone(), torch.tensor([0, 2]), torch.zeros(2, dtype=torch.bool)) for _ in range(2))
    size = ((64, 1088),) * 2
    return DetectionBatch(images, size, size, targets, (0, 1)).to(device)


def _halved() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _same(found: Detector, batch: DetectionBatch) -> None:
    plain = found.eval().detect(batch)
    assert sum(len(entry.scores) for entry in plain)
    with _halved():
        other = found.detect(batch)
    for one, two in zip(plain, other, strict=True):
        assert torch.equal(one.boxes, two.boxes) and torch.equal(one.scores, two.scores)
        assert torch.equal(one.labels, two.labels)


def test_detections_are_those_without_autocast(builder: PyramidBuilder) -> None:
    _same(builder.build(CLASSES), _wide_batch())


def test_detections_of_an_ssd_are_those_without_autocast() -> None:
    torch.manual_seed(0)
    _same(SSDLiteBuilder(score_threshold=0.0).build(CLASSES), _wide_batch())


def test_detections_of_other_libraries_are_those_without_autocast() -> None:
    pytest.importorskip("ultralytics")
    from yolos import build_yolo, lively

    _same(lively(build_yolo()), _wide_batch())


@pytest.mark.parametrize("kind", ["rt_detr", "deformable_detr"])
def test_detections_of_detrs_are_those_without_autocast(kind: str) -> None:
    pytest.importorskip("transformers")
    from test_transformers import tiny

    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    size = ((96, 96),) * 2
    _same(tiny(kind), replace(_wide_batch(), images=images, sizes=size, original_sizes=size))


def test_a_model_of_16_bit_weights_is_left_to_autocast(builder: PyramidBuilder) -> None:
    detector = builder.build(CLASSES).eval()
    detector.model.to(torch.bfloat16)
    with _halved():
        assert len(detector.detect(_wide_batch())) == 2


@pytest.mark.parametrize("masks", [False, True])
def test_the_box_head_learns_from_the_boxes_as_they_are(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ground truth is among the proposals that it is trained on, and gave its regression targets."""
    options = {"backbone": "resnet18", "width": 0.25, "fpn_channels": 16, "representation_size": 32}
    sizes = ((8,), (16,), (32,), (64,), (96,))
    torch.manual_seed(0)
    detector = MaskRCNNBuilder(anchor_sizes=sizes, **options).build(CLASSES).train()
    batch = _wide_batch()
    if masks:
        drawn = torch.zeros(2, 64, 1088, dtype=torch.bool)
        drawn[0, 12:24, 702:712] = drawn[1, 31:51, 1002:1017] = True
        batch = replace(batch, targets=tuple(replace(target, masks=drawn) for target in batch.targets))
    seen: list[torch.Tensor] = []
    select = RoIHeads.select_training_samples

    def spy(self: RoIHeads, proposals: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]):  # type: ignore[no-untyped-def]
        found = select(self, proposals, targets)
        seen.extend([*found[0], *found[3]])
        return found

    monkeypatch.setattr(RoIHeads, "select_training_samples", spy)
    want = frozenset({"losses", "regions"}) if masks else frozenset({"regions"})
    with _halved():
        output = detector(batch, want=want)
    assert seen and all(tensor.dtype == torch.float32 for tensor in seen)
    assert output.regions is not None
    boxes = torch.cat(list(output.regions.regions))
    for far in FAR:
        assert (boxes == far).all(dim=1).any()
    assert not [hook for part in detector.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]
    if masks:
        total = sum(output.losses.values())
        total.backward()
        assert total.isfinite()


@pytest.mark.parametrize("builder", ["retinanet", "fcos"], indirect=True)
def test_anchors_and_targets_of_one_stage_are_those_without_autocast(builder: PyramidBuilder) -> None:
    detector = builder.build(CLASSES).train()
    batch = _wide_batch()
    want = frozenset({"losses", "predictions", "assignment"})
    plain = detector(batch, want=want)
    with _halved():
        other = detector(batch, want=want)
    assert torch.equal(plain.predictions.anchors, other.predictions.anchors)
    assert torch.equal(plain.assignment, other.assignment)
    for name, loss in plain.losses.items():
        assert other.losses[name].item() == pytest.approx(loss.item(), rel=0.02), name


def test_default_boxes_of_an_ssd_are_those_without_autocast() -> None:
    torch.manual_seed(0)
    detector = SSDLiteBuilder().build(CLASSES).train()
    batch, want = _wide_batch(), frozenset({"losses", "predictions", "assignment"})
    plain = detector(batch, want=want)
    with _halved():
        other = detector(batch, want=want)
    assert torch.equal(plain.predictions.anchors, other.predictions.anchors)
    assert torch.equal(plain.assignment, other.assignment)


def test_a_yolos_cells_lie_where_they_are_beyond_1024_px(make_batch: Callable[..., DetectionBatch]) -> None:
    pytest.importorskip("ultralytics")
    from yolos import build_yolo

    detector = build_yolo().train()
    places: list[torch.Tensor] = []
    criterion = detector._criterion(torch.device("cpu"))
    inner = criterion._heads[0][0]
    assign = inner.assigner.forward
    inner.assigner.forward = lambda *args, **kwargs: places.append(args[2]) or assign(*args, **kwargs)
    batch = _wide_batch()
    for context in (torch.autocast("cpu", enabled=False), _halved()):
        with context:
            detector(batch, want=frozenset({"losses"}))
    assert len(places) == 2 and torch.equal(places[0], places[1])


def test_a_part_that_is_not_there_leaves_no_hook_behind() -> None:
    rpn, heads = torch.nn.Module(), torch.nn.Module()
    rpn.head, heads.box_predictor = torch.nn.Identity(), torch.nn.Identity()
    with _halved(), pytest.raises(AttributeError), exact_regions(rpn, heads, torch.device("cpu")):
        pass
    assert not rpn.head._forward_hooks and not heads.box_predictor._forward_hooks


def test_widening_reaches_into_collections_and_takes_no_memory_for_stand_ins() -> None:
    half, whole = torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64)
    found = widen(([half, whole], {"boxes": half}, 3))
    assert (found[0][0].dtype, found[0][1].dtype, found[1]["boxes"].dtype) == (
        torch.float32,
        torch.float64,
        torch.float32,
    )
    assert found[2] == 3
    (stand_in, kept) = float32_likes([torch.ones(2, 3, 4, 5, dtype=torch.bfloat16), whole])
    assert stand_in.shape == (2, 3, 4, 5) and stand_in.dtype == torch.float32 and kept is whole
    assert stand_in.untyped_storage().nbytes() == 4
