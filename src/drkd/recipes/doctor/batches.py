"""The images that an examination looks at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from drkd.contracts import DetectionBatch, DrkdError
from drkd.recipes.recipe import Recipe


class UnreadableBatch(DrkdError):
    """An image cannot be read, which is no fault of the detector that was to see it."""


class ValidationBatches:
    """The first validation images, decoded and moved batch by batch, anew at each pass: one batch is in memory.

    They are decoded in this process: starting others for a handful takes longer.

    Args:
        recipe: The recipe, its data set up.
        images: How many images; None takes all.
        device: Where the batches are to be.

    Attributes:
        count: How many images there are.

    Raises:
        DrkdError: If the validation split holds no image.
    """

    def __init__(self, recipe: Recipe, images: int | None, *, device: torch.device) -> None:
        loader = recipe.data.val_dataloader()
        dataset: Any = loader.dataset
        self.count = len(dataset) if images is None else min(images, len(dataset))
        if not self.count:
            raise DrkdError("drkd doctor: the validation split holds no image.")
        self._device = device
        self._loader: DataLoader[Any] = DataLoader(
            Subset(dataset, range(self.count)),
            batch_size=recipe.data.batch_size,
            collate_fn=loader.collate_fn,
            generator=torch.Generator().manual_seed(0),
        )

    def __iter__(self) -> Iterator[DetectionBatch]:
        """Batches of the recipe's size.

        Raises:
            UnreadableBatch: If an image cannot be read.
        """
        batches: Iterator[DetectionBatch] = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except DrkdError as error:
                raise UnreadableBatch(str(error)) from error
            yield batch.to(self._device)

    def first(self) -> DetectionBatch:
        """The first batch."""
        return next(iter(self))
