"""Measure a detector: COCO numbers on a split, and on request what it costs to run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drkd.adapters.mmdetection_parts import AlignedRoIPool
from drkd.adapters.torchvision_detector import TorchvisionDetector
from drkd.contracts import DetectionBatch, Detections, Detector, DetectorBuilder, Size
from drkd.data.batches import DetectionData
from drkd.data.dataset import DatasetSplit, find_splits
from drkd.data.formats.reading import FormatChoice
from drkd.evaluation import CocoEvaluator, CocoMetrics, ModelCost, measure_cost
from drkd.recipes.loading import choose_device, find_checkpoint, open_detector
from drkd.recipes.run_folder import check_output, write_json


@dataclass(frozen=True)
class Evaluated:
    """What was measured.

    Args:
        coco: The twelve numbers.
        metrics: The same as plain values, with thresholds and per-class AP.
        cost: Parameters, FLOPs and latency as plain values, where asked for.
    """

    coco: CocoMetrics
    metrics: dict[str, Any]
    cost: dict[str, Any] | None = None


@torch.no_grad()
def evaluate_detector(
    detector: Detector,
    split: DatasetSplit,
    *,
    loader: Iterable[DetectionBatch],
    area_scale: float = 1.0,
    cost: bool = False,
    device: torch.device | str = "cpu",
) -> Evaluated:
    """Run a detector over a split and score it. Classes are matched by name; detections of others are left out.

    Args:
        detector: Any detector; put into eval mode.
        split: Ground truth.
        loader: Batches of that split, every image once.
        area_scale: Factor on COCO's area limits.
        cost: Measure parameters, FLOPs and latency at the first batch's image size, on the CPU.
        device: Where to run.
    """
    detector.eval().to(device)
    evaluator = CocoEvaluator(split.records, split.class_names, area_scale=area_scale)
    table = _class_table(detector.spec.class_names, split.class_names)
    image_size = None
    for batch in loader:
        image_size = image_size or batch.image_size
        found = detector.detect(batch.to(device))
        evaluator.update(batch.image_ids, found if table is None else [_renumber(entry, table) for entry in found])
    coco = evaluator.compute()
    measured: ModelCost | None = None
    if cost and image_size is not None:
        measured = measure_detector(detector, image_size)
    return Evaluated(coco, coco.as_json(), None if measured is None else measured.as_json())


def measure_detector(detector: Detector, image_size: Size) -> ModelCost:
    """Parameters, FLOPs and latency of a detector on the CPU; it stays there.

    Args:
        detector: Any detector; put into eval mode.
        image_size: Height and width of the one image, px.
    """
    return measure_cost(_on_images(detector.eval().to("cpu")), image_size)


def _class_table(theirs: tuple[str, ...], ours: tuple[str, ...]) -> Tensor | None:
    """The split's label of each of the detector's, -1 where it has none; None where the two are alike."""
    if theirs == ours:
        return None
    return torch.tensor([ours.index(name) if name in ours else -1 for name in theirs], dtype=torch.int64)


def _renumber(found: Detections, table: Tensor) -> Detections:
    labels = table.to(found.labels.device)[found.labels]
    kept = labels >= 0
    return Detections(found.boxes[kept], found.scores[kept], labels[kept])


class _OnImages(nn.Module):
    """A detector to be called with a list of images, as torchvision's are."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        self.divisor = max(32, int(max(level.stride for level in detector.spec.levels)))
        if isinstance(detector, TorchvisionDetector):
            transform: Any = detector.model.transform
            self.divisor = int(transform.size_divisible)

    def forward(self, images: list[Tensor]) -> list[Detections]:
        empty = {"boxes": images[0].new_zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        return self.detector.detect(DetectionBatch.from_lists(images, [empty] * len(images), size_divisor=self.divisor))


def _on_images(detector: Detector) -> nn.Module:
    """What costs are measured on: torchvision's plain model, which takes images itself, or any other detector.

    MMDetection's Faster R-CNN is no plain one: drkd sets the scales of its pool.
    """
    if isinstance(detector, TorchvisionDetector):
        pool = getattr(getattr(detector.model, "roi_heads", None), "box_roi_pool", None)
        if not isinstance(pool, AlignedRoIPool):
            return detector.model
    return _OnImages(detector).eval()


def evaluate(
    checkpoint: Path | None = None,
    *,
    data: str,
    split: str = "val",
    area_scale: float = 1.0,
    cost: bool = False,
    output: Path | None = None,
    detector: DetectorBuilder | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    batch_size: int = 8,
    workers: int = 2,
    limit: int | None = None,
    device: str = "auto",
    trust_pickle: bool = False,
    trust_code: bool = False,
    format: FormatChoice = "auto",
    classes: list[str] | None = None,
) -> Evaluated:
    """Measure a saved detector, or one that a builder makes, on a split of a data set.

    Args:
        checkpoint: A student.pt, or a run folder that holds one.
        data: The data set's folder in COCO, YOLO or VOC format, or ``digits`` for the embedded one. Classes are matched
            by name.
        split: Split to evaluate on: val, train, tune or test.
        area_scale: Factor on COCO's area limits of small and medium objects (32^2 and 96^2 px); 0.25 halves the sides.
        cost: Also measure parameters, FLOPs and CPU latency.
        output: Also write the numbers as JSON to this file, which ends in .json; an existing one is replaced.
        detector: Instead of a checkpoint: how to build the detector, e.g. drkd.adapters.ZooBuilder.
        min_size: Short side that images are resized to, px; the checkpoint's own by default.
        max_size: Limit of the long side, px; the checkpoint's own by default.
        batch_size: Images a batch.
        workers: Processes that decode images.
        limit: Evaluate on the first images only.
        device: auto, cpu, cuda, ...
        trust_pickle: Load a checkpoint of Ultralytics' own, which is a pickle: loading it runs the code in it.
        trust_code: Call the functions that a checkpoint with a detector of your own names.
        format: The data's format; by default the one that its content shows.
        classes: Score these classes of the data only; images that show none of them stay.

    Raises:
        DrkdError: If the checkpoint or the data cannot be used, their classes do not match, or the output cannot be
            written or would replace an input.
    """
    chosen = choose_device(device)

    def module(**settings: Any) -> DetectionData:
        return DetectionData(
            data,
            val_split=split,
            batch_size=batch_size,
            workers=workers,
            val_limit=limit,
            format=format,
            classes=classes,
            **settings,
        )

    if output is not None:
        read = [file for file, _ in find_splits(module().root, format=format).values()]
        check_output(output, ".json", inputs=read if checkpoint is None else [*read, find_checkpoint(checkpoint)])
    names = module().split(split).class_names if detector is not None else ()
    loaded = open_detector(
        checkpoint,
        builder=detector,
        class_names=names,
        min_size=min_size,
        max_size=max_size,
        trust_pickle=trust_pickle,
        trust_code=trust_code,
    )
    source = module(
        min_size=loaded.min_size,
        max_size=loaded.max_size,
        size_divisor=loaded.size_divisor,
        class_names=loaded.detector.spec.class_names,
    )
    evaluated = evaluate_detector(
        loaded.detector,
        source.val_split,
        loader=source.val_dataloader(),
        area_scale=area_scale,
        cost=cost,
        device=chosen,
    )
    if output is not None:
        content = {**evaluated.metrics, "split": split, "images": len(source.val_split)}
        write_json(output, content if evaluated.cost is None else {**content, "cost": evaluated.cost})
    return evaluated
