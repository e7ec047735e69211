"""A detector that drkd does not know: anchor-free, with methods such as those of MMDetection's detectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import batched_nms, sigmoid_focal_loss


def _block(before: int, after: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Backbone(nn.Module):
    """Five blocks of stride 2; returns the last three maps (strides 8, 16, 32) as a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, width), _block(width, width))
        self.stages = nn.ModuleList(_block(width * 2**i, width * 2 ** (i + 1)) for i in range(3))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = []
        value = self.stem(images)
        for stage in self.stages:
            value = stage(value)
            maps.append(value)
        return tuple(maps)


class Neck(nn.Module):
    """A feature pyramid: lateral convolutions and a path from coarse to fine."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(width * 2 ** (i + 1), channels, 1) for i in range(3))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found = [lateral(level) for lateral, level in zip(self.laterals, maps, strict=True)]
        for index in (1, 0):
            found[index] = found[index] + functional.interpolate(found[index + 1], size=found[index].shape[-2:])
        return tuple(found)


class Head(nn.Module):
    """Shared by all levels: for each cell, class logits and the distances to the box's sides in strides."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.tower = _block(channels, channels, stride=1)
        self.classes = nn.Conv2d(channels, num_classes, 1)
        self.sides = nn.Conv2d(channels, 4, 1)
        nn.init.constant_(self.classes.bias, -2.0)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        value = self.tower(level)
        return self.classes(value), functional.softplus(self.sides(value))


class PointDetector(nn.Module):
    """The whole detector; images (B, 3, H, W) are normalised, boxes are xyxy px of them."""

    strides = (8, 16, 32)

    def __init__(self, num_classes: int, *, width: int = 8, channels: int = 16) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.neck = Neck(width, channels)
        self.head = Head(channels, num_classes)
        self.unused = nn.Conv2d(3, 3, 1)

    def extract_feat(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.neck(self.backbone(images))

    def loss(self, images: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """A cell inside a box is positive for the smallest such box; losses are lists over the levels."""
        losses: dict[str, list[Tensor]] = {"loss_class": [], "loss_box": []}
        for level, stride in zip(self.extract_feat(images), self.strides, strict=True):
            logits, sides = self.head(level)
            points = self._points(level, stride)
            wanted, distances, positive = zip(
                *(self._assign(points, b, k, logits.shape[1], stride) for b, k in zip(boxes, labels, strict=True)),
                strict=True,
            )
            weight = torch.stack(positive).float()
            count = weight.sum().clamp(min=1)
            flat = logits.flatten(2).transpose(1, 2)
            losses["loss_class"].append(sigmoid_focal_loss(flat, torch.stack(wanted), reduction="sum") / count)
            error = (sides.flatten(2).transpose(1, 2) - torch.stack(distances)).abs().mean(-1)
            losses["loss_box"].append((error * weight).sum() / count)
        return losses

    def predict(self, images: Tensor) -> list[dict[str, Tensor]]:
        """The hundred best boxes of each image, in px of ``images``."""
        found = []
        for level, stride in zip(self.extract_feat(images), self.strides, strict=True):
            logits, sides = self.head(level)
            centre = self._points(level, stride)[None]
            sides = sides.flatten(2).transpose(1, 2) * stride
            corners = torch.cat([centre - sides[..., :2], centre + sides[..., 2:]], -1)
            found.append((corners, logits.flatten(2).transpose(1, 2).sigmoid()))
        corners, scores = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        results = []
        for own, score in zip(corners, scores, strict=True):
            best, label = score.max(-1)
            kept = batched_nms(own, best, label, 0.6)[:100]
            results.append({"boxes": own[kept], "scores": best[kept], "labels": label[kept]})
        return results

    @staticmethod
    def _points(level: Tensor, stride: int) -> Tensor:
        rows, columns = (torch.arange(size, device=level.device) for size in level.shape[-2:])
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
        return (grid.reshape(-1, 2) + 0.5) * stride

    @staticmethod
    def _assign(
        points: Tensor, boxes: Tensor, labels: Tensor, classes: int, stride: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each point: one-hot classes, distances in strides, and whether a box holds it."""
        if not len(boxes):
            return points.new_zeros(len(points), classes), points.new_zeros(len(points), 4), points[:, 0] < 0
        to_sides = torch.cat([points[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - points[:, None]], -1)
        inside = to_sides.amin(-1) > 0
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        smallest = torch.where(inside, area, torch.inf).argmin(1)
        positive = inside.any(1)
        wanted = (labels[smallest][:, None] == torch.arange(classes, device=labels.device)) & positive[:, None]
        distances = to_sides[torch.arange(len(points), device=points.device), smallest] / stride
        return wanted.to(points.dtype), distances.clamp(min=0), positive
