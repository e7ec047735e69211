"""torchrun and SLURM start the same recipe: one run folder, one writer, every image scored once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from drkd.recipes.evaluation import evaluate

pytestmark = pytest.mark.slow


def _arguments(data: Path, teacher: Path, output: Path, *extra: str) -> list[str]:
    return [
        *("-m", "drkd", "distill", "--config=digits/retinanet", f"--data.root={data}", "--data.val_split=val"),
        *("--data.batch_size=1", "--data.min_size=96", "--data.max_size=128", "--student.fpn_channels=32"),
        # A student of three steps is sure of nothing: without a threshold it finds something all the same.
        *("--student.score_threshold=0.0", "--data.pad_to=null"),
        *("--student.backbone_weights=null", f"--teacher.path={teacher}", "--inherit=false", "--training.epochs=1"),
        *("--training.validate_every=1", "--training.accelerator=cpu", "--training.devices=2"),
        *("--training.optimization.reference_batch=1", "--evaluation.area_scale=1.0", f"--output={output}", *extra),
    ]


def _free_port() -> str:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return str(place.getsockname()[1])


def _check(run: Path, data: Path, errors: str) -> None:
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps"], record["sessions"]) == ("finished", 3, [])
    assert errors.count("learning rate 0.004 = 0.002 x 2 / 1 images a step") == 1
    assert [part.name for part in (run / "logs").iterdir()] == ["part-000"]
    # Three images of two processes: each found once, as one process finds them.
    alone = evaluate(
        run / "student.pt", data=str(data), workers=0, batch_size=1, device="cpu", min_size=96, max_size=128
    )
    together = json.loads((run / "evaluation.json").read_text())
    assert together["ar_100"] > 0
    assert together["ar_100"] == pytest.approx(alone.metrics["ar_100"], abs=1e-6)
    assert together["ap"] == pytest.approx(alone.metrics["ap"], abs=1e-6)


def test_torchrun(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    arguments = _arguments(tiny_coco, tiny_detector, tmp_path / "run", "--training.strategy=ddp")
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _check(tmp_path / "run", tiny_coco, done.stderr)


def test_slurm(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    arguments = _arguments(
        tiny_coco, tiny_detector, tmp_path / "run", "--training.strategy=ddp_find_unused_parameters_true"
    )
    common = {
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "run", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"},
        **{"SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_ID": "0"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()},
    }
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
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
    _check(tmp_path / "run", tiny_coco, "".join(errors))
