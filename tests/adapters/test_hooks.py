"""Detectors that drkd does not know, seen through hooks."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.adapters.point_adapter import build, detections, losses
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from drkd.adapters.hooks import HookedDetector, wrap_model
from drkd.contracts import DetectionBatch, Detector, DrkdError
from drkd.engine.distiller import Distiller
from drkd.methods import CWD, DRKD, FGD, PKD, CrossKD
from drkd.recipes.evaluation import measure_detector

CLASSES = ("cat", "dog", "cup")
FEATURES, LOSSES, BOTH = frozenset({"features"}), frozenset({"losses"}), frozenset({"features", "losses"})


def wrap(layers: tuple[str, ...] = ("neck",), model: nn.Module | None = None, **options: Any) -> HookedDetector:
    given = {"losses": losses, "detections": detections, "class_names": CLASSES, "image_size": (64, 64), **options}
    return wrap_model(build(CLASSES) if model is None else model, layers, **given)


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class Dictionary(nn.Module):
    """A backbone that returns a dict, as Detectron2's do, in a model that returns losses or boxes by its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _Named()
        self.head = nn.Conv2d(4, 2, 1)
        self.heads_run = 0

    def forward(self, images: Tensor, targets: Any) -> Any:
        maps = self.backbone(images)
        self.heads_run += 1
        score = self.head(maps["p4"]).mean()
        if self.training:
            return {"loss_cls": score.square(), "loss_box": [score, score]}
        return [{"boxes": images.new_tensor([[1.0, 2, 30, 40]]), "scores": score[None], "labels": torch.ones(1)}] * len(
            images
        )


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p3 = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4))
        self.p4 = nn.Conv2d(4, 4, 2, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> dict[str, Any]:
        p3 = self.p3(images)
        p4 = self.relu(self.p4(p3))
        return {"p4": p4, "p3": p3, "mean": p4.mean((2, 3))}


def by_mode(model: nn.Module, batch: DetectionBatch) -> Mapping[str, Any]:
    return model(batch.images, batch.targets)


def boxes_by_mode(model: nn.Module, batch: DetectionBatch) -> Any:
    return model(batch.images, None)


def test_levels_are_found_by_one_pass(make_batch):
    model = build(CLASSES)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    detector = wrap(model=model)
    assert torch.get_rng_state().equal(random)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules()) and hooks(model) == 0
    assert [(level.name, level.channels, level.stride) for level in detector.spec.levels] == [
        ("p3", 16, 8.0),
        ("p4", 16, 16.0),
        ("p5", 16, 32.0),
    ]
    assert detector.layers == ("neck[0]", "neck[1]", "neck[2]")
    maps = detector(make_batch([(64, 96)]), want=FEATURES).features
    expected = model.extract_feat(make_batch([(64, 96)]).images)
    assert [tuple(level.tensor.shape) for level in maps] == [tuple(level.shape) for level in expected]


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (("neck[2]", "neck[0]"), ("neck[0]", "neck[2]")),
        (("neck[-1]",), ("neck[-1]",)),
        (("backbone.stages.2", "backbone.stages.1"), ("backbone.stages.1", "backbone.stages.2")),
        (("neck[1]", "backbone[0]"), ("backbone[0]", "neck[1]")),
    ],
)
def test_layers_and_their_entries(make_batch, layers, found):
    detector = wrap(layers)
    assert detector.layers == found
    batch = make_batch([(64, 96), (60, 90)])
    for level, feature in zip(detector.spec.levels, detector(batch, want=BOTH).features, strict=True):
        assert feature.tensor.shape == (2, level.channels, 64 // level.stride, 96 // level.stride)


def test_a_dict_of_maps_and_a_model_that_returns_by_its_mode(make_batch):
    model = Dictionary()
    detector = wrap(("backbone",), model, losses=by_mode, detections=boxes_by_mode)
    assert detector.layers == ("backbone[p3]", "backbone[p4]")
    batch = make_batch([(64, 96), (32, 64)])
    training = detector.train()(batch, want=BOTH).losses
    assert set(training) == {"loss_cls", "loss_box"} and all(value.ndim == 0 for value in training.values())
    statistics = model.backbone.p3[1].running_mean.clone()
    evaluated = detector.eval()(batch, want=BOTH).losses
    assert set(evaluated) == set(training) and not any(part.training for part in detector.modules())
    assert model.backbone.p3[1].running_mean.equal(statistics)
    found = detector.detect(replace(batch, original_sizes=((128, 96), (32, 64))))
    assert found[0].boxes.tolist() == [[1.0, 4.0, 30.0, 80.0]] and found[1].boxes.tolist() == [[1, 2, 30, 32]]


def test_norms_with_children_keep_their_mode(make_batch):
    model = Dictionary()
    model.backbone.p3[1] = norm = BatchNormAct2d(4)
    teacher = wrap(("backbone",), model, losses=by_mode, detections=None).eval()
    batch = make_batch([(64, 64)] * 2)
    before, first = copy.deepcopy(norm.state_dict()), teacher(batch, want=FEATURES).features
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    maps = model.backbone.p3(teacher._prepare(batch, targets=False).images)
    torch.testing.assert_close(first[0].tensor, maps)
    # A container of the user's decides by its mode, whatever container of torch it is made from.
    model.backbone.p3 = _Own(*model.backbone.p3).eval()
    teacher(batch, want=FEATURES)
    assert model.backbone.p3.seen == [True]


def test_functions_of_dropout_drop_nothing_in_eval_mode(make_batch):
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck = nn.Conv2d(3, 4, 8, 8)

        def forward(self, batch: DetectionBatch) -> Mapping[str, Any]:
            maps = nn.functional.dropout(self.neck(batch.images), 0.5, training=self.training)
            return {"loss": torch.dropout(maps, 0.5, self.training).square().mean()}

    wrapped = wrap(("neck",), Dropping(), losses=lambda model, batch: model(batch), detections=None)
    batch = make_batch([(64, 64)])

    def look() -> set[float]:
        return {float(wrapped(batch, want=LOSSES).losses["loss"]) for _ in range(3)}

    assert len(look()) == 3
    wrapped.eval()
    assert len(look()) == 1
    wrapped.train()
    assert len(look()) == 3


class _Own(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        self.seen = [self.training]
        return super().forward(images)


def test_where_features_are_enough_the_pass_ends_early(make_batch):
    batch = make_batch([(64, 64)])
    model = Dictionary()
    for training, functions in ((False, {}), (True, {}), (False, {"detections": None})):
        given = {"losses": by_mode, "detections": boxes_by_mode, **functions}
        detector = wrap(("backbone",), model, **given).train(training)
        model.heads_run = 0
        early = detector(batch, want=FEATURES).features
        assert model.heads_run == 0 and hooks(model) == 0
        full = detector(batch, want=BOTH).features
        assert model.heads_run == 1 and hooks(model) == 0
        for one, other in zip(early, full, strict=True):
            torch.testing.assert_close(one.tensor, other.tensor)


def test_a_function_for_features(make_batch):
    called = []

    def features(model: nn.Module, batch: DetectionBatch) -> Any:
        called.append(batch.image_size)
        return model.extract_feat(batch.images)

    teacher = wrap(losses=None, detections=None, features=features)
    teacher(make_batch([(64, 96)]), want=FEATURES)
    assert called == [(64, 64), (64, 96)]
    with pytest.raises(DrkdError, match="can teach but not learn"):
        teacher(make_batch([(64, 96)]), want=LOSSES)
    with pytest.raises(DrkdError, match="without a function for its detections"):
        teacher.eval().detect(make_batch([(64, 96)]))


def test_hooks_go_when_the_model_fails(make_batch):
    detector = wrap()
    batch = make_batch([(64, 64)])
    detector._losses = lambda model, batch: [model.extract_feat(batch.images), 1 / 0]
    with pytest.raises(ZeroDivisionError):
        detector(batch, want=BOTH)
    assert hooks(detector) == 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("head",), r"'head' is called 3 times .* Candidates: backbone \(stride 8, 16, 32.*neck \(stride"),
        (("head.tower",), r"'head.tower' is called 3 times"),
        (("unused",), r"'unused' is not called .* Candidates: backbone"),
        (("neck", "unused"), r"'unused' is not called"),
        (("nek",), r"has no layer 'nek'; nearest: neck"),
        (("neck[7]",), r"returns no entry '7' .* it returns \[0\], \[1\], \[2\]"),
        (("backbone.stem.0",), r"returns \(2, 8, 32, 32\).*expected a map.*Candidates"),
        (("neck!",), r"expected names such as 'neck'"),
        (("neck", "neck"), r"expected different names"),
        ((), r"at least one"),
    ],
)
def test_layers_that_will_not_do(layers, message):
    with pytest.raises(DrkdError, match=message) as caught:
        wrap(layers)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_a_map_that_is_overwritten_is_refused():
    with pytest.raises(DrkdError, match=r"'backbone.p4' returns is overwritten .* Candidates: backbone"):
        wrap(("backbone.p4",), Dictionary(), losses=by_mode, detections=boxes_by_mode)


def test_a_layer_called_again_in_training_only(make_batch):
    def twice(model: nn.Module, batch: DetectionBatch) -> Any:
        model.extract_feat(batch.images)
        return losses(model, batch)

    detector = wrap(losses=twice)
    with pytest.raises(DrkdError, match=r"'neck' is called 2 times .* Candidates"):
        detector(make_batch([(64, 64)]), want=BOTH)


def test_a_model_that_resizes_its_images_is_found_out(make_batch):
    def resized(model: nn.Module, batch: DetectionBatch) -> Any:
        return losses(model, replace(batch, images=nn.functional.interpolate(batch.images, size=(160, 160))))

    detector = wrap(losses=resized)
    with pytest.raises(DrkdError, match=r"neck\[0\] has stride 8 and should return about \(1, 16, 8, 12\)"):
        detector(make_batch([(64, 96)]), want=BOTH)


def test_a_first_pass_that_fails_says_so():
    with pytest.raises(DrkdError, match=r"first forward pass of PointDetector.*TypeError: wrong"):
        wrap(detections=lambda model, batch: (_ for _ in ()).throw(TypeError("wrong")).__next__())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({}, "expected a dict of tensors by name"),
        (torch.zeros(()), "expected a dict of tensors by name"),
        ({"loss": torch.zeros(3)}, r"expected 'loss' to be one number .* got \[\(3,\)\]"),
        ({"loss": [torch.zeros(()), 1.0]}, "expected 'loss' to be one number"),
    ],
)
def test_losses_that_are_none(make_batch, returned, message):
    with pytest.raises(DrkdError, match=message):
        wrap(losses=lambda model, batch: returned)(make_batch([(64, 64)]), want=LOSSES)


def test_detections_that_are_none(make_batch):
    batch = make_batch([(64, 64), (64, 64)])
    for returned, message in (([], "one entry for each of 2 images, got 0"), ([1, 2], r"expected boxes \(N, 4\)")):
        detector = wrap().eval()
        detector._detections = lambda model, batch, returned=returned: returned
        with pytest.raises(DrkdError, match=message):
            detector.detect(batch)


def test_labels_of_the_model_and_back(make_batch):
    seen = []

    def spied(model: nn.Module, batch: DetectionBatch) -> Any:
        seen.append([target.labels.tolist() for target in batch.targets])
        return losses(model, batch)

    def all_labels(model: nn.Module, batch: DetectionBatch) -> Any:
        model.extract_feat(batch.images)
        labels = torch.tensor([-1, 0, 2, 5, 7, 9])
        return [(torch.ones(6, 4), torch.linspace(0, 1, 6), labels)] * len(batch)

    model = build(tuple(str(index) for index in range(8)))
    detector = wrap(model=model, losses=spied, detections=all_labels, label_ids=(5, 2, 7))
    detector(make_batch([(64, 64)]), want=LOSSES)
    assert seen[-1] == [[5, 2, 7]]
    (found,) = detector.eval().detect(make_batch([(64, 64)]))
    assert found.labels.tolist() == [2, 0, 1]
    assert wrap(model=model, first_label=1).label_ids == (1, 2, 3)
    with pytest.raises(DrkdError, match="different label for each of 3 classes"):
        wrap(label_ids=(1, 1, 2))
    missing = wrap(model=model, label_ids=(5, -1, 7))
    assert missing.missing_classes == ("dog",)
    with pytest.raises(ValueError, match="no output for"):
        missing(make_batch([(64, 64)]), want=LOSSES)


def test_images_are_normalised_and_their_padding_is_zero(make_batch):
    seen = []

    def spied(model: nn.Module, batch: DetectionBatch) -> Any:
        seen.append(batch.images)
        return losses(model, batch)

    batch = make_batch([(64, 64), (32, 48)])
    detector = wrap(losses=spied, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.25, 0.5))
    detector(batch, want=LOSSES)
    expected = (batch.images[1, 0, :32, :48] - 0.5) / 0.2
    torch.testing.assert_close(seen[-1][1, 0, :32, :48], expected)
    assert not seen[-1][1, :, 32:].any() and not seen[-1][1, :, :, 48:].any()


def test_copies_and_pickles(make_batch):
    detector = wrap().eval()
    batch = make_batch([(64, 96)])
    detector(batch, want=BOTH)
    expected = detector(batch, want=FEATURES).features
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert twin.spec == detector.spec and twin.model is not detector.model
        for one, other in zip(twin(batch, want=FEATURES).features, expected, strict=True):
            assert one.tensor.equal(other.tensor)
    assert list(detector.state_dict()) == [f"model.{name}" for name in detector.model.state_dict()]


def test_nothing_is_kept_alive(make_batch):
    detector = wrap()
    batch = make_batch([(64, 96)])
    gc.collect()
    gc.disable()
    try:
        early, full = detector(batch, want=FEATURES), detector(batch, want=BOTH)
        references = [weakref.ref(maps.features[0].tensor) for maps in (early, full)]
        references += [weakref.ref(detector), weakref.ref(detector.model)]
        del early, full, detector
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()


class NoHostSync(TorchDispatchMode):
    """Refuses operations that make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item"):
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(make_batch):
    detector = wrap(image_mean=(0.5, 0.5, 0.5), first_label=0, label_ids=(2, 1, 0))
    batch = make_batch([(64, 96), (40, 50)])
    with NoHostSync():
        detector(batch, want=FEATURES)
        detector(batch, want=BOTH)


@pytest.mark.parametrize("method", [DRKD, PKD, CWD])
def test_distilled(make_batch, method):
    torch.manual_seed(0)
    student: Detector = wrap()
    teacher = wrap(("neck",), build(CLASSES, width=16, channels=24), losses=None)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher, method)
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=1e-3)
    batch = make_batch([(64, 96), (60, 80)])
    for _ in range(3):
        terms = distiller(batch)
        total = torch.stack(list(terms.values())).sum()
        assert total.isfinite()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert {name.partition("/")[0] for name in terms} == {"task", "kd"}
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if "unused" not in name)
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_in_inference_mode(make_batch):
    teacher = wrap(("neck",), build(CLASSES), losses=None, detections=torch.inference_mode()(detections))
    distiller = Distiller(wrap(), teacher, FGD)
    batch = make_batch([(64, 64)] * 2)
    torch.stack(list(distiller(batch).values())).sum().backward()
    assert all(parameter.grad is not None for parameter in distiller.method.parameters())
    plain = wrap(("neck",), teacher.model, losses=None)
    for one, two in zip(teacher(batch, want=FEATURES).features, plain(batch, want=FEATURES).features, strict=True):
        assert torch.equal(one.tensor, two.tensor)
    student = wrap(losses=torch.inference_mode()(losses))
    with pytest.raises(DrkdError, match=r"layers: neck\[0\] ran in torch.inference_mode.*Expected functions"):
        student.train()(batch, want=BOTH)
    with torch.inference_mode():
        assert student(batch, want=FEATURES).features
    # What overwrites a map is found out there too, although such tensors count no versions.
    quick = torch.inference_mode()(boxes_by_mode)
    with pytest.raises(DrkdError, match=r"'backbone.p4' returns is overwritten"):
        wrap(("backbone.p4",), Dictionary(), losses=None, detections=quick)


def test_a_method_on_predictions_says_why_not():
    with pytest.raises(DrkdError, match=r"student \(PointDetector\) with no predictions .* or a method on features"):
        Distiller(wrap(), wrap(), CrossKD)
    with pytest.raises(ValueError, match="sees through hooks"):
        wrap()(None, want=frozenset({"predictions"}))  # type: ignore[arg-type]


def test_nothing_to_run():
    with pytest.raises(DrkdError, match="expected a function that runs the model"):
        wrap_model(build(CLASSES), ("neck",))
    with pytest.raises(DrkdError, match="names of the classes"):
        wrap_model(build(CLASSES), ("neck",), detections=detections)
    with pytest.raises(DrkdError, match="image_std"):
        wrap(image_std=(1.0, 0.0, 1.0))


def test_detections_are_found_without_autocast(make_batch) -> None:
    seen: list[bool] = []

    def detections(model: nn.Module, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        seen.append(torch.is_autocast_enabled("cpu"))
        model(batch.images)
        return [
            {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
        ] * len(batch)

    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8, padding=1))
    detector = wrap_model(model, ["0"], class_names=CLASSES, detections=detections).eval()
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(detector.detect(make_batch([(64, 64)]))) == 1
    assert seen == [False]


def test_a_model_with_a_transform_of_its_own_is_not_called_with_images() -> None:
    model = build(CLASSES)
    model.transform = nn.Identity()
    cost = measure_detector(wrap(model=model), (64, 96))
    assert cost.flops > 0 and cost.image_size == (64, 96)


@pytest.mark.parametrize("given", [{"class_names": "car"}, {"layers": "neck"}])
def test_one_string_is_no_list_of_names(given: dict[str, Any]) -> None:
    with pytest.raises(DrkdError, match="expected a list of names, got one string"):
        wrap(**given)
