"""Tells the end of another process of a run from a fault of this one."""

from __future__ import annotations

# What gloo, NCCL and PyTorch's key-value store say where the other side of a connection is gone.
_GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "Broken pipe"),
    "remote process exited",
)


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error only says that a process which this one trains with has ended.

    Args:
        error: Of a collective: an error of torch.distributed, or a plain RuntimeError that names its back end.
    """
    from torch import distributed

    known = (distributed.DistBackendError, distributed.DistNetworkError) if distributed.is_available() else ()
    message = str(error)
    speaks = isinstance(error, known) or (
        isinstance(error, RuntimeError) and any(name in message for name in ("gloo", "NCCL"))
    )
    return speaks and any(sign in message for sign in _GONE)
