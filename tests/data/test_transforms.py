"""Transforms keep boxes on their objects (hand-computed), and padding is zero at the right and the bottom."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision import tv_tensors

from drkd.contracts import BoxTargets, DetectionBatch
from drkd.data import transforms
from drkd.data.dataset import Sample
from drkd.data.transforms import collate, eval_transforms, resized_size, train_transforms


def _apply(transforms, boxes: list[list[float]], *, size: tuple[int, int] = (40, 60)):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for left, top, right, bottom in boxes:
        image[:, int(top) : int(bottom), int(left) : int(right)] = 255
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=size),
        "labels": torch.arange(len(boxes)),
        "ignore": torch.zeros(len(boxes), dtype=torch.bool),
    }
    moved, target = transforms(tv_tensors.Image(image), target)
    return moved.as_subclass(torch.Tensor), target["boxes"].as_subclass(torch.Tensor)


@pytest.mark.parametrize(
    ("size", "min_size", "max_size", "expected"),
    [
        ((40, 60), 80, 200, (80, 120)),
        ((40, 60), 80, 90, (60, 90)),  # the long side is the limit
        ((60, 40), 20, 200, (30, 20)),
        ((480, 640), 800, 1333, (800, 1067)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((96, 128), 128, 128, (96, 128)),
        ((1, 1000), 10, 100, (1, 100)),  # no side vanishes
    ],
)
def test_resize_keeps_the_ratio(size, min_size, max_size, expected) -> None:
    assert resized_size(size, min_size, max_size) == expected


def test_evaluation_scales_image_and_boxes_alike() -> None:
    image, boxes = _apply(eval_transforms(min_size=20, max_size=100), [[10.0, 8.0, 30.0, 24.0]])

    assert image.shape == (3, 20, 30)
    assert boxes.tolist() == [[5.0, 4.0, 15.0, 12.0]]
    assert (image.dtype, float(image.max()), float(image.min())) == (torch.float32, 1.0, 0.0)


def test_boxes_follow_the_rounded_size() -> None:
    image, boxes = _apply(eval_transforms(min_size=27, max_size=100), [[0.0, 0.0, 60.0, 40.0]])

    assert image.shape == (3, 27, 40)  # 40.5 rounds to even
    assert boxes.tolist() == [[0.0, 0.0, 40.0, 27.0]]


def test_flip_mirrors_boxes() -> None:
    image, boxes = _apply(train_transforms(min_size=40, max_size=60, horizontal_flip=1.0), [[10.0, 8.0, 30.0, 24.0]])

    assert boxes.tolist() == [[30.0, 8.0, 50.0, 24.0]]
    assert image[0, 8:24, 30:50].min() == 1.0
    assert image.sum() == 3 * 16 * 20


def test_digits_are_never_mirrored() -> None:
    transforms = train_transforms(min_size=40, max_size=60, horizontal_flip=0.0)

    for _ in range(20):
        assert _apply(transforms, [[10.0, 8.0, 30.0, 24.0]])[1].tolist() == [[10.0, 8.0, 30.0, 24.0]]


def test_several_sizes_are_all_drawn_and_evaluation_takes_the_largest() -> None:
    transforms = train_transforms(min_size=[20, 40], max_size=100, horizontal_flip=0.0)

    sizes = {_apply(transforms, [[0.0, 0.0, 6.0, 4.0]])[0].shape[1] for _ in range(30)}

    assert sizes == {20, 40}
    assert _apply(eval_transforms(min_size=[20, 40], max_size=100), [[0.0, 0.0, 6.0, 4.0]])[0].shape == (3, 40, 60)


def test_zoom_out_keeps_boxes_on_their_objects() -> None:
    transforms = train_transforms(min_size=40, max_size=60, horizontal_flip=0.0, zoom_out=1.0)

    for _ in range(10):
        image, boxes = _apply(transforms, [[10.0, 8.0, 30.0, 24.0]])
        left, top, right, bottom = boxes[0].round().int().tolist()
        assert image[0, (top + bottom) // 2, (left + right) // 2] == 1.0
        assert image[0, top + 1 : bottom - 1, left + 1 : right - 1].mean() > 0.95


def test_random_crop_keeps_boxes_on_their_objects_and_empties_those_outside() -> None:
    transforms = train_transforms(min_size=40, max_size=60, horizontal_flip=0.0, random_crop=1.0)

    grown, emptied = 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, boxes = _apply(transforms, [[4.0, 4.0, 16.0, 14.0], [40.0, 20.0, 56.0, 36.0]])
        for left, top, right, bottom in boxes.round().int().tolist():
            if right <= left or bottom <= top:
                emptied += 1
                continue
            assert image[0, top + 1 : bottom - 1, left + 1 : right - 1].mean() > 0.95
            grown += right - left > 16
    assert grown and emptied


def test_photometric_jitter_leaves_boxes_and_range_alone() -> None:
    image, boxes = _apply(
        train_transforms(min_size=40, max_size=60, horizontal_flip=0.0, photometric=True), [[1, 2, 3, 4.0]]
    )

    assert boxes.tolist() == [[1, 2, 3, 4]]
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_colours_keep_their_order_where_they_are_to() -> None:
    """Torchvision's distortion makes green or blue of red in half of the images."""
    red = tv_tensors.Image(torch.stack([torch.full((40, 60), value, dtype=torch.uint8) for value in (255, 40, 20)]))
    strongest = {}
    for choice in (True, "keep_channels"):
        torch.manual_seed(0)
        jitter = train_transforms(min_size=40, max_size=60, horizontal_flip=0.0, photometric=choice).transforms[0]
        seen = [jitter(red) for _ in range(60)]
        assert len({tuple(image.float().mean(dim=(1, 2)).tolist()) for image in seen}) > 30
        strongest[choice] = {int(image.float().mean(dim=(1, 2)).argmax()) for image in seen}
    assert strongest == {True: {0, 1, 2}, "keep_channels": {0}}
    with pytest.raises(ValueError, match="keep_channels"):
        train_transforms(photometric="keep")  # type: ignore[arg-type]


def test_images_without_boxes_pass() -> None:
    transforms = train_transforms(min_size=40, max_size=60, photometric=True, zoom_out=1.0, random_crop=1.0)
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(40, 60)),
        "labels": torch.zeros(0, dtype=torch.int64),
        "ignore": torch.zeros(0, dtype=torch.bool),
    }

    _, moved = transforms(tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8)), target)

    assert moved["boxes"].shape == (0, 4)


def _sample(height: int, width: int, image_id: int) -> Sample:
    targets = BoxTargets(torch.tensor([[0.0, 0.0, 2.0, 3.0]]), torch.tensor([1]), torch.tensor([False]))
    return Sample(torch.ones(3, height, width), targets, (2 * height, 2 * width), image_id)


def test_collate_pads_with_zeros_to_the_divisor() -> None:
    batch = collate([_sample(30, 50, 5), _sample(40, 20, 6)], size_divisor=16)

    assert batch.images.shape == (2, 3, 48, 64)
    assert batch.sizes == ((30, 50), (40, 20))
    assert batch.original_sizes == ((60, 100), (80, 40))
    assert batch.image_ids == (5, 6)
    for image, (height, width) in zip(batch.images, batch.sizes, strict=True):
        assert image[:, :height, :width].min() == 1
        assert image.sum() == 3 * height * width
    assert batch.boxes[1].tolist() == [[0.0, 0.0, 2.0, 3.0]]


def test_collate_pads_to_a_fixed_size() -> None:
    assert collate([_sample(30, 50, 5)], size_divisor=32, pad_to=(128, 128)).images.shape == (1, 3, 128, 128)
    assert collate([_sample(30, 150, 5)], size_divisor=32, pad_to=(128, 128)).images.shape == (1, 3, 128, 160)


def test_in_a_worker_a_batch_lies_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    none = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    masks = replace(_sample(30, 50, 5).targets, masks=torch.ones(1, 30, 50, dtype=torch.bool))
    samples = [replace(_sample(30, 50, 5), targets=masks), replace(_sample(40, 20, 6), targets=none)]

    def tensors(batch: DetectionBatch) -> list[torch.Tensor]:
        boxes = [tensor for own in batch.targets for tensor in (own.boxes, own.labels, own.ignore, own.masks)]
        return [batch.images, *(tensor for tensor in boxes if tensor is not None)]

    alone = collate(samples)
    assert not any(tensor.is_shared() for tensor in tensors(alone))
    monkeypatch.setattr(transforms, "get_worker_info", object)
    shared = collate(samples)
    assert all(tensor.is_shared() for tensor in tensors(shared)) and len(tensors(shared)) == 8
    assert all(torch.equal(*pair) for pair in zip(tensors(shared), tensors(alone), strict=True))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="got 0 and 32"):
        collate([])
    with pytest.raises(ValueError, match="positive min_size"):
        train_transforms(min_size=[])


def test_an_image_may_become_a_single_px():
    image, _ = _apply(eval_transforms(min_size=1, max_size=1), [[10.0, 8.0, 30.0, 24.0]])
    assert image.shape == (3, 1, 1)


@pytest.mark.parametrize("size", [(1, 50), (50, 1)])
def test_random_crop_leaves_lines_alone(size: tuple[int, int]) -> None:
    transforms = train_transforms(min_size=1, max_size=60, horizontal_flip=0.0, random_crop=1.0)
    boxes = tv_tensors.BoundingBoxes([[0, 0, size[1], size[0]]], format="XYXY", canvas_size=size)
    for seed in range(8):
        torch.manual_seed(seed)
        image, kept = transforms(tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8)), boxes)
        assert image.shape[-2:] == size and kept.tolist() == boxes.tolist()
