"""Ship a student: write it as ONNX, check it against PyTorch on real images, time both, and quantise it on request."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torchvision import tv_tensors

from drkd.contracts import BoxTargets, DetectionBatch, Detector, DrkdError
from drkd.data.batches import DetectionData
from drkd.data.dataset import Sample, load_split
from drkd.data.digits import build_digits
from drkd.data.formats.reading import FormatChoice
from drkd.data.image import decode_image
from drkd.data.image_files import find_image_files
from drkd.data.transforms import collate, eval_transforms
from drkd.export.agreement import BOX_BOUND_PX, SCORE_BOUND, Agreement, compare
from drkd.export.onnx_detector import OnnxDetector
from drkd.export.onnx_file import Dynamic, ImageSize, require_onnx, write_onnx
from drkd.export.quantization import quantize
from drkd.recipes.evaluation import evaluate_detector
from drkd.recipes.loading import find_checkpoint, open_detector
from drkd.recipes.prediction import find_images
from drkd.recipes.run_folder import check_output, machine, source_commit, versions, write_json


@dataclass(frozen=True)
class Exported:
    """What was written and measured.

    Args:
        output: The ONNX file.
        report: Everything as plain values; also written beside the file, as ``.json``.
    """

    output: Path
    report: dict[str, Any]


def export(
    checkpoint: Path,
    *,
    output: Path,
    images: str | None = None,
    image_limit: int = 16,
    nms: Literal["inside", "outside"] = "inside",
    dynamic: Dynamic = "all",
    int8: bool = False,
    calibration: str | None = None,
    calibration_images: int = 128,
    format: FormatChoice = "auto",
    evaluation_split: str = "val",
    evaluation_images: int | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    repeats: int = 20,
    json: bool = False,
) -> Exported:
    """Write a student as ONNX, checked against PyTorch.

    Args:
        checkpoint: A student.pt, or a run folder that holds one.
        output: The ONNX file, which ends in .onnx; its report is written beside it, as OUTPUT.json.
        images: Check on these: an image or a folder of images; the embedded ones by default.
        image_limit: Check on the first so many images.
        nms: Suppression inside the graph, or outside: raw boxes and scores, for a runtime with its own.
        dynamic: What the graph leaves open: all (batch and image size), the batch, or none.
        int8: Also write an int8 version, as OUTPUT.int8.onnx.
        calibration: For int8: a data set's folder, or ``digits``. Calibrated on its train split.
        calibration_images: Calibrate on the first so many images.
        format: The format of that data set; by default the one that its content shows.
        evaluation_split: Split of that data set that both versions' AP is measured on.
        evaluation_images: Measure on the first so many images; all by default.
        min_size: Short side that images are resized to, px; the checkpoint's own by default.
        max_size: Limit of the long side, px; the checkpoint's own by default.
        repeats: Timed calls.
        json: Print the report as JSON.

    Raises:
        DrkdError: If the detector cannot be exported, or finds something else than PyTorch: no file is then left.
            If the output does not end in .onnx, cannot be written, or would replace an input.
    """
    del json  # the command line's business
    require_onnx()
    if repeats < 1:
        raise DrkdError(f"repeats: expected at least 1, got {repeats}.")
    if int8 != (calibration is not None):
        raise DrkdError("Expected --int8 together with --calibration DATA: the ranges of activations come from data.")
    report_file, int8_file = output.with_name(f"{output.name}.json"), output.with_name(f"{output.stem}.int8.onnx")
    if output.suffix.lower() != ".onnx":
        raise DrkdError(f"{output}: expected an --output that ends in .onnx; the report is named after it.")
    inputs = [
        find_checkpoint(checkpoint),
        *([] if images is None else [Path(images)]),
        *([] if calibration is None else [Path(calibration)]),
    ]
    for file, suffix in ((output, ".onnx"), (report_file, ".json"), *([(int8_file, ".onnx")] if int8 else [])):
        check_output(file, suffix, inputs=inputs)
    loaded = open_detector(checkpoint, min_size=min_size, max_size=max_size)
    size = ImageSize(loaded.min_size, loaded.max_size, loaded.size_divisor)
    batches = list(_read_images(images, image_limit, size, dynamic, output))
    aside = output.with_name(f".{output.name}.{os.getpid()}.onnx")
    aside_int8 = output.with_name(f".{output.name}.{os.getpid()}.int8.onnx")
    # Before the graph is written, which may take minutes.
    data = None
    if calibration is not None:
        plan = _Calibration(calibration, format, evaluation_split, calibration_images, evaluation_images, size, dynamic)
        data = plan.load(loaded.detector.spec.class_names)
    with torch.inference_mode():
        if not any(len(entry.scores) for _, batch in batches for entry in loaded.detector.detect(batch)):
            raise _nothing(sum(len(batch) for _, batch in batches))
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        started = time.perf_counter()
        write_onnx(loaded.detector, aside, nms=nms == "inside", dynamic=dynamic, image_size=size)
        seconds = time.perf_counter() - started
        found = OnnxDetector(aside)
        agreement = check(loaded.detector, found, batches)
        report: dict[str, Any] = {
            "checkpoint": str(find_checkpoint(checkpoint)),
            "output": str(output),
            "bytes": aside.stat().st_size,
            "export_seconds": round(seconds, 1),
            "exporter": "torch.onnx.export(dynamo=True)",
            **{name: found.metadata[name] for name in ("family",)},
            "class_names": list(found.spec.class_names),
            "nms": nms,
            "dynamic": dynamic,
            "agreement": agreement.as_json(),
            "latency": compare_latency(loaded.detector, found, batches[0][1], repeats=repeats),
            "machine": machine(),
            "versions": versions(),
            "commit": source_commit(),
        }
        if data is not None:
            report["int8"] = _quantize(aside, aside_int8, found, data, batches[0][1], repeats=repeats)
            report["int8"]["calibration"]["data"] = report["int8"]["evaluation"]["data"] = calibration
            report["int8"]["output"] = str(int8_file)
            aside_int8.replace(int8_file)
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
        aside_int8.unlink(missing_ok=True)
    write_json(report_file, report)
    return Exported(output, report)


@torch.inference_mode()
def check(detector: Detector, found: OnnxDetector, batches: Iterable[tuple[str, DetectionBatch]]) -> Agreement:
    """Compare what both find in images, and insist.

    Raises:
        DrkdError: If they differ by more than the bounds, or there was nothing to compare.
    """
    agreement = Agreement()
    settings = found.postprocessing
    for name, batch in batches:
        (reference,), (other,) = detector.detect(batch), found.detect(batch)
        compare(
            agreement,
            reference,
            other,
            name=name,
            class_names=detector.spec.class_names,
            score_threshold=settings["score_threshold"],
            nms_threshold=settings["nms_threshold"],
            most=settings["detections_per_image"],
        )
    if agreement.mismatches:
        raise DrkdError(
            f"The ONNX file does not find what PyTorch finds: of {agreement.detections} detections in "
            f"{agreement.images} images {len(agreement.missed)} have no partner in it, and {len(agreement.extra)} of "
            f"its own have none (within {BOX_BOUND_PX} px and {SCORE_BOUND} in score, of the same label). The "
            f"worst: {agreement.mismatches[0]}. The file was not kept."
        )
    if agreement.too_many_ties:
        raise DrkdError(
            f"Of {agreement.detections} detections in {agreement.images} images, {agreement.ties} on either side have "
            "no partner and are near ties, where rounding may decide: too many to say that PyTorch and the file agree. "
            "Is the detector trained? Its scores should differ. The file was not kept."
        )
    if not agreement.matched:
        raise _nothing(agreement.images)
    return agreement


def _nothing(images: int) -> DrkdError:
    return DrkdError(
        f"PyTorch detects nothing in the {images} images of the check, so it would prove nothing. Name images that "
        "show what the detector knows (--images FOLDER). No file was kept."
    )


@torch.inference_mode()
def compare_latency(detector: Detector, found: OnnxDetector, batch: DetectionBatch, *, repeats: int) -> dict[str, Any]:
    """Time of one image from the padded tensor to the detections, in PyTorch and in onnxruntime, ms, by turns."""
    times: dict[str, list[float]] = {"pytorch": [], "onnxruntime": []}
    runs: dict[str, Callable[[DetectionBatch], Any]] = {"pytorch": detector.detect, "onnxruntime": found.detect}
    for turn in range(repeats + 3):
        for name, run in runs.items():
            started = time.perf_counter()
            run(batch)
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - started))
    return {
        **{f"{name}_ms": round(statistics.median(values), 3) for name, values in times.items()},
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "image_size": list(batch.image_size),
        "batch": len(batch),
        "device": "cpu",
    }


@dataclass(frozen=True)
class _Calibration:
    """Which images int8 ranges are measured on, and which both versions are scored on.

    Args:
        root: The data set's folder, or ``digits``.
        format: Its format.
        split: Split to score on.
        train_limit: Calibrate on the first so many images of the train split.
        limit: Score on the first so many images; None takes all.
        size: How images are resized.
        dynamic: What the graph leaves open.
    """

    root: str
    format: FormatChoice
    split: str
    train_limit: int
    limit: int | None
    size: ImageSize
    dynamic: Dynamic

    def load(self, class_names: tuple[str, ...]) -> tuple[DetectionData, DetectionData]:
        """The images to calibrate on and those to score on, each as the module's ``val_split``, read already.

        Of data with more classes than the student's, those that it knows count.

        Args:
            class_names: The student's.

        Raises:
            DrkdError: If a split is not there, cannot be used, or has other classes.
        """
        root = DetectionData(self.root).root
        own = {name: load_split(root, name, format=self.format).class_names for name in ("train", self.split)}
        known = {name for names in own.values() for name in names}
        # Where the student has a class that the data lacks, names differ, and saying so is better than leaving out.
        some = set(class_names) < known

        def module(split: str, limit: int | None, batch_size: int) -> DetectionData:
            classes = [name for name in class_names if name in own[split]] if some else []
            return DetectionData(
                self.root,
                val_split=split,
                val_limit=limit,
                batch_size=batch_size,
                min_size=self.size.min_size,
                max_size=self.size.max_size,
                size_divisor=self.size.multiple,
                pad_to=None if self.dynamic == "all" else self.size.fixed,
                workers=0,
                class_names=class_names,
                classes=classes or None,
                format=self.format,
            )

        calibration, scored = module("train", self.train_limit, 1), module(self.split, self.limit, self._batch_size)
        for data in (calibration, scored):
            _ = data.val_split
        return calibration, scored

    @property
    def _batch_size(self) -> int:
        return 1 if self.dynamic == "none" else 8


def _quantize(
    source: Path,
    target: Path,
    plain: OnnxDetector,
    data: tuple[DetectionData, DetectionData],
    example: DetectionBatch,
    *,
    repeats: int,
) -> dict[str, Any]:
    """Write the int8 version, calibrated on the first data and scored on the second; say what it costs."""
    calibration, scored = data
    quantize(source, target, calibration.val_dataloader())
    small = OnnxDetector(target)
    metrics = {}
    for name, detector in (("fp32", plain), ("int8", small)):
        evaluated = evaluate_detector(detector, scored.val_split, loader=scored.val_dataloader())
        metrics[name] = {key: evaluated.metrics[key] for key in ("ap", "ap50", "ap_small")}
    return {
        "bytes": target.stat().st_size,
        "calibration": {"split": calibration.val_split.name, "images": len(calibration.val_split)},
        "evaluation": {"split": scored.val_split.name, "images": len(scored.val_split)},
        "metrics": metrics,
        "ap_cost": (metrics["fp32"]["ap"] or 0.0) - (metrics["int8"]["ap"] or 0.0),
        "latency": compare_latency(small, small, example, repeats=repeats)["onnxruntime_ms"],
    }


def _read_images(
    source: str | None, limit: int, size: ImageSize, dynamic: Dynamic, output: Path
) -> Iterator[tuple[str, DetectionBatch]]:
    if limit < 1:
        raise DrkdError(f"image_limit: expected at least 1, got {limit}.")
    if source == "digits" and find_image_files(Path(source)):
        raise DrkdError(
            "images: 'digits' is the embedded data set, and a folder here too: write './digits' for the folder, or "
            "leave it out for the embedded one."
        )
    embedded = source is None or source == "digits"
    folder = build_digits() / "val" if source is None or embedded else Path(source)
    if embedded and not folder.is_dir():
        folder = build_digits()
    files = find_images(folder, output=output)
    transforms = eval_transforms(min_size=size.min_size, max_size=size.max_size)
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    for number, (name, file) in enumerate(list(files.items())[:limit]):
        pixels = decode_image(file)
        original = int(pixels.shape[1]), int(pixels.shape[2])
        image = torch.Tensor(transforms(tv_tensors.Image(pixels)))
        sample = Sample(image, nothing, original, number)
        pad_to = None if dynamic == "all" else size.fixed
        yield name, collate([sample], size_divisor=size.multiple, pad_to=pad_to)
