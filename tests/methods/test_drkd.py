"""DRKD as a whole: terms, weights, edge cases, presets."""

import inspect

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
from drkd.methods import DRKD, FeatureHint, PaperDRKD, ReleasedDRKD
from drkd.methods.levels import spec_of_maps

SIZE = (64, 96)
METHODS = pytest.mark.parametrize("method", [DRKD, PaperDRKD, ReleasedDRKD])
NONE = torch.zeros(0, 4)
ONE = torch.tensor([[3.0, 4.0, 30.0, 40.0]])
MANY = torch.tensor([[3.0, 4, 30, 40], [10, 10, 60, 50], [10, 10, 60, 50], [90, 60, 200, 300], [5, 5, 5, 5]])


def pyramid(channels, strides, *, batch=2, seed=0, size=SIZE):
    torch.manual_seed(seed)
    return {
        f"p{stride}": torch.randn(
            batch, channels, max(size[0] // stride, 1), max(size[1] // stride, 1), requires_grad=True
        )
        for stride in strides
    }


def build(method=DRKD, **options):
    student, teacher = pyramid(8, (8, 16, 32)), pyramid(16, (4, 8, 16, 32), seed=1)
    torch.manual_seed(2)
    return method.for_features(student, teacher, image_size=SIZE, **options), student, teacher


def check_gradients(kd, student, teacher):
    assert all(tensor.grad is None for tensor in teacher.values())
    for name, parameter in kd.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(tensor.grad.isfinite().all() for tensor in student.values())


@METHODS
def test_terms_are_bare_scalars_of_a_fixed_set_of_names(method):
    kd, student, teacher = build(method)
    names = [f"pixel_relation/p{s}" for s in (8, 16, 32)]
    names += [f"{family}/p{s}" for family in ("instance_relation", "instance") for s in (8, 16)]
    for boxes in ([MANY, ONE], [NONE, NONE]):
        terms = kd.from_features(student, teacher, boxes, image_size=SIZE)
        assert list(terms) == names
        assert all(term.ndim == 0 and term.dtype == torch.float32 for term in terms.values())
    expected = sum(kd.weights[name.split("/")[0]] * term.item() for name, term in terms.items())
    assert kd.total(terms).item() == pytest.approx(expected, rel=1e-5)


@METHODS
@pytest.mark.parametrize("boxes", [[MANY, ONE], [NONE, MANY], [ONE, ONE], [NONE, NONE]])
@pytest.mark.parametrize("side", ["joint", "shared", "frozen", "fixed"])
def test_gradients_are_finite_and_reach_every_parameter(method, boxes, side):
    kd, student, teacher = build(method, teacher_side=side)
    terms = kd.from_features(student, teacher, boxes, image_size=SIZE)
    kd.total(terms).backward()
    check_gradients(kd, student, teacher)
    most = max(len(image) for image in boxes)
    for name, term in terms.items():
        family = name.split("/")[0]
        assert (term.item() > 0) == (most >= kd.minimum_boxes.get(family, 0)), name


@pytest.mark.parametrize("distance", ["mse", "rms"])
@pytest.mark.parametrize("boxes", [[MANY, ONE], [NONE, MANY], [NONE, NONE]])
def test_with_a_share_on_objects_gradients_are_as_finite(boxes, distance):
    kd, student, teacher = build(pixel_object_share=0.5, pixel_distance=distance)
    kd.total(kd.from_features(student, teacher, boxes, image_size=SIZE)).backward()
    check_gradients(kd, student, teacher)


def test_the_default_trains_adapters_and_filters_and_no_ruler():
    kd, _, _ = build()
    trained = {name for name, parameter in kd.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("adapters.") or ".teacher_filter." in name for name in trained)
    fixed = {name for name, parameter in kd.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in fixed} == {"pixel_losses", "relation_losses"}
    shared, _, _ = build(teacher_side="shared")
    assert all(parameter.requires_grad for parameter in shared.parameters())


def test_forward_equals_from_features():
    kd, student, teacher = build()
    batch = DetectionBatch(
        torch.zeros(2, 3, *SIZE),
        (SIZE, SIZE),
        (SIZE, SIZE),
        tuple(BoxTargets(b, torch.zeros(len(b), dtype=torch.int64), torch.zeros(len(b)).bool()) for b in (MANY, ONE)),
        (1, 2),
    )
    outputs = [
        DetectorOutput(tuple(FeatureMap(n, t, SIZE[0] / t.shape[2], SIZE[1] / t.shape[3]) for n, t in maps.items()))
        for maps in (student, teacher)
    ]
    direct = kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE)
    for name, term in kd(*outputs, batch).items():
        assert term.equal(direct[name])


@pytest.mark.parametrize("separable", [False, True])
def test_an_adapter_of_nine_cells_starts_as_one_of_a_single_cell(separable):
    student, teacher = pyramid(16, (8, 16)), pyramid(16, (8, 16), seed=1)
    terms, sizes = [], []
    for size in (1, 3):
        torch.manual_seed(2)
        more = {"adapter_size": size, "adapter_separable": separable and size > 1}
        kd = DRKD.for_features(student, teacher, image_size=SIZE, relation_filter="off", **more)
        sizes.append(sum(entry.numel() for entry in kd.adapters.parameters()))
        torch.manual_seed(3)  # what is drawn for an adapter is not what the graph's modules are compared by
        for entry in [*kd.pixel_losses.parameters(), *kd.relation_losses.parameters()]:
            torch.nn.init.normal_(entry, std=0.1)
        terms.append(kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE))
    assert sizes == [2 * (16 * 16 + 16), 2 * (16 * 16 + 16 + 16 * 9 if separable else 16 * 16 * 9 + 16)]
    for name, term in terms[0].items():
        torch.testing.assert_close(terms[1][name], term)
    sum(terms[1].values()).backward()
    assert all(entry.grad is not None and entry.grad.any() for entry in kd.adapters.parameters())


def test_an_adapter_of_one_cell_cannot_be_parted():
    student = pyramid(16, (8, 16))
    with pytest.raises(ValueError, match="Expected an adapter_size above 1 with adapter_separable"):
        DRKD.for_features(student, student, image_size=SIZE, adapter_separable=True)


@pytest.mark.parametrize("options", [{}, {"adapter_size": 2}, {"shared_adapter": False}, {"adapter_init": "none"}])
def test_an_adapter_size_that_is_none_is_refused(options):
    student = pyramid(16, (8, 16))
    if options:
        with pytest.raises(ValueError, match="Expected an odd adapter_size"):
            DRKD.for_features(student, student, image_size=SIZE, **{"adapter_size": 3, **options})
    else:
        DRKD.for_features(student, student, image_size=SIZE, adapter_size=5)


@pytest.mark.parametrize("off", ["pixel_weight", "relation_weight", "instance_weight"])
def test_a_term_of_weight_zero_is_not_built(off):
    kd, student, teacher = build(**{off: 0.0})
    family = {"pixel_weight": "pixel_relation", "relation_weight": "instance_relation", "instance_weight": "instance"}
    terms = kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE)
    assert {name.split("/")[0] for name in terms} == set(kd.weights) == set(family.values()) - {family[off]}
    assert set(kd.minimum_boxes) <= set(kd.weights)
    modules = {"pixel_weight": kd.pixel_losses, "relation_weight": kd.relation_losses}
    assert len(modules.get(off, kd.instance_losses)) == 0
    kd.total(terms).backward()
    check_gradients(kd, {n: t for n, t in student.items() if t.grad is not None}, teacher)


def test_weights_out_of_range():
    with pytest.raises(ValueError, match="above 0"):
        build(pixel_weight=0.0, relation_weight=0.0, instance_weight=0.0)
    with pytest.raises(ValueError, match="at least 0"):
        build(pixel_weight=-1.0)


def test_equal_features_give_zero():
    student = pyramid(8, (8, 16, 32))
    teacher = {name: tensor.detach().clone() for name, tensor in student.items()}
    kd = DRKD.for_features(student, teacher, image_size=SIZE)
    terms = kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE)
    assert all(term.item() == pytest.approx(0, abs=1e-6) for term in terms.values())
    kd.total(terms).backward()
    assert all(tensor.grad.abs().max() < 1e-6 for tensor in student.values())


@pytest.mark.parametrize("scale", [0.1, 13.0])
def test_default_does_not_depend_on_the_size_of_features(scale):
    kd, student, teacher = build()
    terms = kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE)
    scaled = {name: tensor * scale + 1 for name, tensor in teacher.items()}
    for name, term in kd.from_features(student, scaled, [MANY, ONE], image_size=SIZE).items():
        assert term.item() == pytest.approx(terms[name].item(), rel=5e-3, abs=1e-6)


def test_batch_of_one_with_maps_of_one_pixel():
    size = (32, 32)
    student, teacher = (pyramid(8, (8, 16, 32), batch=1, seed=seed, size=size) for seed in (0, 1))
    kd = DRKD.for_features(student, teacher, image_size=size, instance_levels=None)
    kd.total(kd.from_features(student, teacher, [MANY], image_size=size)).backward()
    check_gradients(kd, student, teacher)


@METHODS
def test_autocast(method):
    kd, student, teacher = build(method, **({} if method is DRKD else {"relation_filter": "off"}))
    boxes = [MANY, ONE]
    plain = kd.from_features(student, teacher, boxes, image_size=SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = [{name: tensor.bfloat16() for name, tensor in maps.items()} for maps in (student, teacher)]
        terms = kd.from_features(*half, boxes, image_size=SIZE)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.item() == pytest.approx(plain[name].item(), rel=0.1, abs=1e-3)
    kd.total(terms).backward()
    check_gradients(kd, student, teacher)


def test_channels_last():
    kd, student, teacher = build()
    plain = kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE)
    last = [{n: t.to(memory_format=torch.channels_last) for n, t in maps.items()} for maps in (student, teacher)]
    for name, term in kd.from_features(*last, [MANY, ONE], image_size=SIZE).items():
        assert term.item() == pytest.approx(plain[name].item(), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("filter_mode", ["learned", "off"])
def test_order_of_images_does_not_matter(filter_mode):
    kd, student, teacher = build(relation_filter=filter_mode)
    plain = kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE)
    turned = [{name: tensor.flip(0) for name, tensor in maps.items()} for maps in (student, teacher)]
    for name, term in kd.from_features(*turned, [ONE, MANY], image_size=SIZE).items():
        assert term.item() == pytest.approx(plain[name].item(), rel=1e-4, abs=1e-7)


def test_relations_show_what_is_compared():
    kd, student, teacher = build()
    relations = kd.relations(student, teacher, [MANY, NONE], image_size=SIZE)
    assert [relation.name for relation in relations] == ["p8", "p16", "p32"]
    assert relations[0].student_map.shape == relations[0].teacher_map.shape == (2, 16, 8, 12)
    torch.testing.assert_close(relations[0].teacher_matrix[0].sum(dim=1), torch.ones(5))
    assert relations[0].student_matrix[1].eq(0).all()
    assert relations[2].student_matrix is None


def test_levels_can_be_chosen():
    kd, student, teacher = build(levels=["p16", "p32"], pixel_levels=1, instance_levels=None)
    terms = kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE)
    assert set(terms) == {"pixel_relation/p16"} | {
        f"{f}/{p}" for f in ("instance_relation", "instance") for p in ("p16", "p32")
    }
    with pytest.raises(ValueError, match="missing p16"):
        kd.from_features({"p8": student["p8"]}, teacher, [MANY, ONE], image_size=SIZE)
    with pytest.raises(DrkdError, match="p99"):
        build(levels=["p99"])


def test_sizes_of_the_graph_are_given_a_level():
    kd, _, _ = build(nodes=(4, 8), states=[6, 12])
    assert [loss.student_unit.node_mixing.in_features for loss in kd.pixel_losses] == [4, 8, 8]
    assert [loss.student_unit.state_update.in_features for loss in kd.pixel_losses] == [6, 12, 12]
    with pytest.raises(ValueError, match="graph nodes"):
        build(nodes=())


def test_presets_change_defaults_only():
    signatures = [inspect.signature(method).parameters for method in (DRKD, PaperDRKD, ReleasedDRKD)]
    for other in signatures[1:]:
        assert list(other) == list(signatures[0])
        assert all(p.annotation == signatures[0][name].annotation for name, p in other.items())
    released, paper = signatures[2], signatures[1]
    assert [released[f"{n}_weight"].default for n in ("pixel", "relation", "instance")] == [1e-3, 4e-3, 2.4e-3]
    assert not released["balanced"].default
    assert (paper["instance_target"].default, paper["relation_filter"].default) == ("matrix", "learned")


@pytest.mark.parametrize("method", [DRKD, PaperDRKD, ReleasedDRKD])
def test_every_argument_of_a_preset_arrives(method):
    choices = {
        "pixel_weight": 3.0,
        "relation_weight": 2.0,
        "instance_weight": 4.0,
        "warmup_steps": 7,
        "pixel_levels": 2,
        "instance_levels": 1,
        "roi_size": 2,
        "roi_sampling_ratio": 1,
        "embed_channels": 5,
        "logit_scale": 0.3,
        "across_images": True,
    }
    kd, _, _ = build(method, **choices)
    assert kd.weights == {"pixel_relation": 3.0, "instance_relation": 2.0, "instance": 4.0}
    assert (kd.warmup_steps, kd.roi_size, kd.roi_sampling_ratio) == (7, 2, 1)
    assert (len(kd.pixel_losses), len(kd.instance_losses)) == (2, 1)
    relation = kd.relation_losses[0]
    assert relation.across_images and relation.student_relation.logit_scale == 0.3
    assert relation.student_relation.row.out_features == 5


@pytest.mark.parametrize("standardised", [True, False])
def test_hint(standardised):
    student, teacher = pyramid(8, (8, 16, 32)), pyramid(16, (4, 8, 16), seed=1)
    specs = [spec_of_maps(maps, image_size=SIZE) for maps in (student, teacher)]
    kd = FeatureHint(*specs, standardise=standardised)
    outputs = [DetectorOutput(tuple(FeatureMap(n, t, 1, 1) for n, t in maps.items())) for maps in (student, teacher)]
    batch = DetectionBatch(
        torch.zeros(2, 3, *SIZE),
        (SIZE,) * 2,
        (SIZE,) * 2,
        (BoxTargets(NONE, NONE[:, 0], NONE[:, 0].bool()),) * 2,
        (1, 2),
    )
    terms = kd(*outputs, batch)
    assert list(terms) == ["hint/p8", "hint/p16"]
    sum(terms.values()).backward()
    assert all(tensor.grad is None for tensor in teacher.values())
    assert all(parameter.grad is not None for parameter in kd.parameters())
    same = FeatureHint(specs[0], specs[0], standardise=standardised)
    assert list(same.parameters()) == []
    assert all(term.item() == 0 for term in same(outputs[0], outputs[0], batch).values())
    with pytest.raises(ValueError, match="above 0"):
        FeatureHint(*specs, weight=0.0)


def test_hint_by_hand():
    student = {"p1": torch.zeros(1, 1, 1, 2)}
    teacher = {"p1": torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)}
    spec = spec_of_maps(student, image_size=(1, 2))
    outputs = [DetectorOutput(tuple(FeatureMap(n, t, 1, 1) for n, t in maps.items())) for maps in (student, teacher)]
    batch = DetectionBatch(torch.zeros(0, 3, 1, 2), (), (), (), ())
    assert FeatureHint(spec, spec, standardise=False)(*outputs, batch)["hint/p1"].item() == 12.5
    # A constant student channel is 0 after standardising, the teacher's is (-1, 1): half of mean 1.
    assert FeatureHint(spec, spec)(*outputs, batch)["hint/p1"].item() == pytest.approx(0.5, rel=1e-3)


TERMS = [f"pixel_relation/p{s}" for s in (8, 16, 32)]
TERMS += [f"{family}/p{s}" for family in ("instance_relation", "instance") for s in (8, 16)]


@pytest.mark.parametrize("name", TERMS)
def test_every_term_can_be_learned(name):
    """Student maps that are free to move approach the teacher's, one term at a time: no term is dead."""
    kd, student, teacher = build()
    optimiser = torch.optim.Adam([*student.values(), *kd.parameters()], lr=0.02)
    history = []
    for _ in range(60):
        term = kd.from_features(student, teacher, [MANY, ONE], image_size=SIZE)[name]
        history.append(term.item())
        optimiser.zero_grad()
        term.backward()
        optimiser.step()
    assert history[-1] < 0.7 * history[0]


def _most_held(run):
    """Most bytes that the tensors made by a call held at once, and those that are left."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = profiler.profiler.kineto_results.events()
    held = most = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += change
        most = max(most, held)
    return most, held, kept


@pytest.mark.parametrize("distance", ["mse", "rms"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_drkd_holds_is_counted_in_maps_of_the_finest_level(share, distance):
    # The step's memory where the maps are large (docs/speed.md): what a new line keeps or copies shows here.
    levels = tuple(FeatureLevel(f"p{stage}", 256, 2.0**stage) for stage in (2, 3, 4))
    spec = DetectorSpec(levels, ("thing",), predictions=PredictionLayout("regions"))
    torch.manual_seed(0)
    kd = DRKD(spec, spec, pixel_object_share=share, pixel_distance=distance)
    sides = {level.name: int(256 / level.stride) for level in levels}
    ours, theirs = (
        {name: torch.randn(2, 256, n, n).to(memory_format=torch.channels_last) for name, n in sides.items()}
        for _ in range(2)
    )
    for feature in ours.values():
        feature.requires_grad_()
    boxes = [torch.tensor([[10.0, 10.0, 100.0, 100.0]])] * 2
    finest = ours["p2"].nbytes

    def forward():
        return kd.total(kd.from_features(ours, theirs, boxes, image_size=(256, 256)))

    forward().backward()
    for feature in ours.values():
        feature.grad = None
    kd.zero_grad()
    most, held, total = _most_held(forward)
    assert 2 < held / finest < 4.2
    assert most / finest < 4.2
    most, _, _ = _most_held(total.backward)
    # On top of what the forward pass has left.
    assert most / finest < 2.2


def test_the_parameters_are_where_the_students_maps_are():
    maps = {"a": torch.rand(1, 8, 8, 8, device="meta")}
    kd = DRKD.for_features(maps, maps, image_size=(64, 64))
    assert {tensor.device.type for tensor in (*kd.parameters(), *kd.buffers())} == {"meta"}


def test_missing_maps_are_named_before_anything_else():
    kd = DRKD.for_features(*[{"a": torch.rand(1, 8, 8, 8)}] * 2, image_size=(64, 64))
    with pytest.raises(ValueError, match="Expected student features named a, missing a"):
        kd.from_features({}, {"a": torch.rand(1, 8, 8, 8)}, [torch.zeros(0, 4)], image_size=(64, 64))
