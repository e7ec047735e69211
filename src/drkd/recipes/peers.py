"""Tells the end of another process of a run from a fault of this one."""

from __future__ import annotations

# What gloo, NCCL and PyTorch's key-value store say where the other side of a connection is gone.
_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
    "socket closed",
)
_SPEAKERS = ("gloo", "NCCL", "ProcessGroup", "TCPStore", "socket")


def lost_peer(error: BaseException | None) -> bool:
    """Whether an error only says that a process which this one trains with has ended.

    Args:
        error: Of a collective; such errors are PyTorch's own, or plain RuntimeErrors.
    """
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    return any(sign in message for sign in _GONE) and any(name in message for name in _SPEAKERS)
