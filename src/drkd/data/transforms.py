"""Image and box transforms for training and evaluation, and the padding of samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.utils.data import get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from drkd.contracts import DetectionBatch, Size
from drkd.data.dataset import Sample

Photometric = bool | Literal["keep_channels"]
"""Whether the colours of training images are jittered; with "keep_channels" red, green and blue stay in their order."""


class _KeepChannels(v2.RandomPhotometricDistort):
    """Torchvision's jitter without the permutation of the channels, which it draws for half of the images."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw all but a permutation (called by torchvision)."""
        return {**super().make_params(flat_inputs), "channel_permutation": None}


class _Crop(v2.RandomIoUCrop):
    """Torchvision's crop, but for images a pixel high or wide: of one it would make a part without extent."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the part (called by torchvision); nothing of an image that has none."""
        return super().make_params(flat_inputs) if min(v2.query_size(flat_inputs)) > 1 else {}


class ResizeKeepRatio(v2.Transform):
    """Scales so that the short side has one of the given lengths, unless the long side would become too long.

    Args:
        min_size: Short side, px; one of them is drawn where there are several (multi-scale training).
        max_size: Limit of the long side, px.
    """

    def __init__(self, min_size: Sequence[int], max_size: int) -> None:
        super().__init__()
        if not min_size or min(min_size) <= 0 or max_size < 1:
            raise ValueError(f"expected positive min_size and max_size, got {list(min_size)} and {max_size}")
        self.min_size = tuple(min_size)
        self.max_size = max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the short side and work out the new size (called by torchvision)."""
        height, width = v2.query_size(flat_inputs)
        chosen = int(torch.randint(len(self.min_size), ()).item()) if len(self.min_size) > 1 else 0
        return {"size": resized_size((height, width), self.min_size[chosen], self.max_size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image or its boxes (called by torchvision)."""
        size = list(params["size"])
        if size == [1, 1] and isinstance(inpt, tv_tensors.Image):
            # PyTorch's resize of bytes fails where a single px is left.
            pixel = inpt.float().mean(dim=(-2, -1), keepdim=True).round().to(inpt.dtype)
            return tv_tensors.wrap(pixel, like=inpt)
        return self._call_kernel(functional.resize, inpt, size=size, antialias=True)


def resized_size(size: Size, min_size: int, max_size: int) -> Size:
    """Height and width, px, after a resize that keeps the ratio to within rounding."""
    scale = min(min_size / min(size), max_size / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def train_transforms(
    *,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    horizontal_flip: float = 0.5,
    photometric: Photometric = False,
    zoom_out: float = 0.0,
    random_crop: float = 0.0,
) -> v2.Compose:
    """Transforms for training images.

    Args:
        min_size: Short side, px; one of several is drawn for each image.
        max_size: Limit of the long side, px.
        horizontal_flip: Probability of mirroring. Zero for digits and letters: mirrored, they are others or none.
        photometric: Jitter brightness, contrast, saturation and hue, and permute the colour channels of half of the
            images (SSD's distortion); "keep_channels" leaves them in order, for classes that differ in colour.
        zoom_out: Probability of putting the image on a grey canvas up to twice as wide, so that objects shrink.
        random_crop: Probability of cutting a part out of the image, at least half as wide and as high, so that objects
            grow; an object whose centre is cut off is no target any more (SSD's crop, Liu et al., arXiv:1512.02325).
    """
    steps: list[torch.nn.Module] = []
    if photometric:
        if photometric not in (True, "keep_channels"):
            raise ValueError(f"expected photometric to be true, false or 'keep_channels', got {photometric!r}")
        steps.append(_KeepChannels() if photometric == "keep_channels" else v2.RandomPhotometricDistort())
    if zoom_out > 0:
        fill: dict[Any, int] = {tv_tensors.Image: 114, "others": 0}
        steps.append(v2.RandomZoomOut(fill=fill, side_range=(1.0, 2.0), p=zoom_out))
    if random_crop > 0:
        # Boxes outside become empty, which the data set drops.
        steps.append(v2.RandomApply([_Crop(min_scale=0.5)], p=random_crop))
    if horizontal_flip > 0:
        steps.append(v2.RandomHorizontalFlip(horizontal_flip))
    steps.append(ResizeKeepRatio(several(min_size), max_size))
    steps.append(v2.ToDtype(torch.float32, scale=True))
    return v2.Compose(steps)


def eval_transforms(*, min_size: int | Sequence[int] = 800, max_size: int = 1333) -> v2.Compose:
    """Transforms for evaluation images: nothing random.

    Args:
        min_size: Short side, px; of several the largest, as is the custom after multi-scale training.
        max_size: Limit of the long side, px.
    """
    return v2.Compose([ResizeKeepRatio([max(several(min_size))], max_size), v2.ToDtype(torch.float32, scale=True)])


def several(min_size: int | Sequence[int]) -> list[int]:
    """The short sides, one or more."""
    return [min_size] if isinstance(min_size, int) else list(min_size)


def collate(samples: Sequence[Sample], *, size_divisor: int = 32, pad_to: Size | None = None) -> DetectionBatch:
    """Pad samples with zeros, at the right and at the bottom, to one batch; those without labels come last.

    In a data worker the batch lies in shared memory.

    Args:
        samples: At least one.
        size_divisor: Height and width of the batch are the smallest multiples of it that hold every image, px.
        pad_to: At least this height and width, px, so that every batch has one shape.

    Raises:
        ValueError: If there is no sample, or ``size_divisor`` is not positive.
    """
    if not samples or size_divisor <= 0:
        raise ValueError(f"expected samples and a positive size_divisor, got {len(samples)} and {size_divisor}")
    # The labelled ones are then a view of the batch, not a copy, where the two kinds part ways.
    samples = sorted(samples, key=lambda sample: not sample.labelled)
    least = pad_to or (1, 1)
    height = max(least[0], *(sample.image.shape[1] for sample in samples))
    width = max(least[1], *(sample.image.shape[2] for sample in samples))
    height, width = (-(-side // size_divisor) * size_divisor for side in (height, width))
    images = samples[0].image.new_zeros((len(samples), 3, height, width))
    for canvas, sample in zip(images, samples, strict=True):
        canvas[:, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
    batch = DetectionBatch(
        images=images,
        sizes=tuple((int(sample.image.shape[1]), int(sample.image.shape[2])) for sample in samples),
        original_sizes=tuple(sample.original_size for sample in samples),
        targets=tuple(sample.targets for sample in samples),
        image_ids=tuple(sample.image_id for sample in samples),
        labelled=() if samples[-1].labelled else tuple(sample.labelled for sample in samples),
    )
    if get_worker_info() is not None:
        _share_memory(batch)
    return batch


def _share_memory(batch: DetectionBatch) -> None:
    """Move a batch to shared memory now, where a want of it is an error of this batch.

    Otherwise the thread that sends it would, print the error, and leave the parent to wait for this batch for ever.
    """
    batch.images.share_memory_()
    for target in batch.targets:
        for tensor in (target.boxes, target.labels, target.ignore, target.masks):
            if tensor is not None:
                tensor.share_memory_()
