"""Boxes in float32, whatever precision the layers compute in.

bfloat16 knows a coordinate to 2 px above 256 px, to 4 px above 512 and to 8 px above 1024; and torchvision's
suppression adds the label times the largest coordinate to it. So under autocast convolutions are computed in 16 bits,
and what makes boxes of their outputs is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from drkd.contracts import DetectionBatch, Detections

_HALVES = (torch.float16, torch.bfloat16)
_Self = TypeVar("_Self", bound=nn.Module)


def widen(values: Any) -> Any:
    """Tensors of 16 bits as float32, within lists, tuples and dicts too; everything else as it is."""
    if isinstance(values, Tensor):
        return values.float() if values.dtype in _HALVES else values
    if isinstance(values, dict):
        return {name: widen(value) for name, value in values.items()}
    if isinstance(values, list):
        return [widen(value) for value in values]
    if isinstance(values, tuple):
        found = [widen(value) for value in values]
        return type(values)(*found) if hasattr(values, "_fields") else tuple(found)
    return values


def float32_likes(maps: Sequence[Tensor]) -> list[Tensor]:
    """Stand-ins without memory of their own for those who ask maps for device, shape and the precision of anchors."""
    return [
        entry.new_empty((), dtype=torch.float32).expand(entry.shape) if entry.dtype in _HALVES else entry
        for entry in maps
    ]


@contextmanager
def exact_regions(rpn: nn.Module, heads: nn.Module, device: torch.device) -> Iterator[None]:
    """Have a two-stage detector of torchvision's make and match its boxes in float32 where autocast is on.

    Its proposals take the precision of the proposal head's outputs, its anchors that of the maps, and the boxes of the
    ground truth that of the proposals.
    """
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    untyped: tuple[Any, Any] = rpn, heads
    with ExitStack() as stack:
        for part in (untyped[0].head, untyped[1].box_predictor):
            hook = part.register_forward_hook(lambda _module, _inputs, outputs: widen(outputs))
            stack.callback(hook.remove)
        hook = untyped[0].anchor_generator.register_forward_pre_hook(
            lambda _module, inputs: (inputs[0], float32_likes(inputs[1]))
        )
        stack.callback(hook.remove)
        yield


def without_autocast(
    detect: Callable[[_Self, DetectionBatch], list[Detections]],
) -> Callable[[_Self, DetectionBatch], list[Detections]]:
    """Run a detector's ``detect`` in the precision of its weights: detections are the same wherever it is called.

    A model whose weights are of 16 bits themselves is left to the autocast that it may need.
    """

    @functools.wraps(detect)
    def exactly(self: _Self, batch: DetectionBatch) -> list[Detections]:
        if any(entry.dtype in _HALVES for entry in self.parameters()):
            return detect(self, batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            return detect(self, batch)

    return exactly
