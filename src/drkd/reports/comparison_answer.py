"""The answer of a comparison in words: which method is best on a pair, by how much, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from drkd.reports.comparison_rows import Row
from drkd.reports.gap import PairedDifference, best_rival, compare_paired, summarise
from drkd.reports.tables import format_difference, format_spread

_Scores = Mapping[str, Mapping[int, float]]


def judge(rows: Sequence[Row], pair: str, reference: str) -> str:
    """Say in a sentence which method is best on a pair, and how sure that is; nothing where none can be compared.

    Methods are ranked, and compared with each other, over the seeds that all of them and the reference have. Where
    they have none in common, a mean AP says as much of its seeds as of its method: then the largest difference to the
    reference is named as such, with its seeds.
    """
    known = [row for row in rows if row.pair == pair and row.to_reference and row.to_reference["ap"].count]
    known = [row for row in known if not math.isnan(row.to_reference["ap"].mean)]
    if not known:
        return ""
    # A method with one lucky seed does not beat one that was measured with all.
    most = max(row.to_reference["ap"].count for row in known)
    fewer = [row.method for row in known if row.to_reference["ap"].count < most]
    known = [row for row in known if row.method not in fewer]
    base = next(row for row in rows if (row.pair, row.method) == (pair, reference)).values
    common = base["ap"].keys() & set.intersection(*(set(row.values["ap"]) for row in known))
    answer = _judge_paired(known, base, common, reference) if common else _judge_apart(known, base, reference)
    left = f" Left out, with fewer seeds: {', '.join(fewer)}." if fewer else ""
    if fewer and len(known) == 1:
        left = f" No other method has as many seeds.{left}"
    return f"{pair}: {answer}{left}"


def _judge_paired(known: Sequence[Row], base: _Scores, common: set[int], reference: str) -> str:
    """The answer where the methods have seeds in common: all of it from those."""
    scores = {row.method: _at(row.values, common) for row in known}
    gains = {name: compare_paired(base["ap"], own["ap"]) for name, own in scores.items()}
    best = max(gains, key=lambda name: gains[name].mean)
    own, gain = scores[best], gains[best]
    all_there = all(common == row.values["ap"].keys() for row in known)
    where = "" if all_there else f" over the seeds that all have ({_list(common)})"
    if gain.mean <= 0:
        words = f"no method is better than {reference}; the best of {len(known)}{where}, {best}, has an AP of "
    else:
        words = f"of {len(known)} method(s), {best} has the highest mean AP{where}, "
    words += f"{format_spread(summarise(list(own['ap'].values())))}: {format_difference(gain)} to {reference}, "
    words += _certainty(gain)
    others = {name: other for name, other in scores.items() if name != best}
    if rival := best_rival({name: other["ap"] for name, other in scores.items()}, best, reference=reference):
        difference = compare_paired(others[rival]["ap"], own["ap"])
        words += f"; {format_difference(difference)} to the next, {rival}, {_certainty(difference)}"
    words += "."
    if rival := best_rival({name: other["ap_small"] for name, other in scores.items()}, best, reference=reference):
        difference = compare_paired(others[rival]["ap_small"], own["ap_small"])
        if not math.isnan(difference.mean):
            words += f" On small objects: {format_difference(difference)} AP_S to the best rival there, {rival}, "
            words += f"{_certainty(difference)}."
    return words + _count_beaten(own, others)


def _judge_apart(known: Sequence[Row], base: _Scores, reference: str) -> str:
    """The answer where no seed is common to all: each method's difference to the reference, and nothing of means."""
    best = max(known, key=lambda row: row.to_reference["ap"].mean)
    gain = best.to_reference["ap"]
    own = f"on its seeds {_list(base['ap'].keys() & best.values['ap'].keys())}"
    if gain.mean <= 0:
        words = f"no method is better than {reference}; the least loss of {len(known)} has {best.method} ({own}): "
    else:
        words = f"of {len(known)} method(s), {best.method} has the largest gain over {reference} ({own}): "
    words += f"{format_difference(gain)}, {_certainty(gain)}. There is no seed that all of them have, so mean APs are "
    words += "not compared."
    others = {row.method: row.values for row in known if row.method in best.to_rivals}
    if not others:
        words += " No other method shares its seeds."
    return words + _count_beaten(best.values, others)


def _count_beaten(own: _Scores, others: Mapping[str, _Scores]) -> str:
    """How many rivals the best one is above beyond chance; nothing where one seed says nothing about chance."""
    shared = [own["ap"].keys() & other["ap"].keys() for other in others.values()]
    if not shared or max(map(len, shared)) < 2:
        return ""
    found = [[compare_paired(other[metric], own[metric]) for other in others.values()] for metric in _COUNTED]
    # Data without a small object have no AP_S, and nobody is above or below anybody there.
    known = [[difference for difference in by_rival if not math.isnan(difference.mean)] for by_rival in found]
    clear = [sum(difference.low > 0 for difference in by_rival) for by_rival in known]
    words = f" Beyond chance it is above {clear[0]} of {len(known[0])} rival(s) in AP"
    if known[1]:
        words += f" and {clear[1]}{'' if len(known[1]) == len(known[0]) else f' of {len(known[1])}'} in AP_S"
    return f"{words}."


_COUNTED = ("ap", "ap_small")


def _at(values: _Scores, seeds: set[int]) -> dict[str, dict[int, float]]:
    return {
        metric: {seed: value for seed, value in by_seed.items() if seed in seeds} for metric, by_seed in values.items()
    }


def _list(seeds: set[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _certainty(difference: PairedDifference) -> str:
    if difference.count < 2:
        return "from one seed, which says nothing about chance"
    return "beyond chance" if difference.is_clear else f"not beyond chance with {difference.count} seeds"
