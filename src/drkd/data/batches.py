"""From a data set folder to batches for training and evaluation."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from drkd.contracts import LARGEST_SIDE, DetectionBatch, DrkdError, ImageRecord, Size
from drkd.data.dataset import DetectionDataset, find_splits, load_split
from drkd.data.digits import EMBEDDED, build_digits
from drkd.data.formats.reading import FormatChoice, holds_data_set
from drkd.data.mixed_sampler import MixedBatchSampler
from drkd.data.problem import LeaveOut
from drkd.data.records import PackedRecords
from drkd.data.sampler import EvaluationBatchSampler, TrainBatchSampler, aspect_group
from drkd.data.split import DatasetSplit
from drkd.data.transforms import Photometric, collate, eval_transforms, several, train_transforms
from drkd.data.unlabelled import put_labels_aside, read_unlabelled

REST = "rest"
"""In place of a folder of unlabelled images: the training images that ``limit`` cuts off, their labels put aside."""

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


def _check_numbers(limits: Mapping[str, tuple[float | None, int, int | None]]) -> None:
    """Raise a DrkdError for the first number that is below its least or above its largest."""
    for name, (value, least, largest) in limits.items():
        if value is not None and not (least <= value and (largest is None or value <= largest)):
            expected = f"at least {least}" if largest is None else f"{least} to {largest}"
            raise DrkdError(f"data.{name}: expected {expected}, got {value}.")


def check_embedded(root: str, *, format: FormatChoice = "auto") -> None:
    """Raise a DrkdError if the name of an embedded data set is that of a folder with another one here too."""
    if holds_data_set(Path(root), format=format):
        raise DrkdError(
            f"data.root: '{root}' is the embedded data set, and there is a folder of that name with another one here: "
            f"write './{root}' for the folder, or call it otherwise."
        )


class DetectionData:
    """Batches of a data set folder in COCO, YOLO or VOC format, or of the embedded data set.

    Args:
        root: The data set's folder, or ``digits`` or ``digits2`` for the embedded ones, built on first use.
        train_split: Name of the split to train on.
        val_split: Name of the split to evaluate on.
        batch_size: Images a batch and process.
        min_size: Short side of the images, px; of several, training draws one an image, evaluation takes the largest.
        max_size: Limit of the long side, px.
        horizontal_flip: Probability of mirroring a training image; 0 for digits and letters.
        photometric: Jitter the colours of training images, which may also permute their channels; "keep_channels" does
            not, for classes that differ in colour.
        zoom_out: Probability of shrinking a training image onto a larger canvas.
        random_crop: Probability of cutting a part out of a training image, so that objects grow.
        size_divisor: Batches are padded to multiples of it, px.
        pad_to: Pad every batch at least to this height and width, px.
        workers: Processes that decode images; 0 decodes in the training process.
        seed: Of order and augmentation.
        limit: Train on the first images only.
        val_limit: Evaluate on the first images of a split only, after the last step too.
        group_by_aspect: Put images of like aspect into a batch.
        keep_empty: Train on images without boxes too.
        class_names: Classes whose order the labels follow; the training file's by default.
        masks: Serve the training images' instance masks too, for a student that trains them (Mask R-CNN).
        unreadable: What to do with a training image that cannot be read or has another size than its annotations say:
            "fail" with the file's name, or "skip" it, name it and count it: the next image of the split stands in; one
            whose size only its file says (YOLO's and unlabelled ones) is left out if its header cannot be read.
            Evaluation always fails: a score over other images is another score.
        format: The data's format; by default the one that its content shows.
        classes: Train and evaluate on these classes of the data only. Images that show none of them stay as background;
            ``keep_empty: false`` leaves them out of training.
        unlabelled: Folders of images without labels, which the teacher labels; ``rest`` stands for the training images
            that ``limit`` cuts off. Used by ``drkd distill`` only.
        unlabelled_share: Share of every batch that is unlabelled, in (0, 1); an epoch is then one pass over the
            labelled images. By default all images are shuffled together, and an epoch is a pass over all.
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
        photometric: Photometric = False,
        zoom_out: float = 0.0,
        random_crop: float = 0.0,
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
        format: FormatChoice = "auto",
        classes: list[str] | None = None,
        unlabelled: list[str] | None = None,
        unlabelled_share: float | None = None,
    ) -> None:
        super().__init__()
        _check_numbers(
            {
                "batch_size": (batch_size, 1, None),
                "max_size": (max_size, 1, LARGEST_SIDE),
                "size_divisor": (size_divisor, 1, LARGEST_SIDE),
                "workers": (workers, 0, 1024),
                "limit": (limit, 1, None),
                "val_limit": (val_limit, 1, None),
                "horizontal_flip": (horizontal_flip, 0, 1),
                "zoom_out": (zoom_out, 0, 1),
                "random_crop": (random_crop, 0, 1),
            }
            | {f"min_size[{place}]": (side, 1, LARGEST_SIDE) for place, side in enumerate(several(min_size))}
            | {f"pad_to[{place}]": (side, 1, LARGEST_SIDE) for place, side in enumerate(pad_to or ())}
        )
        if max(several(min_size), default=0) > max_size or not several(min_size):
            raise DrkdError(
                f"data.min_size and data.max_size: expected a short side (or several) of at most the limit of the long "
                f"one, got {min_size} and {max_size}. A side above it was taken for the limit: write that."
            )
        self._left_out: dict[Path, None] = {}
        self._others: dict[str, DatasetSplit] = {}
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
            random_crop=random_crop,
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
        self._format = format
        self._classes = tuple(classes) if classes is not None else None
        self._unlabelled = tuple(unlabelled or ())
        self._share = unlabelled_share
        self._check_unlabelled(limit)
        self._train: DatasetSplit | None = None
        self._rest = PackedRecords(())
        self._val: DatasetSplit | None = None

    @property
    def root(self) -> Path:
        """The data set's folder; builds the embedded one on first use.

        Raises:
            DrkdError: If the name of an embedded one is that of a data set here too.
        """
        if self._root not in EMBEDDED:
            return Path(self._root)
        check_embedded(self._root, format=self._format)
        return build_digits(config=EMBEDDED[self._root])

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
            whole = self._load(self._names[0], self._class_names, masks=self._masks, leave_out=self._leave_out)
            self._class_names = whole.class_names
            split = whole
            if not self._keep_empty:
                kept = PackedRecords(record for record in split.records if (~record.crowd).any())
                split = replace(split, records=kept)
            if not any((~record.crowd).any() for record in split.records):
                raise DrkdError(f"{self._root}: no image of the split '{split.name}' has a box to train on.")
            self._train = split.first(self._limits[0])
            if not self._unlabelled and not any((~record.crowd).any() for record in self._train.records):
                raise DrkdError(
                    f"{self._root}: none of the first {len(self._train.records)} images of the split '{split.name}' "
                    "has a box to train on: raise data.limit, or leave images without boxes out "
                    "(data.keep_empty: false)."
                )
            if REST in self._unlabelled:
                # Nothing but the images' order chooses them: whether they have boxes is not to be known.
                used = {record.image_id for record in self._train.records}
                self._rest = PackedRecords(record for record in whole.records if record.image_id not in used)
        return self._train

    @property
    def unlabelled_records(self) -> tuple[ImageRecord, ...]:
        """The images without labels, none where none are asked for; their ids follow those of the training split.

        Raises:
            DrkdError: If a folder has none, or ``limit`` leaves none over for ``rest``.
        """
        found: tuple[ImageRecord, ...] = ()
        if not self._unlabelled:
            return found
        train = self.train_split
        first = max(record.image_id for record in chain(train.records, self._rest)) + 1
        for entry in self._unlabelled:
            if entry == REST:
                if not self._rest:
                    raise DrkdError(
                        f"data.unlabelled: 'rest' is what data.limit cuts off, and a limit of {self._limits[0]} leaves "
                        f"none of {self._root}'s training images over; expected a smaller data.limit."
                    )
                found += put_labels_aside(self._rest, first_id=first + len(found))
            else:
                found += read_unlabelled(Path(entry), first_id=first + len(found), leave_out=self._leave_out)
        return found

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The folders of images without labels."""
        return self._unlabelled

    @property
    def unlabelled_share(self) -> float | None:
        """Their share of every batch; None where all images are shuffled together."""
        return self._share

    def leave_out_unlabelled(self) -> None:
        """Train on the labelled images alone, as training without a teacher must."""
        self._unlabelled = ()

    @property
    def val_split(self) -> DatasetSplit:
        """The split that is evaluated on, as far as it is used."""
        if self._val is None:
            self._val = self._load(self._names[1], self.class_names).first(self._limits[1])
        return self._val

    def train_dataloader(self) -> TrainLoader:
        """Shuffled, augmented batches; resumable."""
        split, others = self.train_split, self.unlabelled_records
        groups = self._groups(split.records)
        sampler = TrainBatchSampler([*groups, *self._groups(others)], self._batch_size, seed=self._seed)
        if others and self._share is not None:
            sampler = MixedBatchSampler(
                groups, self._groups(others), self._batch_size, share=self._share, seed=self._seed
            )
        mixed = replace(split, records=PackedRecords(chain(split.records, others))) if others else split
        self._train_dataset = DetectionDataset(
            mixed, self._train_transforms, seed=self._seed, minimum_side=1.0, substitutes=self._substitutes
        )
        return TrainLoader(
            self._train_dataset,
            sampler,
            **self._loader_options(),
        )

    @property
    def batch_size(self) -> int:
        """Images a batch and process."""
        return self._batch_size

    def val_dataloader(self) -> DataLoader[Any]:
        """Every image of the validation split once, in order, crowds flagged."""
        return self._evaluation_loader(self.val_split)

    def split(self, name: str) -> DatasetSplit:
        """Load a split by name, with the classes of the training split and limited as validation is."""
        if name == self._names[1]:
            return self.val_split
        if name not in self._others:
            self._others[name] = self._load(name, self.class_names).first(self._limits[1])
        return self._others[name]

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
        found = find_splits(self.root, format=self._format)
        return self.train_split if self._names[0] in found else self._load(self._names[1], None)

    @property
    def _leave_out(self) -> LeaveOut | None:
        """What to do with a training image whose size cannot be read; None where that ends the run."""
        return self._note_left_out if self._substitutes else None

    def _note_left_out(self, path: Path, reason: str) -> None:
        if path not in self._left_out:
            self._left_out[path] = None
            print(f"drkd: left out ({len(self._left_out)}): {path}: {reason}", file=sys.stderr, flush=True)

    def _load(
        self,
        name: str,
        class_names: Sequence[str] | None,
        *,
        masks: bool = False,
        leave_out: LeaveOut | None = None,
    ) -> DatasetSplit:
        return load_split(
            self.root,
            name,
            class_names=class_names,
            classes=self._classes,
            format=self._format,
            masks=masks,
            leave_out=leave_out,
        )

    def _groups(self, records: Sequence[ImageRecord]) -> list[int]:
        return [aspect_group(record) if self._group_by_aspect else 0 for record in records]

    def _check_unlabelled(self, limit: int | None) -> None:
        if self._share is not None and (not 0 < self._share < 1 or self._batch_size < 2):
            raise DrkdError(
                "data.unlabelled_share: expected a share in (0, 1) and a batch of at least two, got "
                f"{self._share} and {self._batch_size}"
            )
        if self._share is not None and not self._unlabelled:
            raise DrkdError(
                f"data.unlabelled_share: the share is {self._share}, but there are no unlabelled images to make it up; "
                "expected folders in data.unlabelled, or no share."
            )
        if REST in self._unlabelled and limit is None:
            raise DrkdError("data.unlabelled: 'rest' is what data.limit cuts off; give a data.limit (or ./rest).")
        if len(set(self._unlabelled)) != len(self._unlabelled):
            raise DrkdError(f"data.unlabelled: a folder is listed twice: {', '.join(self._unlabelled)}")

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": self._collate,
            "num_workers": self._workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self._workers > 0,
            "worker_init_fn": keep_memory_shared,
            # A generator of its own: otherwise every epoch draws from the global one, and a resumed run once more.
            "generator": torch.Generator().manual_seed(self._seed),
        }


def keep_memory_shared(worker: int) -> None:
    """Start a data worker: leave what it got from its parent uncollected, as a collection writes into every object."""
    del worker
    gc.freeze()
