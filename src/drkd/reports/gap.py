"""How much of a teacher's lead a student recovers, and how sure we are: means, spreads, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom.
_STUDENT_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a number over seeds.

    Args:
        mean: Arithmetic mean; NaN of no values.
        std: Sample standard deviation (n - 1); NaN of fewer than two values.
        count: Number of values.
    """

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two methods that ran with the same seeds.

    Args:
        mean: Mean of distilled minus baseline; NaN of no common seed.
        low: Lower end of Student's 95 % interval of the mean; NaN of fewer than two common seeds.
        high: Upper end.
        count: Number of common seeds.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def share_recovered(*, teacher: float, baseline: float, distilled: float) -> float:
    """Return (distilled - baseline) / (teacher - baseline).

    It may be negative (distillation hurt) or above 1 (the student passed its teacher). NaN where there is nothing to
    recover: the teacher is not better than the baseline, or a value is NaN.
    """
    gap = teacher - baseline
    return (distilled - baseline) / gap if gap > 0 else math.nan


def summarise(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation; NaN where a value is NaN."""
    if not values or any(math.isnan(value) for value in values):
        return Spread(math.nan, math.nan, len(values))
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def compare_paired(baseline: Mapping[int, float], distilled: Mapping[int, float]) -> PairedDifference:
    """Return the mean difference over the seeds that both ran, with Student's 95 % interval.

    Args:
        baseline: Value by seed.
        distilled: Value by seed.
    """
    differences = [distilled[seed] - baseline[seed] for seed in sorted(baseline.keys() & distilled.keys())]
    spread = summarise(differences)
    if spread.count < 2:
        return PairedDifference(spread.mean, math.nan, math.nan, spread.count)
    half = _student_t(spread.count - 1) * spread.std / math.sqrt(spread.count)
    return PairedDifference(spread.mean, spread.mean - half, spread.mean + half, spread.count)


def best_rival(scores: Mapping[str, Mapping[int, float]], method: str, *, reference: str) -> str | None:
    """Name the best of the methods that are neither the reference nor this one; None if there is none.

    Those that share most seeds with the method come first, however lucky another was with the one seed that it has; of
    these the best mean over the shared seeds.

    Args:
        scores: Value by seed, by method.
        method: The method that is compared.
        reference: The method that stands for no distillation.
    """
    known: dict[str, tuple[int, float]] = {}
    for name, values in scores.items():
        shared = [values[seed] for seed in values.keys() & scores[method].keys()]
        mean = summarise(shared).mean
        if name not in (method, reference) and not math.isnan(mean):
            known[name] = (len(shared), mean)
    return max(known, key=lambda name: known[name]) if known else None


def _student_t(freedom: int) -> float:
    if freedom <= len(_STUDENT_T):
        return _STUDENT_T[freedom - 1]
    # Cornish-Fisher expansion around the normal quantile: within 1e-4 from 31 degrees on.
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
