"""Refuses what would make the host wait for a GPU, seen at the dispatcher, so that a CPU shows it too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their result, or its size, has to be known by the host.
_WAITING = {
    "aten::_local_scalar_dense",  # item, tolist, float(), int(), bool()
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
}


# These are no operations on the CPU, and copies that the host waits for on a GPU.
_COPIES = {Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.new_tensor}
# So are these where they are told a device: numbers of the host have to get there.
_FACTORIES = {torch.tensor, torch.as_tensor}


class _NoCopies(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES or (func in _FACTORIES and (kwargs or {}).get("device") is not None):
            raise AssertionError(f"{func.__name__} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


class HostMustNotWait(TorchDispatchMode):
    """Raises an AssertionError at the first operation whose result a host would wait for.

    On a GPU, `torch.cuda.set_sync_debug_mode` checks the same from the other side.
    """

    def __enter__(self) -> HostMustNotWait:
        self._copies = _NoCopies()
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        masks = name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")) and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        if func._schema.name in _WAITING or name in _WAITING or masks:
            raise AssertionError(f"{name} makes the host wait for the device{' (a mask as index)' if masks else ''}")
        return func(*args, **(kwargs or {}))
