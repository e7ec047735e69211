"""The same recipe in two processes: one run folder, every image evaluated once, nobody waits for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_share_one_run(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    arguments = [
        "distill",
        "--config=digits/retinanet",
        f"--data.root={tiny_coco}",
        "--data.val_split=val",
        "--data.batch_size=1",
        "--data.min_size=64",
        "--data.max_size=96",
        "--student.fpn_channels=32",
        "--student.backbone_weights=null",
        f"--teacher.path={tiny_detector}",
        "--inherit=false",
        "--training.epochs=1",
        "--training.validate_every=1",
        "--training.accelerator=cpu",
        "--training.devices=2",
        "--training.strategy=ddp",
        f"--output={tmp_path / 'run'}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "drkd", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["steps"] == 3  # six images, two processes, one image each a step
    assert (tmp_path / "run" / "student.pt").is_file()
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["thresholds_px"] == [16.0, 48.0]
