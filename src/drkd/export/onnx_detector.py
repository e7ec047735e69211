"""A detector that is an ONNX file: what onnxruntime finds, as every other detector gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from drkd.contracts import DetectionBatch, Detections, Detector, DetectorOutput, DetectorSpec, DrkdError, Want


class OnnxDetector(Detector):
    """Runs a file that `write_onnx` wrote, on the CPU.

    Args:
        path: The file.
        threads: Threads of onnxruntime; None takes torch's number.

    Raises:
        DrkdError: If the file cannot be loaded or was not written by drkd.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise DrkdError(f"{path}: onnxruntime cannot load this file ({' '.join(str(error).split())}).") from error
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        if "postprocessing" not in self.metadata:
            raise DrkdError(f"{path}: this ONNX file was not written by drkd; it does not say what its outputs are.")
        self.postprocessing: dict[str, Any] = json.loads(self.metadata["postprocessing"])
        self.model = nn.Identity()
        self.spec = DetectorSpec((), tuple(json.loads(self.metadata["class_names"])), self.metadata["family"])
        batch = self.session.get_inputs()[0].shape[0]
        self._batch = batch if isinstance(batch, int) else None

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """Not possible: an ONNX file shows its detections only.

        Raises:
            ValueError: Always.
        """
        raise ValueError("an ONNX file can only detect: it has no features and no losses")

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Detections in px of the original images."""
        images = batch.images.cpu().float().contiguous()
        sizes = torch.tensor(batch.sizes, dtype=torch.int64)
        step = self._batch or len(images)
        found: list[Detections] = []
        for start in range(0, len(images), step):
            feeds = {"images": images[start : start + step].numpy(), "sizes": sizes[start : start + step].numpy()}
            outputs = [torch.from_numpy(value) for value in self.session.run(None, feeds)]
            found.extend(self._finish(outputs))
        return [
            _to_original(entry, size, original)
            for entry, size, original in zip(found, batch.sizes, batch.original_sizes, strict=True)
        ]

    def _finish(self, outputs: list[Tensor]) -> list[Detections]:
        if self.postprocessing["nms"] == "outside":
            settings = {name: self.postprocessing[name] for name in ("score_threshold", "nms_threshold")}
            most = self.postprocessing["detections_per_image"]
            return [
                suppress_outside(b, s, detections_per_image=most, **settings) for b, s in zip(*outputs, strict=True)
            ]
        return [
            Detections(boxes[labels >= 0], scores[labels >= 0], labels[labels >= 0])
            for boxes, scores, labels in zip(*outputs, strict=True)
        ]


def suppress_outside(
    boxes: Tensor, scores: Tensor, *, score_threshold: float, nms_threshold: float, detections_per_image: int
) -> Detections:
    """Finish one image of a graph without suppression; docs/export.md shows it in NumPy's terms.

    Args:
        boxes: (A, 4), or (P, K, 4) with boxes for each class, xyxy px.
        scores: (A, K) or (P, K), in [0, 1].
        score_threshold: Lower scores are dropped.
        nms_threshold: Overlap above which the weaker of two boxes of a class is dropped.
        detections_per_image: So many are kept at most.
    """
    places, labels = torch.where(scores > score_threshold)
    candidates = boxes[places] if boxes.ndim == 2 else boxes[places, labels]
    values = scores[places, labels]
    kept = batched_nms(candidates, values, labels, nms_threshold)[:detections_per_image]
    return Detections(candidates[kept], values[kept], labels[kept])


def _to_original(found: Detections, size: tuple[int, int], original: tuple[int, int]) -> Detections:
    scale_y, scale_x = original[0] / size[0], original[1] / size[1]
    boxes = found.boxes * found.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([original[1], original[0]] * 2))
    return Detections(boxes, found.scores, found.labels)
