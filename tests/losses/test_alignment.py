"""How a student's map comes into the teacher's shape."""

import pytest
import torch

from drkd.losses import MapAdapter, make_adapter


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_identity_passes_equal_widths_through(kernel_size):
    feature = torch.randn(2, 5, 4, 6)
    assert make_adapter(5, 5, kernel_size=kernel_size)(feature).equal(feature)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_other_widths_keep_the_variance(kernel_size):
    torch.manual_seed(0)
    adapter = make_adapter(64, 256, kernel_size=kernel_size)
    out = adapter(torch.randn(2, 64, 32, 32))[:, :, 1:-1, 1:-1]
    assert out.shape[1] == 256 and out.var().item() == pytest.approx(1, rel=0.1)


def test_map_adapter_is_there_where_it_is_needed():
    assert list(MapAdapter(4, 4).parameters()) == []
    assert MapAdapter(4, 8).adapter.weight.shape == (8, 4, 1, 1)
    assert MapAdapter(4, 4, always=True, kernel_size=3).adapter.weight.shape == (4, 4, 3, 3)


def test_map_adapter_brings_both_to_the_teachers_shape():
    student = torch.randn(2, 4, 8, 6, requires_grad=True)
    teacher = torch.randn(2, 8, 4, 3, requires_grad=True)
    ours, theirs = MapAdapter(4, 8)(student.bfloat16(), teacher.bfloat16())
    assert ours.shape == theirs.shape == teacher.shape
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.requires_grad and not theirs.requires_grad
