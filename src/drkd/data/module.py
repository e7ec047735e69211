"""The Lightning data module: the data of a run, and what its checkpoints keep of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from drkd.data.batches import DetectionData


class DetectionDataModule(DetectionData, LightningDataModule):
    """Batches of a data set folder in COCO, YOLO or VOC format, or of the embedded data set, for Lightning.

    Takes what `DetectionData` takes; a checkpoint keeps which images could not be read.
    """

    _unreadable_before: tuple[str, ...] = ()

    def prepare_data(self) -> None:
        """Build the embedded data set where it is the one asked for (called by Lightning in one process)."""
        _ = self.root

    def share_unreadable(self, device: torch.device) -> None:
        """Have every process know what the others could not read and replaced. Collective; nothing without a group.

        Args:
            device: Where the backend of the processes has its tensors.
        """
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._train_dataset is None or not self._substitutes or not together:
            return
        found = self._train_dataset.unreadable.to(device, copy=True)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        # Workers may still write: nothing but ones is written here either.
        self._train_dataset.unreadable[found.bool().cpu()] = 1

    def unreadable_files(self) -> list[str]:
        """Training images that could not be read, left out or replaced so far, in earlier sessions of the run too.

        What other processes replaced is among them as far as it has been shared (`share_unreadable`).
        """
        found = [*self._unreadable_before, *map(str, self._left_out)]
        if self._train_dataset is not None:
            places = self._train_dataset.unreadable.nonzero().flatten().tolist()
            found += [str(self._train_dataset.split.records[place].path) for place in places]
        return list(dict.fromkeys(found))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the images that could not be read."""
        files = self.unreadable_files()
        return {"unreadable": files} if files else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that list."""
        self._unreadable_before = tuple(str(file) for file in state_dict.get("unreadable", []))
