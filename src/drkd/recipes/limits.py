"""Checks of a recipe's training section beyond those of its types: what would fail hours later, or hang."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch

from drkd.contracts import Detector, DrkdError
from drkd.data.split import DatasetSplit
from drkd.engine.unlabelled import choose_labeller
from drkd.recipes.run_folder import is_first_process

if TYPE_CHECKING:
    from drkd.recipes.recipe import Recipe, Training

_SHARDED = ("fsdp", "deepspeed", "model_parallel")
_NO_SYNC = ("cpu", "mps")
# With Lightning's short forms. The others give the batch another precision too, its boxes with it.
_PRECISIONS = ("auto", "32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")


def check_training(training: Training) -> None:
    """Refuse what cannot work.

    Raises:
        DrkdError: For numbers out of range, for a precision that the batch's boxes would have too, and for strategies
            that spread one model over several devices.
    """
    for name, least in (
        ("checkpoint_every", 1),
        ("accumulate", 1),
        ("num_nodes", 1),
        ("monitor_interval", 1),
        ("calibration_steps", 1),
        ("dead_after", 1),
        ("log_interval", 1),
        ("patience", 1),
        ("validate_every", 0),
        ("skip_nonfinite", 0),
    ):
        value = getattr(training, name)
        if value is not None and value < least:
            raise DrkdError(f"training.{name}: expected at least {least}, got {value}.")
    if training.checkpoint_minutes is not None and not training.checkpoint_minutes > 0:
        raise DrkdError(
            f"training.checkpoint_minutes: expected a positive number or null, got {training.checkpoint_minutes}."
        )
    if training.clip_norm is not None and not training.clip_norm > 0:
        raise DrkdError(f"training.clip_norm: expected a positive number or null, got {training.clip_norm}.")
    if training.precision not in _PRECISIONS:
        raise DrkdError(
            f"training.precision: expected one of {', '.join(_PRECISIONS)}, got {training.precision}. Precisions that "
            "convert the whole model convert the batch's boxes too; mixed ones leave both in float32."
        )
    if training.accelerator in _NO_SYNC:
        check_device(training, torch.device(training.accelerator))
    if any(training.strategy.startswith(name) for name in _SHARDED):
        raise DrkdError(
            f"training.strategy: {training.strategy} spreads one model over the devices, and drkd needs the student "
            "whole on each: its moving average, its detections in validation and student.pt are made from it between "
            "steps. Use ddp; a detector with its teacher fits one device, with bf16-mixed more easily."
        )


def check_validation(training: Training, *, epochs: int | None = None, steps_per_epoch: int | None = None) -> None:
    """Refuse a run that would keep its best student and end before its first validation.

    Args:
        training: The recipe's section.
        epochs: Passes over the data, where the run counts them.
        steps_per_epoch: Optimizer steps of an epoch, where the run counts steps and the data is known.

    Raises:
        DrkdError: If there would be no validation.
    """
    if not training.keeps_best:
        return
    wanted = "training.keep=best" if training.patience is None else "training.patience"
    if epochs is not None and training.validate_every > epochs:
        raise DrkdError(
            f"training.validate_every: {wanted} needs a validation, and the first one of every "
            f"{training.validate_every} epochs comes after the run's end; expected at most training.epochs, which is "
            f"{epochs}."
        )
    if training.steps is not None and steps_per_epoch is not None:
        first = training.validate_every * steps_per_epoch
        if training.steps < first:
            raise DrkdError(
                f"training.steps: {wanted} needs a validation, and the first one comes after {first} steps "
                f"(training.validate_every={training.validate_every}, {steps_per_epoch} steps an epoch); expected at "
                f"least so many, got {training.steps}."
            )


def check_splits(recipe: Recipe) -> None:
    """Read what the run looks at hours later; nothing where it neither validates nor evaluates.

    Args:
        recipe: The recipe; its data must be set up.

    Raises:
        DrkdError: If a split is not there, or the best student is to be kept by the AP of images without a box.
    """
    training, evaluated = recipe.training, recipe.evaluation.split
    if evaluated is not None:
        _warn_of_shared(recipe.data.train_split, recipe.data.split(evaluated))
    if not training.validate_every:
        return
    validation = recipe.data.val_split
    if validation.name != evaluated:
        _warn_of_shared(recipe.data.train_split, validation)
    if training.keeps_best and not any((~record.crowd).any() for record in validation.records):
        wanted = "training.keep=best" if training.patience is None else "training.patience"
        raise DrkdError(
            f"data.val_split: none of the {len(validation)} images of '{validation.name}' that are validated on has a "
            f"box of these classes, so there is no AP for {wanted} to go by. Expected some: see data.val_limit and "
            "data.classes, or leave it out."
        )


def _warn_of_shared(train: DatasetSplit, other: DatasetSplit) -> None:
    """VOC's trainval has the images of val in it; whoever trains on it measures on another split."""
    if train.name != "trainval" or not is_first_process():
        return
    shared = len({record.path for record in train.records} & {record.path for record in other.records})
    if shared:
        print(
            f"drkd: data: {shared} of the {len(other)} images of '{other.name}' are in 'trainval' too, which is "
            "trained on: AP on them says nothing about new images.",
            file=sys.stderr,
        )


def steps_per_epoch(recipe: Recipe, *, processes: int) -> int:
    """Optimizer steps of an epoch of the recipe's data, which must be set up."""
    batches = max(1, len(recipe.data.train_dataloader()) // processes)
    return math.ceil(batches / recipe.training.accumulate)


def check_device(training: Training, device: torch.device) -> None:
    """Refuse what cannot work on the device that ``accelerator`` came to, which "auto" tells only where the run is.

    Raises:
        DrkdError: For batch norms to synchronise on a device where PyTorch does not.
    """
    if training.sync_batchnorm and device.type in _NO_SYNC:
        raise DrkdError(
            f"training.sync_batchnorm: PyTorch synchronises batch norm on GPUs only, not on {device.type}, which "
            f"training.accelerator={training.accelerator} means here; expected false."
        )


def check_unlabelled(recipe: Recipe, *, student: Detector, teacher: Detector) -> None:
    """Refuse what cannot work on images without labels; nothing where the recipe has none.

    Raises:
        DrkdError: If no teacher detects, pseudo-labels would have to be masks, or processes would wait for one another.
    """
    if not recipe.data.unlabelled:
        return
    choose_labeller(teacher)
    pseudo_labels = recipe.training.unlabelled.pseudo_labels
    heads = getattr(student.model, "roi_heads", None)
    if pseudo_labels and heads is not None and heads.has_mask():
        raise DrkdError(
            "training.unlabelled.pseudo_labels: this Mask R-CNN trains its masks too, and the teacher's boxes come "
            "without masks. Leave pseudo_labels out, or train a Faster R-CNN."
        )
    if recipe.training.sync_batchnorm and not pseudo_labels and recipe.data.unlabelled_share is None:
        raise DrkdError(
            "training.sync_batchnorm: with data.unlabelled the processes may see different kinds of images in a step, "
            "and would wait for one another's batch norms for ever. Set data.unlabelled_share, so that every batch has "
            "both kinds, or leave sync_batchnorm out."
        )
