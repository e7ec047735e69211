"""The balance's own cases: half precision, terms that come late, processes without boxes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from drkd.contracts import DrkdError
from drkd.engine.balance import GradientBalance, _mean_over_processes, gradient_norms


def test_norms_of_half_precision_maps_do_not_underflow() -> None:
    feature = torch.ones(1000, dtype=torch.float16, requires_grad=True)
    # Each gradient is 1e-8: below the smallest float16 number.
    norms = gradient_norms({"tiny": (feature.float() * 1e-8).sum()}, [feature])
    assert float(norms["tiny"][0]) == pytest.approx(1000 * 1e-16, rel=0.01)


def test_an_infinite_gradient_is_not_taken_for_none() -> None:
    feature = torch.ones(2, requires_grad=True)
    norms = gradient_norms({"loud": (feature * float("inf")).sum() * 0}, [feature])
    assert norms["loud"][0].isinf()
    # Nor for the largest number there is, which would be a weight.
    norms = gradient_norms({"over": (feature * 1e30).square().sum()}, [feature])
    assert norms["over"][0].isinf()


def test_norms_of_half_precision_maps_do_not_overflow() -> None:
    feature = torch.full((1000,), 3.0, dtype=torch.float16, requires_grad=True)
    # Each gradient is 300 or 120,000: too large once or at once, for what keeps small ones.
    for factor, value in ((100, 300.0), (40_000, 120_000.0)):
        norms = gradient_norms({"sum": (feature.float() * factor * 3).sum()}, [feature])
        assert float(norms["sum"][0]) == pytest.approx(1000 * value**2, rel=0.01)


def test_all_processes_measure_again_what_overflows_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes may be collective (synchronised batch norm): each process must make as many."""
    told = []

    def as_another(flags: torch.Tensor, op: object) -> None:
        told.append(flags.tolist())
        flags.copy_(torch.maximum(flags, torch.tensor([0, int(len(told) == 1)], dtype=flags.dtype)))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", as_another)
    feature, passes = torch.ones(4, dtype=torch.float16, requires_grad=True), []
    losses = {name: (feature.float() * 1e-8).sum() for name in ("here", "there")}
    losses["there"].register_hook(passes.append)
    norms = gradient_norms(losses, [feature])
    assert told == [[0, 0], [0, 0]] and len(passes) == 2
    # What was measured well here stays.
    assert float(norms["there"][0]) == pytest.approx(4e-16, rel=0.01)


@pytest.mark.parametrize("first", [(float("inf"), 1.0), (1.0, float("inf")), (0.0, 1.0), (1.0, 0.0)])
def test_a_first_measurement_that_cannot_be_used_gives_no_weight(first: tuple[float, float]) -> None:
    balance = GradientBalance(calibration_steps=4, interval=1)
    task, term = (torch.tensor([value]) for value in first)
    balance.update(task, {"term": term})
    assert float(balance.scale("term", task)) == 0.0
    balance.update(torch.tensor([4.0]), {"term": torch.tensor([16.0])})
    assert float(balance.scale("term", task)) == pytest.approx(0.5)
    # And a later one changes nothing.
    balance.update(task, {"term": term})
    assert float(balance.scale("term", task)) == pytest.approx(0.5)


def test_a_term_without_boxes_in_the_first_steps_is_balanced_when_they_come() -> None:
    balance = GradientBalance(calibration_steps=2, interval=1)
    task, late = torch.tensor([4.0]), torch.tensor([0.0])
    balance.update(task, {"late": late, "early": torch.tensor([1.0])})
    assert float(balance.scale("late", task)) == 0.0
    balance.update(task, {"late": torch.tensor([16.0]), "early": torch.tensor([100.0])}, frozen=True)
    assert float(balance.scale("late", task)) == pytest.approx(0.5)
    assert float(balance.scale("early", task)) == pytest.approx(2.0)
    balance.update(task, {"late": torch.tensor([1.0])}, frozen=True)
    assert float(balance.scale("late", task)) == pytest.approx(0.5)


def test_a_users_own_loop_may_have_frozen_maps_and_not_only_such() -> None:
    balance, frozen, feature = GradientBalance(), torch.ones(2), torch.ones(4, requires_grad=True)
    found = balance(2 * feature.sum(), {"term": 4 * feature.sum()}, [frozen, feature], weights={})
    assert found.item() == pytest.approx(0.5 * 16)
    with pytest.raises(DrkdError, match="carry a gradient, got none"):
        GradientBalance()(2 * feature.sum(), {"term": 4 * feature.sum()}, [frozen], weights={})


def test_a_term_that_is_all_but_silent_gets_no_weight_for_good() -> None:
    balance, task = GradientBalance(), torch.tensor([1.0])
    for squared, scale in ((0.0, 0.0), (1e-40, 0.0), (4.0, 0.5), (1e-40, 0.5)):
        balance.update(task, {"term": torch.tensor([squared], dtype=torch.float64)}, frozen=True)
        assert float(balance.scale("term", task)) == scale


def test_a_users_own_loop_counts_steps_with_gradients_only_and_hears_late_terms() -> None:
    balance, feature = GradientBalance(calibration_steps=2, interval=1), torch.ones(4, requires_grad=True)

    def step(late: float) -> tuple[float, float]:
        terms = {"early": 3 * feature.sum(), "late": late * feature.sum()}
        balance(2 * feature.sum(), terms, [feature], weights={})
        return tuple(float(balance.scale(name, term)) for name, term in terms.items())  # type: ignore[return-value]

    # Validation before training.
    for _ in range(3):
        with torch.no_grad():
            assert step(1.0) == (0.0, 0.0)
    for _ in range(2):
        assert step(0.0) == pytest.approx((2 / 3, 0.0))
    with pytest.warns(UserWarning, match="partly off: late sent no gradient"):
        step(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(0.0)
        assert step(4.0) == pytest.approx((2 / 3, 0.5))
        # From then on it is as fixed as the other.
        assert step(8.0) == pytest.approx((2 / 3, 0.5))


def _mean(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Beside a process that has boxes: one without, then one whose gradient overflowed.
    for own in ([10.0, 0.0], [10.0, float("inf")]):
        mean = _mean_over_processes(torch.tensor([10.0, 2.0] if rank == 0 else own))
        if mean.tolist() != [10.0, 2.0]:
            raise ValueError(f"expected [10, 2], got {mean.tolist()}")
    torch.distributed.destroy_process_group()


def test_a_process_without_boxes_does_not_count(tmp_path: Path) -> None:
    multiprocessing.spawn(_mean, args=(str(tmp_path),), nprocs=2)


@pytest.mark.parametrize("wrong", [{"calibration_steps": 0}, {"interval": 0}, {"momentum": 1.0}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="GradientBalance expects"):
        GradientBalance(**wrong)  # type: ignore[arg-type]
