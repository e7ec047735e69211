"""The distiller: what it computes, what it leaves alone, and when it stops a run."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from toys import ToyDetector, ToyMethod, toy_batch

from drkd.contracts import DetectionBatch, DetectorOutput, DrkdError, KDMethod, Want
from drkd.engine import DeadDistillationError, Distiller, GradientBalance
from drkd.engine.balance import gradient_norms
from drkd.methods import Combination


def make(channels: int = 4, **options: object) -> Distiller:
    torch.manual_seed(3)
    engine = {
        name: options.pop(name) for name in ("monitor_interval", "dead_after", "calibration_steps") if name in options
    }
    student, teacher = ToyDetector(channels, seed=1), ToyDetector(6, seed=2)
    return Distiller(student, teacher, lambda s, t: ToyMethod(s, t, **options), **engine)


def test_losses_are_the_task_and_the_weighted_terms() -> None:
    distiller = make(weights={"near": 3.0})
    batch = toy_batch()
    losses = distiller(batch)
    assert set(losses) == {"task/task", "kd/near"}
    student = distiller.student(batch, want=frozenset({"features", "losses"}))
    teacher = distiller.teacher(batch, want=frozenset({"features"}))
    bare = distiller.method(student, teacher, batch)["near/p3"]
    torch.testing.assert_close(losses["kd/near"], 3.0 * bare)
    torch.testing.assert_close(losses["task/task"], student.losses["task"])


def test_teacher_gets_no_gradient_stays_in_eval_mode_and_computes_features_only() -> None:
    distiller = make()
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller.train()
    for seed in range(3):
        sum(distiller(toy_batch(seed=seed)).values()).backward()
    assert not distiller.teacher.training and distiller.student.training
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert distiller.teacher.asked == [frozenset({"features"})] * 3
    for name, value in distiller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_teacher_runs_before_anything_is_kept_for_the_students_backward_pass() -> None:
    # What its layers take on the way is then never added to what the student's layers keep (docs/speed.md).
    distiller = make()
    order: list[str] = []
    for name in ("student", "teacher"):
        getattr(distiller, name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
    distiller(toy_batch())
    assert order == ["teacher", "student"]


def test_without_a_teacher_it_is_the_task_alone() -> None:
    distiller = Distiller(ToyDetector())
    assert set(distiller(toy_batch())) == {"task/task"}
    with pytest.raises(ValueError, match="both a teacher and a method"):
        Distiller(ToyDetector(), ToyDetector())


def test_trainable_parameters_are_the_students_and_the_methods() -> None:
    distiller = make()
    expected = [*distiller.student.parameters(), *distiller.method.parameters()]
    assert [id(p) for p in distiller.trainable_parameters()] == [id(p) for p in expected]


def test_warm_up_rises_linearly() -> None:
    distiller, plain = make(warmup_steps=4), make()
    shares = []
    for _ in range(5):
        batch = toy_batch()
        shares.append(float(distiller(batch)["kd/near"] / plain(batch)["kd/near"]))
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_balance_holds_the_wanted_ratio_whatever_the_terms_size(size: float) -> None:
    distiller = make(weights={"near": 0.5}, balanced=True, size=size)
    batch = toy_batch()
    losses = distiller(batch)
    student = distiller.student(batch, want=frozenset({"features", "losses"}))
    del student
    assert float(distiller.monitor.ratios["near"]) == pytest.approx(0.5, rel=1e-4)
    assert torch.isfinite(losses["kd/near"])


def test_balance_freezes_and_survives_a_reload() -> None:
    distiller = make(weights={"near": 0.5}, balanced=True, calibration_steps=6)
    for seed in range(8):
        distiller(toy_batch(seed=seed))
    frozen = float(distiller.monitor.weights["near/p3"])
    distiller(toy_batch(seed=99))
    assert float(distiller.monitor.weights["near/p3"]) == frozen
    other = make(weights={"near": 0.5}, balanced=True, calibration_steps=6)
    other.load_state_dict(distiller.state_dict())
    other(toy_batch(seed=5))
    assert float(other.monitor.weights["near/p3"]) == frozen
    assert other.get_extra_state()["passes"] == 10


def test_evaluation_mode_counts_no_step_and_measures_nothing() -> None:
    distiller = make(balanced=True).eval()
    with torch.no_grad():
        distiller(toy_batch())
    assert distiller.get_extra_state()["passes"] == 0
    assert distiller.monitor.ratios == {}


def test_gradient_norms_equal_autograd_by_hand() -> None:
    one, two = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    norms = gradient_norms({"a": one.square().sum(), "b": 2 * two.sum()}, [one, two])
    assert float(norms["a"][0]) == pytest.approx(4 * 25)
    assert norms["a"][1].isnan() and norms["b"][0].isnan()
    assert float(norms["b"][1]) == pytest.approx(4.0)
    assert one.grad is None and two.grad is None


def test_a_dead_term_stops_the_run_with_an_explanation() -> None:
    distiller = make(dead=True, monitor_interval=2, dead_after=3)
    with pytest.raises(DeadDistillationError, match="silently off: 'near' sent no usable gradient") as caught:
        for _ in range(6):
            distiller(toy_batch())
    assert "step 4" in str(caught.value)
    assert "training.dead_after=null in a recipe, dead_after=None of a Distiller" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_shall_not_stop_counts_the_silence() -> None:
    distiller = make(dead=True, monitor_interval=1, dead_after=None)
    for _ in range(5):
        distiller(toy_batch())
    assert distiller.monitor.silent["near"] == 5


@pytest.mark.parametrize("ready", [False, True])
def test_the_method_goes_where_the_student_is(ready: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = ToyDetector(4, seed=1), ToyDetector(6, seed=2)
    method = ToyMethod(student.spec, teacher.spec) if ready else ToyMethod
    # Half precision on the way stands for another device: a machine without an accelerator has but one.
    plain, moves = nn.Module.to, []
    monkeypatch.setattr(ToyMethod, "to", lambda self, device: (moves.append(device), plain(self, torch.half))[1])
    distiller = Distiller(student, teacher, method)
    assert moves == [torch.device("cpu")]
    assert distiller.method is not None
    assert {parameter.dtype for parameter in distiller.method.parameters()} == {torch.half}


def test_a_student_without_weights_takes_none_from_the_method() -> None:
    student, teacher = ToyDetector(4, seed=1).to("meta"), ToyDetector(6, seed=2)
    distiller = Distiller(student, teacher, ToyMethod)
    assert distiller.method is not None
    assert {parameter.device.type for parameter in distiller.method.parameters()} == {"cpu"}


def test_no_gradient_is_no_fault_where_there_could_be_none() -> None:
    no_boxes = make(dead=True, minimum_boxes=2, monitor_interval=1, dead_after=1)
    for _ in range(3):
        no_boxes(toy_batch((1, 0)))
    off = make(dead=True, weights={"near": 0.0}, monitor_interval=1, dead_after=1)
    for _ in range(3):
        off(toy_batch())
    with pytest.raises(DeadDistillationError):
        no_boxes(toy_batch((2, 0)))


def test_no_gradient_is_no_fault_where_nothing_was_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = make(dead=True, monitor_interval=1, dead_after=1)
    counts = {"near/p3": torch.tensor(0.0)}
    monkeypatch.setattr(distiller.method, "compared_counts", lambda: counts)
    for _ in range(3):
        distiller(toy_batch())
    counts["near/p3"] = torch.tensor(2.0)
    with pytest.raises(DeadDistillationError):
        distiller(toy_batch())


def test_what_a_first_try_gets_wrong_is_named() -> None:
    student, teacher, plain = ToyDetector(seed=1), ToyDetector(seed=2), torch.nn.Conv2d(3, 4, 1)
    with pytest.raises(TypeError, match=r"detector as its student, got Conv2d\. Wrap it: wrap_torchvision"):
        Distiller(plain, teacher, ToyMethod)  # type: ignore[arg-type]
    for wrong in (plain, {"one": plain}):
        with pytest.raises(TypeError, match="detector as its teacher, got Conv2d"):
            Distiller(student, wrong, ToyMethod)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expects a method, or its class such as drkd\.DRKD, got 'DRKD'"):
        Distiller(student, teacher, "DRKD")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shares no weights with the student"):
        Distiller(student, student, ToyMethod)
    with pytest.raises(TypeError, match=r"DetectionBatch, got tuple\. Make one .*from_lists"):
        Distiller(student, teacher, ToyMethod)((torch.zeros(1, 3, 8, 8), []))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"one DetectionBatch, got list and list\. Make one .*from_lists"):
        Distiller(student, teacher, ToyMethod)([torch.zeros(3, 8, 8)], [{}])


def test_a_label_that_is_no_class_is_named_in_the_first_step() -> None:
    distiller, batch = make(), toy_batch()
    classes = len(distiller.student.spec.class_names)
    first = replace(batch.targets[0], labels=torch.full_like(batch.targets[0].labels, classes))
    with pytest.raises(ValueError, match=f"labels from 0 to {classes - 1}.* got {classes}; .*first_label=1"):
        distiller(replace(batch, targets=(first, *batch.targets[1:])))


def test_a_teacher_that_is_constant_stops_the_run() -> None:
    distiller = make(monitor_interval=1, dead_after=2)
    body = distiller.teacher.model["body"]
    weight = body.weight.clone()
    torch.nn.init.zeros_(body.weight)
    distiller(toy_batch())
    body.weight.copy_(weight)
    distiller(toy_batch())
    torch.nn.init.zeros_(body.weight)
    distiller(toy_batch())
    with pytest.raises(
        DeadDistillationError,
        match=r"teacher teaches nothing.*2 measurements in a row, the last at step 3.*dead_after=null",
    ):
        distiller(toy_batch())


def test_a_student_that_comes_in_eval_mode_is_woken() -> None:
    student = ToyDetector(seed=1).eval()
    Distiller(student, ToyDetector(seed=2), ToyMethod)
    assert student.training and all(module.training for module in student.modules())
    # Afterwards its modes are the user's.
    distiller = Distiller(ToyDetector(seed=1), ToyDetector(seed=2), ToyMethod)
    distiller.student.eval()
    assert not distiller.student.training


def test_a_teacher_stays_in_eval_mode_though_somebody_trains_it() -> None:
    distiller = make()
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller.teacher.train()
    distiller(toy_batch())
    assert not distiller.teacher.training
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())


def test_so_it_does_where_the_model_within_is_trained() -> None:
    distiller = make()
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller.teacher.model.train()  # by a loop that holds the bare model
    distiller(toy_batch())
    assert not any(module.training for module in distiller.teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())


def test_all_processes_judge_silence_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # One that stopped alone would leave the others waiting for it.
    told = []

    def as_another(values: torch.Tensor, op: object) -> None:
        told.append(values.tolist())
        values.copy_(torch.maximum(values, torch.tensor(other)))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", as_another)
    dead = make(dead=True, minimum_boxes=2, monitor_interval=1, dead_after=1, balanced=False)
    # Most boxes, the term, the teacher, whether the term compared anything.
    other = [0, 0, 1, 1]  # no boxes there either
    dead(toy_batch((1, 0)))
    other = [2, 1, 1, 1]  # there it lives
    dead(toy_batch((2, 0)))
    other = [2, 0, 1, 1]  # boxes there, and dead
    with pytest.raises(DeadDistillationError, match="an image held 2 boxes"):
        dead(toy_batch((1, 0)))
    assert told == [[1, 0, 1, 1], [2, 0, 1, 1], [1, 0, 1, 1]]


def test_a_frozen_students_features_are_said_to_be_out_of_reach() -> None:
    distiller = make()
    distiller.student.model["body"].requires_grad_(False)
    distiller.student.model["norm"].requires_grad_(False)
    with pytest.raises(DeadDistillationError, match="carry no gradient"):
        distiller(toy_batch())


class _Predictions(KDMethod):
    """Compares predictions alone and asks for no maps."""

    needs = frozenset[Want]()

    def __init__(self, student: object, teacher: object, *, silent: bool = False) -> None:
        super().__init__()
        self.balanced, self.weights, self.silent = False, {"own": 1.0}, silent
        self.minimum_boxes, self.warmup_steps, self.decay = {}, 0, "none"

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        return {"own": student.losses["task"].detach() if self.silent else 2 * student.losses["task"]}


def test_a_method_without_maps_has_plain_weights_and_nothing_to_measure() -> None:
    student, teacher = ToyDetector(seed=1), ToyDetector(6, seed=2)
    plain = student.forward

    def without_maps(batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        return replace(plain(batch, want=want), features=())

    student.forward = without_maps  # type: ignore[method-assign]
    losses = Distiller(student, teacher, _Predictions)(toy_batch())
    assert float(losses["kd/own"].detach()) == pytest.approx(2 * float(losses["task/task"].detach()))
    Distiller(student, teacher, lambda s, t: _Predictions(s, t, silent=True), dead_after=None)(toy_batch())
    with pytest.raises(DeadDistillationError, match=r"carry no gradient.* plain weights"):
        Distiller(student, teacher, lambda s, t: _Predictions(s, t, silent=True))(toy_batch())


def test_the_silence_must_be_in_a_row() -> None:
    distiller = make(monitor_interval=1, dead_after=2)
    for dead in (True, False, True, False, True):
        distiller.method.dead = dead
        distiller(toy_batch())
    with pytest.raises(DeadDistillationError):
        distiller(toy_batch())


def test_the_balance_alone_serves_a_loop_of_ones_own() -> None:
    batch, student, teacher = toy_batch(), ToyDetector(seed=1), ToyDetector(6, seed=2)
    method = ToyMethod(student.spec, teacher.spec, weights={"near": 0.5}, size=1e-3)
    ours = student(batch, want=frozenset({"features", "losses"}))
    terms = method(ours, teacher(batch, want=frozenset({"features"})), batch)
    feature, task = ours.features[0].tensor, ours.losses["task"]
    extra = GradientBalance()(task, terms, [feature], weights=method.weights)
    norms = gradient_norms({"task": task, "kd": extra}, [feature])
    assert float((norms["kd"] / norms["task"]).sqrt()) == pytest.approx(0.5, rel=1e-4)


def test_steps_are_optimizer_steps_under_accumulation() -> None:
    student, teacher = ToyDetector(seed=1), ToyDetector(6, seed=2)
    distiller = Distiller(student, teacher, lambda s, t: ToyMethod(s, t, warmup_steps=2), accumulate=2)
    plain = Distiller(student, teacher, distiller.method)
    plain.method.warmup_steps = 0
    whole = float(plain(toy_batch())["kd/near"].detach())
    distiller.method.warmup_steps = 2
    shares = [float(distiller(toy_batch())["kd/near"].detach()) / whole for _ in range(5)]
    assert shares == pytest.approx([0.5, 0.5, 1.0, 1.0, 1.0], rel=1e-3)


def test_a_loop_may_say_where_its_steps_are() -> None:
    student, teacher = ToyDetector(seed=1), ToyDetector(6, seed=2)
    kd = ToyMethod(student.spec, teacher.spec, decay="cosine")
    distiller = Distiller(student, teacher, kd, accumulate=2, total_steps=4, monitor_interval=2)
    found, measured = [], []
    # A trainer that steps after two passes and at the end of an epoch of three.
    for step, first in ((0, True), (0, False), (1, True), (2, True), (2, False), (3, True)):
        distiller.monitor.ratios = {}
        distiller.at_step(step, first=first)
        found.append(float(distiller(toy_batch())["kd/near"].detach()))
        measured.append(bool(distiller.monitor.ratios))
    assert [value / found[0] for value in found] == pytest.approx([1, 1, 0.853553, 0.5, 0.5, 0.146447], rel=1e-3)
    assert measured == [True, False, False, True, False, False]
    # Whoever is told no more counts passes again.
    assert float(distiller(toy_batch())["kd/near"].detach()) / found[0] == pytest.approx(0.146447, rel=1e-3)


def test_weights_decay_over_a_run_of_known_length() -> None:
    """Half a cosine times the warm-up, in optimizer steps; without the length, or without a decay, they stay."""
    student, teacher = ToyDetector(seed=1), ToyDetector(6, seed=2)

    def shares(steps: int | None, **options: object) -> list[float]:
        kd = ToyMethod(student.spec, teacher.spec, **options)  # type: ignore[arg-type]
        distiller = Distiller(student, teacher, kd, accumulate=2, total_steps=steps, monitor_interval=1)
        found = [float(distiller(toy_batch())["kd/near"].detach()) for _ in range(8)]
        assert float(distiller.monitor.ratios["near"]) > 0
        return [value / found[0] for value in found]

    falling = [1.0, 1.0, 0.853553, 0.853553, 0.5, 0.5, 0.146447, 0.146447]
    assert shares(4, decay="cosine") == pytest.approx(falling, rel=1e-3)
    assert shares(None, decay="cosine") == shares(4) == pytest.approx([1.0] * 8, rel=1e-3)
    warmed = ToyMethod(student.spec, teacher.spec, decay="cosine", warmup_steps=2)
    assert [warmed.schedule(step, 4) for step in range(6)] == pytest.approx(
        [0.5, 0.853553, 0.5, 0.146447, 0, 0], rel=1e-4
    )


@pytest.mark.parametrize("several", [False, True])
def test_a_decay_that_does_not_exist_is_refused_before_the_first_step(several: bool) -> None:
    student, teacher = ToyDetector(seed=1), ToyDetector(6, seed=2)
    method = partial(ToyMethod, decay="exponential")
    if several:
        # The combination's own decay is in force; a member's is wrong all the same.
        method = partial(Combination, methods={"toy": method}, decay="none")
    with pytest.raises(DrkdError, match=r"ToyMethod expects a decay out of none, cosine, got 'exponential'"):
        Distiller(student, teacher, method)


def test_a_weight_that_decayed_to_nothing_is_not_silent() -> None:
    """Past the end of the run, as by a run prolonged by hand, the guard says nothing."""
    student, teacher = ToyDetector(seed=1), ToyDetector(6, seed=2)
    kd = ToyMethod(student.spec, teacher.spec, decay="cosine")
    distiller = Distiller(student, teacher, kd, total_steps=1, monitor_interval=1, dead_after=1)
    found = [float(distiller(toy_batch())["kd/near"].detach()) for _ in range(3)]
    assert found[0] > 0 and found[1:] == [0.0, 0.0]
