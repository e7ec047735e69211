"""The Lightning side: schedule, checkpoints without the teacher, averages, and what stops a run."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader
from toys import ToyDetector, ToyMethod, toy_batch

from drkd.adapters import RetinaNetBuilder
from drkd.contracts import DetectionBatch, DetectorOutput, DrkdError
from drkd.engine import Distiller
from drkd.engine.callbacks import FiniteLossGuard, StudentAverage
from drkd.engine.finite_weights import FiniteWeightsGuard, nonfinite_weights
from drkd.engine.interruption import Interruptible, StoppedBySignal
from drkd.engine.module import DistillationModule, Optimization, _parameter_groups, scale_rates
from drkd.methods import FitNet


def module(*, learning_rate: float = 0.05, channels: int = 4, **options: object) -> DistillationModule:
    torch.manual_seed(0)
    distiller = Distiller(ToyDetector(channels, seed=1), ToyDetector(6, seed=2), ToyMethod)
    settings = Optimization(learning_rate=learning_rate, warmup_steps=0, weight_decay=0.0, **options)
    return DistillationModule(distiller, settings)


def loader(count: int = 6) -> DataLoader[DetectionBatch]:
    return DataLoader([toy_batch(seed=seed) for seed in range(count)], batch_size=None)  # type: ignore[arg-type]


def trainer(tmp_path: object, *callbacks: object, **options: object) -> Trainer:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**settings, **options},
    )


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_processes_send_each_other_nothing_of_a_teacher_that_never_changes(one_process: None) -> None:
    del one_process
    own = module()
    wrapped = torch.nn.parallel.DistributedDataParallel(own)
    sent = {id(buffer) for buffer in wrapped.modules_buffers}
    teacher, student = own.distiller.teacher, own.distiller.student
    assert teacher is not None and list(teacher.buffers())
    assert not sent & {id(buffer) for buffer in teacher.buffers()}
    assert {id(buffer) for buffer in student.buffers()} <= sent


def test_all_processes_start_with_the_first_ones_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    own = module()
    teacher = own.distiller.teacher
    assert teacher is not None and any(not parameter.is_contiguous() for parameter in teacher.parameters())
    before = [parameter.clone() for parameter in own.distiller.student.parameters()]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def receive(tensor: torch.Tensor, src: int) -> None:
        assert src == 0 and tensor.is_contiguous()
        tensor.fill_(3)

    monkeypatch.setattr(torch.distributed, "broadcast", receive)
    own.on_fit_start()
    assert all(bool((tensor == 3).all()) for tensor in (*teacher.parameters(), *teacher.buffers()))
    assert all(torch.equal(now, was) for now, was in zip(own.distiller.student.parameters(), before, strict=True))


def test_a_signal_between_the_start_and_training_stops_the_run_without_lightnings_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Callback):
        def on_train_start(self, trainer: Trainer, *rest: object) -> None:
            # Lightning has the signals by now, and is to give them away after this.
            signal.raise_signal(signal.SIGTERM)

    seen = []

    class Loop(Callback):
        def on_train_batch_start(self, trainer: Trainer, *rest: object) -> None:
            seen.append((trainer.received_sigterm, trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor))

    stop = Interruptible(tmp_path / "last.ckpt", every_steps=None, every_minutes=None, signals=(signal.SIGTERM,))
    run = trainer(tmp_path, Told(), stop, Loop(), enable_checkpointing=True)
    # What is replaced is there: a loop that no longer has it would ask in some other way.
    asks, notes = type(run.fit_loop.epoch_loop)._broadcast_sigterm_tensor, []
    # Its notifier would wait for the other processes, which know nothing.
    monkeypatch.setattr(type(run._signal_connector), "_sigterm_notifier_fn", lambda *_: notes.append("told"))
    with pytest.raises(StoppedBySignal, match="SIGTERM at step 1; a checkpoint of this step is saved"):
        run.fit(module(), loader())
    assert notes == [] and [flag for flag, _ in seen] == [False]
    assert all(getattr(now, "__func__", now) is not asks for _, now in seen)


def test_a_student_that_comes_ready_for_use_is_trained_as_any_other(tmp_path: Path) -> None:
    """As ``from_pretrained`` gives it: in eval mode its batch norms would stand still for the whole run."""
    seen = []

    class Modes(Callback):
        def on_train_batch_start(self, run: object, own: DistillationModule, *_: object) -> None:
            model, teacher = own.distiller.student.model, own.distiller.teacher
            seen.append((model.training, model["norm"].training, teacher.training))

    for asleep in ((), ("norm",), ("", "body", "norm", "head"), ("all",)):
        learner = module()
        student = learner.distiller.student
        student.rests = torch.nn.BatchNorm2d(3).eval()  # beside a model that trains: of purpose
        for name in asleep:
            part = student if name == "all" else student.model.get_submodule(name)
            part.train(False) if name == "all" else setattr(part, "training", False)
        before = learner.distiller.student.model["norm"].running_mean.clone()
        seen.clear()
        trainer(tmp_path, Modes()).fit(learner, loader(1))
        # A part that rests by itself, as a frozen norm may, is left alone.
        rests = asleep == ("norm",)
        assert seen == [(True, not rests, False)] * 2
        assert student.training and student.rests.training == (len(asleep) in (4, 1) and not rests)
        assert torch.equal(learner.distiller.student.model["norm"].running_mean, before) == rests


def test_a_step_that_the_epoch_cuts_short_has_the_mean_gradient_of_its_images(tmp_path: Path) -> None:
    norms: list[float] = []
    expected = 0.0

    class Gradients(Callback):
        def on_before_optimizer_step(self, run: object, own: DistillationModule, optimizer: object) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in own.distiller.student.parameters()]).norm()))

    same = DataLoader([toy_batch(seed=0)] * 5, batch_size=None)  # type: ignore[arg-type]
    for accumulate in (1, 2, 8):
        norms.clear()
        learner = module(learning_rate=1e-12)
        learner.distiller.accumulate = accumulate
        trainer(tmp_path, Gradients(), accumulate_grad_batches=accumulate, max_epochs=1).fit(learner, same)
        assert len(norms) == {1: 5, 2: 3, 8: 1}[accumulate]
        expected = norms[0] if accumulate == 1 else expected
        assert norms == pytest.approx([expected] * len(norms), rel=1e-4), accumulate


def test_rates_are_scaled_to_the_images_that_a_short_epoch_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for accumulate, images in ((2, 2), (8, 3)):
        learner = module(reference_batch=6)
        trainer(tmp_path, accumulate_grad_batches=accumulate, max_epochs=1).fit(learner, loader(3))
        assert f"= 0.05 x {images} / 6 images a step" in capsys.readouterr().err


def test_multistep_is_the_papers_schedule() -> None:
    settings = Optimization(learning_rate=0.01, warmup_steps=500, warmup_factor=0.001)
    total = 24 * 1000
    assert settings.factor(0, total) == pytest.approx(0.001)
    assert settings.factor(250, total) == pytest.approx(0.5005)
    assert [settings.factor(s, total) for s in (500, 15_999, 16_000, 21_999, 22_000)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


def test_cosine_ends_at_zero() -> None:
    settings = Optimization(schedule="cosine", warmup_steps=10, warmup_factor=0.0)
    assert [settings.factor(s, 110) for s in (0, 10, 60, 110)] == pytest.approx([0, 1, 0.5, 0], abs=1e-9)


@pytest.mark.parametrize(
    ("accumulate", "passes", "expected"),
    [
        (3, 6, [1.0] * 3 + [0.853553] * 3 + [0.5] * 3 + [0.146447] * 3),
        # Lightning steps at an epoch's end: two epochs of three passes, two a step, are four steps and not three.
        (2, 3, [1.0, 1.0, 0.853553, 0.5, 0.5, 0.146447]),
    ],
)
def test_the_trainer_tells_where_its_steps_are(
    accumulate: int, passes: int, expected: list[float], tmp_path: Path
) -> None:
    """A method that decays needs it: half way through the epochs its weights are at half."""
    learner, seen = module(), []
    learner.distiller.accumulate = accumulate
    learner.distiller.method.decay = "cosine"

    class Weights(Callback):
        def on_train_batch_end(self, *arguments: object) -> None:
            seen.append(float(learner.distiller.monitor.weights["near/p3"]))

    trainer(tmp_path, Weights(), accumulate_grad_batches=accumulate).fit(learner, loader(passes))
    assert learner.distiller.total_steps == 4
    assert seen == pytest.approx(expected, rel=1e-4)


def test_the_backbone_may_have_a_rate_of_its_own() -> None:
    """In groups by owner; every trainable parameter in one of them, once."""
    detector, teacher = (RetinaNetBuilder(width=0.25, fpn_channels=16, extra="none").build(["cat"]) for _ in range(2))
    distiller = Distiller(detector, teacher, FitNet)
    settings = Optimization(
        optimizer="adamw", learning_rate=0.1, backbone_learning_rate=0.01, method_learning_rate=0.5, reference_batch=2
    )
    groups = _parameter_groups(distiller, scale_rates(settings, 4))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    for name, parameter in detector.model.named_parameters():
        expected = 0.02 if name.startswith("backbone.body.") else 0.2
        assert rates[id(parameter)] == pytest.approx(expected), name
    # Without a rate of its own the backbone is in the student's groups, as ever: checkpoints fit.
    assert len(_parameter_groups(distiller, Optimization())) == len(groups) - 2


def test_a_rate_for_a_backbone_that_is_not_there_is_refused() -> None:
    settings = Optimization(backbone_learning_rate=0.01)
    with pytest.raises(DrkdError, match=r"backbone_learning_rate: expected parameters.*backbone\.body\., got none"):
        _parameter_groups(Distiller(ToyDetector(4), ToyDetector(6), ToyMethod), settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0},
        {"milestones": (0.9, 0.5)},
        {"milestones": (1.5,)},
        {"backbone_learning_rate": -1.0},
        {"method_learning_rate": -1.0},
    ],
)
def test_wrong_schedules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DrkdError, match=r"training\.optimization"):
        Optimization(**wrong)  # type: ignore[arg-type]


def test_training_lowers_the_loss_and_moves_student_and_connectors(tmp_path: object) -> None:
    ours = module()
    before = {name: value.clone() for name, value in ours.distiller.state_dict().items() if torch.is_tensor(value)}
    first = float(sum(ours.distiller(toy_batch()).values()).detach())
    trainer(tmp_path, max_epochs=4).fit(ours, loader())
    assert float(sum(ours.distiller(toy_batch()).values()).detach()) < first
    moved = {
        name
        for name, value in ours.distiller.state_dict().items()
        if torch.is_tensor(value) and not torch.equal(value, before[name])
    }
    assert any(name.startswith("student.") for name in moved) and any(name.startswith("method.") for name in moved)
    assert not any(name.startswith("teacher.") for name in moved)


def test_checkpoints_hold_no_teacher_and_refuse_another_student(tmp_path: object) -> None:
    path = f"{tmp_path}/some.ckpt"
    runner = trainer(tmp_path)
    runner.fit(module(), loader())
    runner.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert saved and not any("teacher" in name for name in saved)
    trainer(tmp_path, max_epochs=3).fit(module(), loader(), ckpt_path=path, weights_only=True)
    alone = {**torch.load(path, weights_only=True)}
    alone["state_dict"] = {name: value for name, value in saved.items() if ".method." not in name}
    with pytest.raises(DrkdError, match=r"student that was trained alone, and this is a distillation.*--output"):
        module().on_load_checkpoint(alone)
    reordered = torch.load(path, weights_only=True)
    reordered["drkd_class_names"] = ["b", *reordered["drkd_class_names"][1:]]
    with pytest.raises(DrkdError, match=r"knows the classes b.*another order"):
        module().on_load_checkpoint(reordered)
    other = module()
    other.distiller.student.model["extra"] = torch.nn.Linear(1, 1)
    with pytest.raises(DrkdError, match="another student or method: 2 keys missing"):
        trainer(tmp_path, max_epochs=3).fit(other, loader(), ckpt_path=path, weights_only=True)


def test_the_average_is_validated_and_can_be_kept(tmp_path: object) -> None:
    ours, average = module(), StudentAverage(0.9)
    trainer(tmp_path, average).fit(ours, loader())
    raw = {name: value.clone() for name, value in ours.distiller.student.state_dict().items()}
    average.apply_to(ours)
    name = "model.head.weight"
    kept = ours.distiller.student.state_dict()[name]
    assert not torch.equal(kept, raw[name])
    assert torch.equal(kept, average.state_dict()["average"][f"module.{name}"])


def test_the_average_equals_its_definition(tmp_path: object) -> None:
    weights = []

    class Recorder(StudentAverage):
        def on_train_batch_end(self, trainer: Trainer, pl_module: DistillationModule, *rest: object) -> None:  # type: ignore[override]
            weights.append(pl_module.distiller.student.state_dict()["model.head.bias"].clone())
            super().on_train_batch_end(trainer, pl_module, *rest)  # type: ignore[arg-type]

    ours, average = module(), Recorder(0.5)
    trainer(tmp_path, average, max_epochs=1).fit(ours, loader())
    # The first average is a copy (of what the first step left); then decay = min(0.5, (1 + step) / (10 + step)).
    expected = weights[0]
    for step, value in enumerate(weights[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.state_dict()["average"]["module.model.head.bias"], expected)


def test_whole_numbers_are_copied_into_the_average(tmp_path: object) -> None:
    """Their mean, cut off, is the number below: a table of indices (Swin's) was wrong after a few steps."""
    ours, average = module(), StudentAverage(0.999)
    table = torch.arange(3000)
    ours.distiller.student.register_buffer("table", table.clone())
    trainer(tmp_path, average, max_epochs=3).fit(ours, loader())
    assert torch.equal(average.state_dict()["average"]["module.table"], table)
    counts = [value for name, value in average.average.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts and all(int(count) == 18 for count in counts)


def test_an_average_with_means_of_whole_numbers_is_mended_where_it_is_read(tmp_path: object) -> None:
    """One that was saved before they were copied: the student has its own table whichever way it comes back."""
    ours, average = module(), StudentAverage(0.9)
    table = torch.arange(30)
    ours.distiller.student.register_buffer("table", table.clone())
    trainer(tmp_path, average, max_epochs=1).fit(ours, loader())
    state = copy.deepcopy(average.state_dict())
    state["average"]["module.table"] -= 1
    StudentAverage.put_saved(state, ours)
    assert torch.equal(ours.distiller.student.table, table)  # type: ignore[arg-type]
    average.load_state_dict(state)
    average.apply_to(ours)
    assert torch.equal(ours.distiller.student.table, table)  # type: ignore[arg-type]
    resumed = StudentAverage(0.9)
    resumed.load_state_dict(state)
    trainer(tmp_path, resumed, max_epochs=0).fit(ours, loader())
    assert torch.equal(resumed.state_dict()["average"]["module.table"], table)


def test_an_infinite_mask_stays_one_in_the_average(tmp_path: object) -> None:
    ours, average = module(), StudentAverage(0.5)
    mask = torch.tensor([0.0, float("-inf")])
    ours.distiller.student.model.register_buffer("mask", mask.clone())
    trainer(tmp_path, average, max_epochs=2).fit(ours, loader())
    assert torch.equal(average.state_dict()["average"]["module.model.mask"], mask)


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path: object) -> None:
    with pytest.raises(DrkdError, match=r"became NaN or infinite at step \d+.*learning_rate"):
        trainer(tmp_path, FiniteLossGuard(), max_epochs=20).fit(module(learning_rate=1e30), loader())


def test_no_checkpoint_is_written_between_a_broken_loss_and_the_reading_of_its_note(tmp_path: Path) -> None:
    guard, path = FiniteLossGuard(), tmp_path / "last.ckpt"

    class SavesWithinTheEpoch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *rest: object) -> None:  # type: ignore[override]
            if trainer.global_step == 2:
                # As a GPU leaves it until the next reading.
                guard._broken = torch.tensor(True)
                trainer.save_checkpoint(path)

    with pytest.raises(DrkdError, match="became NaN or infinite at step 2"):
        trainer(tmp_path, guard, SavesWithinTheEpoch()).fit(module(), loader())
    assert not path.exists()


def test_whatever_a_step_draws_depends_on_seed_and_step_only() -> None:
    def draw(before: int, batch: int) -> tuple[float, float, float]:
        random.seed(before), np.random.seed(before), torch.manual_seed(before)
        training = module()
        training.on_train_batch_start(toy_batch(), batch)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1, 3) == draw(2, 3)
    assert all(one != other for one, other in zip(draw(1, 3), draw(1, 4), strict=True))


class BreaksGradient(ToyMethod):
    """Its third loss is finite, the gradient of that is NaN."""

    count = 0

    def forward(self, student: DetectorOutput, *rest: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
        self.count += 1
        terms = super().forward(student, *rest)  # type: ignore[arg-type]
        if self.count == 3:
            terms["near/p3"] = terms["near/p3"] + (0 * student.features[0].tensor).sum().sqrt()
        return terms


def test_no_checkpoint_is_written_of_weights_that_a_gradient_broke(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    distiller = Distiller(ToyDetector(seed=1), ToyDetector(6, seed=2), BreaksGradient)
    ours = DistillationModule(distiller, Optimization(learning_rate=0.05, warmup_steps=0, milestones=()))
    saving = Interruptible(path, every_steps=1, every_minutes=None, signals=())
    runner = trainer(tmp_path, FiniteLossGuard(), FiniteWeightsGuard(), saving, enable_checkpointing=True)
    with pytest.raises(DrkdError, match=r"weights are NaN or infinite after step 3 \(student\.model\.\w+.*\d more\)"):
        runner.fit(ours, loader())
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values() if torch.is_tensor(value))


def test_a_broken_average_is_not_saved_either(tmp_path: Path) -> None:
    runner = trainer(tmp_path, FiniteWeightsGuard(), average := StudentAverage(0.9))
    runner.fit(module(), loader())
    assert average.average is not None
    next(average.average.parameters()).data[0] = float("inf")
    with pytest.raises(DrkdError, match=r"\(average\.model\.body\.weight\)"):
        runner.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def test_running_statistics_count_and_masks_do_not() -> None:
    detector = ToyDetector()
    detector.register_buffer("mask", torch.full((2, 2), float("-inf")))
    assert nonfinite_weights(detector) == []
    detector.model["norm"].running_var[1] = float("nan")
    assert nonfinite_weights(detector) == ["model.norm.running_var"]


def test_a_step_draws_the_same_whatever_came_before(tmp_path: object) -> None:
    drawn: list[list[float]] = []

    class Draws(ToyMethod):
        def forward(self, *arguments: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
            drawn[-1].append(float(torch.rand(())))
            return super().forward(*arguments)  # type: ignore[arg-type]

    for noise in (1, 5):
        drawn.append([])
        distiller = Distiller(ToyDetector(seed=1), ToyDetector(6, seed=2), Draws)
        torch.rand(noise)
        trainer(tmp_path).fit(DistillationModule(distiller, Optimization(warmup_steps=0), seed=4), loader())
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == len(drawn[0]) == 12
