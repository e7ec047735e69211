"""Every process learns at an epoch's end what the others could not read, so that checkpoint and record name it all."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from drkd.data.module import DetectionDataModule


class SharedUnreadable(Callback):
    """Share the list of replaced images, where unreadable ones are skipped.

    An epoch's end is a moment that all processes reach together; of an epoch that a stop cuts short the first process
    lists its own alone.
    """

    def __init__(self, data: DetectionDataModule) -> None:
        self.data = data

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the checkpoint of the epoch is written, which comes last of the callbacks. Collective."""
        del pl_module
        if trainer.world_size > 1:
            self.data.share_unreadable(trainer.strategy.root_device)
