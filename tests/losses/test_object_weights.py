"""Weights by hand: the objects of an image count alike, images too, the rest is spread, nothing is lost outside."""

from __future__ import annotations

import pytest
import torch

from drkd.losses import PixelRelationLoss, object_weights

NONE = torch.zeros(0, 4)


def test_two_boxes_by_hand():
    # 4 x 4 px cells of an 8 x 16 px image: a box in one cell, and one over the four cells of the right half.
    boxes = [torch.tensor([[1.0, 1.0, 3.0, 2.0], [8.0, 0.0, 16.0, 8.0]]), NONE]
    weights = object_weights(boxes, map_size=(2, 4), image_size=(8, 16), share=0.5)
    expected = torch.full((2, 2, 4), 1 / 16)
    expected[0] = 0.5 / 16
    expected[0, 0, 0] += 0.125
    expected[0, :, 2:] += 0.125 / 4
    torch.testing.assert_close(weights, expected)
    assert weights.sum().item() == pytest.approx(1)
    # A mean over images: the same one by one.
    alone = [object_weights([own], map_size=(2, 4), image_size=(8, 16), share=0.5) for own in boxes]
    torch.testing.assert_close(torch.cat(alone) / 2, weights)


def test_a_box_counts_by_the_share_that_it_covers_and_one_that_covers_nothing_not_at_all():
    boxes = [torch.tensor([[3.0, 0.0, 7.0, 4.0]])]
    weights = object_weights(boxes, map_size=(1, 2), image_size=(4, 8), share=1.0)
    torch.testing.assert_close(weights, torch.tensor([[[0.25, 0.75]]]))
    outside, flat = [20.0, 0.0, 24.0, 4.0], [3.0, 1.0, 3.0, 2.0]
    for wrong in (outside, flat):
        mixed = object_weights(
            [torch.cat([boxes[0], torch.tensor([wrong])])], map_size=(1, 2), image_size=(4, 8), share=1
        )
        torch.testing.assert_close(mixed, weights)
        alone = object_weights([torch.tensor([wrong])], map_size=(1, 2), image_size=(4, 8), share=1.0)
        torch.testing.assert_close(alone, torch.full((1, 1, 2), 0.5))


def test_without_boxes_or_share_all_cells_count_alike():
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    for boxes, share in (([NONE, NONE], 0.7), ([box, NONE], 0.0)):
        weights = object_weights(boxes, map_size=(2, 3), image_size=(8, 12), share=share)
        torch.testing.assert_close(weights, torch.full((2, 2, 3), 1 / 12))
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5"):
        object_weights([box], map_size=(2, 3), image_size=(8, 12), share=1.5)


def test_the_pixel_term_with_weights():
    torch.manual_seed(0)
    plain, weighed = (PixelRelationLoss(4, 4, nodes=2, states=4, object_share=share) for share in (0.0, 0.6))
    weighed.load_state_dict(plain.state_dict())
    student, teacher = torch.randn(2, 4, 2, 4, requires_grad=True), torch.randn(2, 4, 2, 4)
    boxes = [torch.tensor([[1.0, 1.0, 3.0, 2.0]]), NONE]
    ours, theirs = plain.maps(student, teacher)
    error = (ours - theirs).square().mean(1)
    assert plain.weigh(teacher, boxes, image_size=(8, 16)) is None
    got = weighed(student, teacher, weighed.weigh(teacher, boxes, image_size=(8, 16)))
    torch.testing.assert_close(got, (0.4 * error[0].mean() + 0.6 * error[0, 0, 0] + error[1].mean()) / 2)
    rooted = PixelRelationLoss(4, 4, nodes=2, states=4, object_share=0.6, distance="rms")
    rooted.load_state_dict(plain.state_dict())
    weights = rooted.weigh(teacher, boxes, image_size=(8, 16))
    torch.testing.assert_close(rooted(student, teacher, weights), got.sqrt())
    torch.testing.assert_close(rooted(student, teacher), plain(student, teacher).sqrt())
    got.backward()
    assert student.grad is not None and student.grad.isfinite().all()
    nothing = weighed.weigh(teacher, [NONE, NONE], image_size=(8, 16))
    torch.testing.assert_close(weighed(student, teacher, nothing), plain(student, teacher))
    with pytest.raises(ValueError, match="boxes of 2 images, got 1"):
        weighed.weigh(teacher, boxes[:1], image_size=(8, 16))
    for wrong in ({"object_share": 1.5}, {"object_share": 0.5, "distance": "frobenius"}):
        with pytest.raises(ValueError, match="object share in"):
            PixelRelationLoss(4, 4, **wrong)


@pytest.mark.parametrize("side", [16, 8, 4])
def test_at_one_gradient_norm_a_share_on_objects_quiets_the_background_more_than_it_says(side: int) -> None:
    """What docs/method.md says of balanced weights: of differences alike everywhere, in cells without a box."""
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(8, 3, 2, generator=draw) * 80
    boxes = list(torch.cat([corners, corners + 8 + 40 * torch.rand(8, 3, 1, generator=draw)], dim=2))
    weights = object_weights(boxes, map_size=(side, side), image_size=(128, 128), share=0.5)
    loudness = float(weights.min() / weights.norm()) * weights.numel() ** 0.5  # 1 without a share
    assert loudness < 0.5 and float(weights.min()) * weights.numel() == pytest.approx(0.5)
