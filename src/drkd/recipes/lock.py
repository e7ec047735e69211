"""One run, or one comparison, at a time in a folder: a lock that ends with its holder, however that one ends."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from drkd.contracts import DrkdError

_LEASE = 120.0
"""Seconds for which a network file system may keep the locks of a machine that is gone."""


@contextmanager
def locked_folder(folder: Path, *, worker: str = "drkd compare", patience: float = 20.0) -> Iterator[int | None]:
    """Hold the folder's lock for a comparison or a demo; yields its descriptor, or None on a system without such locks.

    The descriptor is to be inherited by processes that work in the folder: the lock ends with the last of them.

    Args:
        folder: Created if need be.
        worker: What works in the folder, for the message.
        patience: Seconds to wait for the processes of one that was killed.

    Raises:
        DrkdError: If another one is at work in the folder.
    """
    descriptor = lock_folder(folder, worker=worker, patience=patience)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lock_folder(folder: Path, *, worker: str, patience: float) -> int | None:
    """Take the folder's lock; return its descriptor, or None where there are no such locks, which is said.

    Args:
        folder: Created if need be.
        worker: What works in the folder, for the message.
        patience: Seconds to wait for one that was killed or is about to end; two minutes where it was on another
            machine, whose locks a shared file system keeps for a while after its end.

    Raises:
        DrkdError: If another one is at work in the folder.
        OSError: If the folder cannot be made or written to.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        began, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Who holds it is for messages: on a full disk the lock is as good.
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return descriptor
            except BlockingIOError:
                process, _, host = os.pread(descriptor, 1000, 0).decode(errors="replace").strip().partition(" ")
                elsewhere = host not in ("", socket.gethostname())
                waited, enough = time.monotonic() - began, max(patience, _LEASE) if elsewhere else patience
                if waited > enough:
                    holder = f" (process {process} on {host})" if host else ""
                    gone = f" If {host} is gone, remove {folder / '.lock'}." if elsewhere else ""
                    raise DrkdError(
                        f"{folder}: another {worker} is at work in this folder{holder}. Wait for it, stop it, or "
                        f"choose another folder with --output.{gone}"
                    ) from None
                if elsewhere and waited > patience and not told:
                    told = True
                    print(f"drkd: {folder}: waiting for {host}, which has worked in it.", file=sys.stderr, flush=True)
                time.sleep(0.2)
    except OSError as error:
        os.close(descriptor)
        print(
            f"drkd: {folder}: the folder cannot be locked here ({error.strerror}); see to it that no other {worker} "
            "works in it at the same time.",
            file=sys.stderr,
        )
        return None
    except BaseException:
        os.close(descriptor)
        raise


def unlock(descriptor: int) -> None:
    """Give the lock up, also where processes that inherited the descriptor are still about to end."""
    import fcntl

    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
