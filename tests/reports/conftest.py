"""Hand-made run folders and a hand-made demo folder, as the engine and the recipes write them."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

NAMES = ["zero & <one>", *"123456789"]


def make_evaluation(ap, *, small=None):
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    metrics = dict(zip(names, (ap, ap + 0.2, ap, ap / 2 if small is None else small, ap, None), strict=True))
    metrics |= dict.fromkeys(("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"), ap)
    classes = {name: ap + 0.01 * index for index, name in enumerate(NAMES)}
    return {**metrics, "per_class": classes, "thresholds_px": [16.0, 48.0], "max_detections": [1, 10, 100]}


def make_cost(scale=1.0):
    return {
        "parameters": int(4_321_000 * scale),
        "flops": int(1_234_567_890 * scale),
        "latency_ms": 12.34 * scale,
        "latency_p10_ms": 12.0 * scale,
        "latency_p90_ms": 13.0 * scale,
        "threads": 2,
        "image_size": [160, 160],
        "device": "cpu",
    }


def write_run(folder, ap, *, distils, seed=0):
    """A run of 600 steps, logged as Lightning's CSVLogger does: one row a kind of quantity, the rest left empty."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    (folder / "recipe.yaml").write_text(
        "student:\n  class_path: drkd.adapters.RetinaNetBuilder  # <script>\nsteps: 600\n"
    )
    facts = {
        "seed": 7,
        "commit": "0123abc",
        "versions": {"drkd": "0.1.0", "torch": "2.15.0"},
        "machine": "2 cores",
        "command": ["drkd", "distill", "recipe.yaml"],
        "started": "2026-11-22T15:00:00+00:00",
        "finished": "2026-11-22T15:06:00+00:00",
        "status": "finished",
    }
    (folder / "run.json").write_text(json.dumps(facts))
    terms = [f"pixel_relation/p{level}" for level in range(3, 8)] + ["instance_relation", "instance_feature"]
    rows = []
    for step in range(0, 600, 10):
        fall = math.exp(-step / 250)
        noise = generator.uniform(0.85, 1.15, 20)
        row = {"task/classification": 1.1 * fall * noise[0] + 0.2, "task/box": 0.7 * fall * noise[1] + 0.15}
        if distils:
            for index, term in enumerate(terms):
                row[f"bare/{term}"] = (0.02 + 0.1 * index) * (0.3 + 0.7 * fall) * noise[2 + index]
                row[f"ratio/{term}"] = (0.05 + 0.1 * index) * noise[10 + index]
            row["bare/pixel_relation"] = sum(row[f"bare/{term}"] for term in terms[:5])
        rows.append({"epoch": step // 100, "step": step, **row})
        if step % 100 == 90:
            score = ap * (1 - math.exp(-step / 200))
            rows.append(
                {
                    "epoch": step // 100,
                    "step": step,
                    "val/ap": score,
                    "val/ap50": 1.4 * score,
                    "val/ap_small": score / 2,
                }
            )
    with (folder / "metrics.csv").open("w", newline="") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "evaluation.json").write_text(json.dumps(make_evaluation(ap)))
    (folder / "cost.json").write_text(json.dumps(make_cost()))
    return folder


def _draw_image(generator, size):
    y, x = np.mgrid[:size, :size] / size
    base = generator.uniform(40, 190, 3) + 50 * np.stack([x, y, np.sin(7 * x + 5 * y)], axis=-1)
    image = Image.fromarray(np.clip(base + generator.normal(0, 6, base.shape), 0, 255).astype(np.uint8))
    boxes, labels = [], []
    for _ in range(int(generator.integers(4, 8))):
        side = float(np.exp(generator.uniform(np.log(14), np.log(50))))
        left, top = generator.uniform(0, size - side, 2)
        label = int(generator.integers(0, 10))
        colour = tuple(int(value) for value in generator.integers(0, 255, 3))
        ImageDraw.Draw(image).text((left + 0.2 * side, top - 0.1 * side), str(label), fill=colour, font_size=side)
        boxes.append([left, top, left + side, top + side])
        labels.append(label)
    return image, boxes, labels


def _detect(generator, boxes, labels, quality):
    found = []
    for box, label in zip(boxes, labels, strict=True):
        if generator.random() < quality:
            moved = (np.array(box) + generator.normal(0, 1.5, 4)).tolist()
            right = generator.random() < 0.8 + 0.2 * quality
            score = float(generator.uniform(0.3, 1))
            found.append({"box": moved, "label": label if right else (label + 3) % 10, "score": score})
    return found


def write_demo(folder, *, size=160, images=5, seed=0):
    """A whole demo folder."""
    generator = np.random.default_rng(seed)
    (folder / "teacher").mkdir(parents=True)
    (folder / "teacher/evaluation.json").write_text(json.dumps(make_evaluation(0.6)))
    (folder / "teacher/cost.json").write_text(json.dumps(make_cost(4.0)))
    write_run(folder / "student", 0.4, distils=False)
    write_run(folder / "drkd", 0.5, distils=True, seed=1)
    entries, pixels, all_boxes = [], [], []
    (folder / "images").mkdir()
    for index in range(images):
        image, boxes, labels = _draw_image(generator, size)
        image.save(folder / f"images/{index}.png")
        pixels.append(np.asarray(image))
        all_boxes.append(boxes)
        entries.append(
            {
                "file": f"images/{index}.png",
                "ground_truth": [{"box": box, "label": label} for box, label in zip(boxes, labels, strict=True)],
                **{
                    name: _detect(generator, boxes, labels, quality)
                    for name, quality in (("teacher", 0.95), ("student", 0.5), ("drkd", 0.8))
                },
            }
        )
    (folder / "detections.json").write_text(json.dumps({"class_names": NAMES, "images": entries}))
    y, x = np.mgrid[:size, :size]
    objects = [
        sum(
            np.exp(-(((x - (b[0] + b[2]) / 2) ** 2 + (y - (b[1] + b[3]) / 2) ** 2) / (0.3 * (b[2] - b[0])) ** 2))
            for b in boxes
        )
        for boxes in all_boxes
    ]
    heat = {
        name: np.stack([o * gain + generator.random(o.shape) * (1 - gain) for o in objects]).astype(np.float32)
        for name, gain in (
            ("plain_student", 0.3),
            ("plain_teacher", 0.5),
            ("relation_student", 0.8),
            ("relation_teacher", 0.95),
        )
    }
    count = len(all_boxes[0])
    teacher = generator.random((count, count)) + 4 * np.eye(count)
    np.savez_compressed(
        folder / "explain.npz",
        images=np.stack(pixels),
        **heat,
        relation_matrix_student=teacher + 0.2 * generator.random((count, count)),
        relation_matrix_teacher=teacher,
        relation_filter=generator.random((count, count)),
        boxes=np.array(all_boxes[0], np.float32),
        image_index=0,
    )
    return folder


def make_cells():
    cells = []
    for detector, shift in (("RetinaNet", 0.0), ("Faster R-CNN", 0.03)):
        cells.append({"detector": detector, "method": "teacher", "metrics": {"ap": 0.6 + shift, "ap_small": 0.5}})
        for seed in range(3):
            for method, ap in (("student", 0.40), ("drkd", 0.50)):
                score = ap + shift + 0.01 * seed + (0.002 * seed if method == "drkd" else 0)
                metrics = {"ap": score, "ap_small": score - 0.1}
                cells.append({"detector": detector, "method": method, "seed": seed, "metrics": metrics})
    return [{**cell, "thresholds_px": [16.0, 48.0]} for cell in cells]


@pytest.fixture
def demo(tmp_path):
    return write_demo(tmp_path / "demo", size=64, images=2)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run <b>", 0.4, distils=True)


@pytest.fixture
def cells():
    return make_cells()
