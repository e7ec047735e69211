"""The vocabulary: what it refuses, and batches made of plain lists."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from drkd.contracts import BoxTargets, DetectionBatch


def test_lists_become_a_padded_batch_in_one_frame() -> None:
    images = [torch.full((3, 20, 40), 0.5), torch.full((3, 33, 10), 0.25)]
    targets = [
        {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    batch = DetectionBatch.from_lists(images, targets, first_label=1)
    assert batch.image_size == (64, 64) and batch.sizes == ((20, 40), (33, 10))
    assert float(batch.images[0, :, :20, :40].min()) == 0.5 and float(batch.images[0].sum()) == 0.5 * 3 * 20 * 40
    assert batch.targets[0].labels.tolist() == [0] and len(batch.boxes[1]) == 0


def test_a_detectors_transform_moves_images_boxes_and_masks_and_leaves_the_lists_alone() -> None:
    transform = GeneralizedRCNNTransform(64, 128, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    image, boxes = torch.rand(3, 32, 48), torch.tensor([[4.0, 8.0, 20.0, 30.0]])
    masks = torch.zeros(1, 32, 48, dtype=torch.uint8)
    masks[0, 8:30, 4:20] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}
    nothing = {"boxes": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    batch = DetectionBatch.from_lists([image, image], [target, nothing], first_label=1, transform=transform)
    assert batch.sizes == ((64, 96),) * 2
    assert batch.original_sizes == ((32, 48),) * 2
    assert torch.equal(batch.boxes[0], 2 * boxes)
    assert batch.boxes[1].shape == (0, 4)
    moved = batch.targets[0].masks
    assert moved is not None
    assert moved.shape == (1, 64, 96)
    assert moved.sum() == 4 * masks.sum()
    assert torch.equal(target["boxes"], boxes)


def test_a_transform_says_how_far_to_pad() -> None:
    square = GeneralizedRCNNTransform(
        300, 300, image_mean=[0.0] * 3, image_std=[1.0] * 3, size_divisible=1, fixed_size=(300, 300)
    )
    target = {"boxes": torch.tensor([[4.0, 8.0, 20.0, 30.0]]), "labels": torch.tensor([1])}
    images = [torch.rand(3, 32, 48)]
    assert DetectionBatch.from_lists(images, [target], transform=square).image_size == (300, 300)
    assert DetectionBatch.from_lists(images, [target], transform=square, size_divisor=32).image_size == (320, 320)


def test_wrong_lists_are_refused() -> None:
    image, target = torch.zeros(3, 8, 8), {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "labels": torch.tensor([0])}
    with pytest.raises(ValueError, match="one target an image"):
        DetectionBatch.from_lists([image, image], [target])
    with pytest.raises(ValueError, match="below first_label=1"):
        DetectionBatch.from_lists([image], [target], first_label=1)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)"):
        DetectionBatch(torch.zeros(1, 1, 8, 8), ((8, 8),), ((8, 8),), (), (0,))
    with pytest.raises(ValueError, match=r"boxes \(N, 4\)"):
        BoxTargets(torch.zeros(2, 4), torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), {}, r"image 0: expected floats in \[0, 1\], got torch.uint8"),
        (torch.full((1, 3, 32, 32), 200.0), {}, r"image 0: expected values in \[0, 1\], got larger"),
        (torch.zeros(1, 1, 32, 32), {}, r"image 0: expected a tensor \(3, H, W\), got \(1, 32, 32\)"),
        (["a.jpg"], {}, r"image 0: expected a tensor \(3, H, W\), got str"),
        (None, {"labels": None}, "target 0: expected tensors boxes and labels, got none called labels"),
        (None, {"labels": torch.ones(1)}, r"target 0: expected integer labels \(N,\), got \(1,\) of torch.float32"),
        (None, {"boxes": torch.ones(2, 4)}, r"target 0: expected boxes \(1, 4\), got \(2, 4\)"),
        (None, {"boxes": torch.tensor([[20.0, 20.0, 5.0, 6.0]])}, "target 0: expected boxes as xyxy .* xywh"),
        (None, {"boxes": torch.tensor([[20.0, 20.0, 20.0, 26.0]])}, "target 0: expected boxes as xyxy .* no area"),
        (None, {"boxes": torch.full((1, 4), float("nan"))}, "target 0: expected boxes as xyxy .* NaN"),
        (None, {"boxes": torch.tensor([[0.1, 0.2, 0.5, 1.0]])}, "target 0: expected boxes in px, .* relative"),
    ],
)
def test_lists_that_are_not_as_described_are_refused(images, changes, message):
    target = {"boxes": torch.tensor([[2.0, 3.0, 20.0, 30.0]]), "labels": torch.tensor([0])} | changes
    with pytest.raises(ValueError, match=message):
        DetectionBatch.from_lists(torch.rand(1, 3, 32, 32) if images is None else images, [target])


def test_a_tensor_of_images_and_no_boxes_of_any_shape_are_taken():
    empty = {"boxes": torch.tensor([]), "labels": torch.tensor([])}
    batch = DetectionBatch.from_lists(torch.rand(2, 3, 32, 40), [empty, empty])
    assert [tuple(boxes.shape) for boxes in batch.boxes] == [(0, 4), (0, 4)]
