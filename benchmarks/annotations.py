"""Reads annotations as many as COCO's and says what they cost: seconds, memory, and memory of every data worker.

    python benchmarks/annotations.py

Writes a file with as many images, boxes and corners of outlines as ``instances_train2017.json`` has, drawn at random,
and empty image files; makes the training loader of a run; then starts workers as the loader does, which go through all
records, and adds up the memory that each has for itself afterwards. Linux only (/proc). The result is one JSON file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import random
import resource
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

from drkd.data.batches import keep_memory_shared
from drkd.data.dataset import DatasetSplit, DetectionDataset
from drkd.data.module import DetectionDataModule
from drkd.recipes.run_folder import machine, source_commit, versions, write_json

# COCO 2017's training set.
_IMAGES, _BOXES, _CLASSES = 118_287, 860_001, 80
_CORNERS = 25
_FILE = "annotations/instances_train2017.json"


def main() -> None:
    """Write, read, share, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=_IMAGES)
    parser.add_argument("--boxes", type=int, default=_BOXES)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "annotations" / "annotations.json"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        # In a process of its own, whose memory is not the reader's.
        writer = multiprocessing.get_context("fork").Process(
            target=_write_data, args=(root, options.images, options.boxes)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit(f"{root}: the annotations could not be written (exit code {writer.exitcode}).")
        size = (root / _FILE).stat().st_size
        before, started = _resident(), time.process_time()
        data = DetectionDataModule(str(root), workers=options.workers)
        split = cast(DetectionDataset, data.train_dataloader().dataset).split
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        kept = _resident() - before
        started = time.process_time()
        _go_through(split)
        pass_seconds = time.process_time() - started
        with multiprocessing.get_context("fork").Pool(options.workers, initializer=_hold, initargs=(split,)) as pool:
            own = pool.map(_own_memory, range(options.workers), chunksize=1)
    found = {
        "command": shlex.join(["python", "benchmarks/annotations.py", *sys.argv[1:]]),
        "images": options.images,
        "boxes": options.boxes,
        "file_megabytes": _megabytes(size),
        "read_cpu_seconds": round(seconds, 1),
        "pass_cpu_seconds": round(pass_seconds, 1),
        "peak_megabytes": _megabytes(peak),
        "records_megabytes": _megabytes(len(pickle.dumps(split.records))),
        # With what the allocator keeps of what was freed.
        "resident_megabytes": _megabytes(kept),
        "worker_megabytes": [_megabytes(amount) for amount in own],
        "commit": source_commit(),
        "versions": versions(),
        "machine": machine(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, found)
    print(json.dumps({key: value for key, value in found.items() if key not in ("versions", "machine")}, indent=2))


def _write_data(root: Path, images: int, boxes: int) -> None:
    chance = random.Random(0)
    folder = root / "train2017"
    folder.mkdir()
    (root / "annotations").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        name = f"{number:012d}.jpg"
        (folder / name).touch()
        rows.append({"id": number, "file_name": name, "height": 480, "width": 640, "license": 1})
    annotations = []
    for number in range(1, boxes + 1):
        box = [chance.uniform(0, 500), chance.uniform(0, 350), chance.uniform(2, 139), chance.uniform(2, 129)]
        outline = [round(chance.uniform(0, 480), 2) for _ in range(2 * _CORNERS)]
        annotations.append(
            {
                **{"id": number, "image_id": chance.randint(1, images), "category_id": chance.randint(1, _CLASSES)},
                **{"bbox": [round(value, 2) for value in box], "area": round(0.6 * box[2] * box[3], 3), "iscrowd": 0},
                "segmentation": [outline],
            }
        )
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, _CLASSES + 1)]
    (root / _FILE).write_text(json.dumps({"images": rows, "annotations": annotations, "categories": categories}))


def _go_through(split: DatasetSplit) -> int:
    return sum(len(record.labels) for record in split.records)


_HELD: list[DatasetSplit] = []


def _hold(split: DatasetSplit) -> None:
    keep_memory_shared(0)
    torch.set_num_threads(1)
    _HELD.append(split)


def _own_memory(number: int) -> int:
    """Bytes that going through all records has added to what this worker shares with nobody."""
    del number
    before = _private()
    _go_through(_HELD[0])
    time.sleep(1)  # so that every worker has one
    return _private() - before


def _private() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _megabytes(amount: int) -> float:
    return round(amount / 1e6, 1)


if __name__ == "__main__":
    main()
