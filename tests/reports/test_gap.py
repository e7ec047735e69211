"""Share of the gap and paired differences, against values computed by hand and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from drkd.reports.gap import best_rival, compare_paired, share_recovered, summarise


@pytest.mark.parametrize(
    ("teacher", "baseline", "distilled", "share"),
    [(0.5, 0.3, 0.4, 0.5), (0.5, 0.3, 0.2, -0.5), (0.5, 0.3, 0.6, 1.5)],
)
def test_share(teacher, baseline, distilled, share):
    assert share_recovered(teacher=teacher, baseline=baseline, distilled=distilled) == pytest.approx(share)


@pytest.mark.parametrize(("teacher", "baseline"), [(0.3, 0.3), (0.2, 0.3), (math.nan, 0.3), (0.3, math.nan)])
def test_no_gap_has_no_share(teacher, baseline):
    assert math.isnan(share_recovered(teacher=teacher, baseline=baseline, distilled=0.4))


def test_summary():
    spread = summarise([1.0, 2.0, 3.0])
    assert (spread.mean, spread.std, spread.count) == (2.0, 1.0, 3)
    assert math.isnan(summarise([1.0]).std)
    assert math.isnan(summarise([]).mean)


@pytest.mark.parametrize("count", [2, 3, 5, 31, 60])
def test_interval_agrees_with_scipy(count):
    generator = np.random.default_rng(count)
    baseline = dict(enumerate(generator.normal(0.3, 0.02, count)))
    distilled = {seed: value + generator.normal(0.05, 0.01) for seed, value in baseline.items()}
    difference = compare_paired(baseline, distilled)
    values = [distilled[seed] - baseline[seed] for seed in baseline]
    low, high = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (difference.low, difference.high) == pytest.approx((low, high), rel=2e-4)
    assert difference.count == count


def test_only_common_seeds_are_paired():
    difference = compare_paired({0: 0.1, 1: 0.2}, {1: 0.5, 2: 0.9})
    assert difference.mean == pytest.approx(0.3)
    assert difference.count == 1
    assert math.isnan(difference.low)
    assert not difference.is_clear
    assert compare_paired({}, {}).count == 0


def test_a_mean_over_nothing_known_is_not_known():
    spread = summarise([0.1, math.nan])
    assert math.isnan(spread.mean) and math.isnan(spread.std) and spread.count == 2


def test_best_rival_is_neither_the_reference_nor_oneself():
    scores = {"student": {0: 0.9}, "a": {0: 0.5, 1: 0.7}, "b": {0: 0.65}, "c": {0: math.nan}}
    assert best_rival(scores, "a", reference="student") == "b"
    assert best_rival(scores, "b", reference="student") == "a"
    assert best_rival(scores, "c", reference="student") == "b"
    assert best_rival({"student": {0: 0.9}, "a": {0: 0.5}}, "a", reference="student") is None


def test_one_lucky_seed_makes_no_best_rival():
    three = {"own": {0: 0.5, 1: 0.5, 2: 0.5}, "steady": {0: 0.47, 1: 0.48, 2: 0.49}}
    assert best_rival({**three, "screened": {0: 0.6}}, "own", reference="student") == "steady"
    # Of two with as many, the better on the seeds that the method has too: the others say nothing of the difference.
    others = {"late": {0: 0.1, 7: 0.9}, "early": {0: 0.2, 7: 0.1}}
    assert best_rival({"own": {0: 0.5}, **others}, "own", reference="student") == "early"
    assert best_rival({"own": {0: 0.5}, "elsewhere": {3: 0.9}}, "own", reference="student") is None
