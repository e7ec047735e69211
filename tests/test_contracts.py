"""The vocabulary: what it refuses, and batches made of plain lists."""

from __future__ import annotations

import pytest
import torch

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


def test_wrong_lists_are_refused() -> None:
    image, target = torch.zeros(3, 8, 8), {"boxes": torch.zeros(1, 4), "labels": torch.tensor([0])}
    with pytest.raises(ValueError, match="one target an image"):
        DetectionBatch.from_lists([image, image], [target])
    with pytest.raises(ValueError, match="below first_label=1"):
        DetectionBatch.from_lists([image], [target], first_label=1)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\)"):
        DetectionBatch(torch.zeros(1, 1, 8, 8), ((8, 8),), ((8, 8),), (), (0,))
    with pytest.raises(ValueError, match=r"boxes \(N, 4\)"):
        BoxTargets(torch.zeros(2, 4), torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.bool))
