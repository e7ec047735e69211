"""A compiled step computes what the eager one does, under the same names."""

from __future__ import annotations

import copy
import os
import shutil
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from toys import ToyDetector, ToyMethod, toy_batch

from drkd.adapters import RetinaNetBuilder
from drkd.contracts import BoxTargets, DetectionBatch, KDMethod
from drkd.engine.compilation import compile_distiller
from drkd.engine.distiller import Distiller, MethodFactory
from drkd.methods import DRKD, FGD, FGFI, DeFeat, MismatchedTeacher


def step(distiller: Distiller, batch: DetectionBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses = distiller(batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in losses.items()}, gradients


def small_distiller(method: MethodFactory = DRKD) -> Distiller:
    torch.manual_seed(0)
    builder = RetinaNetBuilder(width=0.25, fpn_channels=32, extra="none", stages=(4,))
    student, teacher = builder.build(["cat"]), builder.build(["cat"])
    return Distiller(student, teacher, method(student.spec, teacher.spec))


def small_batch(boxes: int) -> DetectionBatch:
    torch.manual_seed(1)
    corners = torch.rand(boxes, 4) * 20
    corners[:, 2:] += corners[:, :2] + 4
    target = BoxTargets(corners, torch.zeros(boxes, dtype=torch.long), torch.zeros(boxes, dtype=torch.bool))
    return DetectionBatch(torch.rand(2, 3, 64, 64), ((64, 64),) * 2, ((64, 64),) * 2, (target, target), (0, 1))


@pytest.mark.parametrize(
    "method",
    [DRKD, partial(DRKD, pixel_object_share=0.5), partial(MismatchedTeacher, method=DRKD)],
    ids=["plain", "objects weighed", "within another"],
)
def test_a_compiled_step_equals_the_eager_one(method: MethodFactory) -> None:
    eager = small_distiller(method)
    compiled = copy.deepcopy(eager)
    compile_distiller(compiled, backend="eager")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    torch._dynamo.reset()
    counters.clear()
    for boxes in (3, 5):
        expected, found = step(eager, small_batch(boxes)), step(compiled, small_batch(boxes))
        for ours, theirs in zip(expected, found, strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                torch.testing.assert_close(theirs[name], value, rtol=2e-4, atol=1e-5, msg=name)
    # Two backbones and a pixel loss, each in one piece, and none anew for other numbers of boxes.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("method", [FGD, FGFI, DeFeat])
def test_what_reads_boxes_stays_eager(method: MethodFactory) -> None:
    eager = small_distiller(method)
    compiled = copy.deepcopy(eager)
    compile_distiller(compiled, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    for boxes in (2, 3, 5):
        for ours, theirs in zip(step(eager, small_batch(boxes)), step(compiled, small_batch(boxes)), strict=True):
            for name, value in ours.items():
                torch.testing.assert_close(theirs[name], value, rtol=2e-4, atol=1e-5, msg=name)
    assert counters["stats"]["unique_graphs"] == 2  # the two backbones, once


@torch._dynamo.config.patch(recompile_limit=8)
def test_each_of_several_teachers_is_compiled_with_its_method() -> None:
    torch.manual_seed(0)
    # Of different widths, as equal ones would share what is compiled.
    student, *teachers = (
        RetinaNetBuilder(width=0.25, fpn_channels=32 * wide, extra="none", stages=(4,)).build(["cat"])
        for wide in (1, 2, 3)
    )
    named = {f"teacher{number}": teacher for number, teacher in enumerate(teachers)}
    distiller = Distiller(student, named, DRKD)
    expected = step(copy.deepcopy(distiller), small_batch(3))[0]
    compile_distiller(distiller, backend="eager")
    # All parts count as one function: eight forms for each of them, not for all.
    assert torch._dynamo.config.recompile_limit == 8 * 5
    torch._dynamo.reset()
    counters.clear()
    found = step(distiller, small_batch(3))[0]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)
    # Three backbones and two pixel losses.
    assert counters["stats"]["unique_graphs"] == 5
    assert not counters["graph_break"]


@pytest.mark.parametrize("method", [DRKD, ToyMethod])
def test_gradient_ratios_are_still_measured(method: type[KDMethod]) -> None:
    """By several backward passes through one compiled graph, whose buffers must not be given away by the first."""
    student, teacher = ToyDetector(16), ToyDetector(16, seed=1)
    distiller = Distiller(student, teacher, method(student.spec, teacher.spec))
    expected = step(copy.deepcopy(distiller), toy_batch())[0]
    compile_distiller(distiller, backend="aot_eager")
    torch._dynamo.reset()
    counters.clear()
    found = step(distiller, toy_batch())[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] >= 1 and distiller.monitor.ratios


COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
HEADERS = Path(sysconfig.get_path("include")) / "Python.h"


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER or not HEADERS.is_file(), reason="inductor needs a C++ compiler and Python's headers")
def test_what_inductor_makes_of_a_method_equals_the_eager_one() -> None:
    student, teacher = ToyDetector(4), ToyDetector(6, seed=1)
    distiller = Distiller(student, teacher, ToyMethod(student.spec, teacher.spec))
    expected = step(copy.deepcopy(distiller), toy_batch())
    compile_distiller(distiller)
    torch._dynamo.reset()
    counters.clear()
    found = step(distiller, toy_batch())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] >= 1 and distiller.monitor.ratios
