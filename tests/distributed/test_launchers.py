"""torchrun and SLURM start the same recipe: one run folder, one writer, every image scored once."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from drkd.recipes.evaluation import evaluate

pytestmark = pytest.mark.slow


def _arguments(data: Path, teacher: Path, output: Path, *extra: str) -> list[str]:
    return [
        *("-m", "drkd", "distill", "--config=digits/retinanet", f"--data.root={data}", "--data.val_split=val"),
        *("--data.batch_size=1", "--data.min_size=96", "--data.max_size=128", "--student.fpn_channels=32"),
        # A student of nine steps is sure of nothing: without a threshold it finds something all the same.
        *("--student.score_threshold=0.0", "--data.pad_to=null"),
        *("--student.backbone_weights=null", f"--teacher.path={teacher}", "--inherit=false", "--training.epochs=3"),
        *("--training.validate_every=1", "--training.accelerator=cpu", "--training.devices=2"),
        *("--training.optimization.reference_batch=1", "--evaluation.area_scale=1.0", f"--output={output}", *extra),
    ]


def _free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def _check(run: Path, data: Path, errors: str, *, limit: int | None = None) -> None:
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps"], record["sessions"]) == ("finished", 9, [])
    assert errors.count("learning rate 0.004 = 0.002 x 2 / 1 images a step") == 1
    assert [part.name for part in (run / "logs").iterdir()] == ["part-000"]
    # Three images of two processes, or one: each counts once, as one process finds it.
    size = {"min_size": 96, "max_size": 128}
    alone = evaluate(run / "student.pt", data=str(data), workers=0, batch_size=1, device="cpu", limit=limit, **size)
    together = json.loads((run / "evaluation.json").read_text())
    assert together["ar_100"] > 0 or limit is not None
    # Nothing was trained between the last validation and the end.
    with (run / "metrics.csv").open(newline="") as file:
        validated = [row["val/ap"] for row in csv.DictReader(file) if row["val/ap"]]
    assert float(validated[-1]) == pytest.approx(together["ap"], abs=1e-6)
    assert together["ar_100"] == pytest.approx(alone.metrics["ar_100"], abs=1e-6)
    assert together["ap"] == pytest.approx(alone.metrics["ap"], abs=1e-6)


@pytest.fixture(scope="module")
def finished(
    tiny_coco: Path, tiny_detector: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a run that torchrun started, and how it ended."""
    run = tmp_path_factory.mktemp("torchrun") / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    arguments = _arguments(tiny_coco, tiny_detector, run, "--training.strategy=ddp")
    return run, subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=300, check=False)


def test_torchrun(finished: tuple[Path, subprocess.CompletedProcess[str]], tiny_coco: Path) -> None:
    run, done = finished
    assert done.returncode == 0, done.stderr[-2000:]
    _check(run, tiny_coco, done.stderr)


def test_a_dry_run_of_two_processes_is_told_once_and_leaves_nothing(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    arguments = _arguments(tiny_coco, tiny_detector, tmp_path / "run", "--training.strategy=ddp", "--dry-run")
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # Six images, two processes, one image each a step.
    assert done.stdout.count("epoch:       6 images, 3 steps") == 1 and done.stdout.count("losses:") == 1
    assert not (tmp_path / "run").exists()


def _start_two(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Two processes with what torchrun tells its own, so that a signal can go to any of them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "TORCHELASTIC_RUN_ID": "run"}
    common |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]


def _await_next(checkpoint: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Return as soon as the checkpoint is written anew."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    for _ in range(30_000):
        if (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before) or processes[0].poll() is not None:
            return
        time.sleep(0.01)


def test_a_run_of_two_processes_killed_and_stopped_ends_as_if_it_had_not_been(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--training.strategy=ddp", "--training.checkpoint_every=1", "--resume=auto")
    arguments = _arguments(tiny_coco, tiny_detector, run, *options)
    # Killed, the second one alone, then both; stopped by a signal to the second one alone; then left to the end.
    for stop, told in ((signal.SIGKILL, (1,)), (signal.SIGKILL, (0, 1)), (signal.SIGTERM, (1,)), (None, ())):
        started = _start_two(arguments)
        try:
            if stop is not None:
                _await_next(run / "checkpoints" / "last.ckpt", started)
            for rank in told:
                started[rank].send_signal(stop)
            errors = [process.communicate(timeout=300)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        # Of a stop the first process alone tells: a launcher would take the other's code for a crash.
        wanted = {signal.SIGKILL: [-signal.SIGKILL] * 2, signal.SIGTERM: [128 + signal.SIGTERM, 0], None: [0, 0]}[stop]
        if told == (1,) and stop == signal.SIGKILL:
            # The one that is left does not wait for the other.
            wanted[0] = 1
            assert "Another process of this run has ended" in errors[0] and "Traceback" not in errors[0]
            assert json.loads((run / "run.json").read_text())["status"] == "failed"
        assert [process.returncode for process in started] == wanted, "\n".join(error[-1500:] for error in errors)
        assert (run / "student.pt").exists() == (stop is None)
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps"], len(record["sessions"])) == ("finished", 9, 3)
    ours, theirs = (torch.load(folder / "student.pt", weights_only=True)["state_dict"] for folder in (run, finished[0]))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("machines", [1, 2])
def test_slurm(machines: int, tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    # One image to validate on, so that one of the processes has none of its own.
    options = ("--training.strategy=ddp_find_unused_parameters_true", "--data.val_limit=1")
    spread = (f"--training.devices={2 // machines}", f"--training.num_nodes={machines}")
    arguments = _arguments(tiny_coco, tiny_detector, tmp_path / "run", *options, *spread)
    common = {
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "run", "SLURM_NTASKS": "2", "SLURM_NNODES": str(machines)},
        **{"SLURM_NTASKS_PER_NODE": str(2 // machines), "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_ID": "0"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()},
    }
    places = {rank: (("0", rank) if machines == 1 else (rank, "0")) for rank in "01"}
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={
                **os.environ,
                **common,
                **{"SLURM_PROCID": rank, "SLURM_NODEID": places[rank][0], "SLURM_LOCALID": places[rank][1]},
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(error[-1500:] for error in errors)
    _check(tmp_path / "run", tiny_coco, "".join(errors), limit=1)
