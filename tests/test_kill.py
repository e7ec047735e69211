"""A distillation killed in the middle of epochs ends as one left alone; benchmarks/robustness/kill.py does more."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "robustness"))

from kill import command, counts, differences, disturb, prepare, undisturbed


def test_a_killed_run_ends_bit_for_bit_as_one_left_alone(tmp_path):
    """With DRKD, balanced weights that are still being set, warm-up, a moving average and the best checkpoint."""
    data, teacher = prepare(tmp_path)
    whole = tmp_path / "whole"
    seconds = undisturbed(command(data, teacher, whole), whole)
    chance, kills = random.Random(0), []
    for attempt in range(6):
        killed = tmp_path / f"killed{attempt}"
        record = disturb(command(data, teacher, killed), killed, chance, seconds=seconds, most=3)
        assert not record["failed"], (tmp_path / f"{killed.name}.log").read_text()[-3000:]
        assert not record["broken"]
        assert not differences(killed / "student.pt", whole / "student.pt")
        kills += [kill for kill in record["kills"] if counts(kill)]
        if kills:
            break
    assert kills, "no kill hit a run with a checkpoint"
