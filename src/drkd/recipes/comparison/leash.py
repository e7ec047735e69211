"""Holds a process that must not outlive whoever started it, however that one ends; needs the standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_GRACE = 10.0  # seconds that an interrupted run has to note how it ended


def start_leashed(
    command: Sequence[str], *, log: Path, environment: Mapping[str, str], lock: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a process on a leash: it is stopped when `let_go` is called and when this process ends in any way.

    Args:
        command: The command.
        log: File for all that it prints.
        environment: Its environment.
        lock: Descriptor of a locked file, which stays locked until the leashed process has ended.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        # The pipe is the leash: the kernel closes our end of it even when we are killed. A session of its own keeps
        # Ctrl-C, which the terminal sends to the whole group, away from the children: we stop them ourselves.
        return subprocess.Popen(
            [sys.executable, "-m", "drkd.recipes.comparison.leash", *command],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
        )


def let_go(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop leashed processes and wait until they are gone."""
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    for process in processes:
        try:
            process.wait(timeout=2 * _GRACE)
        except subprocess.TimeoutExpired:
            process.kill()


def main(command: Sequence[str]) -> int:
    """Run the command until it ends or the leash is cut; return its exit code, 128 + n if signal n ended it."""
    # A shell that starts jobs in the background makes them ignore interrupts, and the child would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_watch, args=(child,), daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def _watch(child: subprocess.Popen[bytes]) -> None:
    """Wait for the end of the leash, then stop the child and whatever it started."""
    # Not through sys.stdin: its lock, held by a thread that waits, would abort the interpreter at its end.
    while os.read(0, 4096):
        pass
    with suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=_GRACE)
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
