"""A detector and a method of a few lines, so that the engine is tested without any library's detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drkd.contracts import (
    BoxTargets,
    Decay,
    DetectionBatch,
    Detections,
    Detector,
    DetectorOutput,
    DetectorSpec,
    FeatureLevel,
    FeatureMap,
    KDMethod,
    Want,
)


class ToyDetector(Detector):
    """One convolution of stride 8 as pyramid, one as head; the task is to make the head's mean 1."""

    def __init__(self, channels: int = 4, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        body, head = nn.Conv2d(3, channels, 8, stride=8), nn.Conv2d(channels, 1, 1)
        self.model = nn.ModuleDict({"body": body, "norm": nn.BatchNorm2d(channels), "head": head})
        self.spec = DetectorSpec((FeatureLevel("p3", channels, 8.0),), ("thing",), "toy")
        self.asked: list[frozenset[Want]] = []

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        self.asked.append(want)
        feature = self.model["norm"](self.model["body"](batch.images))
        losses = {"task": (self.model["head"](feature).mean() - 1).square()} if "losses" in want else {}
        return DetectorOutput((FeatureMap("p3", feature, 8.0, 8.0),), losses)

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        return [
            Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)) for _ in range(len(batch))
        ]


class ToyMethod(KDMethod):
    """Two terms: half the mean squared distance, and a term that is never connected to the student."""

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weights: dict[str, float] | None = None,
        balanced: bool = False,
        warmup_steps: int = 0,
        decay: Decay = "none",
        size: float = 1.0,
        dead: bool = False,
        minimum_boxes: int = 0,
    ) -> None:
        super().__init__()
        self.adapter = nn.Conv2d(student.levels[0].channels, teacher.levels[0].channels, 1)
        self.weights = weights or {"near": 1.0}
        self.minimum_boxes = {"near": minimum_boxes}
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.size = size
        self.dead = dead

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        ours, theirs = student.features[0].tensor, teacher.features[0].tensor
        ours = ours * 0.0 if self.dead else ours
        return {"near/p3": self.size * 0.5 * (self.adapter(ours) - theirs).square().mean()}


def toy_batch(boxes: Sequence[int] = (2, 1), *, seed: int = 0) -> DetectionBatch:
    """Images of 32 x 32 px with so many boxes each."""
    generator = torch.Generator().manual_seed(seed)
    targets = tuple(
        BoxTargets(
            torch.tensor([[2.0, 2.0, 20.0, 20.0]]).repeat(count, 1),
            torch.zeros(count, dtype=torch.long),
            torch.zeros(count, dtype=torch.bool),
        )
        for count in boxes
    )
    size = ((32, 32),) * len(boxes)
    images = torch.rand(len(boxes), 3, 32, 32, generator=generator)
    return DetectionBatch(images, size, size, targets, tuple(range(len(boxes))))
