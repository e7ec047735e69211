"""COCO's twelve detection metrics, computed from ImageRecords and Detections by faster-coco-eval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray

from drkd.contracts import Detections, ImageRecord

_SMALL_AREA = 32.0**2
_MEDIUM_AREA = 96.0**2
_LARGEST_AREA = 1e10

_Rows = NDArray[np.float64]
"""Detections of one image: (N, 6), columns x, y, width, height px, score, label."""


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's twelve numbers, in [0, 1]; NaN where COCO has nothing to count (no object of that size or class).

    COCO itself writes -1 there. NaN cannot be averaged or subtracted by mistake.

    Args:
        ap: Average precision over IoU 0.50:0.95, all sizes.
        ap50: Average precision at IoU 0.50.
        ap75: Average precision at IoU 0.75.
        ap_small: Average precision of objects below ``small_px`` squared.
        ap_medium: Average precision of objects between the two thresholds.
        ap_large: Average precision of objects above ``medium_px`` squared.
        ar_1: Average recall with the first of ``max_detections`` (1) detections an image.
        ar_10: Average recall with the second (10).
        ar_100: Average recall with the third (100).
        ar_small: Average recall of small objects, third of ``max_detections``.
        ar_medium: Average recall of medium objects.
        ar_large: Average recall of large objects.
        per_class: Average precision over IoU 0.50:0.95 by class name.
        small_px: Side of a square of the small/medium threshold, px (COCO: 32).
        medium_px: Side of a square of the medium/large threshold, px (COCO: 96).
        max_detections: Detections an image that count, for the three ``ar_*``; the last also for every AP.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar_100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: dict[str, float]
    small_px: float = 32.0
    medium_px: float = 96.0
    max_detections: tuple[int, int, int] = (1, 10, 100)

    def as_dict(self) -> dict[str, float]:
        """Return the twelve numbers by name, for loggers."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:12]}

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON values (``evaluation.json`` of a run folder); NaN becomes null."""
        return {
            **{name: _null_for_nan(value) for name, value in self.as_dict().items()},
            "per_class": {name: _null_for_nan(value) for name, value in self.per_class.items()},
            "thresholds_px": [self.small_px, self.medium_px],
            "max_detections": list(self.max_detections),
        }

    @property
    def thresholds(self) -> str:
        """What small, medium and large mean here, in words."""
        small, medium = f"{self.small_px:g}", f"{self.medium_px:g}"
        words = f"small: area < {small}² px, medium: {small}² to {medium}² px, large: > {medium}² px"
        scaled = self.small_px != 32.0 or self.medium_px != 96.0
        return words + (" (scaled to the images; COCO uses 32² and 96²)" if scaled else " (as COCO)")

    def table(self) -> str:
        """Return the twelve numbers as aligned text, x 100, with the size thresholds below."""
        first, second, third = self.max_detections
        rows = [
            ("AP", "IoU 0.50:0.95", self.ap),
            ("AP50", "IoU 0.50", self.ap50),
            ("AP75", "IoU 0.75", self.ap75),
            ("AP_S", "small", self.ap_small),
            ("AP_M", "medium", self.ap_medium),
            ("AP_L", "large", self.ap_large),
            (f"AR_{first}", f"{first} an image", self.ar_1),
            (f"AR_{second}", f"{second} an image", self.ar_10),
            (f"AR_{third}", f"{third} an image", self.ar_100),
            ("AR_S", "small", self.ar_small),
            ("AR_M", "medium", self.ar_medium),
            ("AR_L", "large", self.ar_large),
        ]
        lines = [
            f"{name:<7} {what:<14} {'-' if math.isnan(value) else f'{100 * value:.1f}':>6}"
            for name, what, value in rows
        ]
        return "\n".join([*lines, self.thresholds])


class CocoEvaluator:
    """Collects detections of a data set's images and computes COCO's metrics.

    Every record counts, also one for which no detections were given: its objects are then missed. An image that is
    given twice, as padding samplers do, counts once (the first time).

    Args:
        records: The images with their ground truth. Ids of any kind: they are renumbered from 1, because COCO's tools
            silently drop annotations with id 0.
        class_names: Names of labels 0..K-1.
        area_scale: Factor on COCO's area thresholds 32^2 and 96^2 px^2, for images smaller than COCO's.
        max_detections: Detections an image that count for ``ar_1``, ``ar_10``, ``ar_100``; ascending.

    Raises:
        ValueError: If ids repeat, names repeat, a label has no name, or an option is out of range.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        class_names: Sequence[str],
        *,
        area_scale: float = 1.0,
        max_detections: tuple[int, int, int] = (1, 10, 100),
    ) -> None:
        if not (math.isfinite(area_scale) and area_scale > 0):
            raise ValueError(f"area_scale expects a positive number, got {area_scale}")
        if len(max_detections) != 3 or min(max_detections) < 1 or sorted(set(max_detections)) != list(max_detections):
            raise ValueError(f"max_detections expects three ascending numbers >= 1, got {max_detections}")
        if len(set(class_names)) != len(class_names):
            raise ValueError(f"class_names expects distinct names, got {list(class_names)}")
        self.class_names = tuple(class_names)
        self.area_scale = area_scale
        self.max_detections = max_detections
        self._index = {record.image_id: index for index, record in enumerate(records, start=1)}
        if len(self._index) != len(records):
            raise ValueError(
                f"records expects distinct image ids, got {len(records)} records of {len(self._index)} ids"
            )
        self._truth = _truth_to_coco(records, len(self.class_names))
        self._rows: dict[int, _Rows] = {}

    def reset(self) -> None:
        """Forget all detections."""
        self._rows = {}

    def update(self, image_ids: Sequence[int], detections: Sequence[Detections]) -> None:
        """Add the detections of some images.

        Args:
            image_ids: Ids of the records.
            detections: One entry an image, xyxy px of the original image.

        Raises:
            ValueError: If the lengths differ, an id is unknown, or a value is not finite or not a known label.
        """
        if len(image_ids) != len(detections):
            raise ValueError(
                f"update expects one Detections an image, got {len(image_ids)} ids, {len(detections)} entries"
            )
        for image_id, found in zip(image_ids, detections, strict=True):
            if image_id not in self._index:
                raise ValueError(f"update expects ids of the records, got unknown image id {image_id}")
            rows = _detections_to_rows(found)
            if not np.isfinite(rows).all():
                raise ValueError(f"detections of image {image_id} expect finite boxes and scores, got NaN or infinity")
            if rows.size and not (rows[:, 5].min() >= 0 and rows[:, 5].max() < len(self.class_names)):
                raise ValueError(
                    f"detections of image {image_id} expect labels 0..{len(self.class_names) - 1}, "
                    f"got {rows[:, 5].min():g}..{rows[:, 5].max():g}"
                )
            self._rows.setdefault(self._index[image_id], rows)

    def gather(self) -> None:
        """Merge the detections of all ranks, on every rank; does nothing without a process group. Collective."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        parts: list[dict[int, _Rows] | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self._rows)
        merged: dict[int, _Rows] = {}
        for part in parts:
            for index, rows in (part or {}).items():
                merged.setdefault(index, rows)
        self._rows = merged

    def compute(self) -> CocoMetrics:
        """Gather over ranks (so every rank must call it) and compute the metrics of all detections so far."""
        self.gather()
        small, medium = _SMALL_AREA * self.area_scale, _MEDIUM_AREA * self.area_scale
        precision, recall = _run_faster_coco_eval(
            self._truth, _rows_to_coco(self._rows), small=small, medium=medium, max_detections=self.max_detections
        )
        # precision (T, R, K, A, M): IoU, recall, class, area, detections; recall (T, K, A, M).
        return CocoMetrics(
            ap=_mean(precision[..., 0, 2]),
            ap50=_mean(precision[0, ..., 0, 2]),
            ap75=_mean(precision[5, ..., 0, 2]),
            ap_small=_mean(precision[..., 1, 2]),
            ap_medium=_mean(precision[..., 2, 2]),
            ap_large=_mean(precision[..., 3, 2]),
            ar_1=_mean(recall[..., 0, 0]),
            ar_10=_mean(recall[..., 0, 1]),
            ar_100=_mean(recall[..., 0, 2]),
            ar_small=_mean(recall[..., 1, 2]),
            ar_medium=_mean(recall[..., 2, 2]),
            ar_large=_mean(recall[..., 3, 2]),
            per_class={name: _mean(precision[:, :, k, 0, 2]) for k, name in enumerate(self.class_names)},
            small_px=math.sqrt(small),
            medium_px=math.sqrt(medium),
            max_detections=self.max_detections,
        )


def detections_to_coco(
    image_ids: Sequence[int], detections: Sequence[Detections], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Write detections as COCO results: plain JSON values, boxes xywh px.

    Args:
        image_ids: Ids as in the annotation file.
        detections: One entry an image.
        category_ids: The annotation file's category id of every label.

    Raises:
        ValueError: If the lengths differ or a label has no category id.
    """
    if len(image_ids) != len(detections):
        raise ValueError(f"expected one Detections an image, got {len(image_ids)} ids and {len(detections)} entries")
    results: list[dict[str, Any]] = []
    for image_id, found in zip(image_ids, detections, strict=True):
        for x, y, width, height, score, label in _detections_to_rows(found).tolist():
            if not 0 <= label < len(category_ids):
                raise ValueError(f"expected labels 0..{len(category_ids) - 1}, got {label:g} in image {image_id}")
            results.append(
                {
                    "image_id": int(image_id),
                    "category_id": int(category_ids[int(label)]),
                    "bbox": [x, y, width, height],
                    "score": score,
                }
            )
    return results


def _null_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of the entries that COCO counts (it marks the others with -1); NaN if there are none."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else math.nan


def _detections_to_rows(found: Detections) -> _Rows:
    boxes = found.boxes.detach().cpu().double().reshape(-1, 4)
    scores = found.scores.detach().cpu().double().reshape(-1, 1)
    labels = found.labels.detach().cpu().double().reshape(-1, 1)
    rows: _Rows = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores, labels], dim=1).numpy()
    return rows


def _truth_to_coco(records: Sequence[ImageRecord], classes: int) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, record in enumerate(records, start=1):
        images.append({"id": index, "height": record.size[0], "width": record.size[1]})
        boxes = record.boxes.double().reshape(-1, 4)
        columns = (boxes.tolist(), record.labels.tolist(), record.crowd.tolist(), record.areas.double().tolist())
        for (x1, y1, x2, y2), label, crowd, area in zip(*columns, strict=True):
            if not 0 <= label < classes:
                raise ValueError(f"record {record.image_id} expects labels 0..{classes - 1}, got {label}")
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": k + 1} for k in range(classes)]}


def _rows_to_coco(rows_by_image: dict[int, _Rows]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    # By image, not by arrival: equal scores are ranked in this order, and ranks may deliver in any.
    for index, rows in sorted(rows_by_image.items()):
        for x, y, width, height, score, label in rows.tolist():
            results.append(
                {
                    "id": len(results) + 1,
                    "image_id": index,
                    "category_id": int(label) + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": score,
                }
            )
    return results


def _run_faster_coco_eval(
    truth: dict[str, Any],
    results: list[dict[str, Any]],
    *,
    small: float,
    medium: float,
    max_detections: tuple[int, int, int],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return precision (T, R, K, A, M) and recall (T, K, A, M), -1 where there is nothing to count."""
    from faster_coco_eval.core.coco import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    # Copied entry by entry: the evaluator writes into the annotations.
    truth = {key: [dict(entry) for entry in entries] for key, entries in truth.items()}
    found = {"images": truth["images"], "categories": truth["categories"], "annotations": results}
    classes = len(truth["categories"])
    if not truth["images"] or not classes:
        return np.full((10, 101, classes, 4, 3), -1.0), np.full((10, classes, 4, 3), -1.0)
    evaluation = COCOeval_faster(
        COCO(truth, print_function=_discard),
        COCO(found, print_function=_discard),
        iouType="bbox",
        print_function=_discard,
        separate_eval=True,
    )
    evaluation.params.maxDets = list(max_detections)
    evaluation.params.areaRng = [[0.0, _LARGEST_AREA], [0.0, small], [small, medium], [medium, _LARGEST_AREA]]
    evaluation.params.areaRngLbl = ["all", "small", "medium", "large"]
    evaluation.evaluate()
    evaluation.accumulate()
    shape = evaluation.eval["counts"]
    precision = np.asarray(evaluation.eval["precision"], dtype=np.float64).reshape(shape)
    recall = np.asarray(evaluation.eval["recall"], dtype=np.float64).reshape(shape[:1] + shape[2:])
    return precision, recall


def _discard(*_: object) -> None:
    """Stand in for print: evaluation is quiet."""
