"""How a student's map comes into the teacher's shape."""

import pytest
import torch

from drkd.losses import MapAdapter, make_adapter, rescale
from drkd.losses.alignment import check_scale


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


def test_maps_in_the_teachers_unit():
    student, teacher = torch.randn(2, 3, 4, 5, requires_grad=True), torch.tensor([3.0, -4.0]).reshape(1, 1, 1, 2)
    ours, theirs = rescale(student, teacher, scale="teacher_rms")
    torch.testing.assert_close(theirs, teacher / 12.5**0.5)
    torch.testing.assert_close(ours, student / 12.5**0.5)
    assert rescale(student, teacher, scale="none") == (student, teacher)
    with pytest.raises(ValueError, match="none, teacher_rms, got 'student_rms'"):
        check_scale("student_rms")


def test_a_map_of_zeros_has_the_unit_one():
    student = torch.randn(2, 3, 4, 5)
    for teacher in (torch.zeros(2, 3, 4, 5), torch.zeros(0, 3, 4, 5)):
        ours, theirs = rescale(student, teacher, scale="teacher_rms")
        assert ours.equal(student) and theirs.equal(teacher)


def test_the_unit_of_half_precision_is_of_full_precision():
    # The squares leave half precision's range.
    teacher = torch.full((1, 4, 8, 8), 3e4, dtype=torch.float16)
    ours, theirs = rescale(teacher, teacher, scale="teacher_rms")
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(theirs, torch.ones_like(theirs))
