"""A Lightning callback that measures what training costs: seconds a step, peak memory, parameters."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from drkd.engine.distiller import Distiller
from drkd.engine.module import DistillationModule


class TrainingCost(Callback):
    """Time a step, peak memory and parameters while training; how far the run is, for whoever waits for it.

    A step's time is that of its forward and backward passes and its update; waiting for data, validation and saving are
    left out. The median is over the steps after the first calibration (or after the first half of a short run) at which
    no gradient ratios are measured.

    Args:
        note: Takes step, steps and epoch now and then.
        seconds: Time between notes.
    """

    def __init__(self, note: Callable[[Mapping[str, int]], None] | None = None, *, seconds: float = 1.0) -> None:
        self.note = note
        self.seconds = seconds
        self.measured: dict[str, Any] = {}
        self._noted = 0.0
        self._clock: _StepClock | None = None
        self._durations: dict[int, float] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting."""
        self._clock = _StepClock(pl_module.device)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._tell(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of a batch."""
        del pl_module, batch, batch_idx
        self._step = trainer.global_step
        if self._clock is not None:
            self._clock.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock; the batches of an accumulated step add up."""
        del pl_module, outputs, batch, batch_idx
        if self._clock is not None:
            self._add(self._clock.stop(self._step))
        if time.monotonic() - self._noted >= self.seconds:
            self._tell(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up, before the final evaluation."""
        if self._clock is not None:
            self._add(self._clock.remaining())
        timed = _typical_steps(self._durations, pl_module)
        peak, kind = _peak_memory(pl_module.device)
        self.measured = {
            "seconds_per_step": statistics.median(timed) if timed else None,
            "timed_steps": len(timed),
            "peak_memory_bytes": peak,
            "peak_memory_kind": kind,
            "device": str(pl_module.device),
            "threads": torch.get_num_threads(),
            "trainable_parameters": _count_parameters(pl_module, trainable=True),
            "held_parameters": _count_parameters(pl_module, trainable=False),
        }
        self._tell(trainer)

    def _add(self, durations: list[tuple[int, float]]) -> None:
        for step, seconds in durations:
            self._durations[step] = self._durations.get(step, 0.0) + seconds

    @rank_zero_only
    def _tell(self, trainer: Trainer) -> None:
        self._noted = time.monotonic()
        if self.note is not None:
            steps = int(trainer.estimated_stepping_batches)
            self.note({"step": trainer.global_step, "steps": steps, "epoch": trainer.current_epoch})


class _StepClock:
    """Seconds of each batch. On a GPU by events that are read a while later, so that nothing waits for the device."""

    def __init__(self, device: torch.device, *, behind: int = 64) -> None:
        self._cuda = device.type == "cuda"
        self._behind = behind
        self._started: Any = None
        self._open: list[tuple[int, Any, Any]] = []

    def start(self) -> None:
        self._started = self._now()

    def stop(self, step: int) -> list[tuple[int, float]]:
        """Return the batches that can be read by now: step and seconds."""
        if not self._cuda:
            return [(step, time.perf_counter() - self._started)]
        self._open.append((step, self._started, self._now()))
        ready, self._open = self._open[: -self._behind], self._open[-self._behind :]
        return [self._read(*item) for item in ready]

    def remaining(self) -> list[tuple[int, float]]:
        """Wait for the device and return the rest."""
        ready, self._open = self._open, []
        return [self._read(*item) for item in ready]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, step: int, started: Any, ended: Any) -> tuple[int, float]:
        ended.synchronize()
        return step, started.elapsed_time(ended) / 1000


def _typical_steps(durations: Mapping[int, float], pl_module: LightningModule) -> list[float]:
    """Times of the steps that do nothing but train, once the run is warm; of all but the first if none is left."""
    distiller = _distiller(pl_module)
    balance, interval = distiller.balance, distiller.monitor_interval
    steps = sorted(durations)
    warm = min(balance.calibration_steps, len(steps) // 2)
    plain = [step for step in steps[warm:] if step % interval and not balance.wants_measurement(step)]
    return [durations[step] for step in plain or steps[1:] or steps]


def _peak_memory(device: torch.device) -> tuple[int | None, str]:
    """Peak memory, bytes: of the allocator on a GPU, of the whole process elsewhere; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    status = Path("/proc/self/status")
    # Where Linux has it, as getrusage also counts what the process was before it became ours.
    marks = (
        [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if status.exists()
        else []
    )
    if marks:
        return int(marks[0][1]) * 1024, "resident"
    try:
        import resource
    except ImportError:  # Windows
        return None, "resident"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "resident"


def _count_parameters(pl_module: LightningModule, *, trainable: bool) -> dict[str, int]:
    """Parameters of the student and, on top of them while training, of the method: the trainable ones, or all."""
    distiller = _distiller(pl_module)
    parts = {"student": distiller.student, "method": distiller.method}
    return {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad or not trainable) if part is not None else 0
        for name, part in parts.items()
    }


def _distiller(pl_module: LightningModule) -> Distiller:
    if not isinstance(pl_module, DistillationModule):
        raise TypeError(f"expected a DistillationModule, got {type(pl_module).__name__}")
    return pl_module.distiller
