"""What a user reads instead of a traceback, and the exit code that goes with it."""

from __future__ import annotations

import errno
import os
import re
import traceback

FAILED, WRONG, NOT_APPLICABLE, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: a fault of the machine, what the user can put right, a method that does not fit the pair, Ctrl-C."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
# Where PyTorch opens the memory that a worker shares with us.
_TAKES_OVER = os.path.join("torch", "multiprocessing", "reductions.py")  # noqa: PTH118 - an end of a name, no path


def explain(error: BaseException) -> tuple[int, str] | None:
    """Exit code and one readable paragraph for an error that is no bug; None for one that is.

    Args:
        error: What reached the command line.
    """
    from drkd.contracts import DrkdError, MachineError, NotApplicableError
    from drkd.recipes.faults import lost_peer, out_of_memory, out_of_shared_memory

    message = str(error).strip()
    if isinstance(error, NotApplicableError):
        return NOT_APPLICABLE, message
    if isinstance(error, DrkdError):
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL
        return FAILED if full else WRONG, _from_worker(message)
    if isinstance(error, MachineError):
        return FAILED, _from_worker(message)
    if _worker_died(error, message):
        return FAILED, (
            "A process that decodes images was killed, mostly for want of (shared) memory. Use fewer of them "
            "(data.workers), or 0."
        )
    if out_of_shared_memory(error):
        return FAILED, (
            "A process that decodes images could not hand them over, for want of shared memory or open files. Use "
            "fewer of them (data.workers), or 0; or allow more (--shm-size where it runs in a container, ulimit -n)."
        )
    if isinstance(error, OSError):
        return _explain_os(error)
    if out_of_memory(error):
        return FAILED, (
            "Out of memory. Use smaller batches (data.batch_size, with training.accumulate to make up for it), smaller "
            "images (data.min_size, data.max_size), or training.precision bf16-mixed."
        )
    if lost_peer(error):
        return FAILED, (
            "Another process of this run has ended, so this one cannot go on; what that one printed says why. The last "
            "checkpoint, if there is one, stands: once that is put right, start all of them again with --resume=auto."
        )
    # torch.save reports a full disk as a RuntimeError of its file writer.
    if "PytorchStreamWriter failed" in message or "unexpected pos" in message:
        return FAILED, "A checkpoint could not be written. Is the disk full? Free some space and go on with --resume."
    if isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException":
        text = _from_worker(message) or type(error).__name__
        return WRONG, f"{text} (DRKD_TRACEBACK=1 shows where this comes from.)"
    return None


def _worker_died(error: BaseException, message: str) -> bool:
    """Whether a data loader's worker was killed.

    PyTorch says so itself where the system told it in time; else what shows is the connection that broke while a batch
    was taken over from the worker.
    """
    if "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
        return True
    if not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.endswith(_TAKES_OVER) for frame, _ in frames)


def _explain_os(error: OSError) -> tuple[int, str]:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _FULL:
        return FAILED, f"{where}no space is left on the disk. Free some, or choose another place with --output."
    return FAILED if error.errno in _SHORT else WRONG, f"{where}{error.strerror or error}."


def _from_worker(message: str) -> str:
    """The bare message of an error that a data loader's worker passed on with its traceback."""
    if "Original Traceback" not in message:
        return message
    return re.split(r"^[\w.]*(?:Error|Exception): ", message, flags=re.MULTILINE)[-1].strip()
