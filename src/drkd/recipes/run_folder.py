"""What a run leaves behind: recipe, provenance, metrics, evaluation; written aside and renamed."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import yaml

from drkd.contracts import DrkdError
from drkd.recipes.lock import lock_folder, unlock
from drkd.recipes.setting_changes import differences, plain_key, without_folder

# Top-level settings that a run without a teacher does not read.
_OF_DISTILLATION = ("teacher", "teachers", "method", "class_map", "teacher_size")
# Removed in this order: as long as run.json is there, the folder is taken.
_WRITTEN = (
    *("student.pt", "doctor.json", "metrics.csv", "evaluation.json", "cost.json", "training.json", "progress.json"),
    *("recipe.yaml", "run.json"),
)
# Seconds to wait for the folder: a killed run's data workers, which share its lock, look for it every five.
_PATIENCE = 10.0
_PACKAGES = ("drkd", "torch", "torchvision", "timm", "lightning", "faster-coco-eval", "numpy")


def write_text(path: Path, text: str, *, lasting: bool = True) -> None:
    """Write a file aside and rename it, so that it is never half-written.

    Args:
        path: The file.
        text: Its content.
        lasting: Have the content on the disk before the rename, so that a power cut leaves no empty file either.

    Raises:
        DrkdError: If the disk is full or the folder cannot be written to.
    """
    written: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", newline="\n", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as aside:
            written = Path(aside.name)
            aside.write(text)
            aside.flush()
            if lasting:
                os.fsync(aside.fileno())
        # NamedTemporaryFile makes private files; these are to be shared like any other output.
        written.chmod(0o644)
        written.replace(path)
    except OSError as error:
        raise DrkdError(f"{path} cannot be written: {error.strerror}. Is the disk full or read-only?") from error
    finally:
        if written is not None:
            written.unlink(missing_ok=True)


def check_output(output: Path, suffix: str, *, inputs: Iterable[Path]) -> None:
    """Refuse a file that could not be written, or that is one that is read, or no output by its name.

    It is asked before the work whose result the file is to hold, and leaves nothing behind.

    Args:
        output: The file that is to be written.
        suffix: What such a file's name ends in, in lower case.
        inputs: The files that are read.

    Raises:
        DrkdError: If the output is one of the inputs, a folder, or ends otherwise, or its folder cannot be made or
            written to.
    """
    if output.resolve() in {path.resolve() for path in inputs}:
        raise DrkdError(f"{output}: is read as an input, so it cannot be the output too. Choose another --output.")
    if output.is_dir():
        raise DrkdError(f"{output}: is a folder, and the output is one file. Choose another --output.")
    if output.suffix.lower() != suffix:
        there = ": it exists already, is no earlier output, and is not replaced" if os.path.lexists(output) else ""
        raise DrkdError(f"{output}: expected an --output that ends in {suffix}{there}.")
    check_folder(output.parent, wanted=output)


def check_folder(folder: Path, *, wanted: Path) -> None:
    """Refuse a folder that cannot be made or written to, by a nameless file in it or in the nearest one that exists.

    Args:
        folder: The folder; it need not exist, and is not made.
        wanted: What is to be written there, for the message.

    Raises:
        DrkdError: If nothing can be written there.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise DrkdError(
            f"{wanted}: cannot be written: {nearest}: {error.strerror}. Choose another --output."
        ) from error


def write_json(path: Path, value: Any, *, lasting: bool = True) -> None:
    """Write JSON, indented; NaN and infinity become null."""
    write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n", lasting=lasting)


def remove_asides(folder: Path, names: Iterable[str]) -> None:
    """Remove what writers that were killed left beside the files of these names; eight characters are tempfile's."""
    for name in names:
        for file in (*folder.glob(f".{name}.????????"), *folder.glob(f".{name}.*.tmp")):
            file.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


class RunFolder:
    """The folder of one run, which no other run works in until this one is closed; a context that closes it.

    Args:
        path: The folder.
        resume: Go on in a folder that has a checkpoint, or in which a run began and was ended before its first one;
            "auto" starts where there is neither.
        overwrite: Remove what an earlier run left, as soon as this one starts: until then anything may be refused.

    Attributes:
        resumes: Whether there is a checkpoint to go on from and that was asked for.

    Raises:
        DrkdError: If the folder holds a run and neither resume nor overwrite was said, or both were, or there is
            nothing to resume, or another run is at work in the folder, or the run has ended and is to go on without
            its checkpoint.
    """

    def __init__(self, path: Path, *, resume: bool | Literal["auto"] = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise DrkdError(
                f"{path}: the run is told both to go on (resume: {str(resume).lower()}) and to replace what is there "
                "(overwrite: true); expected one of the two. Leave out --overwrite, or say --resume=false."
            )
        self.path = path
        self._run: dict[str, Any] = {}
        self._before: dict[Path, str] = {}
        self._replaced: tuple[Path, ...] = ()
        self._part: Path | None = None
        self._clock = time.monotonic()
        self._lock: int | None = None
        # Of several processes only the first looks and writes: the others come when the folder is taken already.
        self.writes: bool = is_first_process()
        if self.writes:
            self._take(resume, overwrite=overwrite)
        self.resumes = bool(resume) and self.last_checkpoint.exists()

    def _take(self, resume: bool | Literal["auto"], *, overwrite: bool) -> None:
        """Lock the folder, then look what is in it: another run may have ended while this one waited."""
        began = (self.path / "run.json").exists() or self.checkpoints.is_dir()
        if resume and resume != "auto" and not began:
            raise DrkdError(f"Nothing to resume: {self.last_checkpoint} does not exist. Start without --resume.")
        try:
            self._lock = lock_folder(self.path, worker="run", patience=_PATIENCE)
            # A run that was overwritten in part, by a drkd that began with run.json, is one too.
            taken = (self.path / "run.json").exists() or self.last_checkpoint.exists()
            if (taken or self.student.exists()) and not resume and not overwrite:
                raise DrkdError(
                    f"{self.path} already holds a run. Go on with it (--resume=true), replace it (--overwrite=true), "
                    "or choose another folder (--output)."
                )
            if resume and self.student.exists() and not self.last_checkpoint.exists():
                raise DrkdError(
                    f"{self.path}: the run has ended ({self.student.name} is there), and what it would go on from is "
                    f"gone ({self.last_checkpoint}). Train anew (--resume=false --overwrite=true), or choose another "
                    "folder (--output)."
                )
            if overwrite and taken:
                self._replaced = (self.checkpoints, self.path / "logs", *(self.path / name for name in _WRITTEN))
            elif overwrite and self.student.exists():
                # A folder of something else may have `checkpoints` and `logs` of its own.
                self._replaced = (self.student, self.path / "evaluation.json")
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            remove_asides(self.path, _WRITTEN)
            # A session that was killed left its own, which is not where this one is.
            if not self._replaces_run:
                (self.path / "progress.json").unlink(missing_ok=True)
            from drkd.engine.checkpoint_io import remove_leftovers  # with Lightning, see is_first_process

            remove_leftovers(self.checkpoints)
        except OSError as error:
            self.close()
            raise DrkdError(
                f"{self.path}: the run folder cannot be made ({error.strerror}). Choose another one with --output."
            ) from error
        except BaseException:
            self.close()
            raise

    def _clear(self) -> None:
        """Remove an earlier run: what one would go on from before its files, last the record that it is one."""
        aside = self.path / f".{self.student.name}.replaced"  # as `remove_asides` knows them
        try:
            if self._replaces_run:
                # Whoever watches the curves may hold them open, which some network file systems cannot remove.
                shutil.rmtree(self.path / "logs", ignore_errors=True)
                for rows in (self.path / "logs").glob("part-*/metrics.csv"):
                    rows.unlink()  # they would be taken for rows of the new run
                self.last_checkpoint.unlink(missing_ok=True)
                # Without the checkpoint it says that the run has ended, which a --resume=auto takes for the last word.
                if self.student.exists():
                    self.student.rename(aside)
                if self.checkpoints.exists():
                    shutil.rmtree(self.checkpoints)
                aside.unlink(missing_ok=True)
            for file in self._replaced:
                if not file.is_dir():
                    file.unlink(missing_ok=True)
        except OSError as error:
            if aside.exists():
                aside.rename(self.student)
            raise DrkdError(
                f"{error.filename or self.checkpoints}: cannot be removed ({error.strerror or error}), so the earlier "
                "run is not replaced. Remove it yourself, or choose another folder with --output."
            ) from error

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        self.close()

    @property
    def _replaces_run(self) -> bool:
        """Whether a run is replaced, and not a student alone."""
        return self.checkpoints in self._replaced

    @property
    def checkpoints(self) -> Path:
        """Folder of the Lightning checkpoints."""
        return self.path / "checkpoints"

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint that a resumed run starts from."""
        return self.checkpoints / "last.ckpt"

    @property
    def student(self) -> Path:
        """The student alone."""
        return self.path / "student.pt"

    def start(self, *, resolved: str, seed: int, kind: str) -> None:
        """Write the recipe and where the run comes from; of a run that goes on, also which settings changed."""
        if not self.writes:
            return
        if self._replaced:
            self._refuse_inputs(yaml.safe_load(resolved) or {}, kind=kind)
            self._clear()
            for folder in (self.checkpoints, self._part):
                if folder is not None:
                    folder.mkdir(parents=True, exist_ok=True)
            self._replaced = ()
        changed = self._changes(resolved) if self.resumes else []
        if self.resumes:
            for file in (self.path / "recipe.yaml", self.path / "run.json"):
                with suppress(OSError, ValueError):  # one that is gone or damaged is none to come back to
                    self._before[file] = file.read_text(encoding="utf-8")
        write_text(self.path / "recipe.yaml", resolved)
        self._run = {
            "sessions": self._earlier_sessions(),
            "kind": kind,
            "seed": seed,
            "command": ["drkd", *sys.argv[1:]] if sys.argv and sys.argv[0].endswith("drkd") else sys.argv,
            "commit": source_commit(),
            "versions": versions(),
            "machine": machine(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "status": "running",
        }
        if changed:
            self._run["changed_settings"] = changed
        self._clock = time.monotonic()
        write_json(self.path / "run.json", self._run)

    def _refuse_inputs(self, settings: Mapping[str, Any], *, kind: str) -> None:
        """A run that replaces another must not read what it removes, a teacher say."""
        alone = kind == "train" and not settings.get("inherit")
        unread = {"output", "data", *(_OF_DISTILLATION if alone else ())}
        folder = self.path.resolve()
        doomed = {path.resolve() for path in self._replaced}
        for name, value in _texts(settings):
            if not value or name.split(".")[0] in unread:
                continue
            try:
                path = Path(value).resolve(strict=True)
            except (OSError, ValueError):
                continue  # no path, most likely
            if path == folder or doomed & {path, *path.parents}:
                raise DrkdError(
                    f"{name}: {value} is of the run that --overwrite would replace, and this one reads it. Choose "
                    "another folder with --output."
                )

    def _changes(self, resolved: str) -> list[str]:
        """Which settings are not those that the run went on with until now; says so, since its results mix both."""
        try:
            before = yaml.safe_load((self.path / "recipe.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return []
        now = yaml.safe_load(resolved)
        if not isinstance(before, Mapping) or not isinstance(now, Mapping):
            return []
        # A key that is new is an option that drkd has got since.
        changed = differences(without_folder(before), without_folder(now), stated=[])
        if changed:
            print(
                f"drkd: {self.path}: the run goes on with other settings than it began with, which run.json keeps: "
                f"{'; '.join(changed)}.",
                file=sys.stderr,
            )
        return changed

    def _earlier_sessions(self) -> list[dict[str, Any]]:
        """What the earlier sessions of a resumed run were; the record is no reason not to go on from a checkpoint."""
        file = self.path / "run.json"
        if not file.exists():
            return []
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
            return [*earlier.pop("sessions", []), earlier] if earlier else []
        except (OSError, ValueError, AttributeError, TypeError) as error:
            print(
                f"drkd: {file}: the record of the earlier sessions is damaged ({error}); the run goes on, and its new "
                'record lists them as one session of status "unreadable".',
                file=sys.stderr,
            )
            return [{"status": "unreadable"}]

    def withdraw(self) -> None:
        """Undo `start` of a run that was not allowed to go on: its record is of the run, and not of the attempt."""
        if not self.writes:
            return
        for file, content in self._before.items():
            write_text(file, content)
        if self._part is not None and not _whole_rows(self._part / "metrics.csv"):
            shutil.rmtree(self._part, ignore_errors=True)
        (self.path / "progress.json").unlink(missing_ok=True)

    def finish(self, status: str, **extra: Any) -> None:
        """Note how the run ended."""
        if not self.writes:
            return
        self._run.update(status=status, finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **extra)
        self._run["seconds"] = round(time.monotonic() - self._clock, 1)
        write_json(self.path / "run.json", self._run)
        (self.path / "progress.json").unlink(missing_ok=True)

    def note_progress(self, progress: Mapping[str, int]) -> None:
        """Say how far the run is, for whoever waits for it; gone when the run has ended."""
        if self.writes:
            # Written every second and gone in the end: not worth waiting for the disk, nor a run's end if it is full.
            with suppress(DrkdError, OSError):
                write_json(self.path / "progress.json", progress, lasting=False)

    def next_log(self) -> Path:
        """Folder for this session's raw logs; a resumed run gets one of its own."""
        logs = self.path / "logs"
        count = len(list(logs.glob("part-*"))) if logs.exists() and not self._replaces_run else 0
        self._part = logs / f"part-{count:03d}"
        return self._part

    def merge_metrics(self) -> None:
        """Join the sessions' logs into ``metrics.csv``; where sessions overlap, the later one counts."""
        if not self.writes:
            return
        rows: list[dict[str, str]] = []
        for part in sorted((self.path / "logs").glob("part-*/metrics.csv")):
            new = _whole_rows(part)
            steps = [int(row["step"]) for row in new if row["step"]]
            if steps:
                rows = [row for row in rows if int(row["step"] or 0) < min(steps)]
            rows += new
        if not rows:
            return
        names = sorted({name for row in rows for name in row} - {"step", "epoch"})
        lines = [",".join(["step", "epoch", *names])]
        lines += [",".join(row.get(name) or "" for name in ["step", "epoch", *names]) for row in rows]
        write_text(self.path / "metrics.csv", "\n".join(lines) + "\n")


def _texts(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text among settings, in lists too, with its dotted key."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list | tuple):
        for place, value in enumerate(settings):
            yield from _texts(value, f"{name}[{place}]")
    elif isinstance(settings, str):
        yield plain_key(name), settings


def is_first_process() -> bool:
    """Whether this is the process that writes, of those of torchrun, SLURM or Lightning, before they have met."""
    # Lightning loads slowly; commands that do not train do without, and read this module too.
    from lightning.pytorch.utilities import rank_zero_only

    if getattr(rank_zero_only, "rank", 0) != 0:
        return False
    # Lightning's own launcher gives the first process of a second machine no rank, only the machine's number.
    alone = not any(name in os.environ for name in ("RANK", "SLURM_PROCID"))
    return not (alone and os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")) != "0")


def _whole_rows(file: Path) -> list[dict[str, str]]:
    """Rows of a log that say their step, without a last one that was cut short when its run was killed."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        rows = [row for row in csv.DictReader(lines) if None not in row and None not in row.values()]
    except csv.Error:
        return []
    return [row for row in rows if re.fullmatch(r"[0-9]{0,15}", row.get("step", "-"))]


def source_commit() -> str | None:
    """Commit of the checkout that drkd runs from, with "+dirty" where files differ; None for an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        # An environment inside somebody's repository is not a checkout of drkd.
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=here,
            capture_output=True,
            timeout=10,
            check=True,
        )
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+dirty" if changed else commit


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Processor, threads and accelerators."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "accelerators": devices}
