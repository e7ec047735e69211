"""What every detector promises: each builder that `drkd.adapters` holds goes through the same cases."""

from __future__ import annotations

import copy
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from no_wait import HostMustNotWait
from tests.contract.adapter_examples import CLASSES, EXAMPLES, SETTINGS, Ability, make_builder
from torch import Tensor

import drkd.adapters
import drkd.methods
from drkd.adapters import load_detector, save_student
from drkd.contracts import (
    BoxTargets,
    DetectionBatch,
    Detector,
    DetectorBuilder,
    DetectorOutput,
    DrkdError,
    KDMethod,
    Want,
)
from drkd.engine.distiller import Distiller
from drkd.methods import DRKD, PKD

FEATURES, LOSSES, BOTH = (frozenset[Want](want) for want in (["features"], ["losses"], ["features", "losses"]))
# Learns from the teachers that cannot learn themselves.
STUDENT = "drkd.adapters.torchvision.RetinaNetBuilder"
ARGUMENTS = {
    "Combination": {"methods": {"relations": DRKD, "features": PKD}},
    "MismatchedTeacher": {"method": DRKD},
}
SIZES = [(64, 96), (64, 96), (50, 96), (64, 70)]
# Neither the first nor the last: a shift of labels by one is seen both ways.
LABEL = 1


def discover() -> list[str]:
    """Import paths of the builders that can be instantiated, of every module below `drkd.adapters`."""
    found = set()
    for module in pkgutil.walk_packages(drkd.adapters.__path__, "drkd.adapters."):
        for _, value in inspect.getmembers(import_module(module.name), inspect.isclass):
            if issubclass(value, DetectorBuilder) and not inspect.isabstract(value) and value is not DetectorBuilder:
                found.add(f"{value.__module__}.{value.__qualname__}")
    return sorted(found)


def methods() -> list[type[KDMethod]]:
    exported = (getattr(drkd.methods, name) for name in drkd.methods.__all__)
    return [value for value in exported if isinstance(value, type) and issubclass(value, KDMethod)]


def make_batch(sizes: list[tuple[int, int]] = SIZES, *, label: int | None = LABEL, seed: int = 0) -> DetectionBatch:
    """Noise with a bright rectangle for each box, which is its mask too, padded to 64 x 96 px, or 64 x 64."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(len(sizes), 3, 64, 96 if max(sizes, key=lambda size: size[1])[1] > 64 else 64)
    targets = []
    for index, (height, width) in enumerate(sizes):
        images[index, :, :height, :width] = 0.3 * torch.rand(3, height, width, generator=generator)
        corner = torch.rand(2, 2, generator=generator) * torch.tensor([width * 0.4, height * 0.4])
        boxes = torch.cat([corner, corner + 16 + 8 * torch.rand(2, 2, generator=generator)], dim=1)
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
            images[index, :, :height, :width][:, mask] = torch.tensor([0.9, 0.6, 0.1])[:, None]
        labels = torch.arange(2) % len(CLASSES) if label is None else torch.full((2,), label)
        targets.append(BoxTargets(boxes, labels, torch.zeros(2, dtype=torch.bool), masks))
    count = tuple(range(len(sizes)))
    return DetectionBatch(images, tuple(sizes), tuple(sizes), tuple(targets), count)


def total(output: DetectorOutput) -> Tensor:
    return torch.stack([value.float() for value in output.losses.values()]).sum()


def same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return list(before) == list(after) and all(torch.equal(value, after[name]) for name, value in before.items())


def hooks(detector: Detector) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in detector.modules())


def missing_examples() -> list[str]:
    """Builders without an example."""
    return sorted(set(discover()) - {path.partition("#")[0] for path in EXAMPLES})


def require(path: str, *abilities: Ability) -> None:
    """Skip what a detector cannot do by its nature, with the reason that its example gives."""
    for ability in abilities:
        if ability in EXAMPLES[path].lacks:
            pytest.skip(f"{path} has no {ability}: {EXAMPLES[path].lacks[ability]}")


@pytest.fixture(scope="module", params=[*EXAMPLES, *missing_examples()])
def path(request: pytest.FixtureRequest) -> str:
    if request.param not in EXAMPLES:
        pytest.fail(f"{request.param} has no example: add one to tests/contract/adapter_examples.py")
    if EXAMPLES[request.param].needs is not None:
        pytest.importorskip(EXAMPLES[request.param].needs)
    return request.param


@pytest.fixture(scope="module")
def builder(path: str, tmp_path_factory: pytest.TempPathFactory) -> DetectorBuilder:
    return make_builder(path, tmp_path_factory.mktemp("example"))


def build(builder: DetectorBuilder, *, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Detector:
    torch.manual_seed(seed)
    return builder.build(classes)


@pytest.fixture
def detector(builder: DetectorBuilder) -> Detector:
    return build(builder)


@pytest.fixture(scope="module")
def trained(path: str, builder: DetectorBuilder) -> tuple[Detector, list[float]]:
    """A detector after some steps on some images whose boxes are all of one class, and the task loss of each step."""
    require(path, "losses")
    detector = build(builder).train()
    batch = make_batch([*SIZES, *SIZES][: EXAMPLES[path].images])
    optimizer = torch.optim.Adam([p for p in detector.parameters() if p.requires_grad], lr=EXAMPLES[path].learning_rate)
    losses = []
    for step in range(EXAMPLES[path].steps):
        torch.manual_seed(step)
        loss = total(detector(batch, want=LOSSES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return detector.eval(), losses


@pytest.fixture(scope="module")
def pair(path: str, builder: DetectorBuilder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Detector]:
    """Student and teacher of one kind; another kind's student where this one only teaches."""
    student = builder
    if "losses" in EXAMPLES[path].lacks:
        student = make_builder(STUDENT, tmp_path_factory.mktemp("student"))
    return build(student), build(builder, seed=1)


def test_builders_are_discovered() -> None:
    found = discover()
    assert {"drkd.adapters.torchvision.RetinaNetBuilder", "drkd.adapters.hooked_builder.HookedBuilder"} <= set(found)
    assert not any("PyramidBuilder" in name for name in found)
    missing = missing_examples()
    assert not missing, f"add examples of {missing} to tests/contract/adapter_examples.py"
    unknown = sorted({path.partition("#")[0] for path in EXAMPLES} - set(found))
    assert not unknown, (
        f"tests/contract/adapter_examples.py has examples of {unknown}, which drkd.adapters does not have"
    )


@pytest.mark.parametrize("width", [96, 64])
def test_features_lie_at_the_declared_strides(path: str, detector: Detector, width: int) -> None:
    detector.expect_image_size(64)
    spec = detector.spec
    assert spec.class_names == CLASSES
    assert len({level.name for level in spec.levels}) == len(spec.levels)
    assert [level.stride for level in spec.levels] == sorted(level.stride for level in spec.levels)
    batch = make_batch([(64, width), (50, width), (64, 40)])
    output = detector.eval()(batch, want=FEATURES)
    assert batch.image_size == (64, width) and not output.losses
    for level, found in zip(spec.levels, output.features, strict=True):
        rows, columns = found.tensor.shape[2:]
        assert found.name == level.name and found.tensor.shape[:2] == (len(batch), level.channels)
        assert (found.stride_y, found.stride_x) == (64 / rows, width / columns)
        # A cell more or less at the border: sizes that are no multiple of the stride are rounded.
        assert abs(rows - 64 / level.stride) <= 1
        assert abs(columns - (64 if EXAMPLES[path].square else width) / level.stride) <= 1


def test_a_teachers_features_are_not_waited_for(path: str, detector: Detector) -> None:
    """On a GPU the host would wait for the device; `test_no_wait.py` has the methods."""
    teacher, batch = detector.eval(), make_batch([(64, 64)] * 2 if EXAMPLES[path].square else SIZES)
    with torch.no_grad():
        expected = teacher(batch, want=FEATURES)  # the first one may prepare
        with HostMustNotWait():
            found = teacher(batch, want=FEATURES)
    assert [level.tensor.shape for level in found.features] == [level.tensor.shape for level in expected.features]


def test_its_body_is_named(detector: Detector) -> None:
    """What a student does not inherit from its teacher: some of the model, the layer that reads the image included."""
    state = detector.model.state_dict()
    body = [name for name in state if name.startswith(detector.body_names)]
    assert 0 < len(body) < len(state)
    assert next(name for name, tensor in state.items() if tensor.ndim == 4 and tensor.shape[1] == 3) in body


def test_task_losses_fall(trained: tuple[Detector, list[float]]) -> None:
    losses = trained[1]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


def test_labels_come_back_as_they_went_in(path: str, trained: tuple[Detector, list[float]]) -> None:
    require(path, "detections")
    strength = torch.zeros(len(CLASSES))
    for found in trained[0].detect(make_batch()):
        assert found.labels.dtype == torch.int64 and found.labels.ge(0).all() and found.labels.lt(len(CLASSES)).all()
        best = found.scores.topk(min(20, len(found.scores))).indices
        strength.index_add_(0, found.labels[best], found.scores[best])
    assert strength.argmax() == LABEL, strength


def test_detections_are_in_px_of_the_original_images(path: str, trained: tuple[Detector, list[float]]) -> None:
    require(path, "detections")
    batch = make_batch([(64, 96), (50, 96), (64, 40)])
    larger = replace(batch, original_sizes=tuple((2 * height, 3 * width) for height, width in batch.sizes))
    for once, scaled, (height, width) in zip(
        trained[0].detect(batch), trained[0].detect(larger), batch.sizes, strict=True
    ):
        assert len(once.boxes) > 0
        assert once.boxes.dtype == once.scores.dtype == torch.float32
        assert once.scores.equal(once.scores.sort(descending=True).values)
        assert once.boxes.ge(0).all() and once.boxes.le(torch.tensor([width, height, width, height]) + 1e-3).all()
        torch.testing.assert_close(scaled.boxes, once.boxes * torch.tensor([3.0, 2.0, 3.0, 2.0]), atol=1e-3, rtol=1e-4)
        assert scaled.labels.equal(once.labels)


def test_detecting_needs_eval_mode(path: str, detector: Detector) -> None:
    require(path, "detections")
    with pytest.raises(ValueError, match="eval mode"):
        detector.train().detect(make_batch())


def test_what_it_does_not_have_is_refused(detector: Detector) -> None:
    with pytest.raises(ValueError, match="want"):
        detector(make_batch(), want=frozenset({"telepathy"}))  # type: ignore[arg-type]


def test_what_its_example_says_it_lacks_is_refused(
    path: str, builder: DetectorBuilder, detector: Detector, tmp_path: Path
) -> None:
    """So an example cannot opt out of what its detector can do."""

    def load() -> None:
        save_student(tmp_path / "student.pt", detector, builder=builder, image_settings=SETTINGS)
        load_detector(tmp_path / "student.pt")

    attempts: dict[Ability, Callable[[], object]] = {
        "losses": lambda: detector(make_batch(), want=LOSSES),
        "detections": lambda: detector.detect(make_batch()),
        "loading": load,
    }
    detector.eval()
    for ability in EXAMPLES[path].lacks:
        with pytest.raises(ValueError) as refusal:
            attempts[ability]()
        assert 40 < len(str(refusal.value)) < 900 and "\n" not in str(refusal.value)


def test_losses_in_eval_mode_change_no_state(path: str, detector: Detector) -> None:
    require(path, "losses")
    detector.eval()
    before = copy.deepcopy(detector.state_dict())
    output = detector(make_batch(), want=BOTH)
    assert total(output).isfinite() and output.features
    assert same_state(before, detector.state_dict())
    assert not any(part.training for part in detector.modules())
    assert list(detector.state_dict()) == [f"model.{name}" for name in detector.model.state_dict()]


def test_images_without_boxes(path: str, detector: Detector) -> None:
    require(path, "losses")
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    batch = make_batch()
    for targets in ((nothing,) * 4, (batch.targets[0], nothing, nothing, nothing)):
        loss = total(detector.train()(replace(batch, targets=targets), want=LOSSES))
        assert loss.isfinite()
        loss.backward()


def test_a_copy_is_another_detector(detector: Detector) -> None:
    batch = make_batch()
    twin = copy.deepcopy(detector.eval())
    expected = [level.tensor.clone() for level in twin(batch, want=FEATURES).features]
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.zero_()
    for level, before in zip(twin(batch, want=FEATURES).features, expected, strict=True):
        assert level.tensor.equal(before)


def test_saved_and_loaded(path: str, builder: DetectorBuilder, trained: tuple[Detector, list[float]], tmp_path: Path):
    require(path, "loading")
    file = tmp_path / "student.pt"
    save_student(file, trained[0], builder=builder, image_settings=SETTINGS)
    content = torch.load(file, weights_only=True)
    assert list(content["state_dict"]) == list(trained[0].model.state_dict())
    options = EXAMPLES[path].load or {}
    batch = make_batch()
    expected = trained[0].detect(batch)
    loaded = load_detector(file, **options)
    assert loaded.spec == trained[0].spec and not loaded.training
    order = (2, 0, 1)
    turned = load_detector(file, class_names=[CLASSES[label] for label in order], **options)
    for before, after, other in zip(expected, loaded.detect(batch), turned.detect(batch), strict=True):
        torch.testing.assert_close(after.boxes, before.boxes)
        torch.testing.assert_close(after.scores, before.scores)
        assert after.labels.equal(before.labels)
        assert torch.tensor(order)[other.labels].equal(before.labels)


def _distilled(method: type[KDMethod], pair: tuple[Detector, Detector]) -> Iterator[tuple[str, str]]:
    """What is wrong with distilling this pair, if anything."""
    student, teacher = pair
    try:
        distiller = Distiller(
            student, teacher, lambda ours, theirs: method(ours, theirs, **ARGUMENTS.get(method.__name__, {}))
        )
    except DrkdError as error:
        if not 40 < len(str(error)) < 900 or "\n" in str(error):
            yield "no readable reason", str(error)
        if method.needs == FEATURES:
            yield "a method on features was refused", str(error)
        return
    student.zero_grad()
    losses = distiller.train()(make_batch(label=None))
    if not any(name.startswith("kd/") for name in losses) or not all(value.isfinite() for value in losses.values()):
        yield "losses", str(losses)
    torch.stack([value.float() for value in losses.values()]).sum().backward()
    if not any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters()):
        yield "gradient", "none reaches the student"


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.__name__)
def test_distilled_or_refused_with_a_reason(method: type[KDMethod], pair: tuple[Detector, Detector]) -> None:
    teacher = pair[1]
    before = copy.deepcopy(teacher.state_dict())
    assert not list(_distilled(method, pair))
    assert same_state(before, teacher.state_dict())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    assert hooks(pair[0]) == hooks(teacher) == 0
