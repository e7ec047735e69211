"""Kill a run at random moments until it has finished in spite of it, again and again; compare with a run left alone.

    python benchmarks/robustness/kill.py --kills 40 --seed 0
    python benchmarks/robustness/kill.py --kills 32 --seed 2 --workers 2 --out kill_workers.json
    python benchmarks/robustness/kill.py --kills 12 --seed 3 --family faster_rcnn --out kill_faster_rcnn.json

Every run is `drkd distill` of a small RetinaNet, or a Faster R-CNN, whose steps draw regions and boxes, with DRKD, a
moving average, warm-up and balanced weights, on the embedded digits, with a checkpoint every three steps. SIGKILL comes
at a random moment: one in eight of the process' whole life, imports included, the others of the time since its training
began (steps, saving, validation, the final evaluation). The same command with `--resume=auto` then goes on. Only kills
that hit a run in training or after it, with a checkpoint to go on from, count towards `--kills`; all are recorded, with
the step that training had reached and the step of the checkpoint. After each kill every checkpoint that is there must
load whole. A finished run's student.pt must be bit-identical to the undisturbed one's. The record goes to
`benchmarks/results/robustness/kill.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drkd.adapters import FasterRCNNBuilder, RetinaNetBuilder, save_student
from drkd.contracts import DetectorBuilder, DrkdError
from drkd.data.digits import DigitsConfig, build_digits
from drkd.engine.checkpoint_io import AtomicCheckpoints
from drkd.recipes.run_folder import machine, source_commit, versions, write_json

_MOST = 8
HERE = Path(__file__).resolve().parent


TEACHERS: dict[str, DetectorBuilder] = {
    "retinanet": RetinaNetBuilder(width=0.25, fpn_channels=48, extra="none", head_norm="none"),
    "faster_rcnn": FasterRCNNBuilder(width=0.25, fpn_channels=48, representation_size=64),
}


def command(data: Path, teacher: Path, output: Path, *extra: str, family: str = "retinanet") -> list[str]:
    """The run: 6 epochs of 8 steps, some seconds of training; no preflight, which only a fresh start has."""
    return [
        *(sys.executable, "-m", "drkd", "distill", f"--config=digits/{family}"),
        *(f"--data.root={data}", "--data.batch_size=4", "--data.min_size=64", "--data.max_size=64"),
        *("--data.pad_to=[64,64]", "--data.horizontal_flip=0.5", "--data.zoom_out=0.3"),
        *("--student.fpn_channels=32", "--student.backbone_weights=null", f"--teacher.path={teacher}"),
        *("--inherit=false", "--method.warmup_steps=10", "--training.epochs=6", "--doctor=false", "--training.ema=0.9"),
        *("--training.optimization.warmup_steps=5", "--training.calibration_steps=12", "--training.monitor_interval=4"),
        *("--training.validate_every=1", "--training.keep=best", "--training.checkpoint_every=3"),
        *("--training.log_interval=1", "--training.accelerator=cpu", "--evaluation.split=val"),
        *(f"--output={output}", "--resume=auto", *extra),
    ]


def prepare(folder: Path, family: str = "retinanet") -> tuple[Path, Path]:
    """A small data set and a teacher of no skill."""
    data = build_digits(folder / "data", config=DigitsConfig(train=32, tune=8, val=8))
    builder = TEACHERS[family]
    torch.manual_seed(7)
    names = json.loads((data / "annotations" / "instances_train.json").read_text())["categories"]
    detector = builder.build([row["name"] for row in names])
    teacher = folder / "teacher.pt"
    save_student(
        teacher, detector, builder=builder, image_settings={"min_size": 64, "max_size": 64, "size_divisor": 32}
    )
    return data, teacher


def broken_files(run: Path) -> list[str]:
    """Checkpoints and JSON files of a run folder that do not load whole."""
    broken = []
    for file in [*run.glob("checkpoints/*.ckpt"), *run.glob("student.pt")]:
        try:
            if file.suffix == ".ckpt":
                AtomicCheckpoints().load_checkpoint(file)
            else:
                torch.load(file, map_location="cpu", weights_only=True)
        except (DrkdError, RuntimeError) as error:
            broken.append(f"{file.name}: {error}")
    for file in run.glob("*.json"):
        try:
            json.loads(file.read_text())
        except json.JSONDecodeError as error:
            broken.append(f"{file.name}: {error}")
    return broken


def differences(ours: Path, theirs: Path) -> list[str]:
    """Names of the tensors that are not bit-identical."""
    first, second = (torch.load(path, map_location="cpu", weights_only=True)["state_dict"] for path in (ours, theirs))
    return [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]


def begin(arguments: list[str], run: Path) -> subprocess.Popen[bytes]:
    """Start the run, its output in a log beside its folder. A note of how far it is can only be its own."""
    (run / "progress.json").unlink(missing_ok=True)
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)


def wait_for_training(process: subprocess.Popen[bytes], run: Path) -> None:
    """Return when the process trains, or has ended."""
    while process.poll() is None and not (run / "progress.json").exists():
        time.sleep(0.02)


def undisturbed(arguments: list[str], run: Path) -> tuple[float, float]:
    """Seconds of a run's whole life, and of it since its training began."""
    started = time.monotonic()
    process = begin(arguments, run)
    wait_for_training(process, run)
    trains = time.monotonic()
    if process.wait() != 0:
        raise SystemExit((run.parent / f"{run.name}.log").read_text()[-3000:])
    return time.monotonic() - started, time.monotonic() - trains


def reached(run: Path) -> dict[str, int | None]:
    """The step that the session had come to (None before training), and that of the checkpoint (None without one)."""
    note, checkpoint = run / "progress.json", run / "checkpoints" / "last.ckpt"
    # A broken one is on record already.
    with contextlib.suppress(DrkdError, RuntimeError):
        saved = AtomicCheckpoints().load_checkpoint(checkpoint)["global_step"] if checkpoint.exists() else None
        return {"step": json.loads(note.read_text())["step"] if note.exists() else None, "checkpoint": saved}
    return {"step": None, "checkpoint": None}


def counts(kill: dict[str, Any]) -> bool:
    """Whether it hit a run in training or after it, with a checkpoint to go on from."""
    return kill["step"] is not None and kill["checkpoint"] is not None


def disturb(
    arguments: list[str], run: Path, chance: random.Random, *, seconds: tuple[float, float], most: int
) -> dict[str, Any]:
    """Start, kill, resume, until the run ends by itself; at most so many kills. Seconds: as `undisturbed` has them."""
    record: dict[str, Any] = {"kills": [], "broken": [], "failed": []}
    while True:
        anywhere = chance.random() < 0.125
        moment = chance.uniform(0.0, seconds[0] if anywhere else seconds[1])
        moment = moment if len(record["kills"]) < most else None
        started = time.monotonic()
        process = begin(arguments, run)
        if not anywhere:
            wait_for_training(process, run)
        try:
            code = process.wait(timeout=moment if moment is not None else 600)
        except subprocess.TimeoutExpired:
            if moment is None:
                record["failed"].append("hung for ten minutes")
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if code == 0:
            return record
        if code != -signal.SIGKILL or moment is None:
            record["failed"].append(f"exit code {code}")
            return record
        record["broken"] += broken_files(run)
        record["kills"].append({"after_s": round(time.monotonic() - started, 2), **reached(run)})


def _passed(runs: list[dict[str, Any]]) -> bool:
    return all(not run["failed"] and not run["broken"] and not run["tensors_that_differ"] for run in runs)


def _counted(runs: list[dict[str, Any]]) -> int:
    return sum(counts(kill) for run in runs for kill in run["kills"])


def _write(
    options: argparse.Namespace, runs: list[dict[str, Any]], *, seconds: tuple[float, float], began: float
) -> None:
    """The record so far, after every run."""
    write_json(
        options.out,
        {
            "command": f"python benchmarks/robustness/kill.py --kills {options.kills} --seed {options.seed}"
            + (f" --kills-per-run {options.kills_per_run}" if options.kills_per_run != _MOST else "")
            + (f" --workers {options.workers}" if options.workers else "")
            + (f" --family {options.family}" if options.family != "retinanet" else ""),
            "passed": _passed(runs),
            "kills": _counted(runs),
            "kills_before_training": sum(len(run["kills"]) for run in runs) - _counted(runs),
            "runs": runs,
            "undisturbed_seconds": [round(value, 1) for value in seconds],
            "seconds": round(time.monotonic() - began),
            "commit": source_commit(),
            "versions": versions(),
            "machine": machine(),
        },
    )


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--kills-per-run", type=int, default=_MOST)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=[*TEACHERS], default="retinanet", help="of student and teacher")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data, killed with the run")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "robustness" / "kill.json")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, teacher = prepare(folder, options.family)
        run = partial(command, data, teacher, family=options.family)
        whole = folder / "whole"
        workers = f"--data.workers={options.workers}"
        seconds = undisturbed(run(whole, workers), whole)
        runs: list[dict[str, Any]] = []
        while _counted(runs) < options.kills:
            output = folder / f"run{len(runs)}"
            record = disturb(run(output, workers), output, chance, seconds=seconds, most=options.kills_per_run)
            different = differences(output / "student.pt", whole / "student.pt") if not record["failed"] else None
            runs.append({**record, "tensors_that_differ": different})
            print(
                f"run {len(runs)}: {len(record['kills'])} kills, {record['failed'] or 'finished'}, "
                f"tensors that differ: {None if different is None else len(different)}, broken: {record['broken']}",
                flush=True,
            )
            _write(options, runs, seconds=seconds, began=began)
            if record["failed"]:
                print((folder / f"{output.name}.log").read_text()[-3000:], flush=True)
    good = _passed(runs)
    print(f"{_counted(runs)} kills in {len(runs)} runs: {'all identical' if good else 'FAILED'}")
    sys.exit(not good)


if __name__ == "__main__":
    main()
