"""What a run that was killed, or a machine that lost its power, leaves in the run folder is no obstacle to going on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.utilities import rank_zero_only

from drkd.contracts import DrkdError
from drkd.recipes import lock, run_folder
from drkd.recipes.lock import locked_folder
from drkd.recipes.run_folder import RunFolder, write_text

NEEDS_LOCKS = pytest.mark.skipif(find_spec("fcntl") is None, reason="Windows has no locks of this kind, and no fork")


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


def test_what_cannot_be_read_keeps_no_run_from_going_on(tmp_path: Path) -> None:
    folder = _interrupted(tmp_path / "run")
    files = [tmp_path / "run" / name for name in ("run.json", "recipe.yaml")]
    for file in files:
        file.write_bytes(b"\xff\xfe\x80")
    folder.start(resolved="seed: 1\n", seed=1, kind="train")
    started = [file.read_bytes() for file in files]
    assert json.loads(started[0])["sessions"] == [{"status": "unreadable"}]
    folder.withdraw()
    assert [file.read_bytes() for file in files] == started


@pytest.mark.parametrize("rows", ["", "epoch,step,loss\n0,9,1.5\n"])
def test_a_refused_attempt_leaves_no_log_unless_it_has_rows(rows: str, tmp_path: Path) -> None:
    folder = _interrupted(tmp_path / "run")
    part = folder.next_log()
    part.mkdir(parents=True)
    (part / "events").write_text("")
    if rows:
        (part / "metrics.csv").write_text(rows)
    folder.start(resolved="", seed=1, kind="train")
    folder.withdraw()
    assert part.is_dir() == bool(rows)


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
    folder.close()
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
    assert sorted(file.name for file in path.iterdir()) == sorted([*mine, ".lock", "checkpoints", "run.json"])


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


@NEEDS_LOCKS
def test_a_run_folder_belongs_to_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.0)
    first = RunFolder(tmp_path / "run")
    half = first.checkpoints / ".last.ckpt.1.part"
    half.write_bytes(b"half")
    for options in ({}, {"resume": "auto"}, {"resume": True}, {"overwrite": True}):
        message = (
            rf"run: another run is at work in this folder \(process {os.getpid()} on .+\)\. Wait for it, stop it, or"
        )
        with pytest.raises(DrkdError, match=message):
            RunFolder(tmp_path / "run", **options)
    assert half.exists()
    # Of several processes the others write nothing.
    with monkeypatch.context() as patch:
        patch.setattr(rank_zero_only, "rank", 1)
        assert not RunFolder(tmp_path / "run", resume="auto").writes
    # What refuses the folder lets go of it.
    first.close()
    first.student.write_bytes(b"")
    with pytest.raises(DrkdError, match="already holds a run"):
        RunFolder(tmp_path / "run")
    first.last_checkpoint.write_bytes(b"")
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run", resume="auto"):
        assert not half.exists()
        raise ZeroDivisionError
    RunFolder(tmp_path / "run", resume="auto").close()


@NEEDS_LOCKS
def test_a_lock_of_another_machine_may_outlive_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Network file systems let go of it when they miss the machine, after a minute or two."""
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.0)
    monkeypatch.setattr(lock, "_LEASE", 0.3)
    with RunFolder(tmp_path / "run"):
        (tmp_path / "run" / ".lock").write_text("7 node3\n")
        with pytest.raises(DrkdError, match=r"\(process 7 on node3\)\..* If node3 is gone, remove .*run/\.lock\.$"):
            RunFolder(tmp_path / "run", resume="auto")
    assert "waiting for node3" in capsys.readouterr().err
    RunFolder(tmp_path / "run", resume="auto").close()


@NEEDS_LOCKS
def test_a_full_disk_is_no_reason_to_go_without_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "_PATIENCE", 0.0)
    monkeypatch.setattr(os, "pwrite", full)
    with RunFolder(tmp_path / "run"), pytest.raises(DrkdError, match=r"at work in this folder\. Wait"):
        RunFolder(tmp_path / "run", resume="auto")


def test_overwriting_leaves_a_folder_alone_that_held_no_run(tmp_path: Path) -> None:
    """`checkpoints` and `logs` are common names."""
    others = [tmp_path / "checkpoints" / "teacher.pth", tmp_path / "logs" / "mine.txt"]
    for file in others:
        file.parent.mkdir()
        file.write_text("mine")
    RunFolder(tmp_path, overwrite=True).close()
    assert all(file.read_text() == "mine" for file in others)


@NEEDS_LOCKS
def test_a_killed_run_holds_its_folder_no_longer_and_a_closed_one_not_by_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import sys, time
from pathlib import Path
from drkd.recipes.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.0)
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(DrkdError, match="another run is at work"):
            RunFolder(tmp_path / "run", resume="auto")
    finally:
        holder.kill()
        holder.communicate()
    folder = RunFolder(tmp_path / "run", resume="auto")
    worker = os.fork()
    if not worker:
        signal.pause()
    try:
        folder.close()
        RunFolder(tmp_path / "run", resume="auto").close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@NEEDS_LOCKS
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_where_there_are_no_locks_a_run_warns_and_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    with RunFolder(tmp_path / "run") as folder:
        assert folder.writes
    with locked_folder(tmp_path / "out") as lock:
        assert lock is None
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"drkd: {tmp_path / name}: the folder cannot be locked here" for name in ("run", "out")
    ]


def _left(path: Path) -> None:
    """What a run leaves."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "logs" / "part-000").mkdir(parents=True)
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "logs/part-000/metrics.csv"):
        (path / name).write_text("")
    for name in run_folder._WRITTEN:
        (path / name).write_text("{}")


def _replace(path: Path, resolved: str = "", *, kind: str = "distill") -> None:
    """Start a run in place of another."""
    with RunFolder(path, overwrite=True) as folder:
        folder.start(resolved=resolved, seed=0, kind=kind)


def test_overwriting_cleans_also_where_the_record_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    _left(path)
    (path / "run.json").unlink()
    (path / "notes.txt").write_text("mine")
    _replace(path)
    assert sorted(file.name for file in path.iterdir()) == [
        *(".lock", "checkpoints", "notes.txt", "recipe.yaml", "run.json")
    ]
    assert (path / "recipe.yaml").read_text() == ""
    assert not list((path / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "student.pt"])
def test_a_checkpoint_without_a_record_is_a_run_too(name: str, tmp_path: Path) -> None:
    _left(tmp_path / "run")
    for file in [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path != tmp_path / "run" / name]:
        file.unlink()
    with pytest.raises(DrkdError, match="already holds a run"):
        RunFolder(tmp_path / "run")


def test_overwriting_that_is_cut_short_is_seen_and_nothing_of_the_old_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    _left(path)
    removed: list[str] = []
    unlink = Path.unlink

    def cut(self: Path, missing_ok: bool = False) -> None:
        if self.parent in (path, path / "checkpoints") and self.exists():
            removed.append(self.name)
            if self.name == "evaluation.json":
                raise KeyboardInterrupt
        unlink(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut)
        with pytest.raises(KeyboardInterrupt):
            _replace(path)
    assert removed[0] == "last.ckpt"
    with pytest.raises(DrkdError, match="already holds a run"):
        RunFolder(path)
    with RunFolder(path, resume="auto") as folder:
        assert not folder.resumes
    _replace(path)
    assert sorted(file.name for file in path.iterdir()) == [".lock", "checkpoints", "recipe.yaml", "run.json"]


def test_checkpoints_that_cannot_be_removed_are_no_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _left(tmp_path / "run")

    def fail(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(DrkdError, match=r"checkpoints: cannot be removed \(Device or resource busy\), so the earlier"):
        _replace(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").exists() and (tmp_path / "run" / "student.pt").read_text() == "{}"
    assert not list((tmp_path / "run").glob(".student.pt*"))


def test_rows_that_cannot_be_removed_keep_the_run_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    _left(path)
    (path / "logs" / "part-000" / "metrics.csv").write_text("step\n1\n")
    unlink, remove = Path.unlink, shutil.rmtree

    def held(self: Path, missing_ok: bool = False) -> None:
        if self.name == "metrics.csv":
            raise OSError(errno.EBUSY, "Device or resource busy", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", held)
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else remove(path))
    with pytest.raises(DrkdError, match=r"metrics\.csv: cannot be removed \(Device or resource busy\), so the earlier"):
        _replace(path)
    assert all((path / name).exists() for name in ("student.pt", "checkpoints/last.ckpt", "checkpoints/best.ckpt"))


def test_a_run_is_replaced_when_the_new_one_starts_and_not_before(tmp_path: Path) -> None:
    """What the new one is refused for, its data or its teacher, costs the old one nothing."""
    path = tmp_path / "run"
    _left(path)
    before = sorted(file.relative_to(path) for file in path.rglob("*"))
    with RunFolder(path, overwrite=True) as folder:
        assert folder.next_log() == path / "logs" / "part-000"
    assert sorted(file.relative_to(path) for file in path.rglob("*") if file.name != ".lock") == before


@pytest.mark.parametrize("name", ["", "student.pt", "checkpoints/last.ckpt", "logs/part-000/metrics.csv"])
def test_a_run_does_not_replace_what_it_reads(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    _left(path)
    resolved = yaml.safe_dump({"output": str(path), "teacher": {"init_args": {"path": str(path / name)}}})
    with pytest.raises(DrkdError, match=r"teacher\.path: .* is of the run that --overwrite would replace"):
        _replace(path, resolved)
    assert (path / "checkpoints" / "best.ckpt").exists() and (path / "run.json").exists()
    (path / "teacher.pt").write_text("")
    _replace(path, yaml.safe_dump({"output": str(path), "data": {"root": str(path)}, "weights": f"{path}/teacher.pt"}))
    assert not (path / "checkpoints" / "best.ckpt").exists() and (path / "teacher.pt").exists()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_finished_run_whose_checkpoints_are_gone_does_not_begin_anew(resume: bool | str, tmp_path: Path) -> None:
    _left(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(DrkdError, match=r"the run has ended \(student\.pt is there\), and what .* is gone"):
        RunFolder(tmp_path / "run", resume=resume)  # type: ignore[arg-type]
    assert (tmp_path / "run" / "student.pt").exists()


def test_files_are_utf8_whatever_the_locale_says(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from drkd.recipes.run_folder import write_text; "
    code += "write_text(Path(sys.argv[1]), 'V\\xf6gel\\n')"
    plain = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], env=plain, check=True)
    assert (tmp_path / "file").read_bytes() == "V\xf6gel\n".encode()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_does_not_both_go_on_and_replace(resume: bool | str, tmp_path: Path) -> None:
    _left(tmp_path / "run")
    with pytest.raises(
        DrkdError, match=r"go on \(resume: (true|auto)\) and to replace .*\(overwrite: true\); expected"
    ):
        RunFolder(tmp_path / "run", resume=resume, overwrite=True)  # type: ignore[arg-type]
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()


def test_a_note_of_progress_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with RunFolder(tmp_path / "run") as folder:
        folder.note_progress({"step": 1})
        monkeypatch.setattr(run_folder.tempfile, "NamedTemporaryFile", full)
        folder.note_progress({"step": 2})
    assert json.loads((tmp_path / "run" / "progress.json").read_text()) == {"step": 1}


@pytest.mark.parametrize("replaced", [True, False])
def test_a_run_that_is_killed_before_its_first_checkpoint_begins_anew_by_itself(replaced: bool, tmp_path: Path) -> None:
    """Also where it began in place of another, or beside a student alone."""
    path = tmp_path / "run"
    _left(path)
    if not replaced:
        for file in [file for file in path.rglob("*") if file.is_file() and file.name != "student.pt"]:
            file.unlink()
        (path / "evaluation.json").write_text("{}")
    _replace(path)
    assert not (path / "student.pt").exists() and not (path / "evaluation.json").exists()
    with RunFolder(path, resume="auto") as folder:
        assert not folder.resumes


def test_a_student_alone_that_the_run_reads_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "student.pt").write_text("mine")
    with pytest.raises(DrkdError, match=r"student\.path: .* is of the run that --overwrite would replace"):
        _replace(tmp_path, yaml.safe_dump({"student": {"init_args": {"path": str(tmp_path / "student.pt")}}}))
    assert (tmp_path / "student.pt").read_text() == "mine"
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "teacher.pth").write_text("kept")
    _replace(tmp_path, yaml.safe_dump({"teacher": {"path": str(tmp_path / "checkpoints" / "teacher.pth")}}))
    assert (tmp_path / "checkpoints" / "teacher.pth").exists() and not (tmp_path / "student.pt").exists()


def test_rows_that_cannot_be_removed_are_not_taken_for_the_new_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    _left(path)
    (path / "logs" / "part-001").mkdir()
    (path / "logs" / "part-001" / "metrics.csv").write_text("step,epoch,loss\n6,0,9.0\n")
    remove = shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else remove(path)
    )  # held open by whoever watches the curves
    with RunFolder(path, overwrite=True) as folder:
        log = folder.next_log()
        folder.start(resolved="", seed=0, kind="train")
        (log / "metrics.csv").write_text("step,epoch,loss\n5,0,1.0\n7,0,1.0\n")
        folder.merge_metrics()
    assert (path / "metrics.csv").read_text() == "step,epoch,loss\n5,0,1.0\n7,0,1.0\n"


@pytest.mark.parametrize("inherit", [True, False])
def test_training_alone_replaces_the_teacher_that_it_does_not_read(inherit: bool, tmp_path: Path) -> None:
    path = tmp_path / "run"
    _left(path)
    settings = {"inherit": inherit, "teacher": {"init_args": {"path": str(path / "student.pt")}}, "class_map": ""}
    if inherit:
        with pytest.raises(DrkdError, match=r"teacher\.path: .* is of the run"):
            _replace(path, yaml.safe_dump(settings), kind="train")
    else:
        _replace(path, yaml.safe_dump(settings), kind="train")


def test_a_file_in_a_list_is_seen_and_an_empty_text_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    _left(path)
    monkeypatch.chdir(path)
    with pytest.raises(DrkdError, match=r"student\.files\[1\]: student\.pt is of the run"):
        _replace(path, yaml.safe_dump({"student": {"init_args": {"files": ["", "student.pt"]}}}))
    _replace(path, yaml.safe_dump({"student": {"init_args": {"files": [""]}}}))
