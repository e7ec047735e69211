"""What a run that was killed, or a machine that lost its power, leaves in the run folder is no obstacle to going on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from drkd.contracts import DrkdError
from drkd.recipes import run_folder
from drkd.recipes.run_folder import RunFolder, write_text


def _interrupted(path: Path) -> RunFolder:
    """The folder of a run that saved once and goes on."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints" / "last.ckpt").write_bytes(b"")
    (path / "run.json").write_text(json.dumps({"sessions": [{"status": "failed"}], "status": "interrupted"}))
    return RunFolder(path, resume=True)


@pytest.mark.parametrize("damage", ["", '{"sessions": [', "[]x", "3", '{"sessions": 3}', "\ufffe\0"])
def test_a_damaged_record_is_named_and_the_run_goes_on(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _interrupted(tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(damage)
    folder.start(resolved="", seed=1, kind="train")
    assert f"{file}: the record of the earlier sessions is damaged" in capsys.readouterr().err
    run = json.loads(file.read_text())
    assert (run["status"], run["sessions"]) == ("running", [{"status": "unreadable"}])


def test_a_record_that_is_whole_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _interrupted(tmp_path / "run").start(resolved="", seed=1, kind="train")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [session["status"] for session in run["sessions"]] == ["failed", "interrupted"]
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_with_other_settings_says_and_keeps_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _interrupted(tmp_path / "run")
    before = {"seed": 1, "data": {"root": "coco"}, "resume": False, "training": {"steps": 3}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(before, sort_keys=False))
    now = {"seed": 3, "data": {"root": "voc"}, "resume": True, "training": {"steps": 3, "new_option": 1}}
    folder.start(resolved=yaml.safe_dump(now, sort_keys=False), seed=3, kind="train")
    changed = ["seed was 1, is 3", "data.root was 'coco', is 'voc'"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["changed_settings"] == changed
    assert f"goes on with other settings than it began with, which run.json keeps: {'; '.join(changed)}." in (
        capsys.readouterr().err
    )
    again = RunFolder(tmp_path / "run", resume=True)
    again.start(resolved=yaml.safe_dump(now, sort_keys=False), seed=3, kind="train")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "changed_settings" not in run and run["sessions"][-1]["changed_settings"] == changed
    assert "other settings" not in capsys.readouterr().err


def test_the_content_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    replace = Path.replace

    def sync(number: int) -> None:
        done.append(f"flushed {os.fstat(number).st_size}")

    def rename(self: Path, target: Path) -> Path:
        done.append("renamed")
        return replace(self, target)

    monkeypatch.setattr(run_folder.os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    write_text(tmp_path / "run.json", "12345")
    assert done == ["flushed 5", "renamed"]
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_write_that_fails_leaves_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(DrkdError, match=r"run\.json cannot be written: No space left"):
        write_text(tmp_path / "run.json", "12345")
    assert not list(tmp_path.iterdir())


def test_a_session_starts_without_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    left = [".run.json.ab_1cd2e", ".progress.json.abcdefgh", ".student.pt.123.tmp", "progress.json"]
    mine = [".run.json.swp", "notes.txt"]
    for name in (*left, *mine):
        (path / name).write_text("{}")
    _interrupted(path)
    assert sorted(file.name for file in path.iterdir()) == sorted([*mine, "checkpoints", "run.json"])


def test_a_record_that_says_infinity_is_kept_without_it(tmp_path: Path) -> None:
    folder = _interrupted(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"status": "failed", "seconds": Infinity}')
    folder.start(resolved="", seed=1, kind="train")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sessions"] == [
        {"status": "failed", "seconds": None}
    ]


@pytest.mark.parametrize("damage", ["x,0,1.5", "0.5,0,1.5", f"{'9' * 5000},0,1.5", "-,0,1.5"])
def test_a_damaged_row_of_a_log_is_left_out(damage: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for part, rows in (("part-000", f"0,0,1.5\n{damage}\n"), ("part-001", "1,0,1.25\n"), ("part-002", "")):
        (tmp_path / "run" / "logs" / part).mkdir(parents=True)
        (tmp_path / "run" / "logs" / part / "metrics.csv").write_text(f"step,epoch,loss\n{rows}")
    (tmp_path / "run" / "logs" / "part-002" / "metrics.csv").write_text("stop,loss\n1,2\n")
    folder.merge_metrics()
    assert (tmp_path / "run" / "metrics.csv").read_text() == "step,epoch,loss\n0,0,1.5\n1,0,1.25\n"
