"""Grouping of boxes by image."""

from __future__ import annotations

import math

import numpy as np

from drkd.data.boxes import BoxColumns, group_boxes


def _columns(rows: list[tuple[int, list[float]]]) -> BoxColumns:
    count = len(rows)
    return BoxColumns(
        np.array([image for image, _ in rows], dtype=np.int64),
        np.arange(count),
        np.zeros(count, dtype=np.bool_),
        np.array([box for _, box in rows], dtype=np.float64).reshape(-1, 4),
        np.full(count, math.nan),
    )


def test_groups_by_image_in_the_order_of_the_rows() -> None:
    grouped = group_boxes(_columns([(2, [0, 0, 1, 1]), (0, [0, 0, 2, 2]), (2, [0, 0, 3, 3])]), [(9, 9)] * 3)

    assert [labels.tolist() for labels in grouped.labels] == [[1], [], [0, 2]]
    assert [areas.tolist() for areas in grouped.areas] == [[4.0], [], [1.0, 9.0]]
    assert grouped.findings == ()


def test_finds_each_kind() -> None:
    rows = [(0, [0, 0, 0, 3]), (0, [20, 0, 3, 3]), (0, [5, 5, 7, 1]), (0, [5, 5, 5.5, 1])]

    grouped = group_boxes(_columns(rows), [(10, 10)])

    assert grouped.findings == ((0, "flat"), (1, "outside"), (2, "overhang"))
    assert grouped.boxes[0].tolist() == [[5, 5, 10, 6], [5, 5, 10, 6]]


def test_a_box_that_vanishes_in_single_precision_has_no_area() -> None:
    grouped = group_boxes(_columns([(0, [5000.0, 5.0, 1e-5, 1.0])]), [(10_000, 10_000)])

    assert grouped.findings == ((0, "flat"),)
    assert grouped.boxes[0].shape == (0, 4)


def test_no_boxes_and_no_images() -> None:
    assert group_boxes(_columns([]), []).boxes == ()
    assert [boxes.shape for boxes in group_boxes(_columns([]), [(4, 4)]).boxes] == [(0, 4)]
