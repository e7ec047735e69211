"""int8 by onnxruntime's static quantisation, calibrated on a few real batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from drkd.contracts import DetectionBatch


def quantize(source: Path, target: Path, batches: Iterable[DetectionBatch]) -> None:
    """Write the int8 version of a file: weights by channel, activations by the range seen in calibration (QDQ nodes).

    Convolutions and matrix products are quantised, the arithmetic of boxes and scores is not.

    Args:
        source: The file in float32.
        target: The file to write.
        batches: What the ranges of the activations are taken from.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = _feeds(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    log = logging.getLogger()
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        log.setLevel(before)


def _feeds(batches: Iterable[DetectionBatch]) -> Iterator[dict[str, Any]]:
    # One by one, as a graph of a fixed batch takes them.
    for batch in batches:
        for image, size in zip(batch.images, batch.sizes, strict=True):
            yield {"images": image[None].contiguous().numpy(), "sizes": torch.tensor([size]).numpy()}
