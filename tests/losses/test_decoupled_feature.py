"""DeFeat's feature loss beyond parity."""

import pytest
import torch

from drkd.losses import choose_levels, decoupled_distance, foreground_mask

SIZE = (32, 48)


def drawn_mask(boxes, size, image_size):
    """The definition, one box and one cell at a time."""
    mask = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for image, own in enumerate(boxes):
        for x1, y1, x2, y2 in own.tolist():
            ranges = (x1, x2, image_size[1]), (y1, y2, image_size[0])
            if any(first < 0 >= last or first >= end < last for first, last, end in ranges):
                continue
            left, right = (max(0, min(int(x * size[1] / image_size[1]), size[1])) for x in (x1, x2))
            upper, lower = (max(0, min(int(y * size[0] / image_size[0]), size[0])) for y in (y1, y2))
            if left >= right or upper >= lower:
                mask[image, min(upper, size[0] - 1), min(left, size[1] - 1)] = True
            mask[image, upper:lower, left:right] = True
    return mask


def test_distances_by_hand():
    student, teacher = torch.zeros(1, 2, 1, 3), torch.tensor([[[[1.0, 2.0, 3.0]], [[1.0, 0.0, 1.0]]]])
    mask = torch.tensor([[[True, False, False]]])
    foreground, background = decoupled_distance(student, teacher, mask)
    # (1 + 1) / (2 * 2 * 1) and (4 + 0 + 9 + 1) / (2 * 2 * 2).
    assert (foreground.item(), background.item()) == (0.5, 14 / 8)


@pytest.mark.parametrize("fill", [False, True])
def test_a_part_without_cells_is_exactly_zero(fill):
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    parts = decoupled_distance(student, torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), fill))
    sum(parts).backward()
    assert parts[int(fill)].item() == 0 and parts[1 - int(fill)].item() > 0
    assert student.grad.isfinite().all()


def test_equal_maps_give_zero_and_gradient_reaches_the_student_only():
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 4, 4) > 0.5
    assert sum(decoupled_distance(student, student.detach(), mask)).item() == 0
    plain = decoupled_distance(student, teacher, mask)
    sum(plain).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0
    last = decoupled_distance(*(t.to(memory_format=torch.channels_last) for t in (student, teacher)), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = decoupled_distance(student.bfloat16(), teacher.bfloat16(), mask)
    for value, moved, cast in zip(plain, last, half, strict=True):
        assert moved.item() == pytest.approx(value.item(), rel=1e-5)
        assert cast.dtype == torch.float32 and cast.item() == pytest.approx(value.item(), rel=0.05)


def test_masks_equal_their_definition():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(6, 4, generator=generator) * torch.tensor([48.0, 32, 48, 32]) - 4
    corners[:, 2:] += corners[:, :2].clamp_min(0)
    odd = torch.tensor([[48.0, 32, 48, 32], [47.5, 3, 47.6, 30], [-9, -9, 90, 90], [7, 7, 7, 7], [20, 9, 10, 20]])
    boxes = [corners, odd[:1], torch.zeros(0, 4), odd]
    for size in ((8, 12), (4, 6), (1, 1), (5, 7)):
        got = foreground_mask(boxes, size, image_size=SIZE)
        assert torch.equal(got, drawn_mask(boxes, size, SIZE))
    counted = torch.tensor([False] * 7 + [True] + [False] * 4)
    got = foreground_mask(boxes, (8, 12), image_size=SIZE, counted=counted)
    assert torch.equal(got, drawn_mask([corners[:0], odd[:0], corners[:0], odd[:1]], (8, 12), SIZE))


def test_boxes_outside_the_image_cover_no_cell():
    outside = torch.tensor(
        [[-50.0, -50, -10, -10], [-9, 3, 0, 9], [3, -9, 9, -1], [48, 3, 60, 9], [3, 40, 9, 50], [90, 90, 90, 90]]
    )
    assert foreground_mask([outside], (4, 6), image_size=SIZE).sum() == 0
    # Those on the border are still moved in.
    border = torch.tensor([[48.0, 32, 48, 32], [0, 0, 0, 0]])
    assert foreground_mask([border], (4, 6), image_size=SIZE)[0].nonzero().tolist() == [[0, 0], [3, 5]]


def test_no_boxes():
    none = [torch.zeros(0, 4)] * 2
    assert foreground_mask(none, (4, 6), image_size=SIZE).sum() == 0
    assert choose_levels(torch.cat(none), [4, 8]).shape == (0,)


def test_levels_by_size():
    sides = torch.tensor([0.0, 10.0, 110.0, 112.0, 223.0, 450.0, 5000.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert choose_levels(boxes, [4, 8, 16, 32, 64]).tolist() == [0, 0, 0, 1, 2, 3, 4]
    # The same by stride where the pyramid starts later, and the first of two levels of one stride.
    assert choose_levels(boxes, [8, 16, 32, 64, 128]).tolist() == [0, 0, 0, 0, 1, 2, 4]
    assert choose_levels(boxes, [32, 32, 64]).tolist() == [0, 0, 0, 0, 0, 0, 2]


def test_errors_state_expected_and_got():
    with pytest.raises(ValueError, match=r"a mask \(B, h, w\), got \(1, 2, 3, 3\)"):
        decoupled_distance(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"boxes \(N, 4\)"):
        foreground_mask([torch.zeros(3)], (4, 6), image_size=SIZE)
