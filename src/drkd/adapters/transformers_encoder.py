"""One pass through a transformers detector that hands out its encoder's pyramid, and stops there when told to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _StopAfterEncoderError(Exception):
    """Ends a forward pass whose decoder nobody asked for."""


class EncoderTap:
    """Runs the model; afterwards ``maps`` holds what its encoder gave to the decoder, finest level first.

    The decoder reads the very tensors in ``maps``, so that the task's gradient can be measured on them. Where the
    encoder returns all positions in one row (Deformable DETR), the row is cut into maps and put together again on its
    way. The hook is on the encoder during the call only.

    Args:
        model: A model of one of `transformers_library.FAMILIES`.
        flat: Whether the encoder returns one row.

    Attributes:
        maps: (B, C, h, w) of each level.
    """

    def __init__(self, model: nn.Module, *, flat: bool) -> None:
        self.maps: list[Tensor] = []
        self._model = model
        self._flat = flat
        self._stop = False

    def run(self, **inputs: Any) -> Any:
        """The model's output for these inputs."""
        return self._call(stop=False, inputs=inputs)

    def encode(self, **inputs: Any) -> list[Tensor]:
        """The maps alone; nothing behind the encoder is computed."""
        try:
            self._call(stop=True, inputs=inputs)
        except _StopAfterEncoderError:
            return self.maps
        raise ValueError(f"expected {type(self._model).__name__} to call its model.encoder")

    def _call(self, *, stop: bool, inputs: Mapping[str, Any]) -> Any:
        untyped: Any = self._model
        encoder: nn.Module = untyped.model.encoder
        self._stop = stop
        handle = encoder.register_forward_hook(self._take, with_kwargs=True)
        try:
            return self._model(**inputs)
        finally:
            handle.remove()

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        del module, args
        if self._flat:
            row = output.last_hidden_state
            self.maps = unroll(row, kwargs["spatial_shapes_list"])
            output.last_hidden_state = torch.cat([entry.flatten(2).transpose(1, 2) for entry in self.maps], dim=1)
        else:
            self.maps = list(output[0])
        if self._stop:
            raise _StopAfterEncoderError
        return output


def unroll(row: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut positions (B, S, C), level by level and row by row, into maps (B, C, h, w)."""
    parts = row.split([height * width for height, width in shapes], dim=1)
    return [
        part.transpose(1, 2).reshape(part.shape[0], part.shape[2], *shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


@torch.no_grad()
def probe_maps(model: nn.Module, size: int, *, flat: bool) -> list[Tensor]:
    """Maps of a black image of this side, px, in eval mode; the model's modes and statistics stay as they were."""
    modes = {part: part.training for part in model.modules()}
    reference = next(model.parameters())
    pixels = torch.zeros(1, 3, size, size, device=reference.device, dtype=reference.dtype)
    mask = torch.ones(1, size, size, device=reference.device, dtype=torch.int64)
    try:
        model.eval()
        return EncoderTap(model, flat=flat).encode(pixel_values=pixels, pixel_mask=mask)
    finally:
        for part, training in modes.items():
            part.training = training
