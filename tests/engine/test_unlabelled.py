"""Images without labels: what the teacher's boxes replace, what they leave alone, and that no step drops out."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor
from toys import ToyDetector, ToyMethod, toy_batch

from drkd.contracts import DetectionBatch, Detections, DetectorOutput, DrkdError
from drkd.engine import Distiller
from drkd.engine.guard import DeadDistillationError
from drkd.engine.unlabelled import UnlabelledImages, choose_labeller, detect_targets, split_batch
from drkd.methods import Combination

_BOXES = [[1.0, 2.0, 11.0, 22.0], [3.0, 3.0, 30.0, 30.0], [0.0, 0.0, 9.0, 9.0], [5.0, 5.0, 5.5, 20.0]]
_SCORES = [0.9, 0.8, 0.5, 0.95]


class SureDetector(ToyDetector):
    """Sees the same four boxes in every image, in px of what it is told the stored image is."""

    def __init__(self, channels: int = 6, *, seed: int = 2, sees: bool = True) -> None:
        super().__init__(channels, seed=seed)
        self.sees = sees
        self.detected: list[DetectionBatch] = []

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        assert not self.training and not torch.is_grad_enabled()
        self.detected.append(batch)
        found = []
        for size, original in zip(batch.sizes, batch.original_sizes, strict=True):
            scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
            count = len(_SCORES) if self.sees else 0
            order = torch.tensor(_SCORES[:count]).argsort(descending=True)
            boxes = torch.tensor(_BOXES)[:count].reshape(-1, 4)[order] * scale
            found.append(Detections(boxes, torch.tensor(_SCORES[:count])[order], torch.zeros(count, dtype=torch.long)))
        return found


class BoxMethod(ToyMethod):
    """Notes the boxes it is shown, and lets each count in its term."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.shown: list[list[list[list[float]]]] = []

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict:
        self.shown.append([boxes.tolist() for boxes in batch.boxes])
        return super().forward(student, teacher, batch)


def mixed(labelled: tuple[bool, ...], **options: object) -> DetectionBatch:
    boxes = [2 if known else 0 for known in labelled]
    return dataclasses.replace(toy_batch(boxes, **options), labelled=labelled)  # type: ignore[arg-type]


def make(settings: UnlabelledImages | None = None, *, sees: bool = True, **options: object) -> Distiller:
    torch.manual_seed(3)
    return Distiller(
        ToyDetector(seed=1),
        SureDetector(sees=sees),
        lambda s, t: BoxMethod(s, t, **options),
        unlabelled=settings,
        monitor_interval=1,
    )


def test_confident_boxes_are_in_px_of_the_augmented_batch_tensor() -> None:
    batch = dataclasses.replace(mixed((False, False)), original_sizes=((320, 96), (64, 64)))
    student, teacher = ToyDetector(), SureDetector().eval()
    settings = UnlabelledImages(score_threshold=0.6)
    first, second = detect_targets(batch, student=student, teacher=teacher, settings=settings)
    # The thin one is left out whatever its score.
    assert first.boxes.tolist() == second.boxes.tolist() == _BOXES[:2]
    assert first.labels.tolist() == [0, 0] and first.ignore.tolist() == [False, False]


@pytest.mark.parametrize(("threshold", "limit", "count"), [(0.5, 100, 3), (0.85, 100, 1), (0.0, 2, 2), (1.0, 5, 0)])
def test_threshold_and_limit(threshold: float, limit: int, count: int) -> None:
    settings = UnlabelledImages(score_threshold=threshold, max_boxes=limit)
    (found,) = detect_targets(mixed((False,)), student=ToyDetector(), teacher=SureDetector().eval(), settings=settings)
    assert found.boxes.tolist() == _BOXES[:count]


def test_classes_are_matched_by_name() -> None:
    student, teacher = ToyDetector(), SureDetector().eval()
    student.spec = dataclasses.replace(student.spec, class_names=("other", "thing"))
    (found,) = detect_targets(mixed((False,)), student=student, teacher=teacher, settings=UnlabelledImages())
    assert found.labels.tolist() == [1, 1, 1]
    student.spec = dataclasses.replace(student.spec, class_names=("other",))
    (found,) = detect_targets(mixed((False,)), student=student, teacher=teacher, settings=UnlabelledImages())
    assert found.boxes.shape == (0, 4) and found.labels.shape == (0,)


def test_without_pseudo_labels_the_task_is_that_of_the_labelled_images_alone() -> None:
    distiller, batch = make(), mixed((True, False, True, False))
    losses = distiller(batch)
    alone = make()(dataclasses.replace(batch.select([0, 2]), labelled=()))
    torch.testing.assert_close(losses["task/task"], alone["task/task"], rtol=0, atol=0)
    # The method saw the ground truth of the labelled, and the teacher's boxes of the others.
    truth = [2.0, 2.0, 20.0, 20.0]
    assert distiller.method.shown == [[[truth] * 2] * 2, [_BOXES[:3]] * 2]
    # The teacher labelled the unlabelled images only.
    assert [shown.image_ids for shown in distiller.teacher.detected] == [(1, 3)]


class CountingMethod(BoxMethod):
    """Divides its term by its boxes, and says so."""

    def shared_counts(self) -> dict[str, Tensor]:
        return {"near/p3": torch.tensor(self.count)}

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict:
        self.count = sum(map(len, batch.boxes))
        return {name: term / max(self.count, 1) for name, term in super().forward(student, teacher, batch).items()}


@pytest.mark.parametrize(("labelled", "inner"), [((True, True), False), ((True, False), False), ((True, True), True)])
def test_a_shared_count_is_a_mean_over_processes_asked_for_once_a_pass(
    labelled: tuple[bool, ...], inner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many parts the images of one process are in, or the processes would wait for each other."""
    calls: list[float] = []

    def add_the_other(total: Tensor, **maximum: object) -> None:
        if maximum:
            return  # what a measurement asks: does a term live anywhere?
        calls.append(float(total))
        total += 9 / 2  # another process with nine boxes

    def build() -> Distiller:
        torch.manual_seed(3)
        method = partial(Combination, methods={"one": CountingMethod}) if inner else CountingMethod
        return Distiller(ToyDetector(seed=1), SureDetector(sees=False), method)

    batch = mixed(labelled)
    own = build()(batch)
    # The count is an integer: the mean must be none.
    boxes = sum(map(len, batch.boxes))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_the_other)
    shared, name = build()(batch), "kd/one.near" if inner else "kd/near"
    assert calls == [boxes / 2]
    assert shared[name].item() == pytest.approx(own[name].item() * boxes / ((boxes + 9) / 2), rel=1e-6)
    # Nobody else is asked outside training.
    build().eval()(batch)
    assert len(calls) == 1


def test_terms_are_means_over_all_images() -> None:
    distiller, batch = make().eval(), mixed((True, False, False))
    with torch.no_grad():
        losses = distiller(batch)
        parts = [make().eval()(dataclasses.replace(batch.select(rows), labelled=())) for rows in ([0], [1, 2])]
    expected = parts[0]["kd/near"] / 3 + 2 * parts[1]["kd/near"] / 3
    torch.testing.assert_close(losses["kd/near"], expected)


def test_pseudo_labels_are_labels_in_one_pass() -> None:
    distiller, batch = make(UnlabelledImages(pseudo_labels=True)), mixed((True, False))
    losses = distiller(batch)
    torch.testing.assert_close(losses["task/task"], make()(toy_batch((2, 0)))["task/task"], rtol=0, atol=0)
    assert distiller.method.shown == [[[[2.0, 2.0, 20.0, 20.0]] * 2, _BOXES[:3]]]
    assert len(distiller.student.asked) == 1


@pytest.mark.parametrize("pseudo_labels", [False, True])
def test_a_batch_of_unlabelled_images_reaches_every_parameter(pseudo_labels: bool) -> None:
    # Otherwise one process of several would wait for gradients that another never makes.
    distiller = make(UnlabelledImages(pseudo_labels=pseudo_labels))
    losses = distiller(mixed((False, False)))
    assert set(losses) == {"task/task", "kd/near"}
    assert (float(losses["task/task"].detach()) > 0) == pseudo_labels
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.trainable_parameters())
    head = distiller.student.model["head"].weight.grad
    assert bool(head.abs().sum() > 0) == pseudo_labels
    assert bool(distiller.student.model["body"].weight.grad.abs().sum() > 0)


def test_a_batch_of_unlabelled_images_is_no_measurement_of_the_balance() -> None:
    distiller = make(balanced=True, weights={"near": 0.5})
    distiller(mixed((True, False)))
    weight, ratio = float(distiller.monitor.weights["near/p3"]), float(distiller.monitor.ratios["near"])
    assert ratio == pytest.approx(0.5, rel=1e-4)
    distiller(mixed((False, False), seed=5))
    assert float(distiller.monitor.weights["near/p3"]) == weight
    assert float(distiller.monitor.ratios["near"]) == ratio


def test_a_teacher_that_finds_nothing_leaves_images_without_boxes() -> None:
    distiller = make(sees=False)
    losses = distiller(mixed((True, False)))
    assert distiller.method.shown[1] == [[]]
    assert all(bool(value.isfinite()) for value in losses.values())
    (part,) = split_batch(
        mixed((True, False)),
        student=distiller.student,
        teacher=distiller.teacher,
        settings=UnlabelledImages(pseudo_labels=True),
    )
    assert part.counts and part.batch.targets[1].boxes.shape == (0, 4) and len(part.batch.targets[0].boxes) == 2


def test_labelled_batches_are_left_as_they_are() -> None:
    distiller, plain = make(), make()
    ours, theirs = distiller(mixed((True, True))), plain(toy_batch((2, 2)))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    assert not distiller.teacher.detected


def test_a_student_alone_refuses_unlabelled_images() -> None:
    with pytest.raises(DrkdError, match="no teacher to label it"):
        Distiller(ToyDetector())(mixed((True, False)))
    assert set(Distiller(ToyDetector())(mixed((True, True)))) == {"task/task"}


def test_settings_out_of_range_name_the_field() -> None:
    with pytest.raises(DrkdError, match=r"training\.unlabelled\.score_threshold"):
        UnlabelledImages(score_threshold=1.5)
    with pytest.raises(DrkdError, match=r"training\.unlabelled\.max_boxes"):
        UnlabelledImages(max_boxes=0)


def test_selecting_keeps_the_memory_layout_and_does_not_copy_a_run() -> None:
    batch = mixed((True, True, False))
    laid_out = dataclasses.replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
    first = laid_out.select([0, 1])
    assert first.images.data_ptr() == laid_out.images.data_ptr()
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert laid_out.select([0, 2]).image_ids == (0, 2)
    with pytest.raises(ValueError, match="labelled"):
        dataclasses.replace(batch, labelled=(True,))


class SilentDetector(ToyDetector):
    """Shows features alone."""

    can_detect = False

    def detect(self, batch: DetectionBatch) -> list[Detections]:
        raise DrkdError("no heads")


def test_of_several_teachers_the_first_that_detects_gives_the_boxes() -> None:
    first, second = SureDetector(), SureDetector()
    second.spec = dataclasses.replace(second.spec, class_names=("other", "thing"))
    second.eval()
    distiller = Distiller(ToyDetector(seed=1), {"a": SilentDetector(6), "b": second, "c": first}, BoxMethod)
    losses = distiller(mixed((True, False)))
    assert set(losses) == {"task/task", "kd/a.near", "kd/b.near", "kd/c.near"}
    assert len(second.detected) == 1 and not first.detected
    # Its label 0 is no class of the student's, whatever the first teacher calls its own.
    assert distiller.method.members["a"].shown[1] == [[]]
    with pytest.raises(DrkdError, match="no teacher of this run detects"):
        choose_labeller(SilentDetector())


def test_images_whose_task_loss_does_not_count_have_masks_for_it_all_the_same() -> None:
    options = {"student": ToyDetector(), "teacher": SureDetector().eval(), "settings": UnlabelledImages()}
    (part,) = split_batch(mixed((False, False)), **options)
    assert [target.masks.shape for target in part.batch.targets] == [(3, 32, 32)] * 2
    assert not part.counts and not part.batch.targets[0].masks.any()


def test_a_run_may_begin_with_images_without_labels() -> None:
    """No task loss counts there, so that a balanced term has no weight yet: that is not silence."""
    distiller = make(UnlabelledImages(pseudo_labels=False), balanced=True)
    distiller.dead_after = 2
    for _ in range(4):
        distiller(mixed((False, False)))
    assert distiller.monitor.silent["near"] == 0
    distiller.method.dead = True
    with pytest.raises(DeadDistillationError, match="'near' sent no usable gradient"):
        for _ in range(2):
            distiller(mixed((False, False)))
