"""Have SLURM start a stopped job again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

from drkd.engine.interruption import StoppedBySignal

__all__ = ["StoppedBySignal", "requeue", "under_slurm"]


def under_slurm() -> bool:
    """Whether this process belongs to a SLURM batch job."""
    return bool(os.environ.get("SLURM_JOB_ID")) and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def requeue(signal_number: int) -> bool:
    """Put the job back into the queue if it was told so, with the signal SIGUSR1 (``#SBATCH --signal=USR1@120``).

    SIGTERM is no such order: scancel sends it, and a preempted job is put back by SLURM itself.

    Args:
        signal_number: What stopped the run.

    Returns:
        Whether the job was put back.
    """
    if signal_number != getattr(signal, "SIGUSR1", None) or not under_slurm():
        return False
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not re.fullmatch(r"[0-9_]+", job):
        return False
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        print(f"drkd: job {job} could not be put back into the queue: {problem}", file=sys.stderr)
        return False
    print(f"drkd: job {job} is back in the queue and goes on from its checkpoint.", file=sys.stderr)
    return True
