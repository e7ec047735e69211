"""A backbone with its feature pyramid as a detector without heads: it can teach, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drkd.adapters.backbones import probe_features
from drkd.adapters.normalisation import normalise_images
from drkd.contracts import (
    DetectionBatch,
    Detections,
    Detector,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    FeatureLevel,
    FeatureMap,
    Want,
)

_PROBE_SIZE = 256


class PyramidDetector(Detector):
    """A teacher for methods that need features only.

    Args:
        backbone: Takes (B, 3, H, W) and returns a dict of maps, finest first.
        class_names: Names of classes 0..K-1, as the data has them; nothing depends on them.
        mean: Per channel, RGB in [0, 1].
        std: The same for the standard deviation.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self, backbone: nn.Module, class_names: Sequence[str], *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = backbone
        found = probe_features(backbone, _PROBE_SIZE)
        self._keys = tuple(found)
        strides = [_PROBE_SIZE / tensor.shape[-2] for tensor in found.values()]
        self.spec = DetectorSpec(
            tuple(
                FeatureLevel(f"p{round(math.log2(stride))}", tensor.shape[1], stride)
                for stride, tensor in zip(strides, found.values(), strict=True)
            ),
            tuple(class_names),
            "pyramid",
        )
        device = next(backbone.parameters()).device
        for name, values in (("_mean", mean), ("_std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)

    @property
    def body_names(self) -> tuple[str, ...]:
        """Beginnings of the names in the model's state dict that belong to the body: the model is the backbone."""
        return ("body.",)

    @property
    def can_detect(self) -> bool:
        """No: there are no heads."""
        return False

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """The pyramid of the normalised images, padding zero.

        Raises:
            ValueError: If more than features is wanted.
        """
        if want - {"features"}:
            raise ValueError(
                f"want: this teacher has no heads and can show features only, got {sorted(want)}. Use a method that "
                "needs features, or a teacher with heads."
            )
        height, width = batch.image_size
        maps = self.model(normalise_images(batch, self._mean, self._std))
        return DetectorOutput(
            tuple(
                FeatureMap(level.name, maps[key], height / maps[key].shape[-2], width / maps[key].shape[-1])
                for level, key in zip(self.spec.levels, self._keys, strict=True)
            )
        )

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Not possible.

        Raises:
            DrkdError: Always: there are no heads.
        """
        raise DrkdError("This teacher was read with part: features; it has no heads and detects nothing.")
