"""CrossKD, LogitKD, DeFeat and, where Ultralytics is installed, LD on real detectors; LD on predictions by hand too."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from tests.adapters.yolos import build_yolo, lively
from torch.utils._python_dispatch import TorchDispatchMode

from drkd.adapters import FasterRCNNBuilder, FCOSBuilder, RetinaNetBuilder
from drkd.adapters.torchvision_predictions import RegionRecorder
from drkd.contracts import (
    BoxTargets,
    DensePredictions,
    DetectionBatch,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    FeatureLevel,
    FeatureMap,
    HeadFeatures,
    NotApplicableError,
    PredictionLayout,
)
from drkd.engine import Distiller
from drkd.losses import align_scale, bin_divergence
from drkd.methods import DRKD, LD, Combination, CrossKD, DeFeat, FeatureHint, LogitKD, PaperDRKD

CLASSES = ("cat", "dog", "cup")
BOXES = [[[4.0, 5.0, 40.0, 44.0], [30.0, 20.0, 62.0, 60.0], [10.0, 30.0, 22.0, 41.0]], [[2.0, 3.0, 50.0, 38.0]]]
NONE = [[], []]
COMMON = {"backbone": "resnet18", "width": 0.25, "fpn_channels": 32}
SERVED = {"retinanet": (CrossKD, LogitKD, DeFeat), "fcos": (CrossKD, LogitKD, DeFeat), "faster_rcnn": (LogitKD, DeFeat)}
NEEDS_ULTRALYTICS = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the optional extra ultralytics")
# After a sign #, how the teacher differs from the student but for its weights.
PAIRS = pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, method) for family, methods in SERVED.items() for method in methods),
        *((f"{family}#wide", LogitKD) for family in SERVED),
        pytest.param("yolo", LD, marks=NEEDS_ULTRALYTICS),
    ],
)
COMPARED = [(family, method) for family in SERVED for method in (CrossKD, LogitKD) if method in SERVED[family]]
ON_PREDICTIONS = pytest.mark.parametrize(("family", "method"), COMPARED)


def detector(family, *, seed, classes=CLASSES, **options):
    if family == "yolo":
        return lively(build_yolo("yolo11n.yaml", classes)) if seed else build_yolo("yolov8n.yaml", classes)
    torch.manual_seed(seed)
    options = {**COMMON, **options}
    if family == "faster_rcnn":
        small = {"representation_size": 32, "rpn_batch_size": 32, "roi_batch_size": 32}
        few = {"rpn_pre_nms_train": 100, "rpn_post_nms_train": 50}
        options = {"anchor_sizes": ((8,), (16,), (32,), (48,), (64,)), **small, **few, **options}
    elif family == "retinanet":
        options = {"extra": "none", "anchor_sizes": ((12, 16), (24, 32), (48, 64)), **options}
    else:
        options = {"extra": "none", **options}
    builder = {"retinanet": RetinaNetBuilder, "fcos": FCOSBuilder, "faster_rcnn": FasterRCNNBuilder}[family]
    built = builder(**options).build(classes)
    if seed:
        with torch.no_grad():
            for name, parameter in built.model.named_parameters():
                if "head" in name and parameter.ndim > 1:
                    parameter.normal_(std=0.05)
            if family == "fcos":
                # Distances are cut at zero, and two empty boxes do not overlap.
                built.model.head.regression_head.bbox_reg.bias.fill_(2.0)
    return built


def pair(family, **options):
    family, _, difference = family.partition("#")
    student = detector(family, seed=0, **options).train()
    wider = {"fpn_channels": 64} if difference == "wide" else {}
    return student, detector(family, seed=1, **{**options, **wider}).requires_grad_(False).eval()


def batch_of(boxes=BOXES, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 64), (50, 60))[: len(boxes)]]
    targets = [
        {"boxes": torch.tensor(own).view(-1, 4), "labels": torch.arange(len(own)) % len(CLASSES)} for own in boxes
    ]
    return DetectionBatch.from_lists(images, targets)


def outputs(kd, student, teacher, batch):
    ours = student(batch, want=kd.needs | {"losses"})
    with torch.no_grad():
        theirs = teacher(batch, want=kd.needs if kd.teacher_needs is None else kd.teacher_needs)
    return ours, theirs


def run(kd, student, teacher, batch):
    torch.manual_seed(5)
    ours, theirs = outputs(kd, student, teacher, batch)
    return kd(ours, theirs, batch), ours


def gradient_sizes(term, output):
    maps = [level.tensor for level in output.features]
    found = torch.autograd.grad(term, maps, retain_graph=True, allow_unused=True)
    return [0.0 if gradient is None else gradient.abs().sum().item() for gradient in found]


@PAIRS
@pytest.mark.parametrize("boxes", [BOXES, [[], BOXES[1]], NONE, BOXES[:1]], ids=["both", "second", "none", "one image"])
def test_terms_reach_the_students_pyramid_and_nothing_of_the_teacher(family, method, boxes):
    student, teacher = pair(family)
    kd = method(student.spec, teacher.spec)
    before = copy.deepcopy(teacher.state_dict())
    terms, output = run(kd, student, teacher, batch_of(boxes))
    assert {name.split("/")[0] for name in terms} == set(kd.weights)
    for name, term in terms.items():
        assert term.ndim == 0 and term.dtype == torch.float32 and term.isfinite(), name
    most = max(len(own) for own in boxes)
    for name in kd.weights:
        total = sum(term for key, term in terms.items() if key.split("/")[0] == name)
        sizes = gradient_sizes(total, output)
        assert all(math.isfinite(size) for size in sizes)
        assert (sum(sizes) > 0) == (most >= kd.minimum_boxes.get(name, 0)), name
        if most < kd.minimum_boxes.get(name, 0):
            assert total.item() == 0
    sum(terms.values()).backward()
    for parameter in (*student.parameters(), *kd.parameters()):
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert all(parameter.grad is not None for parameter in kd.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters()) and not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@ON_PREDICTIONS
def test_a_student_that_is_the_teacher_has_nothing_to_learn(family, method):
    teacher = detector(family, seed=1).requires_grad_(False).eval()
    student = copy.deepcopy(teacher).requires_grad_(True).eval()
    kd = method(student.spec, teacher.spec)
    terms, output = run(kd, student, teacher, batch_of())
    other, compared = run(kd, detector(family, seed=2).eval(), teacher, batch_of())
    for name, term in terms.items():
        assert term.item() < 1e-4 * other[name].item()
        # The others have a kink there, and the gradient of a kink is a sign, also of rounding.
        if method is LogitKD and name == "classification":
            assert sum(gradient_sizes(term, output)) < 1e-2 * sum(gradient_sizes(other[name], compared))


@PAIRS
def test_half_precision(family, method):
    student, teacher = pair(family)
    kd = method(student.spec, teacher.spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms, output = run(kd, student, teacher, batch_of())
        total = sum(terms.values()) + sum(output.losses.values())
    total.backward()
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    body = [p for name, p in student.model.named_parameters() if name.startswith(student.body_names)]
    assert body and any(p.grad is not None for p in body)


@PAIRS
def test_channels_last(family, method):
    student, teacher = (entry.eval() for entry in pair(family))
    kd, batch = method(student.spec, teacher.spec), batch_of()
    plain, _ = run(kd, student, teacher, batch)
    for entry in (student, teacher):
        entry.to(memory_format=torch.channels_last)
    moved, _ = run(kd, student, teacher, replace(batch, images=batch.images.to(memory_format=torch.channels_last)))
    for name, term in plain.items():
        assert moved[name].item() == pytest.approx(term.item(), rel=1e-3, abs=1e-6)


class NoHostSync(TorchDispatchMode):
    """Refuses operations that make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item"):
            raise RuntimeError(f"{name} waits for the device")
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise RuntimeError(f"{name} by a mask waits for the device")
        return func(*args, **(kwargs or {}))


@PAIRS
@pytest.mark.parametrize("boxes", [BOXES, NONE])
def test_nothing_waits_for_the_device(family, method, boxes):
    student, teacher = pair(family)
    kds, batch = [method(student.spec, teacher.spec)], batch_of(boxes)
    if method is LogitKD:
        kds.append(LogitKD(student.spec, teacher.spec, share=0.5))
    for kd in kds:
        _without_waiting(kd, student, teacher, batch)


def _without_waiting(kd, student, teacher, batch):
    ours, theirs = outputs(kd, student, teacher, batch)
    if theirs.region_head is not None:
        # torchvision's own pooling asks which level each region belongs to.
        found, seen = theirs.region_head(ours.regions.regions), len(torch.cat(ours.regions.regions))

        def head(regions):
            kept = len(torch.cat(regions))
            assert kept <= seen
            return replace(found, logits=found.logits[:kept], boxes=found.boxes[:kept])

        theirs = replace(theirs, region_head=head)
    with NoHostSync():
        sum(kd(ours, theirs, batch).values()).backward()


@pytest.mark.parametrize("boxes", [BOXES, NONE])
def test_the_teachers_head_sees_few_regions_without_an_object(boxes):
    student, teacher = pair("faster_rcnn")
    kd, batch = LogitKD(student.spec, teacher.spec), batch_of(boxes)
    ours, theirs = outputs(kd, student, teacher, batch)
    heads, sampler = student.model.roi_heads, student.model.roi_heads.fg_bg_sampler
    most = int(sampler.batch_size_per_image * sampler.positive_fraction)
    assert ours.regions.matched_at_most == most
    counts = [len(entry) for entry in ours.regions.regions]
    assert max(counts) > most, "the case is of no use with so few regions"
    seen = []

    def head(regions):
        seen.extend(len(entry) for entry in regions)
        return theirs.region_head(regions)

    got = kd(ours, replace(theirs, region_head=head), batch)
    assert seen == [min(count, most) for count in counts]
    # The same terms as of all regions, since those that are left out are background.
    whole = replace(ours, regions=replace(ours.regions, matched_at_most=None))
    for name, term in kd(whole, theirs, batch).items():
        torch.testing.assert_close(got[name], term)
        assert (term > 0) == (boxes is BOXES)
    heads.fg_bg_sampler = torch.nn.Identity()
    assert RegionRecorder(heads).matched_at_most is None


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize(
    ("boxes", "asked"), [(BOXES, 0), ([[], BOXES[1]], 1), (NONE, 0)], ids=["both", "second", "none"]
)
def test_a_share_of_the_images_goes_through_the_teachers_head(family, boxes, asked):
    student, teacher = pair(family)
    kd, every, batch = (
        LogitKD(student.spec, teacher.spec, share=0.5),
        LogitKD(student.spec, teacher.spec),
        batch_of(boxes),
    )
    ours, theirs = outputs(kd, student, teacher, batch)
    seen = []
    if family == "faster_rcnn":
        # What the others have would be background to a method that looks at all.
        counts = [len(entry) for entry in ours.regions.regions]
        labels = [*ours.regions.labels.split(counts)]
        labels[1 - asked] = torch.full_like(labels[1 - asked], len(CLASSES))
        alone = replace(ours, regions=replace(ours.regions, labels=torch.cat(labels)))

        def region_head(regions):
            seen.extend(len(entry) > 0 for entry in regions)
            return theirs.region_head(regions)

        watched = replace(theirs, region_head=region_head)
    else:
        assignment = ours.assignment.clone()
        assignment[1 - asked] = -1
        alone = replace(ours, assignment=assignment)

        def head_tail(classification, regression, *, after):
            assert after == 0 and all(len(entry) == 1 for entry in (*classification, *regression))
            seen.extend(torch.equal(classification[0][0], theirs.features[0].tensor[row]) for row in range(2))
            return theirs.head_tail(classification, regression, after=after)

        watched = replace(theirs, head_tail=head_tail)
    got = kd(ours, watched, batch)
    assert seen == [asked == 0, asked == 1]
    want = outputs(every, student, teacher, batch)[1]
    for name, term in every(alone, want, batch).items():
        torch.testing.assert_close(got[name], term, rtol=1e-4, atol=1e-6)
        assert (term > 0) == (boxes is not NONE)
    sum(got.values()).backward()
    with pytest.raises(ValueError, match="share above 0"):
        LogitKD(student.spec, teacher.spec, share=0.0)


@pytest.mark.parametrize("family", SERVED)
def test_a_share_of_less_than_an_image_leaves_passes_out(family):
    student, teacher = pair(family)
    batch = batch_of()
    alone = LogitKD(student.spec, teacher.spec, share=0.25)
    torch.manual_seed(5)  # two-stage students sample
    ours, theirs = outputs(alone, student, teacher, batch)
    expected = alone(ours, theirs, batch)
    for number, factor in enumerate([0, 2, 0, 2, 0]):
        alone.begin_pass(number, measured=False)
        for name, term in alone(ours, theirs, batch).items():
            torch.testing.assert_close(term, factor * expected[name])
    alone.begin_pass(4, measured=True)
    assert all(torch.equal(term, expected[name]) for name, term in alone(ours, theirs, batch).items())


def _first_image(output):
    """What was computed for a batch's first image."""
    inside = output.head_features
    branches = (inside.classification, inside.regression)
    cut = (tuple(tuple(entry[:1] for entry in maps) for maps in branch) for branch in branches)
    predictions = replace(output.predictions, logits=output.predictions.logits[:1], boxes=output.predictions.boxes[:1])
    assignment = None if output.assignment is None else output.assignment[:1]
    return replace(output, predictions=predictions, assignment=assignment, head_features=HeadFeatures(*cut))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_a_share_of_the_images_goes_through_the_teachers_head_in_crosskd(family, align):
    student, teacher = pair(family)
    batch = batch_of()
    kd = CrossKD(student.spec, teacher.spec, share=0.5, align=align)
    assert kd.teacher_needs == {"features", "head_tail"}
    want = kd.needs | {"features", "predictions", "head_features", "head_tail", "assignment"}
    ours, theirs = student(batch, want=want), teacher(batch, want=want - {"assignment"})
    every = CrossKD(student.spec, teacher.spec, align=align)
    fields = ("images", "sizes", "original_sizes", "targets", "image_ids")
    first = replace(batch, **{field: getattr(batch, field)[:1] for field in fields})
    expected = every(_first_image(ours), _first_image(theirs), first)
    got = kd(ours, replace(theirs, predictions=None, head_features=None), batch)
    for name, term in expected.items():
        assert term > 0
        torch.testing.assert_close(got[name], term, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(count, every.shared_counts()[name]) for name, count in kd.shared_counts().items())
    sum(got.values()).backward()
    with pytest.raises(ValueError, match="share above 0"):
        CrossKD(student.spec, teacher.spec, share=1.5)
    # Background teaches too: the first image is asked about, whether it has boxes or not.
    bare = batch_of(boxes=[[], BOXES[1]])
    ours, theirs = student(bare, want=want), teacher(bare, want=want - {"assignment"})
    first = replace(bare, **{field: getattr(bare, field)[:1] for field in fields})
    expected = every(_first_image(ours), _first_image(theirs), first)
    for name, term in kd(ours, theirs, bare).items():
        torch.testing.assert_close(term, expected[name], rtol=1e-5, atol=1e-7)
    assert expected["classification"] > 0
    sparse = CrossKD(student.spec, teacher.spec, share=0.25, align=align)
    for number, factor in enumerate([0, 2, 0, 2]):
        sparse.begin_pass(number, measured=False)
        for name, term in sparse(ours, theirs, batch).items():
            torch.testing.assert_close(term, factor * expected[name], rtol=1e-5, atol=1e-7)


def test_the_distiller_tells_drkds_response_which_passes_to_leave_out():
    student, teacher = pair("retinanet")
    distiller = Distiller(
        student, teacher, partial(DRKD, response_weight=1.0), calibration_steps=6, monitor_interval=7, dead_after=1
    ).train()
    asked = []
    for _ in range(12):
        losses = distiller(batch_of())
        sum(losses.values()).backward()
        asked.append(float(losses["kd/response_classification"].detach()) > 0)
    # Measured at 0 and 5 (calibration) and at 7 (monitoring); every second one besides.
    assert [number for number, found in enumerate(asked) if found] == [0, 1, 3, 5, 7, 9, 11]
    with torch.no_grad():
        assert float(distiller(batch_of())["kd/response_classification"]) > 0, "nothing is left out of a validation"


@pytest.mark.parametrize("response", ["cross_head", "logits"])
def test_a_response_in_a_part_of_the_run_asks_the_teachers_head_there_only(response):
    student, teacher = pair("retinanet")
    asked = {"response": response, "response_weight": 1.0, "response_share": 1.0}
    heads = [name for name, module in teacher.named_modules() if "head" in name and isinstance(module, torch.nn.Conv2d)]
    calls = []
    teacher.get_submodule(heads[0]).register_forward_hook(lambda *_: calls.append(True))

    def heard(total_steps, *, passes=12, accumulate=1, member=False, **options):
        method = partial(DRKD, **asked, **options)
        if member:
            method = partial(Combination, methods={"a": method})
        distiller = Distiller(
            *(student, teacher, method),
            calibration_steps=2,
            monitor_interval=10,
            accumulate=accumulate,
            total_steps=total_steps,
        ).train()
        found = []
        term = "kd/a.response_classification" if member else "kd/response_classification"
        for number in range(passes):
            calls.clear()
            losses = distiller(batch_of())
            sum(losses.values()).backward()
            if float(losses[term].detach()) > 0:
                found.append(number)
            assert bool(calls) == (number in found)
        with torch.no_grad():
            assert float(distiller(batch_of())[term]) > 0, "nothing is left out of a validation"
        return found

    # Measured at 0 (calibration) and 10 (monitoring), whatever the span.
    assert heard(12, response_span=(0.5, 0.75)) == [0, 6, 7, 8, 10]
    assert heard(12, response_span=[0.75, 1], passes=14) == [0, 9, 10, 11, 12, 13], "a span to the end has no end"
    assert heard(6, response_span=[0.5, 0.75], passes=10, accumulate=2) == [0, 6, 7, 8, 9]
    assert heard(6, response_span=(0.5, 0.75), passes=5, member=True) == [0, 3, 4]
    assert heard(None, response_span=[0, 1], passes=3) == [0, 1, 2]
    with pytest.raises(DrkdError, match="nobody says how long the run is: expected `total_steps` of Distiller"):
        heard(None, response_span=(0.5, 0.75))


@pytest.mark.parametrize("span", [(0.5, 0.5), (-0.1, 0.5), (0.5, 1.1), (0.75, 0.5), (0.5,), (0, 0.5, 1), 0.5, "ab"])
def test_a_span_that_is_none_is_refused(span):
    student, teacher = pair("retinanet")
    message = re.escape(f"as [begin, end] with 0 <= begin < end <= 1, got {span}")
    for method in (CrossKD, LogitKD):
        with pytest.raises(ValueError, match=message):
            method(student.spec, teacher.spec, span=span)
    for weight in (0.0, 1.0):
        with pytest.raises(ValueError, match=message):
            DRKD(student.spec, teacher.spec, response_weight=weight, response_span=span)


@PAIRS
@pytest.mark.parametrize("balanced", [True, False])
def test_the_distiller_runs_three_steps(family, method, balanced):
    student, teacher = pair(family)
    distiller = Distiller(
        student,
        teacher,
        lambda ours, theirs: method(ours, theirs, balanced=balanced),
        calibration_interval=1,
        monitor_interval=1,
    ).train()
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=1e-3)
    before = copy.deepcopy(teacher.state_dict())
    for step in range(3):
        torch.manual_seed(step)
        losses = distiller(batch_of(seed=step))
        assert {name for name in losses if name.startswith("kd/")} == {
            f"kd/{name}" for name in distiller.method.weights
        }
        assert all(value.isfinite() for value in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        for name, ratio in distiller.monitor.ratios.items():
            assert ratio > 0, name
            if balanced and step == 0 and name != "decoupled":
                assert ratio.item() == pytest.approx(1.0, rel=1e-3), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@PAIRS
def test_the_teacher_computes_no_more_than_is_needed(family, method):
    student, teacher = pair(family)
    asked = {}
    for name, entry in (("student", student), ("teacher", teacher)):
        plain = entry.forward
        entry.forward = lambda batch, *, want, plain=plain, name=name: (
            asked.update({name: want}) or plain(batch, want=want)
        )
    distiller = Distiller(student, teacher, method)
    distiller(batch_of())
    kd = distiller.method
    assert asked == {"student": kd.needs | {"losses"}, "teacher": kd.teacher_needs}
    if method is not DeFeat:
        assert "features" not in asked["teacher"]


@pytest.mark.parametrize("method", [CrossKD, LogitKD, LD])
def test_pairs_of_different_kinds_are_refused(method):
    specs = {family: detector(family, seed=0).spec for family in SERVED}
    for student in SERVED:
        for teacher in SERVED:
            if student == teacher and method in SERVED[student]:
                continue
            with pytest.raises(DrkdError, match=r"expects.*(DRKD or PKD|CrossKD or LogitKD)"):
                Distiller(detector(student, seed=0), detector(teacher, seed=1), method)
            with pytest.raises(DrkdError, match=student):
                method(specs[student], specs[teacher])
    blind = replace(specs["retinanet"], predictions=None)
    with pytest.raises(DrkdError):
        method(blind, specs["retinanet"])


@pytest.mark.parametrize("method", [CrossKD, LogitKD])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"anchor_sizes": ((12,), (24,), (48,))},
            "as many anchors a cell, got 6 .student. and 3 .teacher. on level p3",
        ),
        ({"anchor_sizes": ((12, 20), (24, 32), (48, 64))}, "equal anchors, got sides of 16 x 8, 22 x 12"),
        ({"stages": (1, 2, 3)}, "same strides, got 8, 16, 32 px .student. and 4, 8, 16 px .teacher."),
        ({"classes": ("owl", "bat", "ufo")}, "got none of them .the teacher's: owl, bat, ufo"),
    ],
)
def test_grids_and_classes_that_do_not_fit_are_refused(method, options, message):
    with pytest.raises(DrkdError, match=message):
        method(detector("retinanet", seed=0).spec, detector("retinanet", seed=1, **options).spec)


def test_heads_that_do_not_fit_are_refused():
    student, teacher = detector("fcos", seed=0).spec, detector("fcos", seed=1, fpn_channels=64).spec
    with pytest.raises(DrkdError, match=r"same width, got 32 .* and 64 .*fpn_channels: 64.*LogitKD"):
        CrossKD(student, teacher)
    LogitKD(student, teacher)
    shallow = detector("fcos", seed=0, num_convs=1).spec
    with pytest.raises(DrkdError, match=r"after convolution 2 .* got 1 .student. and 4 .teacher"):
        CrossKD(shallow, student)
    assert CrossKD(shallow, student, after=1).after == 1
    # The authors' place is not what the user asked for: such a pair the method is not for, and DRKD goes without.
    with pytest.raises(NotApplicableError, match="after convolution 2"):
        CrossKD(shallow, student)
    assert DRKD(shallow, student, response="cross_head", response_weight=None).response is None
    with pytest.raises(DrkdError) as caught:
        CrossKD(shallow, student, after=3)
    assert not isinstance(caught.value, NotApplicableError)
    blind = replace(student, predictions=replace(student.predictions, missing_classes=("dog",)))
    with pytest.raises(DrkdError, match="none for dog"):
        LogitKD(blind, student)
    assert LogitKD(student, blind).classes.names == ("cat", "cup")


@pytest.mark.parametrize("family", SERVED)
def test_boxes_of_classes_that_the_teacher_lacks_are_nothing_to_compare(family):
    """As the guard against silence must know: there are boxes, and no term has a gradient."""
    student, teacher = pair(family)
    names = student.spec.class_names
    layout = replace(teacher.spec.predictions, missing_classes=names[:1])
    kd = LogitKD(student.spec, replace(teacher.spec, predictions=layout))
    for label, expected in ((0, False), (1, True)):
        batch = batch_of(BOXES)
        targets = tuple(replace(target, labels=torch.full_like(target.labels, label)) for target in batch.targets)
        batch = replace(batch, targets=targets)
        ours, theirs = outputs(kd, student, teacher, batch)
        terms = kd(ours, theirs, batch)
        assert set(kd.compared_counts()) == set(terms)
        assert [bool(count > 0) for count in kd.compared_counts().values()] == [expected] * 2
        assert all((term > 0) == expected for term in terms.values())


def test_regions_of_one_stage_detectors_are_refused():
    spec, two_stage = detector("retinanet", seed=0).spec, detector("faster_rcnn", seed=0).spec
    assert set(DeFeat(spec, two_stage).weights) == {"decoupled"}
    assert set(DeFeat(two_stage, two_stage).weights) == {"decoupled", "regions"}
    off = DeFeat(two_stage, two_stage, region_weight=0.0)
    assert set(off.weights) == {"decoupled"} and off.needs == off.teacher_needs == {"features"}
    with pytest.raises(DrkdError, match=r"retinanet\) with predictions of kind anchors.*Leave region_weight out"):
        DeFeat(spec, two_stage, region_weight=1.0)
    other = replace(two_stage, class_names=("owl", "bat", "ufo"))
    with pytest.raises(DrkdError, match=r"DeFeat with a region_weight .*got none of them"):
        DeFeat(two_stage, other)


@pytest.mark.parametrize(("family", "method"), [*COMPARED, ("faster_rcnn", DeFeat)])
def test_classes_are_matched_by_name(family, method):
    """A teacher whose classes come in another order, with one more, teaches the same."""
    student, teacher = (entry.eval() for entry in pair(family))
    shuffled = ("cup", "ufo", "cat", "dog")
    first = int(family == "faster_rcnn")
    wider = detector(family, seed=3, classes=shuffled).requires_grad_(False).eval()
    state, source = wider.model.state_dict(), teacher.model.state_dict()
    for name, value in source.items():
        if value.shape == state[name].shape:
            state[name].copy_(value)
            continue
        # The last layers: outputs come in blocks of classes (dense: inside each anchor's block).
        width = 4 if "bbox_pred" in name else 1
        ours, theirs = (
            entry.view(-1, count, width, *entry.shape[1:])
            for entry, count in ((state[name], 4 + first), (value, 3 + first))
        )
        ours[:, first + 1] = -30.0 if name.endswith("bias") else 0.0
        for place, label in enumerate(shuffled):
            if label != "ufo":
                ours[:, place + first] = theirs[:, CLASSES.index(label) + first]
        if first:
            ours[:, 0] = theirs[:, 0]
    plain, shuffled_kd = (method(student.spec, entry.spec) for entry in (teacher, wider))
    shuffled_kd.load_state_dict(plain.state_dict())
    expected, _ = run(plain, student, teacher, batch_of())
    got, _ = run(shuffled_kd, student, wider, batch_of())
    for name, term in expected.items():
        assert got[name].item() == pytest.approx(term.item(), rel=1e-4, abs=1e-7), name


def test_crosskd_leaves_out_ignored_anchors_and_counts_positives():
    student, teacher = (entry.eval() for entry in pair("retinanet"))
    kd, batch = CrossKD(student.spec, teacher.spec), batch_of()
    ours, theirs = outputs(kd, student, teacher, batch)
    full = kd(ours, theirs, batch)
    none = kd(replace(ours, assignment=torch.full_like(ours.assignment, -2)), theirs, batch)
    assert all(term.item() == 0 for term in none.values())
    background = kd(replace(ours, assignment=torch.full_like(ours.assignment, -1)), theirs, batch)
    one = torch.full_like(ours.assignment, -1)
    one[0, :2] = 0
    halved = kd(replace(ours, assignment=one), theirs, batch)
    for name, term in background.items():
        assert halved[name].item() == pytest.approx(term.item() / 2, rel=1e-4)
        assert full[name].item() != term.item()


def test_crosskd_learns_no_box_of_a_class_that_the_teacher_does_not_know():
    student, _ = (entry.eval() for entry in pair("retinanet"))
    teacher = detector("retinanet", seed=3, classes=CLASSES[:2]).requires_grad_(False).eval()
    kd, batch = CrossKD(student.spec, teacher.spec), batch_of()
    unknown = tuple(replace(entry, labels=torch.full_like(entry.labels, 2)) for entry in batch.targets)
    batch = replace(batch, targets=unknown)
    ours, theirs = outputs(kd, student, teacher, batch)

    def terms(*indices):
        assignment = torch.full_like(ours.assignment, -2)
        assignment[0, : len(indices)] = torch.tensor(indices)
        return {name: term.item() for name, term in kd(replace(ours, assignment=assignment), theirs, batch).items()}

    # Three anchors on a box that the teacher does not know: no positives, and no boxes to compare.
    lone, background = terms(0, 0, 0), terms(-1, -1, -1)
    assert lone["classification"] == pytest.approx(background["classification"], rel=1e-5) and lone["box"] == 0
    assert background["box"] > 0


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_crosskd_hands_the_teacher_nothing_that_its_activation_cannot_give(family):
    student, teacher = (entry.eval() for entry in pair(family))
    kd, batch = CrossKD(student.spec, teacher.spec), batch_of()
    ours, theirs = outputs(kd, student, teacher, batch)
    seen = []

    def tail(classification, regression, *, after):
        seen.extend([*classification, *regression])
        return theirs.head_tail(classification, regression, after=after)

    kd(ours, replace(theirs, head_tail=tail), batch)
    place = kd.after - 1
    plain = [
        align_scale(one, two)
        for one, two in zip(
            ours.head_features.classification[place], theirs.head_features.classification[place], strict=True
        )
    ]
    # Alignment alone goes below what a ReLU gives.
    assert min(entry.min() for entry in plain) < 0
    assert seen and all(entry.min() >= 0 for entry in seen)
    torch.testing.assert_close(seen[0], plain[0].clamp_min(0))


def test_crosskd_defaults_are_the_authors():
    retinanet, fcos = detector("retinanet", seed=0).spec, detector("fcos", seed=0).spec
    kd = CrossKD(retinanet, retinanet, balanced=False)
    assert (kd.after, kd.weights) == (3, {"classification": 1.0, "box": 1.0})
    kd = CrossKD(fcos, fcos, balanced=False)
    assert (kd.after, kd.weights) == (2, {"classification": 0.4, "box": 0.75})
    assert CrossKD(fcos, fcos).weights == {"classification": 1.0, "box": 1.0}
    assert "head_features" not in CrossKD(fcos, fcos, align=False).teacher_needs


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
@pytest.mark.parametrize("align", [False, True])
def test_crosskd_trains_the_head_before_the_cut_only(family, align):
    student, teacher = pair(family)
    kd = CrossKD(student.spec, teacher.spec, align=align)
    terms, _ = run(kd, student, teacher, batch_of())
    sum(terms.values()).backward()
    for branch in (student.model.head.classification_head, student.model.head.regression_head):
        step = 1 if family == "retinanet" else 3
        for index, layer in enumerate(branch.conv):
            reached = [p.grad is not None for p in layer.parameters()]
            assert all(reached) if index < kd.after * step else not any(reached)


def test_logit_kd_by_hand():
    anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0]] * 2)
    layout = PredictionLayout("anchors", (((8.0, 8.0),),))
    spec = DetectorSpec((FeatureLevel("p3", 4, 8.0),), ("cat",), "toy", layout)
    kd = LogitKD(spec, spec)
    target = DensePredictions(torch.full((1, 2, 1), 2 * math.log(3.0)), torch.ones(1, 2, 4), anchors, (2,))
    ours = DensePredictions(torch.zeros(1, 2, 1), torch.zeros(1, 2, 4), anchors, (2,))
    student = DetectorOutput(predictions=ours, assignment=torch.tensor([[0, -1]]))
    terms = kd(student, DetectorOutput(predictions=target), batch_of(BOXES[:1]))
    assert terms["box"].item() == 1.0
    assert terms["classification"].item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))


@pytest.mark.parametrize("method", [CrossKD, LogitKD])
def test_outputs_that_are_missing_are_named(method):
    spec = detector("retinanet", seed=0).spec
    with pytest.raises(ValueError, match="Expected a student with"):
        method(spec, spec)(DetectorOutput(), DetectorOutput(), batch_of())


def test_arguments_out_of_range():
    spec = detector("retinanet", seed=0).spec
    for wrong in ({"after": 0}, {"beta": -1.0}, {"class_weight": 0.0}):
        with pytest.raises(ValueError, match="Expected"):
            CrossKD(spec, spec, **wrong)
    for wrong in ({"temperature": 0.0}, {"box_weight": -1.0}):
        with pytest.raises(ValueError, match="Expected"):
            LogitKD(spec, spec, **wrong)
    for wrong in (
        {"temperature": 0.0},
        {"foreground_weight": -1.0},
        {"foreground_weight": 0.0, "background_weight": 0.0},
    ):
        with pytest.raises(ValueError, match="Expected"):
            DeFeat(spec, spec, **wrong)


BINS = 5


def bins_spec(*, bins=BINS, classes=CLASSES):
    layout = PredictionLayout("anchors", (((32.0, 32.0),),), box_bins=bins)
    return DetectorSpec((FeatureLevel("p3", 4, 8.0),), classes, "toy", layout)


def bins_output(feature, *, seed, assignment=None):
    """Predictions of one anchor of 32 px at each cell of a map (B, 4, 8, 8), from fixed random 1x1 convolutions."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(CLASSES) + 4 * BINS, 4, generator=generator).to(feature.dtype)
    values = torch.einsum("oc,bchw->bhwo", weight, feature).flatten(1, 2)
    y, x = torch.meshgrid(torch.arange(8) * 8.0, torch.arange(8) * 8.0, indexing="ij")
    centres = torch.stack([x, y], dim=-1).view(-1, 2)
    anchors = torch.cat([centres - 16, centres + 16], dim=1)
    logits, bins = values[..., : len(CLASSES)], values[..., len(CLASSES) :].unflatten(2, (4, BINS))
    dense = DensePredictions(logits, torch.zeros(len(feature), 64, 4), anchors, (64,), bins=bins)
    return DetectorOutput((FeatureMap("p3", feature, 8.0, 8.0),), predictions=dense, assignment=assignment)


@pytest.mark.parametrize("boxes", [BOXES, NONE])
def test_ld_on_predictions_by_hand(boxes):
    torch.manual_seed(0)
    kd, batch = LD(bins_spec(), bins_spec()), batch_of(boxes)
    feature = torch.randn(2, 4, 8, 8, requires_grad=True)
    assignment = torch.full((2, 64), -1)
    if boxes is BOXES:
        assignment[0, 27] = 0
        assignment[1, 18] = 0
    student = bins_output(feature, seed=1, assignment=assignment)
    theirs = torch.randn(2, 4, 8, 8, requires_grad=True)
    teacher = bins_output(theirs, seed=2)
    with NoHostSync():
        terms = kd(student, teacher, batch)
    assert set(terms) == set(kd.weights) == set(kd.minimum_boxes) == set(kd.compared_counts())
    assert all((count > 0) == (boxes is BOXES) for count in kd.compared_counts().values())
    if boxes is BOXES:
        ours, target = student.predictions, teacher.predictions
        places = torch.tensor([27, 64 + 18])
        picked = [entry.flatten(0, 1)[places] for entry in (ours.bins, target.bins, ours.logits, target.logits)]
        weight = picked[2].sigmoid().amax(dim=1, keepdim=True).expand(-1, 4)
        expected = bin_divergence(picked[0], picked[1], weight, temperature=10.0, normaliser=4.0)
        torch.testing.assert_close(terms["localization"], expected)
        torch.testing.assert_close(terms["classification"], bin_divergence(*picked[2:], temperature=2.0))
        assert terms["valuable_region"].item() > 0
    else:
        assert all(term.item() == 0 for term in terms.values())
    sum(terms.values()).backward()
    assert feature.grad.isfinite().all() and theirs.grad is None
    assert bool(feature.grad.abs().sum() > 0) == (boxes is BOXES)


def test_ld_has_no_boxes_to_teach_of_a_class_that_the_teacher_does_not_know():
    torch.manual_seed(0)
    kd = LD(bins_spec(), bins_spec(classes=("cat", "cow", "cup")))
    feature, theirs = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 4, 8, 8)
    box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    assignment = torch.full((1, 64), -1)
    assignment[0, 27] = 0
    found = {}
    for label in (0, 1):
        batch = DetectionBatch.from_lists([torch.rand(3, 64, 64)], [{"boxes": box, "labels": torch.tensor([label])}])
        teacher = bins_output(theirs, seed=2)
        with NoHostSync():
            found[label] = kd(bins_output(feature, seed=1, assignment=assignment), teacher, batch)["valuable_region"]
        assert (kd.compared_counts()["valuable_region"] > 0) == (label == 0)
    assert found[0].item() > 0 and found[1].item() == 0


def ld_terms(feature, theirs, *, assignment, batch):
    """Of predictions made from the two maps, at their precision."""
    kd = LD(bins_spec(), bins_spec())
    student = bins_output(feature, seed=1, assignment=assignment)
    return kd, kd(student, bins_output(theirs, seed=2), batch)


@pytest.mark.parametrize("boxes", [BOXES, BOXES[:1], NONE], ids=["both", "one image", "none"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "last"])
@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_ld_in_other_precisions_and_memory_formats(precision, memory_format, boxes):
    torch.manual_seed(0)
    batch, count = batch_of(boxes), len(boxes)
    maps = [torch.randn(count, 4, 8, 8) for _ in range(2)]
    assignment = torch.full((count, 64), -1)
    for row, own in enumerate(boxes):
        assignment[row, 18 + 9 * row] = 0 if own else -1
    _, expected = ld_terms(*maps, assignment=assignment, batch=batch)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    feature, theirs = (entry.to(dtype, memory_format=memory_format).requires_grad_() for entry in maps)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        kd, terms = ld_terms(feature, theirs, assignment=assignment, batch=batch)
    assert set(terms) == set(kd.weights)
    close = {"rel": 1e-4, "abs": 1e-6} if precision == "float32" else {"rel": 0.1, "abs": 1e-3}
    for name, term in terms.items():
        assert term.ndim == 0 and term.dtype == torch.float32, name
        assert term.item() == pytest.approx(expected[name].item(), **close), name
        assert (term > 0) == (boxes is not NONE), name
    sum(terms.values()).backward()
    assert feature.grad.isfinite().all() and theirs.grad is None
    assert bool(feature.grad.abs().sum() > 0) == (boxes is not NONE)


def test_ld_leaves_out_the_classes_where_there_is_one():
    """A softmax over one class is 1 whatever the logit: the term would be silent, and the run stopped for it."""
    one, feature = CLASSES[:1], torch.randn(1, 4, 8, 8)
    kd = LD(bins_spec(classes=one), bins_spec(classes=one))
    assert set(kd.weights) == {"localization", "valuable_region"}
    assignment = torch.full((1, 64), -1)
    assignment[0, 27] = 0
    outputs = [bins_output(feature, seed=seed, assignment=assignment) for seed in (1, 2)]
    outputs = [
        replace(entry, predictions=replace(entry.predictions, logits=entry.predictions.logits[..., :1]))
        for entry in outputs
    ]
    terms = kd(*outputs, batch_of(BOXES[:1]))
    assert set(terms) == set(kd.weights) == set(kd.compared_counts()) and terms["localization"] > 0
    assert set(LD(bins_spec(), bins_spec(classes=one)).weights) == set(kd.weights)


@pytest.mark.parametrize("side", [12.0, 24.0, 40.0, 96.0, 110.0, 200.0, 300.0])
def test_ld_finds_a_valuable_region_around_points_as_around_anchors(side):
    """Cells of one stride, as a YOLO has them, overlap a box of many strides too little to be worth anything."""
    spec = bins_spec()
    points = replace(spec, predictions=replace(spec.predictions, kind="points"))
    grids = [torch.cartesian_prod(*[torch.arange(0.0, 640.0, stride)] * 2) for stride in (8.0, 16.0, 32.0)]
    cells = torch.cat(
        [torch.cat([grid, grid + stride], 1) for grid, stride in zip(grids, (8.0, 16.0, 32.0), strict=True)]
    )
    box = torch.tensor([[300.0 - side / 2, 300.0 - side / 2, 300.0 + side / 2, 300.0 + side / 2]])
    batch = DetectionBatch(
        torch.zeros(1, 3, 640, 640),
        ((640, 640),),
        ((640, 640),),
        (BoxTargets(box, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.bool)),),
        (0,),
    )

    def output(seed):
        generator = torch.Generator().manual_seed(seed)
        bins = torch.randn(1, len(cells), 4, BINS, generator=generator)
        dense = DensePredictions(
            torch.zeros(1, len(cells), len(CLASSES)), torch.zeros(1, len(cells), 4), cells, (len(cells),), bins=bins
        )
        return DetectorOutput(predictions=dense, assignment=torch.full((1, len(cells)), -1))

    kd = LD(points, points)
    assert kd(output(1), output(2), batch)["valuable_region"] > 0
    kd.points = False
    assert (kd(output(1), output(2), batch)["valuable_region"] > 0) == (side <= 40.0)


def test_ld_refuses_detectors_without_bins():
    plain = detector("retinanet", seed=0).spec
    with pytest.raises(DrkdError, match=r"got 0 bins from the student \(retinanet\).*CrossKD or LogitKD"):
        LD(plain, plain)
    with pytest.raises(DrkdError, match=r"got 5 bins from the student .* and 9 from the teacher"):
        LD(bins_spec(), bins_spec(bins=9))
    assert LD(bins_spec(), bins_spec(), balanced=False).weights == {
        "localization": 0.25,
        "valuable_region": 0.25,
        "classification": 10.0,
    }


def test_methods_without_needs_of_the_teachers_ask_for_the_same():
    student, teacher = pair("retinanet")
    kd = FeatureHint(student.spec, teacher.spec)
    assert kd.teacher_needs is None
    assert Distiller(student, teacher, kd)(batch_of())["kd/hint"].isfinite()


@pytest.mark.parametrize(("family", "member"), [("retinanet", CrossKD), ("fcos", CrossKD), ("faster_rcnn", LogitKD)])
def test_a_combination_asks_each_side_for_what_its_members_need_of_it(family, member):
    student, teacher = pair(family)
    methods = {"relations": partial(DRKD, nodes=4, states=8, embed_channels=8), "response": member}
    distiller = Distiller(student, teacher, partial(Combination, methods=methods), calibration_steps=1)
    kd = distiller.method
    assert kd.needs > {"features"} and kd.teacher_needs > {"features"} and kd.needs != kd.teacher_needs
    losses = distiller.train()(batch_of())
    families = {name.partition("/")[2].partition(".")[0] for name in losses if name.startswith("kd/")}
    assert families == {"relations", "response"}
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(("family", "method"), COMPARED)
@pytest.mark.parametrize("share", [None, 1.0])
def test_drkd_hears_the_response_where_predictions_are_alike(family, method, share):
    student, teacher = pair(family)
    shares = {} if share is None else {"response_share": share}
    response = "logits" if method is LogitKD else "cross_head"
    kd = DRKD(student.spec, teacher.spec, response=response, response_weight=None, **shares)
    alone = method(student.spec, teacher.spec, share=share or 0.25)
    assert (kd.needs, kd.teacher_needs) == (alone.needs, alone.teacher_needs | {"features"})
    batch = batch_of()
    torch.manual_seed(5)  # two-stage students sample
    ours, theirs = outputs(kd, student, teacher, batch)
    terms, expected = kd(ours, theirs, batch), alone(ours, theirs, batch)
    assert {name for name in terms if name.startswith("response")} == {f"response_{name}" for name in expected}
    for name, term in expected.items():
        assert torch.equal(terms[f"response_{name}"], term)
    assert {"response_classification", "response_box"} <= set(kd.weights)
    for mine, own in (
        (kd.minimum_boxes, alone.minimum_boxes),
        (kd.shared_counts(), alone.shared_counts()),
    ):
        assert {name: mine[name] for name in mine if "response" in name} == {
            f"response_{name}": value for name, value in own.items()
        }


def test_drkd_goes_without_the_response_where_predictions_differ():
    student, teacher = detector("retinanet", seed=0), detector("faster_rcnn", seed=1)
    kd = DRKD(student.spec, teacher.spec, response_weight=None)
    assert not any(name.startswith("response") for name in kd.weights)
    assert kd.needs == {"features"}
    for response, method in (("logits", "LogitKD"), ("cross_head", "CrossKD")):
        with pytest.raises(DrkdError, match=f"{method} compares predictions"):
            DRKD(student.spec, teacher.spec, response=response, response_weight=1.0)
    with pytest.raises(ValueError, match="response out of cross_head, logits, got 'loud'"):
        DRKD(student.spec, student.spec, response="loud")


@pytest.mark.parametrize("asked", [{"response": "cross_head"}, {"response_share": 1.0}, {"response_span": (0, 0.5)}])
def test_a_response_without_a_weight_is_refused_and_not_silent(asked):
    student, teacher = pair("retinanet")
    with pytest.raises(DrkdError, match="says nothing at response_weight 0; expected a response_weight"):
        DRKD(student.spec, teacher.spec, **asked)
    with pytest.raises(DrkdError, match="says nothing at response_weight 0"):
        PaperDRKD(student.spec, teacher.spec, **asked)
    assert DRKD(student.spec, teacher.spec, **asked, response_weight=1.0).response is not None


def test_a_response_alone_pools_no_instances():
    student, teacher = pair("retinanet")
    kd = DRKD(student.spec, teacher.spec, relation_weight=0.0, instance_weight=0.0, response_weight=1.0)
    assert kd.instance_pairs == ()


@pytest.mark.parametrize(
    ("family", "pixel_weight", "distance", "share"),
    [("retinanet", 3.0, "rms", 0.0), ("fcos", 3.0, "rms", 0.0), ("faster_rcnn", 1.0, "mse", 0.5)],
)
def test_drkds_default_is_the_relations_alone_and_goes_by_stages(family, pixel_weight, distance, share):
    student, teacher = pair(family)
    kd = DRKD(student.spec, teacher.spec)
    assert kd.weights == {"pixel_relation": pixel_weight, "instance_relation": 0.1, "instance": 0.5}
    assert kd.needs == {"features"} and kd.teacher_needs is None
    assert DRKD(student.spec, teacher.spec, pixel_weight=2.0).weights["pixel_relation"] == 2
    assert (kd.pixel_losses[0].distance, kd.pixel_losses[0].object_share) == (distance, share)
    others = {name: DRKD(student.spec, teacher.spec, pixel_distance=name) for name in ("mse", "rms", "relative")}
    found = {name: own.pixel_losses[0].object_share for name, own in others.items()}
    assert found == {"mse": share, "rms": share, "relative": 0.0}
    assert DRKD(student.spec, teacher.spec, pixel_object_share=0.2).pixel_losses[0].object_share == 0.2


def test_defeat_puts_boxes_on_levels_by_their_size_in_strides():
    student, teacher = pair("retinanet")
    whole, scaled = (DeFeat(student.spec, teacher.spec, size_per_stride=number) for number in (14.0, 2.0))
    scaled.load_state_dict(whole.state_dict())
    batch = batch_of()
    ours, theirs = outputs(whole, student, teacher, batch)
    plain, other = (kd(ours, theirs, batch) for kd in (whole, scaled))
    changed = [name for name in plain if plain[name].item() != other[name].item()]
    # From the finest level, which had them all, to a coarser one.
    assert len(changed) >= 2 and next(iter(plain)) in changed
    with pytest.raises(ValueError, match="size_per_stride above 0"):
        DeFeat(student.spec, teacher.spec, size_per_stride=0.0)


def test_what_reads_labels_image_by_image_says_so() -> None:
    """It is not compiled: each number of boxes would be compiled anew."""
    layout = PredictionLayout("anchors", (((32.0, 32.0),),), box_bins=BINS, head_channels=4, head_depth=4)
    own, fewer = (
        DetectorSpec((FeatureLevel("p3", 4, 8.0),), classes, "toy", layout) for classes in (CLASSES, CLASSES[:-1])
    )
    for method, expected in ((LD, [True, True]), (CrossKD, [False, True]), (LogitKD, [False, True])):
        assert [method(own, teacher).reads_boxes for teacher in (own, fewer)] == expected
