"""When two runs of a detector agree, and how a disagreement is told."""

from __future__ import annotations

import pytest
import torch

from drkd.contracts import Detections
from drkd.export.agreement import Agreement, compare

BOX = [10.0, 10.0, 30.0, 40.0]


def _found(*entries: tuple[list[float], float, int]) -> Detections:
    return Detections(
        torch.tensor([box for box, _, _ in entries]).reshape(-1, 4),
        torch.tensor([score for _, score, _ in entries]),
        torch.tensor([label for _, _, label in entries], dtype=torch.int64),
    )


def _compare(reference: Detections, found: Detections, *, most: int = 100) -> Agreement:
    agreement = Agreement()
    compare(
        agreement,
        reference,
        found,
        name="a.png",
        class_names=("cat", "dog"),
        score_threshold=0.05,
        nms_threshold=0.5,
        most=most,
    )
    return agreement


def test_small_differences_in_any_order_agree_and_are_measured() -> None:
    moved = [10.25, 10.0, 30.0, 40.0]
    far = [60.0, 60.0, 80.0, 80.0]
    agreement = _compare(_found((BOX, 0.9, 0), (far, 0.8, 1)), _found((far, 0.8, 1), (moved, 0.9005, 0)))
    assert agreement.good and agreement.matched == 2
    assert agreement.worst_box_px == pytest.approx(0.25) and agreement.worst_score == pytest.approx(0.0005, abs=1e-6)


@pytest.mark.parametrize(
    "other", [([10.6, 10.0, 30.0, 40.0], 0.9, 0), (BOX, 0.902, 0), (BOX, 0.9, 1)], ids=["box", "score", "label"]
)
def test_more_than_the_bounds_is_a_mismatch_of_both_sides(other: tuple[list[float], float, int]) -> None:
    agreement = _compare(_found((BOX, 0.9, 0)), _found(other))
    assert not agreement.good and len(agreement.mismatches) == 2
    assert "a.png: only PyTorch finds 'cat'" in agreement.mismatches[0]


def test_the_worst_comes_first_and_each_side_has_its_count() -> None:
    agreement = _compare(_found((BOX, 0.6, 0)), _found())
    for shift in (0.6, 300.0):
        moved = [side + shift for side in BOX]
        compare(
            agreement,
            _found((BOX, 0.9, 0)),
            _found((moved, 0.9, 0)),
            name=f"{shift}.png",
            class_names=("cat", "dog"),
            score_threshold=0.05,
            nms_threshold=0.5,
            most=100,
        )
    assert [words.partition(":")[0] for words in agreement.mismatches] == ["300.0.png"] * 2 + ["0.6.png"] * 2 + [
        "a.png"
    ]
    assert (len(agreement.missed), len(agreement.extra), agreement.detections) == (3, 2, 3)
    assert (agreement.as_json()["missed"], agreement.as_json()["extra"]) == (3, 2)


def test_a_detection_that_only_one_side_has_is_a_mismatch() -> None:
    assert "finds nothing" in _compare(_found((BOX, 0.9, 0)), _found()).mismatches[0]
    assert "only ONNX finds" in _compare(_found(), _found((BOX, 0.9, 0))).mismatches[0]


def test_rounding_at_the_threshold_and_at_the_last_place_is_a_tie() -> None:
    far = [60.0, 60.0, 80.0, 80.0]
    at_threshold = _compare(_found((far, 0.9, 1), (BOX, 0.0505, 0)), _found((far, 0.9, 1)))
    assert at_threshold.good and at_threshold.ties == 1
    last = _compare(_found((far, 0.9, 1), (BOX, 0.4, 0)), _found((far, 0.9, 1), (BOX, 0.4, 1)), most=2)
    assert last.good and last.ties == 2


def test_rounding_at_the_overlap_limit_is_a_tie() -> None:
    # Overlap 200 / 400 with the better box.
    better, weaker = [0.0, 0.0, 20.0, 15.0], [0.0, 5.0, 20.0, 20.0]
    agreement = _compare(_found((better, 0.9, 0), (weaker, 0.6, 0)), _found((better, 0.9, 0)))
    assert agreement.good and agreement.ties == 1
    assert not _compare(_found((better, 0.9, 0), (weaker, 0.6, 1)), _found((better, 0.9, 0))).good


def test_nothing_to_compare_is_not_good() -> None:
    assert not _compare(_found(), _found()).good
