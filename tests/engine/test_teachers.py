"""Several teachers in one distiller."""

from __future__ import annotations

import pytest
import torch
from toys import ToyDetector, ToyMethod, toy_batch

from drkd.contracts import DrkdError
from drkd.engine.distiller import Distiller
from drkd.engine.guard import DeadDistillationError


def test_each_teacher_has_terms_of_its_own_and_weights_add_up():
    teachers = {"one": ToyDetector(5, seed=1), "two": ToyDetector(6, seed=2)}
    distiller = Distiller(ToyDetector(), teachers, ToyMethod, teacher_weights={"two": 0.25})
    before = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    losses = distiller.train()(toy_batch())
    assert set(losses) == {"task/task", "kd/one.near", "kd/two.near"}
    assert distiller.monitor.weights["one.near/p3"] == 1 and distiller.monitor.weights["two.near/p3"] == 0.25
    torch.testing.assert_close(losses["kd/two.near"].detach(), 0.25 * distiller.monitor.terms["two.near"])
    sum(losses.values()).backward()
    assert distiller.student.model["body"].weight.grad is not None
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())
    assert not any(part.training for part in distiller.teacher.modules())
    # Each is asked once, for what its own method needs.
    assert [teacher.asked for teacher in teachers.values()] == [[frozenset({"features"})]] * 2
    trained = sum(parameter.numel() for parameter in distiller.method.parameters())
    assert trained == (4 * 5 + 5) + (4 * 6 + 6)


def test_one_named_teacher_teaches_what_a_single_one_does():
    torch.manual_seed(3)
    single = Distiller(ToyDetector(), ToyDetector(5, seed=1), ToyMethod).train()
    torch.manual_seed(3)
    named = Distiller(ToyDetector(), {"t": ToyDetector(5, seed=1)}, ToyMethod).train()
    assert torch.equal(single(toy_batch())["kd/near"], named(toy_batch())["kd/t.near"])


def test_what_cannot_be_used_is_refused():
    teacher = ToyDetector(5, seed=1)
    for teachers, weights, message in (
        ({}, None, "at least one teacher"),
        ({"a.b": teacher}, None, "leave out dots"),
        ({"a": teacher}, {"b": 1.0}, "weights for b"),
        ({"a": teacher}, {"a": 0.0}, "above 0"),
    ):
        with pytest.raises(DrkdError, match=message):
            Distiller(ToyDetector(), teachers, ToyMethod, teacher_weights=weights)
    method = ToyMethod(ToyDetector().spec, teacher.spec)
    with pytest.raises(ValueError, match="what builds a method"):
        Distiller(ToyDetector(), {"a": teacher}, method)
    with pytest.raises(ValueError, match="several teachers only"):
        Distiller(ToyDetector(), teacher, ToyMethod, teacher_weights={"a": 1.0})
    with pytest.raises(ValueError, match="does not detect"):
        Distiller(ToyDetector(), {"a": teacher}, ToyMethod).teacher.detect(toy_batch())


def test_one_constant_teacher_of_several_stops_the_run():
    teachers = {"good": ToyDetector(5, seed=1), "blank": ToyDetector(6, seed=2)}
    torch.nn.init.zeros_(teachers["blank"].model["body"].weight)
    distiller = Distiller(ToyDetector(), teachers, ToyMethod, monitor_interval=1, dead_after=2).train()
    distiller(toy_batch())
    with pytest.raises(DeadDistillationError, match=r"^The teacher blank teaches nothing"):
        distiller(toy_batch())
    assert distiller.monitor.silent["the teacher good"] == 0
