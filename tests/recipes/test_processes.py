"""The same recipe in two processes: one run folder, every image evaluated once, nobody waits for ever."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_share_one_run(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    # Of six images three cannot be read; whoever meets them, the one list names all.
    data = Path(shutil.copytree(tiny_coco, tmp_path / "data"))
    for name in "135":
        (data / "train" / f"{name}.png").write_bytes(b"broken")
    arguments = [
        "distill",
        "--config=digits/retinanet",
        f"--data.root={data}",
        "--data.unreadable=skip",
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
    assert [Path(file).name for file in run["unreadable"]] == ["1.png", "3.png", "5.png"]
    assert run["steps"] == 3  # six images, two processes, one image each a step
    assert (tmp_path / "run" / "student.pt").is_file()
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["thresholds_px"] == [16.0, 48.0]
