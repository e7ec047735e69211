"""Compares the state in a checkpoint with that of the run which is to go on: what differs in kind cannot fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drkd.adapters.argument_types import shown

_LARGEST = 1e300


def find_misfit(own: Any, saved: Any, place: str) -> str | None:
    """Say where saved state is of another kind than the run's own, as words; None where nothing is.

    Lightning and PyTorch take over whatever a checkpoint says and fail on it steps later, or count for ever. Entries
    that only one of the two has are theirs to judge, since versions differ in them.

    Args:
        own: State of the run before anything is taken over.
        saved: What the checkpoint has in its place.
        place: Where in the checkpoint, for the words.
    """
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            return f"{place} is {_name(saved)}, no mapping"
        parts = ((f"{place}.{key}", own[key], saved[key]) for key in own if key in saved)
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or (own and len(own) != len(saved)):
            return f"{place} is {_name(saved)}, no list of {len(own)}"
        parts = ((f"{place}[{index}]", *pair) for index, pair in enumerate(zip(own, saved, strict=False)))
    else:
        return None if _fits(own, saved) else f"{place} is {_name(saved)}, expected {_name(own, any_value=True)}"
    return next((found for name, ours, theirs in parts if (found := find_misfit(ours, theirs, name))), None)


def is_score(value: Any) -> bool:
    """Whether a value is a number, or a tensor that holds one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dtype.is_floating_point and value.layout == torch.strided
    return _is_number(value)


def _fits(own: Any, saved: Any) -> bool:
    if own is None:
        # Not set yet: what it will be is not known, but it is no structure.
        return saved is None or isinstance(saved, bool | str) or is_score(saved)
    if isinstance(own, bool | str):
        return type(saved) is type(own)
    if isinstance(own, int):
        return type(saved) is int and 0 <= saved < 2**53
    if isinstance(own, float):
        return type(saved) in (int, float) and (abs(saved) < _LARGEST or saved == own)
    if isinstance(own, Tensor):
        same = isinstance(saved, Tensor) and saved.shape == own.shape and saved.layout == own.layout
        return same and saved.dtype.is_floating_point == own.dtype.is_floating_point and not saved.dtype.is_complex
    return True


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST


def _name(value: Any, *, any_value: bool = False) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if any_value:
        return "a count" if type(value) is int else f"a {type(value).__name__}"
    return shown(value, 40)
