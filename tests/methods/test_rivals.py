"""Weights, levels and assignments of the rivals; what all methods share is in the contract test."""

import inspect
import math
from dataclasses import replace

import pytest
import torch

from drkd.contracts import (
    BoxTargets,
    DetectionBatch,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    FeatureLevel,
    FeatureMap,
    PredictionLayout,
)
from drkd.methods import CWD, FGD, FGFI, MGD, NLD, PKD, DeFeat, FitNet

SPEC = DetectorSpec(tuple(FeatureLevel(f"p{i}", 8, 2.0**i) for i in range(3, 8)), ("thing",))
RIVALS = pytest.mark.parametrize(
    ("method", "term", "plain"),
    [
        (FitNet, "hint", 1.0),
        (PKD, "pkd", 10.0),
        (CWD, "cwd", 10.0),
        (FGD, "fgd", 1.0),
        (MGD, "mgd", 2e-5),
        (NLD, "nld", 1.0),
        (FGFI, "fgfi", 0.01),
    ],
)


@RIVALS
def test_weights(method, term, plain):
    assert method(SPEC, SPEC).weights == {term: 1.0}
    assert method(SPEC, SPEC, balanced=False).weights == {term: plain}
    for balanced in (True, False):
        kd = method(SPEC, SPEC, weight=0.3, balanced=balanced, warmup_steps=7)
        assert (kd.weights, kd.balanced, kd.warmup_steps) == ({term: 0.3}, balanced, 7)
    with pytest.raises(ValueError, match="above 0, got 0"):
        method(SPEC, SPEC, weight=0.0)


@RIVALS
def test_levels(method, term, plain):
    names = [pair.name for pair in method(SPEC, SPEC).pairs]
    assert names == ["p3", "p4", "p5", "p6", "p7"][: 4 if method in (PKD, NLD) else 5]
    assert [pair.name for pair in method(SPEC, SPEC, levels=["p7", "p4"]).pairs] == ["p4", "p7"]
    with pytest.raises(DrkdError, match="p9"):
        method(SPEC, SPEC, levels=["p9"])


@RIVALS
def test_a_missing_level_is_named(method, term, plain):
    batch = DetectionBatch(torch.zeros(0, 3, 8, 8), (), (), (), ())
    with pytest.raises(ValueError, match=r"student's level p3 .* got none and none"):
        method(SPEC, SPEC)(DetectorOutput(), DetectorOutput(), batch)


def loss_of(method, **options):
    return method(SPEC, SPEC, **options).losses


def plain_fgd(student, teacher, **options):
    """FGD without modules of its own but the adapters."""
    return FGD(student, teacher, relation_weight=0.0, **options)


def test_arguments_arrive():
    assert loss_of(CWD, temperature=3.0)[0].temperature == 3.0
    assert loss_of(MGD, masked_share=0.4)[0].masked_share == 0.4
    assert [loss.student_block.pool for loss in loss_of(NLD, finest_levels=None)] == [8, 4, 2, 2, 2]
    nld = loss_of(NLD, feature_weight=1.0, channel_weight=2.0, spatial_weight=3.0, relation_weight=4.0, temperature=5.0)
    assert (nld[0].weights, nld[0].temperature) == ((1.0, 2.0, 3.0, 4.0), 5.0)
    names = ("foreground_weight", "background_weight", "attention_weight", "relation_weight", "temperature")
    fgd = loss_of(FGD, **{name: float(index) for index, name in enumerate(names, 1)})[0]
    assert [getattr(fgd, name) for name in names] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [loss_of(method)[0].scale for method in (FGD, NLD, CWD)] == ["none", "none", "none"]
    assert {loss.scale for method in (FGD, NLD, CWD) for loss in loss_of(method, scale="teacher_rms")} == {
        "teacher_rms"
    }
    fgfi = loss_of(FGFI, scales=[4, 8], ratios=[1.0], threshold=0.3, anchor_style="inclusive", activation=True)[1]
    assert (fgfi.scales, fgfi.ratios, fgfi.threshold) == ((4, 8), (1.0,), 0.3)
    assert (fgfi.anchor_style, fgfi.activation) == ("inclusive", True)
    for adapting, by_default in ((FitNet, True), (PKD, False), (CWD, False), (plain_fgd, False)):
        assert bool(list(adapting(SPEC, SPEC).parameters())) is by_default
        assert list(adapting(SPEC, SPEC, always_adapt=False).parameters()) == []
        shapes = [tuple(weight.shape) for weight in adapting(SPEC, SPEC, always_adapt=True).parameters()]
        assert shapes == [(8, 8, 1, 1), (8,)] * len(adapting(SPEC, SPEC).pairs)
    with pytest.raises(ValueError, match="at least one pool"):
        NLD(SPEC, SPEC, pools=())


@pytest.mark.parametrize("method", [CWD, FGD, FGFI, FitNet, MGD, NLD, PKD])
def test_a_method_and_its_loss_have_the_same_defaults(method):
    defaults = inspect.signature(method).parameters
    for name, parameter in inspect.signature(type(loss_of(method)[0])).parameters.items():
        if name in defaults:
            # None is chosen by the student's stages: for one, what the loss has.
            chosen = defaults[name].default
            chosen = getattr(loss_of(method)[0], name) if chosen is None else chosen
            assert chosen == parameter.default, name


def test_two_stage_students_have_the_authors_numbers_for_two_stages():
    two = replace(SPEC, predictions=PredictionLayout("regions"))
    for stages, numbers, share in ((SPEC, (1e-3, 5e-4, 5e-4, 5e-6), 0.65), (two, (5e-5, 2.5e-5, 5e-5, 5e-7), 0.45)):
        fgd = FGD(stages, SPEC).losses[0]
        names = ("foreground_weight", "background_weight", "attention_weight", "relation_weight")
        assert tuple(getattr(fgd, name) for name in names) == numbers
        assert MGD(stages, SPEC).losses[0].masked_share == share
    plain = {method: method(two, SPEC, balanced=False).weights for method in (PKD, MGD, CWD, FGD)}
    assert plain == {PKD: {"pkd": 6.0}, MGD: {"mgd": 5e-7}, CWD: {"cwd": 10.0}, FGD: {"fgd": 1.0}}
    assert PKD(SPEC, SPEC, balanced=False).weights == {"pkd": 10.0}
    assert PKD(two, SPEC, weight=3.0, balanced=False).weights == {"pkd": 3.0}
    assert MGD(two, SPEC, masked_share=0.65).losses[0].masked_share == 0.65
    assert FGD(two, SPEC, attention_weight=0.0).losses[0].attention_weight == 0.0


def test_boxes_go_to_the_level_of_their_size():
    sizes = [loss.box_sizes for loss in loss_of(FGFI)]
    assert sizes == [(0.0, 224.0), (224.0, 448.0), (448.0, 896.0), (896.0, 1792.0), (1792.0, math.inf)]
    assert {loss.box_sizes for loss in loss_of(FGFI, assignment="all")} == {(0.0, math.inf)}
    assert loss_of(FGFI, size_per_stride=2.0)[1].box_sizes == (32.0, 64.0)
    with pytest.raises(ValueError, match="size, all"):
        FGFI(SPEC, SPEC, assignment="none")


def test_levels_of_one_stride_share_their_boxes():
    spec = DetectorSpec(tuple(FeatureLevel(f"l{i}", 8, stride) for i, stride in enumerate((32.0, 32.0, 64.0))), ())
    assert [loss.box_sizes for loss in FGFI(spec, spec).losses] == [(0.0, 896.0), (0.0, 896.0), (896.0, math.inf)]


def test_only_the_level_of_a_box_learns_from_it():
    image = (512, 512)
    spec = DetectorSpec(SPEC.levels[:3], ())
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        levels = [(level.name, int(level.stride)) for level in spec.levels]
        maps = [FeatureMap(name, torch.randn(1, 8, 512 // s, 512 // s), float(s), float(s)) for name, s in levels]
        outputs.append(DetectorOutput(tuple(maps)))
    boxes = torch.tensor([[100.0, 100.0, 400.0, 400.0]])
    targets = (BoxTargets(boxes, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)),)
    batch = DetectionBatch(torch.zeros(1, 3, *image), (image,), (image,), targets, (1,))
    terms = FGFI(spec, spec)(*outputs, batch)
    assert {name: term.item() > 0 for name, term in terms.items()} == {
        "fgfi/p3": False,
        "fgfi/p4": True,
        "fgfi/p5": False,
    }
    assert all(term.item() > 0 for term in FGFI(spec, spec, assignment="all")(*outputs, batch).values())


ADAPTING = pytest.mark.parametrize(
    ("method", "options"),
    [
        (FGFI, {"assignment": "all"}),
        (DeFeat, {}),
        (NLD, {}),
        (CWD, {"always_adapt": True}),
        (FGD, {"always_adapt": True}),
    ],
)


def adapters(kd):
    """What is on the student's side of each level."""
    if isinstance(kd, DeFeat):
        return list(kd.adapters)
    if isinstance(kd, NLD):
        names = ("feature_adapter", "channel_adapter", "spatial_adapter", "relation_adapter")
        return [getattr(loss, name) for loss in kd.losses for name in names]
    return [loss.align.adapter for loss in kd.losses]


@ADAPTING
def test_adapters_start_as_they_are_told(method, options):
    # Nobody can always have an adapter and none.
    without = {name: value for name, value in options.items() if name != "always_adapt"}
    kinds = {
        "identity": adapters(method(SPEC, SPEC, adapter_init="identity", **options)),
        "none": adapters(method(SPEC, SPEC, adapter_init="none", **without)),
    }
    for adapter in kinds["identity"]:
        linear = isinstance(adapter, torch.nn.Linear)
        feature = torch.randn(3, adapter.weight.shape[1], *(() if linear else (4, 5)))
        torch.testing.assert_close(adapter(feature), feature, rtol=0, atol=0)
    assert all(isinstance(adapter, torch.nn.Identity) for adapter in kinds["none"])
    assert inspect.signature(method).parameters["adapter_init"].default == "default"
    with pytest.raises(ValueError, match="identity, default, none, got 'eye'"):
        method(SPEC, SPEC, adapter_init="eye", **options)
    wider = DetectorSpec(tuple(FeatureLevel(level.name, 16, level.stride) for level in SPEC.levels), ("thing",))
    for adapter in adapters(method(SPEC, wider, adapter_init="identity", **options)):
        assert adapter.bias.eq(0).all() and adapter.weight.ne(0).any()
    with pytest.raises(ValueError, match="equal channels without an adapter"):
        method(SPEC, wider, adapter_init="none", **without)


@pytest.mark.parametrize("method", [PKD, CWD, FGD])
def test_an_adapter_asked_for_everywhere_and_nowhere_is_refused(method):
    with pytest.raises(ValueError, match="always_adapt false with adapter_init 'none'"):
        method(SPEC, SPEC, always_adapt=True, adapter_init="none")
    assert all(isinstance(adapter, torch.nn.Identity) for adapter in adapters(method(SPEC, SPEC, adapter_init="none")))


def test_fitnet_always_has_an_adapter_unless_it_is_told_none():
    assert all(isinstance(adapter, torch.nn.Conv2d) for adapter in adapters(FitNet(SPEC, SPEC)))
    assert all(isinstance(adapter, torch.nn.Identity) for adapter in adapters(FitNet(SPEC, SPEC, adapter_init="none")))


@ADAPTING
def test_an_adapter_that_starts_as_the_identity_leads_the_student_to_the_teacher(method, options):
    """A step against the gradient goes to the teacher's map; through a random basis it does not see that map."""
    spec = DetectorSpec(SPEC.levels[:2], ("thing",))
    sides = [16, 8]
    box = torch.tensor([[10.0, 10.0, 60.0, 70.0]])
    target = BoxTargets(box, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))
    image = (128, 128)
    batch = DetectionBatch(torch.zeros(2, 3, *image), (image,) * 2, (image,) * 2, (target,) * 2, (1, 2))
    found = {}
    for init in ("identity", "default"):
        torch.manual_seed(0)
        kd = method(spec, spec, adapter_init=init, **options)
        torch.manual_seed(1)
        ours, theirs = ([torch.randn(2, 8, side, side, requires_grad=True) for side in sides] for _ in range(2))
        outputs = []
        for maps in (ours, theirs):
            named = zip(spec.levels, maps, strict=True)
            outputs.append(
                DetectorOutput(tuple(FeatureMap(level.name, map_, level.stride, level.stride) for level, map_ in named))
            )
        terms = torch.stack(list(kd(*outputs, batch).values())).sum()
        step = -torch.cat([gradient.flatten() for gradient in torch.autograd.grad(terms, ours)])
        student, teacher = (torch.cat([map_.detach().flatten() for map_ in maps]) for maps in (ours, theirs))
        found[init] = [torch.cosine_similarity(step, way, dim=0).item() for way in (teacher - student, teacher)]
    assert found["identity"][0] > 0.35 and found["identity"][0] > 2 * found["default"][0]
    assert found["identity"][1] > 0.2 and abs(found["default"][1]) < 0.1
