"""Which level learns from which."""

import pytest
import torch

from drkd.contracts import DetectorSpec, DrkdError, FeatureLevel
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
