"""Checkpoint files: whole or not there, never executed, and a full disk leaves the old one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from drkd.cli_errors import explain
from drkd.contracts import DrkdError
from drkd.engine.checkpoint_io import AtomicCheckpoints, remove_leftovers


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def content(value: float, size: int = 4) -> dict[str, Any]:
    return {
        "state_dict": {"a": torch.full((size,), value)},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {},
        "global_step": 1,
        "epoch": 0,
        "pytorch-lightning_version": "2.0.0",
    }


@pytest.mark.parametrize("stage", ["write", "flush", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint(content(1.0), file)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {"write": "torch.save", "flush": "os.fsync", "rename": "pathlib.Path.replace"}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(DrkdError, match="No space left") as caught:
            AtomicCheckpoints().save_checkpoint(content(2.0), file)
    explained = explain(caught.value)
    assert explained is not None and explained[0] == 1 and "--resume" in explained[1]
    assert names(tmp_path) == ["last.ckpt"]
    assert AtomicCheckpoints().load_checkpoint(file)["state_dict"]["a"][0] == 1.0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file (RLIMIT_FSIZE)")
def test_a_real_write_that_is_refused_by_the_system(tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint_io import AtomicCheckpoints, DrkdError, content
AtomicCheckpoints().save_checkpoint(content(1.0), {str(tmp_path / "last.ckpt")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    AtomicCheckpoints().save_checkpoint(content(2.0, 1_000_000), {str(tmp_path / "last.ckpt")!r})
except DrkdError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "cannot be written" in done.stdout and "The checkpoint before it is whole" in done.stdout
    assert names(tmp_path) == ["last.ckpt"]
    assert AtomicCheckpoints().load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["a"].shape == (4,)


class Payload:
    """Runs code where a pickle is trusted."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.place),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({**content(1.0), "callbacks": {"evil": Payload(tmp_path / "ran")}}, tmp_path / "evil.ckpt")
    with pytest.raises(DrkdError, match="could run code"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_a_cut_checkpoint_and_one_of_another_kind(tmp_path: Path) -> None:
    AtomicCheckpoints().save_checkpoint(content(1.0), tmp_path / "last.ckpt")
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DrkdError, match="damaged"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "last.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(DrkdError, match=r"no checkpoint of a run.*optimizer_states"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "other.ckpt")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.123.part").write_bytes(b"half")
    (tmp_path / "last.ckpt").write_bytes(b"whole")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["last.ckpt"]
