"""The leash: exit codes pass through, and cutting it ends the child and the child's children."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from drkd.recipes.comparison.leash import let_go, start_leashed


@pytest.mark.parametrize(
    ("code", "expected"),
    [("print('out')", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_exit_codes(code: str, expected: int, tmp_path: Path) -> None:
    process = start_leashed([sys.executable, "-c", code], log=tmp_path / "deep" / "log", environment=os.environ)
    assert process.wait(timeout=30) == expected
    let_go([process])
    assert (tmp_path / "deep" / "log").read_text() == ("out\n" if expected == 0 else "")


def test_letting_go_ends_child_and_grandchild(tmp_path: Path) -> None:
    # Neither of them listens to an interrupt.
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); "
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {stubborn + 'time.sleep(60)'!r}]).wait()"
    log = tmp_path / "log"
    process = start_leashed([sys.executable, "-c", child], log=log, environment=os.environ)
    while "up" not in log.read_text():
        time.sleep(0.05)
    started = time.monotonic()
    let_go([process])
    assert process.returncode is not None
    assert time.monotonic() - started < 15
