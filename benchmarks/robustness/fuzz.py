"""Feed damaged and hostile data sets, recipes, comparisons, checkpoints and images to drkd, thousands of them.

    python benchmarks/robustness/fuzz.py --count 1000 --seed 0

Each input is a valid file in which bytes or values were changed at random. It must work or end in one paragraph
(`DrkdError`); any other exception, too much CPU time without an answer (10 seconds, 60 for a run that goes on), a file
that is written outside the working folder, a program that is started, or code of a checkpoint that ran is a failure
and is printed. The kinds whose inputs each take long have fewer of them. The record goes to
`benchmarks/results/robustness/fuzz.json`.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from attacks import Attacks
from checkpoint_attacks import CheckpointAttacks, write_student
from data_attacks import DataAttacks
from library_attacks import LibraryAttacks
from mutations import Watch, guarded
from recipe_attacks import RecipeAttacks

from drkd.recipes.run_folder import machine, source_commit, versions, write_json

__all__ = ["KINDS", "LACKING", "campaign", "guarded"]

HERE = Path(__file__).resolve().parent
KINDS: dict[str, float] = {
    **{"transformers": 0.5, "ultralytics": 0.5, "hooks": 0.5},
    **{"resume": 0.2, "mmdetection": 0.5, "checkpoint": 1.0, "student": 0.8, "teacher": 0.8},
    **{"comparison": 0.5, "build": 0.5, "recipe": 0.5},
    **{"coco": 1.0, "yolo": 1.0, "voc": 1.0, "image": 1.0},
}
"""Kinds of input, and the share of the count that each gets."""

LACKING = {kind for kind in ("transformers", "ultralytics") if find_spec(kind) is None}
"""Kinds whose library is not installed."""

_MEMORY = 8 * 2**30


def campaign(
    folder: Path, *, count: int, seed: int, kinds: dict[str, float] | None = None, watch: Watch | None = None
) -> dict[str, Counter[str]]:
    """So many inputs of each kind; how often each outcome came.

    Args:
        folder: Working folder, empty.
        count: Inputs of a kind whose share is 1.
        seed: Of the inputs.
        kinds: Kinds and their shares; all by default.
        watch: Notes what is written outside the folder.
    """
    data = DataAttacks(folder)
    root, teacher = folder / "whole" / "coco", write_student(folder / "student.pt")
    owners: tuple[Attacks, ...] = (
        *(data, LibraryAttacks(folder)),
        *(attacks(folder, data=root, teacher=teacher) for attacks in (RecipeAttacks, CheckpointAttacks)),
    )
    watch = watch or Watch(folder)
    before = {path for path in folder.parent.rglob("*") if folder not in (path, *path.parents)}
    outcomes: dict[str, Counter[str]] = {}
    for kind, share in (kinds or KINDS).items():
        owner = next(owner for owner in owners if hasattr(owner, f"try_{kind}"))
        owner.begin(kind, seed=seed)
        attack: Callable[[], str] = getattr(owner, f"try_{kind}")
        outcomes[kind] = Counter()
        for _ in range(max(1, round(count * share))):
            watch.active = True
            try:
                outcome = attack()
            finally:
                watch.active = False
            if owner.marker.exists():
                owner.marker.rmdir()
                outcome = "ran code"
            if outcome not in ("works", "refused") and outcome not in outcomes[kind]:
                print(f"{kind}: {outcome}", file=sys.stderr, flush=True)
            outcomes[kind][outcome] += 1
    escaped = {str(path) for path in folder.parent.rglob("*") if folder not in (path, *path.parents)}
    escaped -= {str(path) for path in before}
    if escaped or watch.seen:
        outcomes["outside"] = Counter([*escaped, *watch.seen])
    return outcomes


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", choices=tuple(KINDS), default=[kind for kind in KINDS if kind not in LACKING]
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "robustness" / "fuzz.json")
    options = parser.parse_args()
    began = time.monotonic()
    # An absurd size is then an error of the allocator, and not the end of the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    warnings.simplefilter("ignore")
    outcomes: dict[str, Counter[str]] = {}
    seconds: dict[str, int] = {}
    for kind in options.kinds:
        since = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "work"
            folder.mkdir()
            found = campaign(folder, count=options.count, seed=options.seed, kinds={kind: KINDS[kind]})
        for name, counter in found.items():
            outcomes[name] = outcomes.get(name, Counter()) + counter
        seconds[kind] = round(time.monotonic() - since)
        print(
            kind,
            f"{seconds[kind]} s",
            {name: dict(counter.most_common(30)) for name, counter in found.items()},
            flush=True,
        )
        # After every kind, so that one that is broken off has a record.
        _write(options, outcomes, seconds, began=began)
    sys.exit(not _passed(outcomes))


def _passed(outcomes: dict[str, Counter[str]]) -> bool:
    return all(set(counter) <= {"works", "refused"} for counter in outcomes.values())


def _write(
    options: argparse.Namespace, outcomes: dict[str, Counter[str]], seconds: dict[str, int], *, began: float
) -> None:
    """The record so far; its command says of which kinds."""
    kinds = "" if set(seconds) == set(KINDS) else f" --kinds {' '.join(name for name in outcomes if name in KINDS)}"
    write_json(
        options.out,
        {
            "command": f"python benchmarks/robustness/fuzz.py --count {options.count} --seed {options.seed}{kinds}",
            "passed": _passed(outcomes),
            "inputs": {kind: outcomes[kind].total() for kind in seconds},
            "outcomes": outcomes,
            "seconds": round(time.monotonic() - began),
            "seconds_by_kind": seconds,
            "commit": source_commit(),
            "versions": versions(),
            "machine": machine(),
        },
    )


if __name__ == "__main__":
    main()
