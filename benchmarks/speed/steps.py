"""A distillation step beside its floor: the student's plain training step and the teacher's features, no gradient."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo.config
from torch import nn

import drkd.methods
from drkd.adapters import FasterRCNNBuilder, RetinaNetBuilder
from drkd.contracts import BoxTargets, DetectionBatch, Detector, KDMethod
from drkd.engine.compilation import compile_distiller
from drkd.engine.distiller import Distiller

# LD needs box distributions, which these detectors lack: it lands among the impossible, with the reason.
_NAMES = (
    *("DRKD", "PaperDRKD", "ReleasedDRKD", "FeatureHint", "FitNet", "PKD", "CWD", "FGD"),
    *("MGD", "NLD", "FGFI", "DeFeat", "CrossKD", "LogitKD", "LD"),
)
# DRKD at a step that measures gradient ratios, which one in `training.monitor_interval` is.
MEASURING = "DRKD-measuring"
METHODS: dict[str, Callable[..., KDMethod]] = {
    **{name: getattr(drkd.methods, name) for name in _NAMES},
    # The response terms need the teacher's head, which the floor leaves out.
    "DRKD-response": partial(drkd.methods.DRKD, response_weight=1.0),
    "DRKD-cross-head": partial(drkd.methods.DRKD, response="cross_head", response_weight=1.0, response_share=1.0),
    MEASURING: drkd.methods.DRKD,
}
# With a response, DRKD asks the teacher's head in every second pass of a batch of 2 (`response_share`): timed by twos.
STEPS_A_ROUND = 2
CLASSES = tuple(f"class {index}" for index in range(80))


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        family: retinanet or faster_rcnn.
        student: Backbone.
        teacher: Backbone.
        size: Height and width of the padded batch, px.
        batch_size: Images.
        boxes: Boxes an image.
    """

    family: str
    student: str
    teacher: str
    size: tuple[int, int]
    batch_size: int
    boxes: int

    @property
    def name(self) -> str:
        """For tables."""
        height, width = self.size
        return (
            f"{self.family}, {self.student} from {self.teacher}, {height}x{width}, batch {self.batch_size}, "
            f"{self.boxes} boxes an image"
        )


def make_batch(setting: Setting, device: torch.device, *, channels_last: bool) -> DetectionBatch:
    """Random images with random boxes."""
    generator = torch.Generator().manual_seed(0)
    height, width = setting.size
    images = torch.rand(setting.batch_size, 3, height, width, generator=generator)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    targets = []
    for _ in range(setting.batch_size):
        centres = torch.rand(setting.boxes, 2, generator=generator) * torch.tensor([width, height])
        sides = torch.exp(torch.rand(setting.boxes, 2, generator=generator) * 2.5 + 2.5)
        corners = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
        corners = corners.clamp(min=0).minimum(torch.tensor([width, height] * 2))
        labels = torch.randint(0, 80, (setting.boxes,), generator=generator)
        targets.append(BoxTargets(corners, labels, torch.zeros(setting.boxes, dtype=torch.bool)))
    sizes = (setting.size,) * setting.batch_size
    batch = DetectionBatch(images, sizes, sizes, tuple(targets), tuple(range(setting.batch_size)))
    return batch.to(device)


def build_pair(setting: Setting) -> tuple[Detector, Detector]:
    """Student as in the paper's recipes, teacher in eval mode; random weights."""
    torch.manual_seed(0)
    builder: Any = {"retinanet": RetinaNetBuilder, "faster_rcnn": FasterRCNNBuilder}[setting.family]
    student = builder(backbone=setting.student, norm="frozen", frozen_stages=1).build(CLASSES)
    teacher = builder(backbone=setting.teacher).build(CLASSES).eval()
    teacher.requires_grad_(False)
    return student, teacher


class Step:
    """One training step: forward, backward, update.

    Args:
        forward: Returns the loss.
        modules: Whose parameters are trained.
        precision: Of autocast, or None.
        method: What the step holds beside the detectors, trained or not.
    """

    def __init__(
        self,
        forward: Callable[[], torch.Tensor],
        modules: Sequence[nn.Module],
        *,
        precision: torch.dtype | None,
        method: nn.Module | None = None,
    ) -> None:
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        # A learning rate of nothing: every variant trains the same student, over and over.
        self.optimizer = torch.optim.SGD(parameters, lr=1e-12, momentum=0.9)
        self.forward = forward
        self.precision = precision
        self.method = method
        self.device = parameters[0].device

    def __call__(self) -> None:
        """Take the step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None):
            loss = self.forward()
        loss.backward()
        self.optimizer.step()

    def held_bytes(self) -> int:
        """Bytes between steps: the optimizer's state, and the method's weights and buffers."""
        state = self.optimizer.state.values()
        kept = sum(t.nbytes for entry in state for t in entry.values() if isinstance(t, torch.Tensor))
        own = (*self.method.parameters(), *self.method.buffers()) if self.method is not None else ()
        return kept + sum(t.nbytes for t in own)


def make_steps(
    setting: Setting,
    methods: Sequence[str],
    device: torch.device,
    *,
    precision: torch.dtype | None = None,
    channels_last: bool = True,
    compile_with: str | None = None,
) -> tuple[dict[str, Step], dict[str, str], int]:
    """The floor and each method's step on one pair of detectors; why others are impossible; bytes of both detectors.

    With a backend of ``torch.compile``, all are compiled as a run would be, the floor's two backbones too.
    """
    student, teacher = (detector.to(device) for detector in build_pair(setting))
    if channels_last:
        student, teacher = (detector.to(memory_format=torch.channels_last) for detector in (student, teacher))
    batch = make_batch(setting, device, channels_last=channels_last)
    student.train()

    def floor() -> torch.Tensor:
        with torch.no_grad():
            teacher(batch, want=frozenset({"features"}))
        return torch.stack(list(student(batch, want=frozenset({"losses"})).losses.values())).sum()

    if compile_with is not None:
        # The forms of all variants count as one function's.
        torch._dynamo.config.recompile_limit = 1000
    steps = {"floor": Step(floor, [student], precision=precision)}
    impossible: dict[str, str] = {}
    for name in methods:
        try:
            method = METHODS[name](student.spec, teacher.spec).to(device)
        except ValueError as error:
            impossible[name] = str(error)
            continue
        # Ratios are measured at the first step only, which is not timed; but for the variant that times just that.
        interval = 1 if name == MEASURING else 10**9
        distiller = Distiller(
            student, teacher, method, calibration_steps=1, monitor_interval=interval, dead_after=10**9
        )
        distiller.train()
        if compile_with is not None:
            compile_distiller(distiller, backend=compile_with)

        def forward(distiller: Distiller = distiller) -> torch.Tensor:
            return torch.stack([value.float() for value in distiller(batch).values()]).sum()

        steps[name] = Step(forward, [student, method], precision=precision, method=method)
    detectors = sum(t.nbytes for d in (student, teacher) for t in (*d.parameters(), *d.buffers()))
    return steps, impossible, detectors


def measure_steps(
    steps: dict[str, Step], *, repeats: int, clock: Callable[[], float], warm: int = 2, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Time all steps in turns, in another order each round; then the peak memory of each.

    Returns:
        By step: seconds (median over rounds of the mean of a round's `STEPS_A_ROUND` steps), ratio (median over rounds
        of that over the floor's in that round), the 10th and 90th percentile of the ratio, and the peak bytes of the
        most demanding step of a round, with what is held between steps (`Step.held_bytes`).
    """
    device = steps["floor"].device
    for step in steps.values():
        for _ in range(warm):
            step()

    def take_round(step: Step) -> None:
        for _ in range(STEPS_A_ROUND):
            step()

    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(seed)
    for _ in range(repeats):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(time_once(partial(take_round, steps[name]), device, clock) / STEPS_A_ROUND)
    found = measure_peaks(steps)
    for name, own in times.items():
        ratios = sorted(ours / floor for ours, floor in zip(own, times["floor"], strict=True))
        last = len(ratios) - 1
        found[name] |= {
            "seconds": statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratio_p10": ratios[round(0.1 * last)],
            "ratio_p90": ratios[round(0.9 * last)],
        }
    return found


def measure_peaks(steps: dict[str, Step], *, warm: int = 0) -> dict[str, dict[str, Any]]:
    """By step, ``peak_bytes``: of the most demanding of a round's, with what is held between steps.

    Args:
        steps: The steps.
        warm: How many are taken before: the first of a method measures gradients, which takes more.
    """
    peaks: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        for _ in range(warm):
            step()
        highest = []
        for _ in range(STEPS_A_ROUND):
            # Gradients belong to the step that makes them.
            step.optimizer.zero_grad(set_to_none=True)
            highest.append(peak_bytes(step, step.device))
        peaks[name] = {"peak_bytes": max(highest) + step.held_bytes()}
    return peaks


def time_once(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that tensors made during one call held at once; what was there before is not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = highest = 0
    for _, change in changes:
        held += change
        highest = max(highest, held)
    return highest


def clock_of(name: str) -> Callable[[], float]:
    """``wall``, or ``cpu``: this process's own time, which other processes disturb less."""
    return {"wall": time.perf_counter, "cpu": time.process_time}[name]
