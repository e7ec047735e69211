"""Neither the teacher's forward nor a method makes the host wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from no_wait import HostMustNotWait
from torch import Tensor
from toys import ToyDetector, toy_batch

from drkd.adapters import FasterRCNNBuilder, FCOSBuilder, RetinaNetBuilder
from drkd.adapters.focal_head import FocalClassificationHead
from drkd.adapters.resized import ResizedDetector
from drkd.contracts import BoxTargets, DetectionBatch, Detector, DetectorOutput, FeatureMap, KDMethod, Want
from drkd.engine.distiller import Distiller
from drkd.losses import rescale
from drkd.methods import (
    CWD,
    DRKD,
    FGD,
    FGFI,
    MGD,
    NLD,
    PKD,
    CrossKD,
    DeFeat,
    FeatureHint,
    FitNet,
    LogitKD,
    PaperDRKD,
    ReleasedDRKD,
)

METHODS = (DRKD, PaperDRKD, ReleasedDRKD, FitNet, PKD, CWD, FGD, MGD, NLD, FGFI, DeFeat, FeatureHint)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")),
]


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: bool((x > 0).any()),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x.long().abs()),
        lambda x: x.clone().__setitem__(x > 0, 0.0 * x[:1]),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.as_tensor(1.0, device=x.device),
    ],
)
def test_the_check_sees_what_waits(waits: Callable[[Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="makes the host wait"), HostMustNotWait():
        waits(torch.tensor([1.0, -2.0, 3.0]))


def make_batch(counts: tuple[int, ...], device: str) -> DetectionBatch:
    targets = []
    for count in counts:
        boxes = torch.rand(count, 4) * 50
        boxes[:, 2:] += boxes[:, :2] + 2
        targets.append(BoxTargets(boxes, torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)))
    sizes = ((96, 128), *((80, 100) for _ in counts[1:]))
    batch = DetectionBatch(torch.rand(len(counts), 3, 96, 128), sizes, sizes, tuple(targets), tuple(range(len(counts))))
    return batch.to(device)


def build(kind: str) -> Detector:
    torch.manual_seed(0)
    if kind == "faster_rcnn":
        return FasterRCNNBuilder(width=0.25, fpn_channels=32, representation_size=32).build(["cat", "dog"])
    builder = {"retinanet": RetinaNetBuilder, "fcos": FCOSBuilder}[kind]
    return builder(width=0.25, fpn_channels=64).build(["cat", "dog"])


def output(detector: Detector, device: str, *, gradient: bool) -> DetectorOutput:
    maps = []
    for level in detector.spec.levels:
        h, w = math.ceil(96 / level.stride), math.ceil(128 / level.stride)
        tensor = torch.randn(2, level.channels, h, w, device=device, requires_grad=gradient)
        maps.append(FeatureMap(level.name, tensor, 96 / h, 128 / w))
    return DetectorOutput(tuple(maps))


@contextmanager
def waiting_is_an_error(device: str) -> Iterator[None]:
    """At the dispatcher everywhere; on a GPU CUDA's own check too."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with HostMustNotWait():
            yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("kind", "want"),
    [
        *(("retinanet", ["features"]), ("fcos", ["features"]), ("faster_rcnn", ["features"])),
        # With one stage; with two, torchvision chooses regions, which waits.
        ("retinanet", ["features", "predictions"]),
    ],
)
def test_the_teachers_forward(kind: str, want: list[Want], scale: float, device: str) -> None:
    teacher = build(kind).to(device)
    seen = (teacher if scale == 1.0 else ResizedDetector(teacher, scale=scale)).eval()
    batch = make_batch((3, 2), device)
    with torch.no_grad():
        seen(batch, want=frozenset(want))
        with waiting_is_an_error(device):
            found = seen(batch, want=frozenset(want))
    assert len(found.features) == len(teacher.spec.levels)
    assert (found.predictions is not None) == ("predictions" in want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; test_methods.py has the CPU")
@pytest.mark.parametrize("counts", [(3, 2), (0, 1), (0, 0)])
@pytest.mark.parametrize("method", METHODS)
def test_a_methods_forward_and_backward_on_a_gpu(method: type[KDMethod], counts: tuple[int, ...]) -> None:
    student, teacher = build("retinanet"), build("retinanet")
    batch = make_batch(counts, "cuda")
    kd = method(student.spec, teacher.spec).to("cuda")
    ours, theirs = output(student, "cuda", gradient=True), output(teacher, "cuda", gradient=False)
    kd(ours, theirs, batch)
    with waiting_is_an_error("cuda"):
        torch.stack(list(kd(ours, theirs, batch).values())).sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_maps_in_the_teachers_unit(device: str) -> None:
    student, teacher = (torch.randn(2, 8, 4, 4, device=device) for _ in range(2))
    with waiting_is_an_error(device):
        rescale(student, teacher, scale="teacher_rms")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "method",
    [
        LogitKD,
        CrossKD,
        partial(DRKD, response_weight=1.0, response_share=1.0),
        partial(DRKD, response="cross_head", response_weight=1.0, response_share=0.5),
    ],
    ids=["logit", "crosskd", "drkd", "drkd_cross_head"],
)
def test_methods_of_predictions(method: Callable[..., KDMethod], device: str) -> None:
    student, teacher = build("retinanet").to(device), build("retinanet").to(device).eval()
    batch = make_batch((3, 2), device)
    kd = method(student.spec, teacher.spec).to(device)
    ours = student(batch, want=kd.needs)
    with torch.no_grad():
        theirs = teacher(batch, want=kd.needs if kd.teacher_needs is None else kd.teacher_needs)
    with waiting_is_an_error(device):
        torch.stack(list(kd(ours, theirs, batch).values())).sum().backward()


@pytest.mark.parametrize("device", DEVICES)
def test_a_whole_step_of_the_distiller_between_measurements(device: str) -> None:
    """The task losses are torchvision's, which wait, so a student of one convolution stands in."""
    torch.manual_seed(0)
    student, teacher = ToyDetector(16), ToyDetector(16, seed=1)
    distiller = Distiller(student, teacher, DRKD(student.spec, teacher.spec)).to(device)
    batch = toy_batch().to(device)
    sum(distiller(batch).values()).backward()
    with waiting_is_an_error(device):
        sum(distiller(batch).values()).backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [(3, 2), (0, 1), (0, 0)])
def test_the_classes_of_the_focal_head(counts: tuple[int, ...], device: str) -> None:
    """Not its whole loss, as `one_hot` looks at its numbers on a CPU, and on a GPU does not."""
    targets = [{"labels": torch.arange(count, device=device)} for count in counts]
    matched = torch.stack([torch.full((12,), count - 1, device=device) for count in counts])
    with waiting_is_an_error(device):
        found = FocalClassificationHead._classes(targets, matched)
    assert found[:, 0].tolist() == [max(count - 1, 0) for count in counts]
