"""What training costs: which steps are timed, and what is counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import ToyDetector, ToyMethod

from drkd.engine import Distiller, training_cost
from drkd.engine.module import DistillationModule, Optimization
from drkd.engine.training_cost import TrainingCost


def _run(
    monkeypatch: pytest.MonkeyPatch,
    batches: list[tuple[int, float]],
    *,
    calibration: int = 4,
    interval: int = 3,
    fixed: nn.Module | None = None,
) -> tuple[TrainingCost, list[dict[str, int]]]:
    """Drive the callback through batches of (optimizer step, seconds) on a clock of our own."""
    torch.manual_seed(0)
    distiller = Distiller(
        ToyDetector(4, seed=1),
        ToyDetector(6, seed=2),
        ToyMethod,
        calibration_steps=calibration,
        monitor_interval=interval,
    )
    if fixed is not None:
        assert distiller.method is not None
        distiller.method.add_module("fixed", fixed)
    module = DistillationModule(distiller, Optimization())
    notes: list[dict[str, int]] = []
    cost = TrainingCost(notes.append, seconds=0.0)  # type: ignore[arg-type]
    now = 0.0
    monkeypatch.setattr(training_cost.time, "perf_counter", lambda: now)
    trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=10, current_epoch=0)
    cost.on_train_start(trainer, module)  # type: ignore[arg-type]
    for index, (step, seconds) in enumerate(batches):
        trainer.global_step = step
        cost.on_train_batch_start(trainer, module, None, index)  # type: ignore[arg-type]
        now += seconds
        cost.on_train_batch_end(trainer, module, None, None, index)  # type: ignore[arg-type]
        now += 100.0  # evaluation, loading: not counted
    cost.on_train_end(trainer, module)  # type: ignore[arg-type]
    return cost, notes


def test_warm_steps_without_measurements_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    # Left out: steps 0 to 3 (calibration), 6 and 9 (monitoring). Left: 4, 5, 7, 8.
    seconds = [9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 9.0, 3.0, 5.0, 9.0]
    cost, notes = _run(monkeypatch, list(enumerate(seconds)))
    assert cost.measured["seconds_per_step"] == pytest.approx(2.5)
    assert cost.measured["timed_steps"] == 4
    assert notes[-1] == {"step": 9, "steps": 10, "epoch": 0}


def test_batches_of_one_step_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, _ = _run(monkeypatch, [(0, 9.0), (0, 9.0), (1, 1.0), (1, 2.0)], calibration=1, interval=50)
    assert cost.measured["seconds_per_step"] == pytest.approx(3.0)


def test_a_run_of_one_step_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, _ = _run(monkeypatch, [(0, 4.0)])
    assert cost.measured["seconds_per_step"] == pytest.approx(4.0)


def test_memory_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, _ = _run(monkeypatch, [(0, 1.0)])
    # Body 3*8*8*4 + 4, norm 4 + 4, head 4 + 1; the method's 1x1 convolution 4 * 6 + 6.
    assert cost.measured["trainable_parameters"] == {"student": 768 + 4 + 8 + 5, "method": 30}
    assert cost.measured["held_parameters"] == cost.measured["trainable_parameters"]
    assert cost.measured["peak_memory_bytes"] > 2**20
    assert cost.measured["peak_memory_kind"] == "resident"


def test_fixed_modules_of_a_method_are_held_and_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, _ = _run(monkeypatch, [(0, 1.0)], fixed=nn.Linear(10, 5).requires_grad_(False))
    assert cost.measured["trainable_parameters"]["method"] == 30
    assert cost.measured["held_parameters"] == {"student": 768 + 4 + 8 + 5, "method": 30 + 55}
