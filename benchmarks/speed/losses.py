"""DRKD's losses alone, forward and backward: against the released arithmetic, and how they grow."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from released import ReleasedLosses
from steps import peak_bytes, time_once
from torch import Tensor, nn

from drkd.losses import GraphReasoningUnit, InstanceRelationLoss, PixelRelationLoss
from drkd.methods import DRKD, ReleasedDRKD

Clock = Callable[[], float]


class NonLocal(nn.Module):
    """The embedded Gaussian non-local block (Wang et al., CVPR 2018): every pixel beside every other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta, self.phi, self.value = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.output = nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add to each pixel what all others say of it."""
        theta, phi, value = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.value))
        weights = (theta.transpose(1, 2) @ phi).softmax(dim=2)
        related = (value @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.output(related)


def compare_with_released(
    size: tuple[int, int],
    boxes: Sequence[int],
    device: torch.device,
    *,
    repeats: int,
    clock: Clock,
    channels: int = 256,
) -> list[dict[str, Any]]:
    """Forward and backward of all losses on five levels of stride 4 to 64, two images; a row a count of boxes."""
    rows = []
    for count in boxes:
        torch.manual_seed(0)
        strides = [4 * 2**level for level in range(5)]
        maps = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in strides]
        student, teacher = (
            [torch.randn(2, channels, *cells, device=device, requires_grad=gradient) for cells in maps]
            for gradient in (True, False)
        )
        corners = _boxes(count, size, device)
        named = {f"p{index}": tensor for index, tensor in enumerate(student)}
        targets = {f"p{index}": tensor for index, tensor in enumerate(teacher)}
        steps: dict[str, Callable[[], Tensor]] = {}
        released = ReleasedLosses(channels).to(device)
        steps["released way"] = lambda m=released, s=student, t=teacher, b=corners: m(s, t, b, first_stride=4.0)
        for name, kind in (("DRKD", DRKD), ("ReleasedDRKD", ReleasedDRKD)):
            method = kind.for_features(named, targets, image_size=size).to(device)
            steps[name] = lambda m=method, s=named, t=targets, b=corners: m.total(
                m.from_features(s, t, b, image_size=size)
            )
        found = _in_turns({name: _with_backward(step) for name, step in steps.items()}, device, repeats, clock)
        for name, seconds in found.items():
            rows.append(
                {
                    "losses": name,
                    "boxes": count,
                    "seconds": statistics.median(seconds),
                    "speedup": statistics.median(
                        slow / own for slow, own in zip(found["released way"], seconds, strict=True)
                    ),
                    "peak_bytes": peak_bytes(_with_backward(steps[name]), device),
                }
            )
    return rows


def growth(
    sides: Sequence[int],
    counts: Sequence[int],
    device: torch.device,
    *,
    repeats: int,
    clock: Clock,
    channels: int = 256,
) -> dict[str, list[dict[str, Any]]]:
    """Seconds and peak bytes, forward and backward, against the pixels of a map and against the instances of an image.

    Args:
        sides: Of square maps, cells; the non-local block is left out where its matrix would exceed 2 GiB.
        counts: Instances of each of two images.
        device: Where to run.
        repeats: Of each measurement; the median is kept.
        clock: Seconds.
        channels: Of the maps.
    """
    pixels = []
    for side in sides:
        torch.manual_seed(0)
        student = torch.randn(1, channels, side, side, device=device, requires_grad=True)
        teacher = torch.randn(1, channels, side, side, device=device)
        modules: dict[str, nn.Module] = {
            "pixel relation": PixelRelationLoss(channels, channels).to(device),
            "graph unit": GraphReasoningUnit(channels, nodes=32, states=64).to(device),
        }
        if side**4 * 4 <= 2**31:
            modules["non-local block"] = NonLocal(channels).to(device)
        runs = {
            name: _with_backward(partial(_apply, module, student, teacher if name == "pixel relation" else None))
            for name, module in modules.items()
        }
        for name, seconds in _in_turns(runs, device, repeats, clock).items():
            row = {"what": name, "pixels": side**2, "seconds": statistics.median(seconds)}
            pixels.append({**row, "peak_bytes": peak_bytes(runs[name], device)})
    instances = []
    for count in counts:
        torch.manual_seed(0)
        student = torch.randn(2 * count, channels, 3, 3, device=device, requires_grad=True)
        teacher = torch.randn(2 * count, channels, 3, 3, device=device)
        loss = InstanceRelationLoss(channels, channels).to(device)
        corners = _boxes(count, (512, 512), device)
        run = _with_backward(lambda m=loss, s=student, t=teacher, b=corners: m(s, t, b, image_size=(512, 512)))
        seconds = _in_turns({"": run}, device, repeats, clock)[""]
        row = {"what": "instance relation", "instances": count, "seconds": statistics.median(seconds)}
        instances.append({**row, "peak_bytes": peak_bytes(run, device)})
    return {"pixels": pixels, "instances": instances}


def _apply(module: nn.Module, student: Tensor, teacher: Tensor | None) -> Tensor:
    """A loss of two maps, or the mean square of what a block makes of one."""
    value: Tensor = module(student).square().mean() if teacher is None else module(student, teacher)
    return value


def exponent(rows: Sequence[dict[str, Any]], what: str, by: str, value: str) -> float:
    """Slope of a value over a size between the two largest sizes, in log-log: 1 is linear, 2 quadratic."""
    chosen = sorted((row[by], row[value]) for row in rows if row["what"] == what)
    (x0, y0), (x1, y1) = chosen[-2:]
    return float(torch.log(torch.tensor(y1 / y0)) / torch.log(torch.tensor(x1 / x0)))


def _boxes(count: int, size: tuple[int, int], device: torch.device) -> list[Tensor]:
    found = []
    for _ in range(2):
        corners = torch.rand(count, 4) * torch.tensor([size[1], size[0]] * 2) / 2
        corners[:, 2:] += corners[:, :2] + 8
        found.append(corners.to(device))
    return found


def _with_backward(forward: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        forward().backward()

    return run


def _in_turns(
    runs: dict[str, Callable[[], None]], device: torch.device, repeats: int, clock: Clock
) -> dict[str, list[float]]:
    order, shuffle = list(runs), random.Random(0)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(time_once(runs[name], device, clock))
    return times
