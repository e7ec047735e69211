"""One comparison at a time in a folder, the last cells of a killed one included."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drkd.contracts import DrkdError


@contextmanager
def locked_folder(folder: Path, *, patience: float = 20.0) -> Iterator[int | None]:
    """Hold the folder's lock; yields its descriptor, or None on a system without such locks.

    The descriptor is to be inherited by processes that work in the folder: the lock ends with the last of them.

    Args:
        folder: Created if need be.
        patience: Seconds to wait for the processes of a comparison that was killed.

    Raises:
        DrkdError: If another comparison is at work in the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DrkdError(
                        f"{folder}: another drkd compare is at work in this folder. Wait for it, stop it, or choose "
                        "another folder with --output."
                    ) from None
                time.sleep(0.2)
        yield descriptor
    finally:
        os.close(descriptor)
