"""Tries every teacher with every student and every method on tiny detectors, and writes the tables of docs/pairs.md.

    python benchmarks/pairs.py            # writes docs/pairs.md
    python benchmarks/pairs.py --check    # says whether it is up to date

The detectors of other libraries need pip install 'drkd[transformers,ultralytics]'.

A cell is a method's terms on two images of 64 x 96 px: each must be finite and send a gradient to the student's
features.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import drkd.methods
from drkd.adapters import (
    DetrBuilder,
    FasterRCNNBuilder,
    FCOSBuilder,
    MaskRCNNBuilder,
    RetinaNetBuilder,
    SSD300Builder,
    SSDLiteBuilder,
    UltralyticsBuilder,
)
from drkd.contracts import DetectionBatch, Detector, DetectorBuilder, DetectorOutput, DrkdError, KDMethod, Want
from drkd.engine.distiller import Distiller
from drkd.methods import DRKD, PKD, Combination

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pairs.md"
MARK = "<!-- written by benchmarks/pairs.py -->"
CLASSES = ("cat", "dog", "cup")
SIDE = 64
WANTS: tuple[Want, ...] = (
    "features",
    "predictions",
    "assignment",
    "head_features",
    "head_tail",
    "regions",
    "region_head",
)
_TINY = {"backbone": "resnet18", "width": 0.125, "fpn_channels": 32}
_FEW = {"rpn_post_nms_train": 50, "rpn_post_nms_test": 50, "roi_batch_size": 32, "representation_size": 16}
_SMALL = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "num_queries": 20,
}
_HYBRID = {**_SMALL, "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32], "num_denoising": 5}
BUILDERS: dict[str, DetectorBuilder] = {
    "retinanet": RetinaNetBuilder(**_TINY, extra="none"),
    "fcos": FCOSBuilder(**_TINY, extra="none", num_convs=2),
    "faster_rcnn": FasterRCNNBuilder(**_TINY, **_FEW),
    "mask_rcnn": MaskRCNNBuilder(**_TINY, **_FEW, mask_layers=(8,), mask_channels=8),
    "ssd300": SSD300Builder(width=0.0625, image_std=(0.25, 0.25, 0.25)),
    "ssdlite": SSDLiteBuilder(width=0.25, size=96),
    "rt_detr": DetrBuilder(backbone="timm/resnet10t", config=_HYBRID),
    "deformable_detr": DetrBuilder(model_type="deformable_detr", backbone="timm/resnet10t", config=_SMALL),
    "yolo": UltralyticsBuilder(model="yolo11n.yaml"),
}


def build(name: str, *, seed: int) -> Detector:
    """One of the tiny detectors, for batches of `SIDE` px."""
    torch.manual_seed(seed)
    detector = BUILDERS[name].build(CLASSES)
    detector.expect_image_size(SIDE)
    return detector


def batch() -> DetectionBatch:
    """Two images with three boxes and masks each."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, SIDE, 96, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[4.0, 6, 30, 40], [20, 10, 60, 60], [50, 20, 90, 56]])
    masks = torch.zeros(3, SIDE, 96)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target = {"boxes": boxes, "labels": torch.arange(3), "masks": masks}
    return DetectionBatch.from_lists(images, [target] * 2)


def methods() -> dict[str, type[KDMethod]]:
    """Every method that drkd exports, but for the control around another one, which works where that one does."""
    found = {name: getattr(drkd.methods, name) for name in drkd.methods.__all__ if name != "MismatchedTeacher"}
    return {name: entry for name, entry in found.items() if isinstance(entry, type) and issubclass(entry, KDMethod)}


@dataclass(frozen=True)
class Seen:
    """A detector with all that it computes for the batch."""

    detector: Detector
    output: DetectorOutput

    @classmethod
    def of(cls, detector: Detector, images: DetectionBatch, *, teacher: bool) -> Seen:
        """Run it once, as a `Distiller` would, for everything that any method may want."""
        if teacher:
            detector.requires_grad_(False).eval()
        else:
            detector.train()
        want = {name for name in WANTS if _offers(detector, name)}
        return cls(detector, detector(images, want=frozenset(want)))


def _offers(detector: Detector, name: str) -> bool:
    layout = detector.spec.predictions
    kind = "" if layout is None else layout.kind
    if name in ("predictions", "assignment"):
        return kind in ("anchors", "points", "default_boxes")
    if name in ("head_features", "head_tail"):
        return layout is not None and layout.head_depth > 0
    return name == "features" or kind == "regions"


def attempt(student: Seen, teacher: Seen, method: type[KDMethod], images: DetectionBatch) -> str:
    """An empty string where the pair works, else the reason why it cannot: the error's first sentence.

    Raises:
        RuntimeError: If a pair that is not refused does not work: a defect.
    """
    options = {"methods": {"a": DRKD, "b": PKD}} if method is Combination else {}
    torch.manual_seed(0)
    try:
        built = method(student.detector.spec, teacher.detector.spec, **options)
    except DrkdError as error:
        return first_sentence(str(error))
    pair = f"{student.detector.spec.family} from {teacher.detector.spec.family} by {method.__name__}"
    terms = built(student.output, teacher.output, images)
    features = [level.tensor for level in student.output.features]
    # Level by level some may be silent: a softmax over one cell has nothing to teach.
    families: dict[str, torch.Tensor] = {}
    for name, value in terms.items():
        family = name.partition("/")[0]
        families[family] = families[family] + value if family in families else value
    for name, value in families.items():
        found = torch.autograd.grad(value, features, retain_graph=True, allow_unused=True)
        norm = sum(float(entry.square().sum()) for entry in found if entry is not None)
        if not (bool(value.isfinite()) and 0 < norm < float("inf")):
            raise RuntimeError(f"{pair}: {name} is {value.item()} with a squared gradient norm of {norm}")
    return ""


def check_step(student: Detector, teacher: Detector, images: DetectionBatch) -> None:
    """One whole step of DRKD.

    Raises:
        RuntimeError: If a loss is not finite, or the teacher got a gradient or has changed.
    """
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    losses = Distiller(student, teacher, DRKD).train()(images)
    sum(losses.values()).backward()
    pair = f"{student.spec.family} from {teacher.spec.family}"
    if not all(bool(value.isfinite()) for value in losses.values()):
        raise RuntimeError(f"{pair}: the losses are not finite: {losses}")
    if any(parameter.grad is not None for parameter in teacher.parameters()):
        raise RuntimeError(f"{pair}: the teacher got a gradient")
    if any(not torch.equal(value, before[name]) for name, value in teacher.state_dict().items()):
        raise RuntimeError(f"{pair}: the teacher has changed")
    student.zero_grad(set_to_none=True)


def first_sentence(text: str) -> str:
    """The first sentence of a message, without the names of the two, which the table gives."""
    return re.sub(r"(from the (?:student|teacher)) \([a-z0-9_]+\)", r"\1", text.split(". ")[0]).rstrip(".") + "."


def run(
    students: Iterable[str] = tuple(BUILDERS),
    teachers: Iterable[str] = tuple(BUILDERS),
    names: Iterable[str] | None = None,
) -> dict[str, dict[tuple[str, str], str]]:
    """By method, by (student, teacher): what `attempt` says."""
    images = batch()
    chosen = methods()
    ours = {name: Seen.of(build(name, seed=0), images, teacher=False) for name in students}
    theirs = {name: Seen.of(build(name, seed=1), images, teacher=True) for name in teachers}
    return {
        name: {
            (student, teacher): attempt(ours[student], theirs[teacher], chosen[name], images)
            for student in ours
            for teacher in theirs
        }
        for name in (chosen if names is None else names)
    }


def write(found: Mapping[str, Mapping[tuple[str, str], str]]) -> str:
    """The tables as Markdown: methods with the same grid share one, reasons are numbered below."""
    reasons: dict[str, int] = {}
    grids: dict[str, list[str]] = {}
    for name, cells in found.items():
        teachers = list(dict.fromkeys(teacher for _, teacher in cells))
        lines = ["| student \\ teacher | " + " | ".join(teachers) + " |", "|---" * (len(teachers) + 1) + "|"]
        for student in dict.fromkeys(student for student, _ in cells):
            marks = []
            for teacher in teachers:
                reason = cells[student, teacher]
                marks.append(f"no [{reasons.setdefault(reason, len(reasons) + 1)}]" if reason else "works")
            lines.append(f"| {student} | " + " | ".join(marks) + " |")
        grids.setdefault("\n".join(lines), []).append(name)
    parts = []
    for grid, names in grids.items():
        parts.append(f"### {', '.join(names)}\n\n{grid}\n")
    parts.append("### Why not\n\n" + "\n".join(f"{number}. {reason}" for reason, number in reasons.items()) + "\n")
    return "\n".join(parts)


def page(tables: str) -> str:
    """docs/pairs.md with these tables below its mark."""
    head = PAGE.read_text(encoding="utf-8").split(MARK)[0]
    return f"{head}{MARK}\n\n{tables}"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Compare with the committed page instead of writing it.")
    arguments = parser.parse_args()
    text = page(write(run()))
    if arguments.check:
        same = text == PAGE.read_text(encoding="utf-8")
        print("docs/pairs.md is up to date" if same else "docs/pairs.md is out of date: run benchmarks/pairs.py")
        return int(not same)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
