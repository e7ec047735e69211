"""What the cells of a comparison say together: means, spreads and paired differences, one row a pair and method."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drkd.contracts import DrkdError
from drkd.reports.files import read_json
from drkd.reports.gap import PairedDifference, Spread, best_rival, compare_paired, share_recovered, summarise
from drkd.reports.tables import HEADINGS, group_scores

METRICS = tuple(HEADINGS)
TEACHER = "teacher"
_REASON = "not_applicable"
_AGAIN_FILE = "rerun.json"


@dataclass(frozen=True)
class Row:
    """A method on a pair.

    Args:
        pair: Name of the pair.
        method: Name of the method, or "teacher".
        seeds: Seeds that are measured.
        scores: Mean and spread by metric, in [0, 1].
        to_reference: Paired difference to the reference by metric; empty for the reference and the teacher.
        rival: The best other method that is not the reference, by mean AP, see `best_rival`; None where there is none.
        to_rival: Paired difference to the rival by metric.
        small_rival: The best other method by mean AP_S, which may be another one.
        to_small_rival: Paired difference to that one in AP_S; None where there is none.
        to_rivals: By name, paired differences in AP and AP_S to every other method that is not the reference and
            shares a seed; the best rival is not always the one that is hardest to tell apart from.
        share: Share of the teacher's lead over the reference that is recovered, in AP; NaN where there is none.
        seconds_per_step: Mean over seeds of the median step, s; NaN if not measured.
        step_ratio: The same over the reference's, mean over the seeds that both have measured on the same machine; NaN
            if there is none.
        peak_memory: Largest over seeds, bytes; NaN if not measured.
        extra_parameters: Trainable parameters of the method while training; NaN if not measured.
        held_parameters: The same with its fixed ones; NaN if not measured, as in cells of earlier versions.
        terms: By distillation term, means over seeds of ``median_gradient_ratio``, ``first`` and ``last``.
        values: Scores by metric and seed.
    """

    pair: str
    method: str
    seeds: tuple[int, ...]
    scores: Mapping[str, Spread]
    to_reference: Mapping[str, PairedDifference]
    rival: str | None
    to_rival: Mapping[str, PairedDifference]
    small_rival: str | None
    to_small_rival: PairedDifference | None
    to_rivals: Mapping[str, Mapping[str, PairedDifference]]
    share: float
    seconds_per_step: float
    step_ratio: float
    peak_memory: float
    extra_parameters: float
    held_parameters: float
    terms: Mapping[str, Mapping[str, float]]
    values: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Comparison:
    """What `drkd compare` left in its folder.

    Args:
        pairs: Names, in order.
        methods: Names, in order.
        seeds: As asked for; a cell may be missing.
        reference: The method that the others are compared with.
        split: The split of all scores.
        cells: Content of the cells' files, in order, with the pair as ``detector`` too.
        inapplicable: By pair and method, why the method cannot work with the pair.
        again: Names of cells that are to be measured again, perhaps with other settings, and are left out.
        limited: By method, the pairs that it is for, where it is not for all.
        aside: Sentences about cells that lie in the folder and are not asked for, so that they are left out too.
    """

    pairs: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    reference: str
    split: str
    cells: tuple[Mapping[str, Any], ...]
    inapplicable: Mapping[tuple[str, str], str] = field(default_factory=dict)
    again: tuple[str, ...] = ()
    limited: Mapping[str, Sequence[str]] = field(default_factory=dict)
    aside: tuple[str, ...] = ()


def read_comparison(folder: Path) -> Comparison:
    """Read ``comparison.json`` and those of its cells that are measured.

    Raises:
        DrkdError: If there is none, or a file is damaged.
    """
    about = read_json(folder / "comparison.json", kind=dict)
    missing = [name for name in ("pairs", "methods", "seeds", "reference", "split") if name not in about]
    if missing:
        raise DrkdError(f"{folder / 'comparison.json'}: field {missing[0]} is missing.")
    noted = read_json(folder / _AGAIN_FILE, kind=dict) if (folder / _AGAIN_FILE).exists() else {}
    files = {name: path for name, path in _cell_files(folder, about) if path.exists()}
    found = [_read_cell(path) for name, path in files.items() if name not in noted]
    cells = [cell for cell in found if _REASON not in cell]
    if not cells:
        raise DrkdError(f"{folder} holds no measured cell, so there is nothing to report.")
    return Comparison(
        pairs=tuple(about["pairs"]),
        methods=tuple(about["methods"]),
        seeds=tuple(about["seeds"]),
        reference=about["reference"],
        split=about["split"],
        cells=tuple(cells),
        inapplicable={(cell["pair"], cell["method"]): cell[_REASON] for cell in found if _REASON in cell},
        again=tuple(name for name in files if name in noted),
        limited=about.get("limited", {}),
        aside=tuple(_cells_aside(folder, about)),
    )


def summarise_comparison(comparison: Comparison) -> list[Row]:
    """Return the rows, pair by pair, the teacher first."""
    grouped = group_scores(comparison.cells, metrics=METRICS)
    rows = []
    for pair, methods in grouped.items():
        for method in methods:
            found = [cell for cell in comparison.cells if (cell["detector"], cell["method"]) == (pair, method)]
            base = [
                cell for cell in comparison.cells if (cell["detector"], cell["method"]) == (pair, comparison.reference)
            ]
            rows.append(_make_row(pair, method, methods, found, base, comparison.reference))
    return rows


def _make_row(
    pair: str,
    method: str,
    methods: Mapping[str, Mapping[str, Mapping[int, float]]],
    cells: Sequence[Mapping[str, Any]],
    base: Sequence[Mapping[str, Any]],
    reference: str,
) -> Row:
    own = methods[method]
    compared = method not in (reference, TEACHER)
    has_reference = compared and reference in methods
    rival, small_rival = (
        best_rival(
            {name: scores[metric] for name, scores in methods.items() if name != TEACHER}, method, reference=reference
        )
        if compared
        else None
        for metric in ("ap", "ap_small")
    )
    return Row(
        pair=pair,
        method=method,
        seeds=() if method == TEACHER else tuple(sorted(own["ap"])),
        scores={metric: summarise(list(own[metric].values())) for metric in METRICS},
        to_reference={m: compare_paired(methods[reference][m], own[m]) for m in METRICS} if has_reference else {},
        rival=rival,
        to_rival={m: compare_paired(methods[rival][m], own[m]) for m in METRICS} if rival else {},
        small_rival=small_rival,
        to_small_rival=compare_paired(methods[small_rival]["ap_small"], own["ap_small"]) if small_rival else None,
        to_rivals={
            name: {m: compare_paired(scores[m], own[m]) for m in ("ap", "ap_small")}
            for name, scores in methods.items()
            if compared and name not in (method, reference, TEACHER) and scores["ap"].keys() & own["ap"].keys()
        },
        share=_share(methods, method, reference) if has_reference else math.nan,
        seconds_per_step=summarise(_training(cells, "seconds_per_step")).mean,
        step_ratio=_step_ratio(cells, base),
        peak_memory=max(_training(cells, "peak_memory_bytes"), default=math.nan),
        extra_parameters=max(_training(cells, "trainable_parameters", "method"), default=math.nan),
        held_parameters=max(_training(cells, "held_parameters", "method"), default=math.nan),
        terms=_mean_terms(cells),
        values=own,
    )


def _share(methods: Mapping[str, Mapping[str, Mapping[int, float]]], method: str, reference: str) -> float:
    """Over the seeds that method and reference both have, so that it agrees with the paired difference."""
    common = methods[method]["ap"].keys() & methods[reference]["ap"].keys()
    if TEACHER not in methods or not common:
        return math.nan
    ours, theirs = ([methods[name]["ap"][seed] for seed in sorted(common)] for name in (method, reference))
    teacher = summarise(list(methods[TEACHER]["ap"].values())).mean
    return share_recovered(teacher=teacher, baseline=summarise(theirs).mean, distilled=summarise(ours).mean)


def _training(cells: Sequence[Mapping[str, Any]], *keys: str) -> list[float]:
    """Values of ``training`` that are numbers."""
    values = []
    for cell in cells:
        value: Any = cell.get("training") or {}
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            values.append(float(value))
    return values


def _step_ratio(cells: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> float:
    """Paired by seed: a machine's load differs from one seed to the next, and would count as the method's.

    Both of a pair must have run on one machine, and say so.
    """
    ours, theirs = (
        # Of two machines the faster one would count as the method's too.
        {
            (cell.get("seed"), json.dumps(machine, sort_keys=True)): seconds[0]
            for cell in side
            if (machine := cell.get("machine")) and (seconds := _training([cell], "seconds_per_step"))
        }
        for side in (cells, base)
    )
    return summarise([ours[key] / theirs[key] for key in ours if theirs.get(key)]).mean


def _mean_terms(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    collected: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        for term, values in (cell.get("distillation") or {}).items():
            for name, value in values.items():
                # Infinite or undefined ones are null in the file.
                if isinstance(value, int | float):
                    collected.setdefault(term, {}).setdefault(name, []).append(float(value))
    # A term of several levels is also there as their sum; the single levels would drown it.
    shown = {term: values for term, values in collected.items() if term.rpartition("/")[0] not in collected}
    return {term: {name: summarise(list_).mean for name, list_ in values.items()} for term, values in shown.items()}


def _cell_files(folder: Path, about: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Name and file of every cell."""
    for pair in about["pairs"]:
        yield f"{pair}/{TEACHER}", folder / "cells" / pair / f"{TEACHER}.json"
        for method in about["methods"]:
            if pair not in about.get("limited", {}).get(method, about["pairs"]):
                continue
            for seed in about["seeds"]:
                yield f"{pair}/{method}/{seed}", folder / "cells" / pair / method / f"seed{seed}.json"


def _cells_aside(folder: Path, about: Mapping[str, Any]) -> Iterator[str]:
    """Say which cells lie in the folder beside those of this table: of other seeds, methods or pairs."""
    seeds, methods, pairs, limited = set(), set(), set(), set()
    for path in (folder / "cells").glob("*/*/seed*.json"):
        pair, method, seed = path.parts[-3], path.parts[-2], path.stem.removeprefix("seed")
        if pair not in about["pairs"]:
            pairs.add(pair)
        elif method not in about["methods"]:
            methods.add(method)
        elif pair not in about.get("limited", {}).get(method, about["pairs"]):
            limited.add(f"{pair}/{method}")
        elif seed.isdigit() and int(seed) not in about["seeds"]:
            seeds.add(int(seed))
    for kind, found in (("pairs", sorted(pairs)), ("methods", sorted(methods)), ("seeds", sorted(seeds))):
        if found:
            names = ", ".join(map(str, found))
            yield f"Cells of {kind} {names} lie in the folder and are not in this table: name them, and they are."
    if limited:
        names = ", ".join(sorted(limited))
        yield f"Cells of {names} lie in the folder and are not in this table: `pairs` leaves them out."


def _read_cell(path: Path) -> dict[str, Any]:
    cell: dict[str, Any] = read_json(path, kind=dict)
    if _REASON in cell:
        return cell
    for name in ("pair", "method", "metrics"):
        if name not in cell:
            raise DrkdError(f"{path}: field {name} is missing. Remove the file, and the cell is measured again.")
    for metric in METRICS:
        if metric not in cell["metrics"]:
            raise DrkdError(f"{path}: field metrics.{metric} is missing. Remove the file to measure the cell again.")
    return {**cell, "detector": cell["pair"]}
