"""The control whose teacher looks at other images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from drkd.adapters import RetinaNetBuilder
from drkd.contracts import (
    BoxTargets,
    DetectionBatch,
    DetectorOutput,
    DetectorSpec,
    FeatureLevel,
    FeatureMap,
    KDMethod,
    NotApplicableError,
)
from drkd.engine import Distiller
from drkd.methods import DRKD, PKD, Combination, CrossKD, MismatchedTeacher

SPEC = DetectorSpec((FeatureLevel("p3", 16, 8.0), FeatureLevel("p4", 16, 16.0)), ("thing",))


def _output(images: int, *, seed: int) -> DetectorOutput:
    torch.manual_seed(seed)
    maps = (("p3", 8), ("p4", 4))
    return DetectorOutput(
        tuple(
            FeatureMap(name, torch.randn(images, 16, side, side, requires_grad=True), 64 / side, 64 / side)
            for name, side in maps
        )
    )


def _batch(images: int) -> DetectionBatch:
    boxes = torch.tensor([[3.0, 4, 30, 40], [10, 10, 60, 50]])
    target = BoxTargets(boxes, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool))
    sizes = ((64, 64),) * images
    return DetectionBatch(torch.zeros(images, 3, 64, 64), sizes, sizes, (target,) * images, tuple(range(images)))


def _methods(**options) -> tuple[DRKD, MismatchedTeacher]:
    torch.manual_seed(0)
    plain = DRKD(SPEC, SPEC, **options)
    torch.manual_seed(0)
    return plain, MismatchedTeacher(SPEC, SPEC, method=partial(DRKD, **options))


def test_each_image_gets_the_maps_of_the_next():
    plain, control = _methods()
    student, teacher, batch = _output(3, seed=1), _output(3, seed=2), _batch(3)
    turned = DetectorOutput(
        tuple(
            FeatureMap(level.name, level.tensor[[1, 2, 0]], level.stride_y, level.stride_x)
            for level in teacher.features
        )
    )
    expected, found = plain(student, turned, batch), control(student, teacher, batch)
    assert list(found) == list(expected)
    assert all(found[name].item() == pytest.approx(expected[name].item()) for name in found)
    assert any(found[name].item() != plain(student, teacher, batch)[name].item() for name in found)


def test_a_student_that_equals_its_teacher_still_has_something_to_learn():
    plain, control = _methods()
    same, batch = _output(2, seed=1), _batch(2)
    assert all(term.item() == pytest.approx(0, abs=1e-9) for term in plain(same, same, batch).values())
    assert all(term.item() > 1e-6 for term in control(same, same, batch).values())


def test_one_image_has_no_other():
    _, control = _methods()
    student = _output(1, seed=1)
    terms = control(student, _output(1, seed=2), _batch(1))
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.item() == 0 for term in terms.values())
    assert all(level.tensor.grad.eq(0).all() for level in student.features)


def _looked_at(distiller: Distiller, batch: DetectionBatch) -> dict[str, float]:
    """How often each term was silent in a row after the batch."""
    distiller(batch)
    return {name: count for name, count in distiller.monitor.silent.items() if name != "the teacher"}


def test_a_batch_of_one_image_is_no_dead_term():
    student, teacher = RetinaNetBuilder(width=0.25, fpn_channels=32), RetinaNetBuilder(width=0.25, fpn_channels=32)
    torch.manual_seed(0)
    distiller = Distiller(
        student.build(("thing",)),
        teacher.build(("thing",)),
        partial(MismatchedTeacher, method=PKD),
        monitor_interval=1,
        dead_after=2,
    )
    for _ in range(3):
        assert _looked_at(distiller, _noisy(1)) == {}
    assert _looked_at(distiller, _noisy(2)) == {"pkd": 0}


def _noisy(images: int) -> DetectionBatch:
    return replace(_batch(images), images=torch.rand(images, 3, 64, 64))


def test_counts_say_whether_there_was_another_image():
    _, control = _methods()
    assert control.compared_counts() == {}
    terms = control(_output(3, seed=1), _output(3, seed=2), _batch(3))
    assert {name: count.item() for name, count in control.compared_counts().items()} == dict.fromkeys(terms, 3)
    control(_output(1, seed=1), _output(1, seed=2), _batch(1))
    assert {name: count.item() for name, count in control.compared_counts().items()} == dict.fromkeys(terms, 0)


def test_a_part_of_one_image_does_not_hide_a_part_of_two():
    both = Combination(SPEC, SPEC, methods={"control": partial(MismatchedTeacher, method=DRKD)})
    total: dict[str, float] = {}
    for images in (1, 2):
        both(_output(images, seed=1), _output(images, seed=2), _batch(images))
        for name, count in both.compared_counts().items():
            total[name] = total.get(name, 0) + count.item()
    assert len(total) == 6 and set(total.values()) == {2}


def test_what_the_method_compared_goes_before_the_images():
    class Counted(PKD):
        found = 5

        def compared_counts(self):
            return {"pkd/p3": torch.tensor(self.found)}

    control = MismatchedTeacher(SPEC, SPEC, method=Counted)
    for images, found, expected in ((2, 5, [5, 2]), (2, 0, [0, 2]), (1, 5, [0, 0])):
        control.method.found = found
        control(_output(images, seed=1), _output(images, seed=2), _batch(images))
        assert [count.item() for count in control.compared_counts().values()] == expected


def test_it_declares_what_the_method_declares():
    plain, control = _methods(pixel_weight=2.0, warmup_steps=7, decay="cosine", balanced=False)
    for name in ("needs", "teacher_needs", "weights", "minimum_boxes", "balanced", "warmup_steps", "decay"):
        assert getattr(control, name) == getattr(plain, name), name
    assert [tuple(p.shape) for p in control.parameters()] == [tuple(p.shape) for p in plain.parameters()]


def test_targets_are_looked_at_where_gradients_are_measured():
    plain, control = _methods()
    both = Combination(SPEC, SPEC, methods={"plain": DRKD, "control": partial(MismatchedTeacher, method=DRKD)})
    student, teacher, batch = _output(2, seed=1), _output(2, seed=2), _batch(2)
    for method in (plain, control, both):
        method(student, teacher, batch)
        assert method.target_spread() == {}
        for part in method.modules():
            if isinstance(part, KDMethod):
                part.begin_pass(0, measured=True)
        method(student, teacher, batch)
    assert set(plain.target_spread()) == set(control.target_spread()) == {"pixel_relation/p3", "pixel_relation/p4"}
    assert set(both.target_spread()) == {
        f"{name}.pixel_relation/{level}" for name in ("plain", "control") for level in ("p3", "p4")
    }
    assert all(value > 0 for value in both.target_spread().values())


def test_a_method_on_predictions_is_refused():
    with pytest.raises(NotApplicableError):
        MismatchedTeacher(SPEC, SPEC, method=CrossKD)

    class AsksForMore(DRKD):
        teacher_needs = frozenset({"features", "predictions"})

    with pytest.raises(NotApplicableError, match=r"AsksForMore asks for features, predictions\."):
        MismatchedTeacher(SPEC, SPEC, method=AsksForMore)
