"""Instance masks: from the COCO file to the batch, and never unless asked for."""

from __future__ import annotations

import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from torchvision import tv_tensors

from drkd.contracts import DrkdError
from drkd.data.dataset import DetectionDataset, load_split
from drkd.data.masks import pack_segmentation, unpack_masks
from drkd.data.transforms import collate, train_transforms


@pytest.fixture
def folder(coco):
    """Two boxes with masks in image 7 (the first has no area and is dropped), one without any in image 3."""
    coco.document["annotations"] = [
        {"id": 4, "image_id": 7, "category_id": 2, "bbox": [5, 5, 0, 3], "segmentation": [[5, 5, 5, 8, 5, 5]]},
        {"id": 1, "image_id": 3, "category_id": 18, "bbox": [10, 5, 20, 10], "segmentation": [[10, 5, 30, 5, 30, 15]]},
        {
            "id": 2,
            "image_id": 7,
            "category_id": 2,
            "bbox": [0, 0, 60, 20],
            "segmentation": {"size": [40, 60], "counts": [0] + [20] * 120},
        },
        {
            "id": 5,
            "image_id": 7,
            "category_id": 90,
            "bbox": [40, 0, 20, 40],
            "segmentation": [[40, 0, 60, 0, 60, 40, 40, 40]],
        },
    ]
    coco.write()
    coco.write_image("a.png")
    coco.write_image("b.png")
    return coco


def test_masks_are_rasterised_and_moved_with_their_boxes(folder):
    split = load_split(folder.root, "train", masks=True)
    plain = train_transforms(min_size=40, max_size=60, horizontal_flip=0.0)
    sample = DetectionDataset(split, plain)[0]
    masks = sample.targets.masks
    assert masks is not None and masks.dtype == torch.bool and masks.shape == (2, 40, 60)
    upper, right = torch.zeros(2, 40, 60, dtype=torch.bool)
    upper[:20], right[:, 40:] = True, True
    assert torch.equal(masks[0], upper) and torch.equal(masks[1], right)
    assert sample.targets.labels.tolist() == [0, 2]
    # Mirrored and twice as large: the right part is the left one now.
    moved = DetectionDataset(split, train_transforms(min_size=80, max_size=120, horizontal_flip=1.0))[0]
    assert moved.targets.masks is not None
    assert torch.equal(moved.targets.masks[1], torch.zeros(80, 120).index_fill(1, torch.arange(40), 1).bool())
    assert moved.targets.boxes[1].tolist() == [0, 0, 40, 80]
    batch = collate([sample, DetectionDataset(split, plain)[1]])
    kept = batch.to("cpu").targets[1].masks
    assert kept is not None and kept.shape == (1, 40, 60) and 80 < int(kept.sum()) < 120


def test_the_canvas_of_zoom_out_belongs_to_no_instance(folder):
    split = load_split(folder.root, "train", masks=True)
    moved = DetectionDataset(split, train_transforms(min_size=40, max_size=60, horizontal_flip=0.0, zoom_out=1.0))[0]
    masks, boxes = moved.targets.masks, moved.targets.boxes
    assert masks is not None
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        rows, columns = torch.where(mask)
        assert rows.min() >= y1 - 1 and rows.max() <= y2 + 1 and columns.min() >= x1 - 1 and columns.max() <= x2 + 1


def test_nobody_pays_who_does_not_ask(folder):
    folder.document["annotations"][1].pop("segmentation")
    folder.write()
    split = load_split(folder.root, "train")
    assert all(record.masks is None for record in split.records)
    seen = []

    def transforms(image, target):
        seen.append(set(target))
        return train_transforms(min_size=40, max_size=60)(tv_tensors.Image(image), target)

    assert DetectionDataset(split, transforms)[0].targets.masks is None
    assert seen == [{"boxes", "labels", "ignore"}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "annotation 1, field 'segmentation': expected polygons"),
        ([], "at least three corners"),
        ([[1, 2, 3, 4]], "at least three corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "at least three corners"),
        ([["a", 2, 3, 4, 5, 6]], "at least three corners"),
        ({"size": [2, 2], "counts": [4]}, r"size \[40, 60\]"),
        ({"size": [40, 60], "counts": [4]}, "add up to 2400 px"),
        ({"size": [40, 60], "counts": "abc"}, "annotation 1, field 'segmentation': .*damaged, or of another image"),
        ({"size": [40, 60], "counts": "0"}, "damaged, or of another image"),
        ({"size": [40, 60], "counts": "\u00e9"}, "damaged, or of another image"),
        ({"size": [40, 60], "counts": "X" * 50}, "damaged, or of another image"),
    ],
)
def test_a_segmentation_that_cannot_be_used_is_named(folder, value, message):
    folder.document["annotations"][1]["segmentation"] = value
    folder.write()
    with pytest.raises(DrkdError, match=message):
        load_split(folder.root, "train", masks=True)


def test_compressed_run_lengths_round_trip():
    packed = pack_segmentation([[2, 1, 8, 1, 8, 5, 2, 5]], (10, 12))
    assert not isinstance(packed, str)
    again = pack_segmentation({"size": [10, 12], "counts": packed.counts.decode()}, (10, 12))
    assert again == packed
    found = unpack_masks([packed, None], (10, 12))
    assert found[0, 1:5, 2:8].all() and found[0].sum() == 24 and not found[1].any()


def test_corners_far_outside_of_the_image_cost_nothing():
    far = pack_segmentation([[0, 0, 9e8, 0, 9e8, 5, 0, 5]], (10, 12))
    assert not isinstance(far, str)
    found = unpack_masks([far], (10, 12))
    assert found[0, :5].all() and not found[0, 5:].any()
    near = [[-3.0, 1.0, 14.5, 1.0, 8.0, 12.0]]
    assert pack_segmentation(near, (10, 12)).counts == coco_mask.merge(coco_mask.frPyObjects(near, 10, 12))["counts"]


@pytest.mark.parametrize(
    "value",
    [
        {"size": 40, "counts": [2400]},
        {"size": None, "counts": [2400]},
        {"size": [40, 60], "counts": [-5, 2405]},
        {"size": [40, 60], "counts": [0.5, 2399.5]},
        {"size": [40, 60], "counts": {"a": 1}},
    ],
)
def test_damaged_run_lengths_are_said_to_be(value):
    assert "run lengths" in pack_segmentation(value, (40, 60))
