"""What every distillation method promises: each class that `drkd.methods` exports goes through the same cases."""

import math
from dataclasses import replace

import pytest
import torch
from no_wait import HostMustNotWait
from toys import ToyDetector

import drkd.methods
from drkd.contracts import BoxTargets, DetectionBatch, DetectorOutput, DetectorSpec, FeatureLevel, FeatureMap, KDMethod
from drkd.engine.distiller import Distiller
from drkd.methods import DRKD, PKD

# Arguments of the classes that cannot be built from two specs alone.
ARGUMENTS = {
    "Combination": {"methods": {"relations": DRKD, "features": PKD}, "factors": {"features": 0.5}},
    "MismatchedTeacher": {"method": DRKD},
}
# Their documented batch norm (paper, released code) needs more than one value a channel in training.
BATCH_NORM = {"PaperDRKD", "ReleasedDRKD"}
# Relation logits as in the paper, unscaled: their softmax carries bf16's rounding into the value.
COARSE_UNDER_BF16 = {"PaperDRKD", "ReleasedDRKD"}

SIZE = (64, 96)
NONE = torch.zeros(0, 4)
ONE = torch.tensor([[3.0, 4.0, 30.0, 40.0]])
# Overlapping, equal, partly outside, wholly outside, inverted, without area, the whole image.
MANY = torch.tensor(
    [
        [3.0, 4, 30, 40],
        [10, 10, 60, 50],
        [10, 10, 60, 50],
        [90, 60, 200, 300],
        [-80, -90, -20, -30],
        [40, 40, 20, 20],
        [5, 5, 5, 5],
        [0, 0, 96, 64],
        [-40, 20, 20, 30],
    ]
)
STUDENT = {"p3": (8, 8, 12), "p4": (8, 4, 6), "p5": (8, 2, 3)}
TEACHER = {"t2": (16, 16, 24), "t3": (16, 8, 12), "t4": (16, 4, 6), "t5": (16, 2, 3)}
UNEVEN = {"u3": (16, 9, 14), "u4": (16, 5, 7), "u5": (16, 2, 4)}


def features_only():
    for name in drkd.methods.__all__:
        exported = getattr(drkd.methods, name)
        if isinstance(exported, type) and issubclass(exported, KDMethod) and exported.needs == {"features"}:
            yield exported


METHODS = pytest.mark.parametrize("method", list(features_only()))
BOXES = pytest.mark.parametrize(
    "boxes", [[MANY, ONE], [NONE, MANY], [ONE, NONE], [NONE, NONE]], ids=["both", "second", "first", "neither"]
)


def spec(levels, size=SIZE):
    return DetectorSpec(
        tuple(
            FeatureLevel(name, channels, math.sqrt(size[0] / height * size[1] / width))
            for name, (channels, height, width) in levels.items()
        ),
        ("thing",),
    )


def build(method, student=STUDENT, teacher=TEACHER, *, seed=0, size=SIZE):
    torch.manual_seed(seed)
    return method(spec(student, size), spec(teacher, size), **ARGUMENTS.get(method.__name__, {}))


def output(levels, *, seed, batch=2, size=SIZE, dtype=torch.float32):
    torch.manual_seed(seed)
    return DetectorOutput(
        tuple(
            FeatureMap(
                name,
                torch.randn(batch, channels, height, width).to(dtype).requires_grad_(),
                size[0] / height,
                size[1] / width,
            )
            for name, (channels, height, width) in levels.items()
        )
    )


def outputs(student=STUDENT, teacher=TEACHER, **options):
    return output(student, seed=1, **options), output(teacher, seed=2, **options)


def batch_of(boxes, size=SIZE):
    count = len(boxes)
    targets = tuple(
        BoxTargets(image, torch.zeros(len(image), dtype=torch.int64), torch.zeros(len(image), dtype=torch.bool))
        for image in boxes
    )
    return DetectionBatch(torch.zeros(count, 3, *size), (size,) * count, (size,) * count, targets, tuple(range(count)))


def run(kd, maps, boxes, *, size=SIZE):
    torch.manual_seed(3)  # for those that draw masks or filters
    return kd(*maps, batch_of(boxes, size))


def check_backward(kd, maps, terms):
    torch.stack(list(terms.values())).sum().backward()
    student, teacher = maps
    assert all(level.tensor.grad is None for level in teacher.features)
    for name, parameter in kd.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} is not used"
            assert parameter.grad.isfinite().all(), name
    gradients = [level.tensor.grad for level in student.features]
    assert any(gradient is not None for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def test_methods_are_discovered():
    found = {method.__name__ for method in features_only()}
    assert {"CWD", "DRKD", "FGD", "FGFI", "MGD", "NLD", "PKD", "Combination", "FitNet", "MismatchedTeacher"} <= found


@METHODS
def test_declarations(method):
    kd = build(method)
    families = {name.partition("/")[0] for name in run(kd, outputs(), [MANY, ONE])}
    assert set(kd.weights) == families
    assert set(kd.minimum_boxes) <= families
    assert min(kd.weights.values()) > 0
    assert isinstance(kd.balanced, bool) and kd.warmup_steps == 0


@METHODS
@BOXES
def test_terms_and_gradients(method, boxes):
    kd, maps = build(method), outputs()
    terms = run(kd, maps, boxes)
    assert list(terms) == list(run(kd, maps, [MANY, MANY])), "the set of names changes with the boxes"
    assert {name.partition("/")[2] for name in terms} <= set(STUDENT)
    for name, term in terms.items():
        assert term.ndim == 0 and term.dtype == torch.float32 and term.isfinite() and term >= 0, name
    check_backward(kd, maps, terms)


@METHODS
@BOXES
def test_a_term_has_a_gradient_where_it_says_so(method, boxes):
    kd, (student, teacher) = build(method), outputs()
    terms = run(kd, (student, teacher), boxes)
    most = max(len(image) for image in boxes)
    for family, needed in {family: kd.minimum_boxes.get(family, 0) for family in kd.weights}.items():
        total = torch.stack([term for name, term in terms.items() if name.partition("/")[0] == family]).sum()
        tensors = [level.tensor for level in student.features]
        gradients = torch.autograd.grad(total, tensors, retain_graph=True, allow_unused=True)
        size = sum(gradient.abs().sum() for gradient in gradients if gradient is not None)
        assert (size > 0) == (most >= needed), family


@METHODS
def test_maps_of_other_sizes(method):
    kd, maps = build(method, teacher=UNEVEN), outputs(teacher=UNEVEN)
    check_backward(kd, maps, run(kd, maps, [MANY, ONE]))


@METHODS
def test_equal_channels(method):
    wide = {name: (16, height, width) for name, (_, height, width) in STUDENT.items()}
    kd, maps = build(method, student=wide), outputs(student=wide)
    check_backward(kd, maps, run(kd, maps, [MANY, ONE]))


@METHODS
def test_batch_of_one(method):
    kd, maps = build(method), outputs(batch=1)
    check_backward(kd, maps, run(kd, maps, [MANY]))


@METHODS
def test_one_pixel_of_one_image(method):
    levels, size = {"a": (8, 2, 2), "b": (8, 1, 1)}, (32, 32)
    kd, maps = build(method, levels, levels, size=size), outputs(levels, levels, batch=1, size=size)
    if method.__name__ in BATCH_NORM:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            run(kd, maps, [MANY], size=size)
        return
    check_backward(kd, maps, run(kd, maps, [MANY], size=size))


@METHODS
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_maps(method, value):
    kd, maps = build(method), outputs()
    with torch.no_grad():
        for level in (*maps[0].features, *maps[1].features):
            level.tensor.fill_(value)
    check_backward(kd, maps, run(kd, maps, [MANY, ONE]))


@METHODS
def test_autocast(method):
    kd = build(method)
    plain = run(kd, outputs(), [MANY, ONE])
    maps = outputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = run(kd, maps, [MANY, ONE])
    for name, term in terms.items():
        assert term.dtype == torch.float32, name
        if method.__name__ not in COARSE_UNDER_BF16:
            assert term.item() == pytest.approx(plain[name].item(), rel=0.1, abs=1e-3), name
    check_backward(kd, maps, terms)


@METHODS
def test_half_precision_maps_without_autocast(method):
    kd, maps = build(method), outputs(dtype=torch.bfloat16)
    terms = run(kd, maps, [MANY, ONE])
    assert all(term.dtype == torch.float32 for term in terms.values())
    check_backward(kd, maps, terms)


@METHODS
def test_double_precision_stays(method):
    kd = build(method)
    plain = run(kd, outputs(), [MANY, ONE])
    maps = outputs(dtype=torch.float64)
    terms = run(kd.double(), maps, [MANY, ONE])
    for name, term in terms.items():
        assert term.dtype == torch.float64, name
        # The released random filter draws other numbers in double precision.
        if method.__name__ != "ReleasedDRKD":
            assert term.item() == pytest.approx(plain[name].item(), rel=1e-3, abs=1e-6), name
    check_backward(kd, maps, terms)


@METHODS
def test_channels_last(method):
    kd, maps = build(method), outputs()
    plain = run(kd, maps, [MANY, ONE])
    last = [
        DetectorOutput(
            tuple(
                FeatureMap(
                    level.name,
                    level.tensor.detach().to(memory_format=torch.channels_last).requires_grad_(),
                    level.stride_y,
                    level.stride_x,
                )
                for level in side.features
            )
        )
        for side in maps
    ]
    terms = run(kd, last, [MANY, ONE])
    for name, term in terms.items():
        assert term.item() == pytest.approx(plain[name].item(), rel=1e-4, abs=1e-7), name
    check_backward(kd, last, terms)


@METHODS
def test_state_dict_round_trip(method):
    kd, other, maps = build(method), build(method, seed=9), outputs()
    other.load_state_dict(kd.state_dict())
    kd.eval(), other.eval()
    expected = run(kd, maps, [MANY, ONE])
    for name, term in run(other, maps, [MANY, ONE]).items():
        assert term.equal(expected[name]), name


@METHODS
@pytest.mark.parametrize("boxes", [[MANY, ONE], [NONE, NONE]], ids=["boxes", "none"])
def test_nothing_waits_for_the_device(method, boxes):
    kd, maps = build(method), outputs()
    with HostMustNotWait():
        terms = run(kd, maps, boxes)
        torch.stack(list(terms.values())).sum().backward()


@METHODS
def test_the_distiller_balances_it(method):
    torch.manual_seed(0)
    student, teacher = ToyDetector(8), ToyDetector(16, seed=1)
    kd = method(student.spec, teacher.spec, **ARGUMENTS.get(method.__name__, {}))
    distiller = Distiller(student, teacher, kd)
    batch = replace(batch_of([MANY / 3, ONE / 3], (32, 32)), images=torch.rand(2, 3, 32, 32))
    losses = distiller(batch)
    assert {name for name in losses if name.startswith("kd/")} == {f"kd/{family}" for family in kd.weights}
    for family, ratio in distiller.monitor.ratios.items():
        assert ratio > 0, family
        if kd.balanced:
            assert ratio.item() == pytest.approx(kd.weights[family], rel=1e-3), family
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.trainable_parameters())
