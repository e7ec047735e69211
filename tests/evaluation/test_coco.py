"""COCO metrics: hand-computed, against pycocotools, edge cases, and merged over ranks."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import multiprocessing

from drkd.contracts import Detections, ImageRecord
from drkd.evaluation import CocoEvaluator, detections_to_coco

NAMES = ("cat", "dog", "mouse")


def make_record(image_id, boxes, labels, *, crowd=None, size=(200, 200)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return ImageRecord(
        image_id=image_id,
        path=Path(f"{image_id}.png"),
        size=size,
        boxes=boxes,
        labels=torch.tensor(labels, dtype=torch.int64),
        crowd=torch.tensor(crowd if crowd is not None else [False] * len(labels), dtype=torch.bool),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
    )


def make_detections(boxes, scores, labels):
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


def random_case(seed, *, images=12):
    """Records with crowds, empty images and all three sizes; detections near the truth and far from it."""
    generator = np.random.default_rng(seed)
    records, detections = [], []
    for index in range(images):
        count = 0 if index % 5 == 0 else int(generator.integers(1, 9))
        corner = generator.uniform(0, 150, (count, 2))
        side = np.exp(generator.uniform(np.log(6), np.log(180), (count, 2)))
        boxes = np.concatenate([corner, corner + side], axis=1)
        labels = generator.integers(0, 3, count)
        crowd = generator.random(count) < 0.2
        records.append(make_record(index * 7, boxes.tolist(), labels.tolist(), crowd=crowd.tolist()))
        near = boxes + generator.normal(0, 0.08, boxes.shape) * np.tile(side, 2)
        near = np.repeat(near, 2, axis=0)
        far = generator.uniform(0, 100, (3, 4))
        far[:, 2:] += far[:, :2]
        found = np.concatenate([near, far])
        guess = np.concatenate([np.repeat(labels, 2), generator.integers(0, 3, 3)])
        keep = np.zeros(len(found), bool) if index % 4 == 3 else generator.random(len(found)) < 0.8
        # Few distinct scores, so that ties are tested too.
        scores = np.round(generator.random(len(found)), 1)[keep]
        order = np.argsort(-scores, kind="stable")
        detections.append(
            make_detections(found[keep][order].tolist(), scores[order].tolist(), guess[keep][order].tolist())
        )
    return records, detections


def oracle(records, detections, *, area_scale=1.0):
    """The twelve numbers by pycocotools, ids from 1."""
    truth = {
        "images": [{"id": i + 1, "height": r.size[0], "width": r.size[1]} for i, r in enumerate(records)],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)],
        "annotations": [],
    }
    for index, record in enumerate(records):
        for box, label, crowd, area in zip(
            record.boxes.double(), record.labels, record.crowd, record.areas, strict=True
        ):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": index + 1,
                    "category_id": int(label) + 1,
                    "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    reference = COCO()
    reference.dataset = truth
    reference.createIndex()
    results = detections_to_coco(range(1, len(records) + 1), detections, [1, 2, 3])
    evaluation = COCOeval(reference, reference.loadRes(results), "bbox")
    small, medium = 32**2 * area_scale, 96**2 * area_scale
    evaluation.params.areaRng = [[0, 1e10], [0, small], [small, medium], [medium, 1e10]]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


def evaluate(records, detections, **options):
    evaluator = CocoEvaluator(records, NAMES, **options)
    evaluator.update([record.image_id for record in records], detections)
    return evaluator.compute()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("area_scale", [1.0, 0.25])
def test_agrees_with_pycocotools(seed, area_scale):
    records, detections = random_case(seed)
    ours = list(evaluate(records, detections, area_scale=area_scale).as_dict().values())
    theirs = oracle(records, detections, area_scale=area_scale)
    assert len(ours) == 12
    np.testing.assert_allclose(np.nan_to_num(ours, nan=-1.0), theirs, atol=1e-9)


def test_value_computed_by_hand():
    # Two cats of 50 px and one found exactly, after a false alarm with a higher score: precision is 1/2 up to
    # recall 1/2 (51 of COCO's 101 recall points) and 0 beyond.
    records = [make_record(0, [[0, 0, 50, 50], [100, 100, 150, 150]], [0, 0])]
    found = [make_detections([[0, 100, 50, 150], [0, 0, 50, 50]], [0.9, 0.8], [0, 0])]
    metrics = evaluate(records, found)
    assert metrics.ap == pytest.approx(0.5 * 51 / 101)
    assert metrics.ap50 == metrics.ap75 == metrics.ap_medium == metrics.ap
    assert metrics.ar_1 == 0.0
    assert metrics.ar_10 == metrics.ar_100 == 0.5
    assert math.isnan(metrics.ap_small) and math.isnan(metrics.ap_large)
    assert metrics.per_class["cat"] == metrics.ap
    assert math.isnan(metrics.per_class["dog"])


def test_first_annotation_counts():
    """COCO's tools silently drop an annotation of id 0; ours start from 1."""
    metrics = evaluate([make_record(0, [[0, 0, 50, 50]], [0])], [make_detections([[0, 0, 50, 50]], [0.9], [0])])
    assert metrics.ap == pytest.approx(1.0)


def test_a_crowd_is_neither_missed_nor_a_false_alarm():
    records = [make_record(3, [[0, 0, 50, 50], [60, 60, 200, 200]], [0, 0], crowd=[False, True])]
    found = [make_detections([[70, 70, 90, 90], [0, 0, 50, 50]], [0.9, 0.8], [0, 0])]
    assert evaluate(records, found).ap == pytest.approx(1.0)


def test_area_scale_moves_the_thresholds():
    records = [make_record(1, [[0, 0, 20, 20]], [0])]
    found = [make_detections([[0, 0, 20, 20]], [0.9], [0])]
    plain, scaled = evaluate(records, found), evaluate(records, found, area_scale=0.25)
    assert plain.ap_small == pytest.approx(1.0) and math.isnan(plain.ap_medium)
    assert math.isnan(scaled.ap_small) and scaled.ap_medium == pytest.approx(1.0)
    assert (scaled.small_px, scaled.medium_px) == (16.0, 48.0)
    assert "16² px" in scaled.table() and "scaled" in scaled.table()
    assert "scaled" not in plain.table()


@pytest.mark.parametrize("given", [True, False])
def test_no_detections_score_zero(given):
    records = [make_record(1, [[0, 0, 20, 20]], [0]), make_record(2, [], [])]
    evaluator = CocoEvaluator(records, NAMES)
    if given:
        evaluator.update([1, 2], [make_detections([], [], [])] * 2)
    metrics = evaluator.compute()
    assert metrics.ap == metrics.ap50 == metrics.ap_small == metrics.ar_100 == 0.0
    assert math.isnan(metrics.ap_large)


@pytest.mark.parametrize("records", [[], [make_record(5, [], [])]])
def test_no_objects_at_all_score_nan(records):
    found = [make_detections([[0, 0, 9, 9]], [0.5], [1])] * len(records)
    metrics = evaluate(records, found)
    assert all(math.isnan(value) for value in metrics.as_dict().values())
    assert json.loads(json.dumps(metrics.as_json(), allow_nan=False))["ap"] is None


def test_repeated_images_and_repeated_computes_count_once():
    records, detections = random_case(1)
    evaluator = CocoEvaluator(records, NAMES)
    for _ in range(2):
        evaluator.update([record.image_id for record in records], detections)
    once = evaluate(records, detections).as_dict()
    assert evaluator.compute().as_dict() == pytest.approx(once, nan_ok=True)
    assert evaluator.compute().as_dict() == pytest.approx(once, nan_ok=True)
    evaluator.reset()
    assert evaluator.compute().ap == 0.0


def test_prints_nothing(capfd):
    evaluate(*random_case(2))
    assert capfd.readouterr() == ("", "")


def test_wrong_input_is_refused():
    record = make_record(1, [[0, 0, 9, 9]], [0])
    with pytest.raises(ValueError, match="distinct image ids"):
        CocoEvaluator([record, record], NAMES)
    with pytest.raises(ValueError, match=r"labels 0\.\.-1"):
        CocoEvaluator([record], ())
    with pytest.raises(ValueError, match="area_scale"):
        CocoEvaluator([record], NAMES, area_scale=0.0)
    with pytest.raises(ValueError, match="max_detections"):
        CocoEvaluator([record], NAMES, max_detections=(1, 100, 10))
    evaluator = CocoEvaluator([record], NAMES)
    with pytest.raises(ValueError, match="unknown image id 2"):
        evaluator.update([2], [make_detections([], [], [])])
    with pytest.raises(ValueError, match="finite"):
        evaluator.update([1], [make_detections([[0, 0, math.nan, 1]], [0.5], [0])])
    with pytest.raises(ValueError, match="labels"):
        evaluator.update([1], [make_detections([[0, 0, 1, 1]], [0.5], [3])])


def test_detections_to_coco_writes_plain_json():
    rows = detections_to_coco([7], [make_detections([[1, 2, 4, 8]], [0.5], [1])], [18, 44])
    assert json.loads(json.dumps(rows)) == [
        {"image_id": 7, "category_id": 44, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.5}
    ]


def _evaluate_on_rank(rank, port, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    records, detections = random_case(3)
    evaluator = CocoEvaluator(records, NAMES)
    # Both ranks see the first three images, as with a sampler that pads.
    chosen = [i for i in range(len(records)) if i % 2 == rank or i < 3]
    evaluator.update([records[i].image_id for i in chosen], [detections[i] for i in chosen])
    Path(folder, f"{rank}.json").write_text(json.dumps(evaluator.compute().as_json()))
    torch.distributed.destroy_process_group()


def test_ranks_are_merged_and_each_image_counts_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_evaluate_on_rank, args=(port, str(tmp_path)), nprocs=2)
    alone = json.loads(json.dumps(evaluate(*random_case(3)).as_json()))
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [alone, alone]
