"""Feed damaged and hostile annotation files, recipes, checkpoints and images to drkd, thousands of them.

    python benchmarks/robustness/fuzz.py --count 1000 --seed 0

Each input is a valid file in which bytes or values were changed at random. It must work or end in one paragraph
(`DrkdError`); any other exception, ten seconds of CPU time without an answer, or a file that appears outside the
working folder is a failure and is printed. The record goes to `benchmarks/results/robustness/fuzz.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from PIL import Image

from drkd.adapters import RetinaNetBuilder, load_detector, save_student
from drkd.contracts import DrkdError
from drkd.data.dataset import load_split
from drkd.engine.checkpoint_io import AtomicCheckpoints
from drkd.recipes.prediction import _read_pixels
from drkd.recipes.recipe import load_recipe
from drkd.recipes.run_folder import machine, source_commit, versions, write_json

HERE = Path(__file__).resolve().parent
_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../../escape", "/etc/passwd", "\0", "a" * 3000, [], [[]], {}, {"id": 1}, [1, 2, 3, 4]),
)


class Hang(BaseException):
    """No answer in time."""


def mutate_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8, 40))):
        kind, place = chance.randrange(5), chance.randrange(len(changed) + 1)
        if kind == 0 and place < len(changed):
            changed[place] = chance.randrange(256)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
        elif kind == 3:
            changed[place:place] = changed[place : place + chance.randrange(1, 200)]
        else:
            del changed[place : place + chance.randrange(1, 30)]
    return bytes(changed)


def mutate_value(chance: random.Random, value: Any) -> Any:
    """Replace, remove or duplicate one entry somewhere in lists and dicts."""
    changed = copy.copy(value)
    if isinstance(changed, dict) and changed:
        key = chance.choice(list(changed))
        if chance.random() < 0.75 and isinstance(changed[key], dict | list) and changed[key]:
            changed[key] = mutate_value(chance, changed[key])
        elif chance.random() < 0.2:
            del changed[key]
        elif chance.random() < 0.1:
            changed[chance.choice(("id", "", "base", "x", 7))] = changed[key]
        else:
            changed[key] = chance.choice(_ODD)
        return changed
    if isinstance(changed, list) and changed:
        place = chance.randrange(len(changed))
        if chance.random() < 0.75:
            changed[place] = mutate_value(chance, changed[place])
        elif chance.random() < 0.5:
            changed.append(changed[place])
        else:
            del changed[place]
        return changed
    return chance.choice(_ODD)


def guarded(action: Callable[[], Any], *, seconds: float = 10.0) -> str:
    """Say "works", "refused", or what went wrong."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        action()
    except DrkdError as error:
        text = str(error).strip()
        return "refused" if text and "\n\n" not in text and "Traceback" not in text else f"no paragraph: {text[:300]}"
    except Hang:
        return f"no answer in {seconds:g} seconds"
    except Exception as error:
        return f"{type(error).__name__}: {error} | {traceback.format_exc().strip().splitlines()[-3].strip()}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)
    return "works"


class Attacks:
    """One method a kind of input; each makes the next input and tries it.

    Args:
        folder: Working folder.
        chance: Source of randomness.
    """

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.chance = chance
        self.data = folder / "data"
        self.file = folder / "input"
        for split in ("train", "val"):
            (self.data / split).mkdir(parents=True)
            for name in ("1", "2"):
                Image.new("RGB", (40, 30), (90, 20, 200)).save(self.data / split / f"{name}.png")
        (self.data / "annotations").mkdir()
        self.annotations: dict[str, Any] = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in (1, 2)],
            "annotations": [
                {"id": n, "image_id": 1 + n % 2, "category_id": 3, "bbox": [n, 2, 9.5, 8], "area": 76.0, "iscrowd": 0}
                for n in (1, 2, 3)
            ],
            "categories": [{"id": 3, "name": "cat"}],
        }
        (self.data / "annotations" / "instances_val.json").write_text(json.dumps(self.annotations))
        builder = RetinaNetBuilder(width=0.125, fpn_channels=32, extra="none")
        self.student = folder / "student.pt"
        settings = {"min_size": 32, "max_size": 64, "size_divisor": 32}
        save_student(self.student, builder.build(["cat"]), builder=builder, image_settings=settings)
        self.content = torch.load(self.student, weights_only=True)
        self.recipe: dict[str, Any] = {
            "student": {"class_path": "drkd.adapters.RetinaNetBuilder", "init_args": {"width": 0.25}},
            "teacher": {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": "teacher.pt"}},
            "method": {"class_path": "drkd.methods.DRKD", "init_args": {"warmup_steps": 3}},
            "data": {"root": "data", "batch_size": 2, "min_size": [64, 80], "max_size": 96, "pad_to": [64, 96]},
            "training": {"steps": 2, "ema": 0.9, "devices": 1, "optimization": {"milestones": [0.5, 0.9]}},
            "evaluation": {"split": None, "area_scale": 0.25},
            "output": "run",
            "seed": 0,
        }
        zeros = {"a": torch.zeros(3)}
        self.checkpoint: dict[str, Any] = {
            **{"state_dict": zeros, "callbacks": {}, "optimizer_states": [zeros], "lr_schedulers": []},
            **{"loops": {"fit_loop": {}}, "global_step": 3, "epoch": 1, "pytorch-lightning_version": "2.6.0"},
        }

    def try_annotations(self) -> str:
        """A COCO file with other values, or other bytes."""
        if self.chance.random() < 0.6:
            changed: Any = self.annotations
            for _ in range(self.chance.choice((1, 1, 2, 5))):
                changed = mutate_value(self.chance, changed)
            content = json.dumps(changed).encode()
        else:
            content = mutate_bytes(self.chance, json.dumps(self.annotations).encode())
        (self.data / "annotations" / "instances_train.json").write_bytes(content)

        def read() -> None:
            split = load_split(self.data, "train")
            for record in split.records:
                if self.data.resolve() not in record.path.resolve().parents:
                    raise RuntimeError(f"climbed out of the folder: {record.path}")

        return guarded(read)

    def try_recipe(self) -> str:
        """A recipe with other values, or other bytes."""
        file = self.file.with_suffix(".yaml")
        if self.chance.random() < 0.6:
            changed: Any = self.recipe
            for _ in range(self.chance.choice((1, 1, 2))):
                changed = mutate_value(self.chance, changed)
            file.write_text(yaml.safe_dump(changed))
        else:
            file.write_bytes(mutate_bytes(self.chance, yaml.safe_dump(self.recipe).encode()))
        return guarded(lambda: load_recipe([file]))

    def try_student(self) -> str:
        """A student.pt with other values, or other bytes."""
        file = self.file.with_suffix(".pt")
        if self.chance.random() < 0.5:
            torch.save(mutate_value(self.chance, self.content), file)
        else:
            file.write_bytes(mutate_bytes(self.chance, self.student.read_bytes()))
        return guarded(lambda: load_detector(file))

    def try_checkpoint(self) -> str:
        """A checkpoint to resume from with other values, or other bytes."""
        file = self.file.with_suffix(".ckpt")
        torch.save(mutate_value(self.chance, self.checkpoint), file)
        if self.chance.random() < 0.5:
            file.write_bytes(mutate_bytes(self.chance, file.read_bytes()))
        return guarded(lambda: AtomicCheckpoints().load_checkpoint(file))

    def try_image(self) -> str:
        """An image of some format with other bytes."""
        kind = self.chance.choice(("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM"))
        mode = self.chance.choice(("RGB", "L", "P")) if kind != "JPEG" else "RGB"
        file = self.file.with_suffix(f".{kind.lower()}")
        mode = "RGB" if kind == "PPM" else mode
        Image.effect_noise((31, 17), 60).convert(mode).save(file, format=kind)
        file.write_bytes(mutate_bytes(self.chance, file.read_bytes()))
        return guarded(lambda: _read_pixels(file))


def campaign(folder: Path, *, count: int, seed: int) -> dict[str, Counter[str]]:
    """So many inputs of each kind; how often each outcome came."""
    attacks = Attacks(folder, random.Random(seed))
    before = {path for path in folder.parent.rglob("*") if folder not in (path, *path.parents)}
    outcomes: dict[str, Counter[str]] = {}
    for kind in ("annotations", "recipe", "student", "checkpoint", "image"):
        attack: Callable[[], str] = getattr(attacks, f"try_{kind}")
        outcomes[kind] = Counter(attack() for _ in range(count))
    escaped = {path for path in folder.parent.rglob("*") if folder not in (path, *path.parents)} - before
    if escaped:
        outcomes["outside"] = Counter(str(path) for path in escaped)
    return outcomes


def main() -> None:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "robustness" / "fuzz.json")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "work"
        folder.mkdir()
        outcomes = campaign(folder, count=options.count, seed=options.seed)
    good = all(set(counter) <= {"works", "refused"} for counter in outcomes.values())
    for kind, counter in outcomes.items():
        print(kind, dict(counter.most_common(12)))
    write_json(
        options.out,
        {
            "command": f"python benchmarks/robustness/fuzz.py --count {options.count} --seed {options.seed}",
            "passed": good,
            "outcomes": outcomes,
            "seconds": round(time.monotonic() - began),
            "commit": source_commit(),
            "versions": versions(),
            "machine": machine(),
        },
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
