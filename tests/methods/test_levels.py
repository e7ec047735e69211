"""Which level learns from which."""

import pytest
import torch

from drkd.contracts import BoxTargets, DetectionBatch, DetectorOutput, DetectorSpec, DrkdError, FeatureLevel, FeatureMap
from drkd.methods import CWD, DRKD, FGD, FGFI, MGD, PKD, FitNet
from drkd.methods.levels import match_levels, spec_of_maps


def pyramid(*strides):
    return DetectorSpec(tuple(FeatureLevel(f"l{i}", 8, stride) for i, stride in enumerate(strides)), ())


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((8, 16, 32), (8, 16, 32), [(0, 0), (1, 1), (2, 2)]),
        ((8, 16, 32, 64, 128), (4, 8, 16, 32, 64), [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ((32, 32, 64), (4, 8, 16, 32, 64), [(0, 3), (1, 3), (2, 4)]),
        ((32, 32, 64), (32, 32, 64), [(0, 0), (1, 1), (2, 2)]),
        ((7.9, 15.8, 300), (8, 16, 320), [(0, 0), (1, 1), (2, 2)]),
        ((32, 8), (8, 32), [(1, 0), (0, 1)]),
    ],
)
def test_levels_pair_by_stride(student, teacher, expected):
    pairs = match_levels(pyramid(*student), pyramid(*teacher))
    assert [(pair.student.name, pair.teacher.name) for pair in pairs] == [(f"l{s}", f"l{t}") for s, t in expected]


def test_named_levels_only():
    pairs = match_levels(pyramid(8, 16, 32), pyramid(8, 16, 32), names=["l2", "l0"])
    assert [pair.name for pair in pairs] == ["l0", "l2"]


def test_errors_are_readable():
    with pytest.raises(DrkdError, match=r"strides 8, 16.*strides 32, 64"):
        match_levels(pyramid(8, 16), pyramid(32, 64))
    with pytest.raises(DrkdError, match=r"p9.*only l0, l1"):
        match_levels(pyramid(8, 16), pyramid(8, 16), names=["p9"])


def test_spec_of_maps_reads_channels_and_strides():
    spec = spec_of_maps({"b": torch.zeros(1, 5, 4, 8), "a": torch.zeros(1, 3, 8, 16)}, image_size=(64, 128))
    assert spec.levels == (FeatureLevel("a", 3, 8.0), FeatureLevel("b", 5, 16.0))
    with pytest.raises(ValueError, match="'a'"):
        spec_of_maps({"a": torch.zeros(3, 8, 16)}, image_size=(64, 128))


def test_pairs_by_name_whatever_their_strides():
    pairs = match_levels(pyramid(8, 16, 32), pyramid(4, 8, 16), names={"l1": "l0", "l0": "l0"})
    assert [(pair.student.name, pair.teacher.name) for pair in pairs] == [("l0", "l0"), ("l1", "l0")]
    with pytest.raises(DrkdError, match=r"teacher's feature levels l7.*has l0, l1"):
        match_levels(pyramid(8, 16), pyramid(8, 16), names={"l0": "l7"})
    with pytest.raises(DrkdError, match=r"levels l9, but the student has only l0, l1"):
        match_levels(pyramid(8, 16), pyramid(8, 16), names={"l9": "l0"})
    with pytest.raises(DrkdError, match="an empty map"):
        match_levels(pyramid(8, 16), pyramid(8, 16), names={})


@pytest.mark.parametrize(
    ("method", "name"), [(PKD, "finest_levels"), (DRKD, "pixel_levels"), (DRKD, "instance_levels")]
)
@pytest.mark.parametrize("count", [0, -1])
def test_no_level_is_no_number_of_levels(method, name, count):
    with pytest.raises(ValueError, match=f"Expected {name} of at least 1, or None for all levels, got {count}"):
        method(pyramid(8, 16), pyramid(8, 16), **{name: count})


def test_a_map_made_smaller_is_as_loud_as_the_target():
    """A mean of four cells of noise has half the deviation: a student would be paid for smoothness."""
    torch.manual_seed(0)
    kd = DRKD(pyramid(8), pyramid(16), levels={"l0": "l0"}, relation_weight=0, instance_weight=0, adapter_init="none")
    seen = []
    kd.pixel_losses[0].student_unit.register_forward_hook(lambda unit, given, result: seen.append(given[0]))
    noise = torch.randn(2, 8, 8, 8)
    small = torch.nn.functional.avg_pool2d(noise, 2)
    terms = kd(output_of({"l0": noise}), output_of({"l0": small}), batch_of([torch.zeros(0, 4)] * 2))
    assert [given.shape[-1] for given in seen] == [4, 4]
    assert all(float(given.std(correction=0)) == pytest.approx(1, rel=1e-3) for given in seen)
    assert terms["pixel_relation/l0"] < 0.05


@pytest.mark.parametrize("method", [CWD, DRKD, FGD, FGFI, MGD, PKD, FitNet])
def test_methods_take_pairs_of_levels_of_unlike_strides(method):
    torch.manual_seed(0)
    ours, theirs = pyramid(8, 16), pyramid(4, 8, 16)
    kd = method(ours, theirs, levels={"l0": "l0", "l1": "l0"})
    student = {f"l{i}": torch.randn(2, 8, 8 // 2**i, 8 // 2**i, requires_grad=True) for i in range(2)}
    teacher = {f"l{i}": torch.randn(2, 8, 16 // 2**i, 16 // 2**i) for i in range(3)}
    boxes = [torch.tensor([[4.0, 4, 40, 50], [10, 8, 60, 30]]), torch.zeros(0, 4)]
    terms = kd(output_of(student), output_of(teacher), batch_of(boxes))
    torch.stack(list(terms.values())).sum().backward()
    heard = [name for name, feature in student.items() if feature.grad.abs().sum() > 0]
    # Coarse cells hold none of these boxes' anchors.
    assert heard == (["l0"] if method is FGFI else ["l0", "l1"])


def output_of(maps):
    strides = {name: 64 / tensor.shape[-1] for name, tensor in maps.items()}
    return DetectorOutput(
        features=tuple(FeatureMap(name, tensor, strides[name], strides[name]) for name, tensor in maps.items())
    )


def batch_of(boxes):
    targets = tuple(
        BoxTargets(own, torch.zeros(len(own), dtype=torch.int64), torch.zeros(len(own), dtype=torch.bool))
        for own in boxes
    )
    size = ((64, 64),) * len(boxes)
    return DetectionBatch(torch.zeros(len(boxes), 3, 64, 64), size, size, targets, tuple(range(len(boxes))))
