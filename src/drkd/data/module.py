"""The Lightning data module: from a data set folder to batches for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from drkd.contracts import DetectionBatch, DrkdError, Size
from drkd.data.dataset import DetectionDataset, find_splits, load_split
from drkd.data.digits import EMBEDDED, build_digits
from drkd.data.sampler import EvaluationBatchSampler, TrainBatchSampler, aspect_group
from drkd.data.split import DatasetSplit
from drkd.data.transforms import collate, eval_transforms, train_transforms

# So many unreadable images in a row are no few bad files but a disk that is gone.
_MOST_SUBSTITUTES = 16


class TrainLoader(DataLoader[Any]):
    """A data loader that knows how many batches were handed out, so that a checkpoint can resume after them.

    Lightning saves and restores its state by itself. Counting here and not in the sampler matters: workers fetch ahead.

    Args:
        dataset: Serves the samples.
        batch_sampler: Orders them.
        **options: Those of torch's loader.
    """

    def __init__(self, dataset: DetectionDataset, batch_sampler: TrainBatchSampler, **options: Any) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.order = batch_sampler

    def __iter__(self) -> Iterator[DetectionBatch]:  # type: ignore[override]
        # A generator, so that nothing is drawn before the first batch is asked for: when it resumes at the end of an
        # epoch, Lightning makes the iterator first and sets the next epoch then.
        for batch in super().__iter__():
            self.order.position += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation come next."""
        self.order.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that batch."""
        self.order.load_state_dict(state)


class DetectionDataModule(LightningDataModule):
    """Batches of a COCO-format folder, or of the embedded data set.

    Args:
        root: The data set's folder, or ``digits`` or ``digits2`` for the embedded ones, built on first use.
        train_split: Name of the split to train on.
        val_split: Name of the split to evaluate on.
        batch_size: Images a batch and process.
        min_size: Short side of the images, px; of several, training draws one an image, evaluation takes the largest.
        max_size: Limit of the long side, px.
        horizontal_flip: Probability of mirroring a training image; 0 for digits and letters.
        photometric: Jitter the colours of training images.
        zoom_out: Probability of shrinking a training image onto a larger canvas.
        size_divisor: Batches are padded to multiples of it, px.
        pad_to: Pad every batch at least to this height and width, px.
        workers: Processes that decode images; 0 decodes in the training process.
        seed: Of order and augmentation.
        limit: Train on the first images only.
        val_limit: Evaluate on the first images only.
        group_by_aspect: Put images of like aspect into a batch.
        keep_empty: Train on images without boxes too.
        class_names: Classes whose order the labels follow; the training file's by default.
        masks: Serve the training images' instance masks too, for a student that trains them (Mask R-CNN).
        unreadable: What to do with a training image that cannot be read or has another size than its annotations say:
            "fail" with the file's name, or "skip" it (the next image of the split stands in), name it and count it.
            Evaluation always fails: a score over other images is another score.
    """

    def __init__(
        self,
        root: str,
        *,
        train_split: str = "train",
        val_split: str = "val",
        batch_size: int = 16,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        horizontal_flip: float = 0.5,
        photometric: bool = False,
        zoom_out: float = 0.0,
        size_divisor: int = 32,
        pad_to: Size | None = None,
        workers: int = 2,
        seed: int = 0,
        limit: int | None = None,
        val_limit: int | None = None,
        group_by_aspect: bool = True,
        keep_empty: bool = True,
        class_names: Sequence[str] | None = None,
        masks: bool = False,
        unreadable: Literal["fail", "skip"] = "fail",
    ) -> None:
        super().__init__()
        self._substitutes = _MOST_SUBSTITUTES if unreadable == "skip" else 0
        self._train_dataset: DetectionDataset | None = None
        self._root = root
        self._names = (train_split, val_split)
        self._batch_size = batch_size
        self._train_transforms = train_transforms(
            min_size=min_size,
            max_size=max_size,
            horizontal_flip=horizontal_flip,
            photometric=photometric,
            zoom_out=zoom_out,
        )
        self._eval_transforms = eval_transforms(min_size=min_size, max_size=max_size)
        self._collate = partial(collate, size_divisor=size_divisor, pad_to=pad_to)
        self._workers = workers
        self._seed = seed
        self._limits = (limit, val_limit)
        self.image_settings: dict[str, Any] = {
            "min_size": min_size if isinstance(min_size, int) else list(min_size),
            "max_size": max_size,
            "size_divisor": size_divisor,
        }
        self._group_by_aspect = group_by_aspect
        self._keep_empty = keep_empty
        self._masks = masks
        self._class_names = tuple(class_names) if class_names is not None else None
        self._train: DatasetSplit | None = None
        self._val: DatasetSplit | None = None

    def prepare_data(self) -> None:
        """Build the embedded data set where it is the one asked for (called by Lightning in one process)."""
        if self._root in EMBEDDED:
            build_digits(config=EMBEDDED[self._root])

    @property
    def root(self) -> Path:
        """The data set's folder; builds the embedded one on first use."""
        return build_digits(config=EMBEDDED[self._root]) if self._root in EMBEDDED else Path(self._root)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of classes 0..K-1."""
        if self._class_names is None:
            self._class_names = self._any_split().class_names
        return self._class_names

    @property
    def train_split(self) -> DatasetSplit:
        """The split that is trained on, as far as it is used."""
        if self._train is None:
            split = load_split(self.root, self._names[0], class_names=self._class_names, masks=self._masks)
            self._class_names = split.class_names
            if not self._keep_empty:
                kept = tuple(record for record in split.records if (~record.crowd).any())
                split = DatasetSplit(split.name, kept, split.class_names, split.category_ids)
            if not split.records:
                raise DrkdError(f"{self._root}: no image of the split '{split.name}' has a box to train on.")
            self._train = split.first(self._limits[0])
        return self._train

    @property
    def val_split(self) -> DatasetSplit:
        """The split that is evaluated on, as far as it is used."""
        if self._val is None:
            split = load_split(self.root, self._names[1], class_names=self.class_names)
            self._val = split.first(self._limits[1])
        return self._val

    def train_dataloader(self) -> TrainLoader:
        """Shuffled, augmented batches; resumable."""
        split = self.train_split
        groups = [aspect_group(record) if self._group_by_aspect else 0 for record in split.records]
        self._train_dataset = DetectionDataset(
            split, self._train_transforms, seed=self._seed, minimum_side=1.0, substitutes=self._substitutes
        )
        return TrainLoader(
            self._train_dataset,
            TrainBatchSampler(groups, self._batch_size, seed=self._seed),
            **self._loader_options(),
        )

    @property
    def batch_size(self) -> int:
        """Images a batch and process."""
        return self._batch_size

    def unreadable_files(self) -> list[str]:
        """Training images that this process could not read and replaced, so far."""
        if self._train_dataset is None:
            return []
        places = self._train_dataset.unreadable.nonzero().flatten().tolist()
        return [str(self._train_dataset.split.records[place].path) for place in places]

    def val_dataloader(self) -> DataLoader[Any]:
        """Every image of the validation split once, in order, crowds flagged."""
        return self._evaluation_loader(self.val_split)

    def split(self, name: str) -> DatasetSplit:
        """Load a split by name, with the classes of the training split and limited as validation is."""
        if name == self._names[1]:
            return self.val_split
        return load_split(self.root, name, class_names=self.class_names).first(self._limits[1])

    def loader(self, name: str) -> DataLoader[Any]:
        """Every image of a split once, in order, crowds flagged."""
        return self._evaluation_loader(self.split(name))

    def _evaluation_loader(self, split: DatasetSplit) -> DataLoader[Any]:
        return DataLoader(
            DetectionDataset(split, self._eval_transforms, seed=self._seed, keep_crowds=True),
            batch_sampler=EvaluationBatchSampler(len(split), self._batch_size),
            **self._loader_options(),
        )

    def _any_split(self) -> DatasetSplit:
        # The training file decides; evaluation of a folder without one takes what there is.
        return self.train_split if self._names[0] in find_splits(self.root) else load_split(self.root, self._names[1])

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": self._collate,
            "num_workers": self._workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self._workers > 0,
            # A generator of its own: otherwise every epoch draws from the global one, and a resumed run once more.
            "generator": torch.Generator().manual_seed(self._seed),
        }
