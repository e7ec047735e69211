"""What a detector costs: parameters, floating-point operations, latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from drkd.contracts import Size


@dataclass(frozen=True)
class ModelCost:
    """The cost of detecting in one image.

    Args:
        parameters: Number of weights, trainable or not; buffers are left out.
        flops: Floating-point operations of convolutions and matrix products, a multiply-add counted as two.
        latency_ms: Median time from the image tensor to the final detections, ms.
        latency_p10_ms: Tenth percentile, ms.
        latency_p90_ms: Ninetieth percentile, ms.
        threads: CPU threads that torch used.
        image_size: Height and width of the image, px, without padding; of an SSD its one size.
        device: Where it ran: "cpu" or "cuda (its name)".
    """

    parameters: int
    flops: int
    latency_ms: float
    latency_p10_ms: float
    latency_p90_ms: float
    threads: int
    image_size: Size
    device: str

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values (``cost.json`` of a run folder)."""
        return {**asdict(self), "image_size": list(self.image_size)}


def measure_cost(
    model: nn.Module,
    image_size: Size,
    *,
    repeats: int = 20,
    warmup: int = 3,
    threads: int | None = None,
    device: torch.device | str = "cpu",
) -> ModelCost:
    """Measure a torchvision-style detector on one image, post-processing included.

    The image is fixed noise in [0, 1]. A torchvision detector would first resize it to its own training size; for the
    measurement it is told to keep ``image_size``, so that size is what the network computes on. One with a single size
    for all images (an SSD's ``fixed_size``) keeps that, and the result names it.

    Args:
        model: Called as ``model([image])`` with an image (3, H, W); in eval mode, on ``device``.
        image_size: Height and width, px.
        repeats: Timed calls.
        warmup: Calls before these, not timed.
        threads: CPU threads to use; None keeps torch's setting.
        device: Where the model lies.

    Raises:
        ValueError: If the model is in training mode or a number is out of range.
    """
    if model.training:
        raise ValueError("measure_cost expects a model in eval mode, got training mode")
    if repeats < 1 or warmup < 0 or min(image_size) < 1 or (threads is not None and threads < 1):
        raise ValueError(
            "measure_cost expects repeats >= 1, warmup >= 0, sizes >= 1 and threads >= 1, "
            f"got {repeats}, {warmup}, {image_size} and {threads}"
        )
    device = torch.device(device)
    image = torch.rand((3, *image_size), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode(), _keep_size(model, image_size), _use_threads(threads):
        counter = FlopCounterMode(display=False)
        with _countable(model), counter:
            model([image])
        for _ in range(warmup):
            model([image])
        times = [_time_call(model, image) for _ in range(repeats)]
        used = torch.get_num_threads()
    deciles = statistics.quantiles(times, n=10, method="inclusive") if repeats > 1 else times * 9
    return ModelCost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=int(counter.get_total_flops()),
        latency_ms=statistics.median(times),
        latency_p10_ms=deciles[0],
        latency_p90_ms=deciles[8],
        threads=used,
        image_size=_computed_size(model, image_size),
        device=f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
    )


@contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Let FlopCounterMode count all of a model, which is put back afterwards.

    It fails on parameters that are handed to a layer and want gradients, and knows neither the CPU's fused attention
    nor torch's fast path through whole encoder layers.
    """
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in wanted:
            parameter.requires_grad_(True)


def _time_call(model: nn.Module, image: torch.Tensor) -> float:
    """Return the milliseconds of one call."""
    _wait(image.device)
    start = time.perf_counter()
    model([image])
    _wait(image.device)
    return 1000.0 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _use_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _keep_size(model: nn.Module, image_size: Size) -> Iterator[None]:
    """Let torchvision's GeneralizedRCNNTransform pass images of ``image_size`` through at that size, and undo it."""
    transform: Any = getattr(model, "transform", None)
    if not (hasattr(transform, "min_size") and hasattr(transform, "max_size")):
        yield
        return
    before = (transform.min_size, transform.max_size)
    transform.min_size, transform.max_size = (min(image_size),), max(image_size)
    try:
        yield
    finally:
        transform.min_size, transform.max_size = before


def _computed_size(model: nn.Module, image_size: Size) -> Size:
    """What the network computes on: its own size where it has one for all images, as an SSD has."""
    fixed = getattr(getattr(model, "transform", None), "fixed_size", None)
    return (int(image_size[0]), int(image_size[1])) if fixed is None else (int(fixed[1]), int(fixed[0]))
