"""Tells what the machine, or another process of a run, has done to a run from a fault of the run itself."""

from __future__ import annotations

import torch
from torch import distributed

# What gloo, NCCL and PyTorch's key-value store say where the other side of a connection is gone.
_GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "Broken pipe"),
    "remote process exited",
)
_BACK_ENDS = ("gloo", "NCCL")
# A CPU's allocator, Apple's, that of a GPU's context and libraries that allocate beside PyTorch report it as a plain
# RuntimeError, or as one of many of a GPU's errors.
_NO_MEMORY = (
    *("can't allocate memory", "DefaultCPUAllocator: not enough memory", "CUDA error: out of memory"),
    *("HIP error: out of memory", "MPS backend out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)
# What PyTorch and Python say where a batch does not go into the memory that a worker shares with its parent, or where
# there is no number left for one more of such files.
_NO_SHARED = (
    *("unable to write to file </torch_", "unable to resize file </torch_", "unable to stretch file </torch_"),
    *("from file </torch_", "unable to allocate shared memory", "unable to open shared memory object"),
    *("items of ancdata", "Too many open files. Communication with the workers"),
)


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error only says that a process which this one trains with has ended.

    Args:
        error: Of a collective: an error of torch.distributed, or a plain RuntimeError that names its back end.
    """
    return _of_processes(error) and any(sign in str(error) for sign in _GONE)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, on whatever device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


def out_of_shared_memory(error: BaseException | None) -> bool:
    """Whether a batch did not go into the memory that processes share."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_SHARED)


def of_machine(error: BaseException | None) -> bool:
    """Whether an error comes from the device, from its memory, or from the processes' ways to each other."""
    return (
        isinstance(error, torch.AcceleratorError)
        or out_of_memory(error)
        or out_of_shared_memory(error)
        or _of_processes(error)
    )


def _of_processes(error: BaseException | None) -> bool:
    known = (distributed.DistError,) if distributed.is_available() else ()
    return isinstance(error, known) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in _BACK_ENDS)
    )
