"""Distances between student and teacher tensors, in at least float32 whatever autocast says."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Distance = Literal["frobenius", "relative", "mse", "rms", "standardised"]
"""How two tensors of one shape are compared; see `tensor_distance`."""

TeacherSide = Literal["joint", "shared", "frozen", "fixed"]
"""What becomes of the modules on the teacher's side.

``shared``: one module serves the adapted student and the teacher; the target is a constant to the gradient.
``fixed``: the same, and the module keeps its random initial weights. What pixel relations compare with is then a
function of the teacher's map that is the same from the first step to the last (without batch norm); the target of
instance relations still changes with their filter, if it is learned or random.
``joint``: the teacher has a module of its own that is trained by the distillation loss, as in the released code; it
can make its own target easier. ``frozen``: the teacher has a module of its own that keeps its random initial weights,
and the student one that is trained.
"""

ONE_MODULE: frozenset[TeacherSide] = frozenset({"shared", "fixed"})
"""The teacher sides with one module for both."""

# Of `standardise`; a constant, since a compiler cannot trace a number that an autograd function is given.
_EPS = 1e-5


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half-precision tensors to float32 and leave float32 and float64 alone."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def standardise(feature: Tensor, *, eps: float = _EPS) -> Tensor:
    """Give every channel zero mean and unit variance over batch and space together (PKD, arXiv:2207.02039).

    Deviation from PKD: the variance is biased and ``eps`` is added to it inside the root, so that one value a channel,
    or a constant channel, gives zeros (to rounding) and a bounded gradient (PKD: NaN, and a gradient of 1e6).

    Args:
        feature: (B, C, ...), any float dtype.
        eps: Added to the variance, squared units of the feature.

    Returns:
        Same shape, at least float32.
    """
    with full_precision(feature):
        feature = at_least_float32(feature)
        if feature.numel() == 0:
            return feature
        if eps != _EPS:
            return torch.native_batch_norm(feature, None, None, None, None, True, 0.0, eps)[0]
        return cast(Tensor, _Standardise.apply(feature))


class _Standardise(torch.autograd.Function):
    """What batch norm computes, in one pass each way; keeps the result, which others read too, and not the input."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> Tensor:
        """The standardised map."""
        result, _, inverse = torch.native_batch_norm(feature, None, None, None, None, True, 0.0, _EPS)
        ctx.save_for_backward(result, inverse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Of a map whose mean is 0 and whose deviation is 1, in the unit of the map that was given."""
        result, inverse = ctx.saved_tensors
        found: Tensor = torch.ops.aten.native_batch_norm_backward(
            gradient,
            result,
            None,
            None,
            None,
            torch.zeros_like(inverse),
            torch.ones_like(inverse),
            True,
            _EPS,
            [True, False, False],
        )[0]
        return found.mul_(inverse.view(1, -1, *[1] * (found.ndim - 2)))


def tensor_distance(student: Tensor, teacher: Tensor, *, kind: Distance, eps: float = 1e-6) -> Tensor:
    r"""Compare two tensors as wholes. Nothing is detached here: the losses decide what is a constant.

    - ``frobenius``: :math:`\|s - t\|_2` of the whole tensor, un-squared; gradient 0 where it is 0.
    - ``relative``: :math:`\|s - t\| / \|t\|`, the denominator a constant to the gradient.
    - ``mse``: mean squared difference.
    - ``rms``: its root, so ``frobenius`` whatever the size; gradient 0 where it is 0.
    - ``standardised``: half the mean squared difference after `standardise` of both (PKD).

    Args:
        student: (B, C, ...).
        teacher: Same shape.
        kind: See above.
        eps: Smallest denominator of ``relative``.

    Returns:
        0-d, at least float32; 0 (with a graph) for empty tensors.

    Raises:
        ValueError: If the shapes differ or the kind is unknown.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"Expected tensors of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    with full_precision(student):
        if kind == "standardised":
            return 0.5 * _mean_square(standardise(student) - standardise(teacher))
        if kind == "mse":
            ours, theirs = at_least_float32(student), at_least_float32(teacher)
            return functional.mse_loss(ours, theirs, reduction="sum") / max(student.numel(), 1)
        difference = at_least_float32(student) - at_least_float32(teacher)
        if kind == "frobenius":
            return torch.linalg.vector_norm(difference)
        if kind == "rms":
            return torch.linalg.vector_norm(difference) / max(difference.numel(), 1) ** 0.5
        if kind == "relative":
            size = torch.linalg.vector_norm(at_least_float32(teacher.detach())).clamp_min(eps)
            return torch.linalg.vector_norm(difference) / size
    raise ValueError(f"Expected a distance out of frobenius, relative, mse, rms, standardised, got {kind!r}")


def weighted_square(
    student: Tensor, teacher: Tensor, weights: Tensor, *, root: bool = False, spend: bool = False
) -> Tensor:
    r"""Sum over cells of a weight times the mean square over channels, :math:`\sum_p w_p \|s_p - t_p\|^2 / C`.

    One map is kept for the backward pass, and none but the gradient is made in it: maps of a fine level are what a
    distillation step pays for in memory. It cannot be differentiated twice.

    Args:
        student: (B, C, H, W), at least float32.
        teacher: Same shape and dtype.
        weights: (B, H, W), constants.
        root: Take the root of the sum, whose gradient is 0 where it is 0.
        spend: Overwrite both maps, which then must be nobody else's; the teacher's has no gradient.

    Returns:
        0-d, the dtype of the maps.
    """
    with full_precision(student):
        return cast(Tensor, _WeightedSquare.apply(student, teacher, weights, root, spend))


class _WeightedSquare(torch.autograd.Function):
    """See `weighted_square`."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, root: bool, spend: bool) -> Tensor:
        """The sum or its root; keeps half the sum's gradient."""
        factors = (weights.detach().to(student.dtype) / max(student.shape[1], 1)).unsqueeze(1)
        difference = torch.sub(student, teacher, out=teacher) if spend else student - teacher
        # Both must lie in memory alike: they are multiplied as rows.
        alike = _is_channels_last(student) == _is_channels_last(difference)
        scaled = torch.mul(difference, factors, out=student.detach()) if spend and alike else difference * factors
        # Rows are summed one by one: one sum of millions of float32 is right to four digits only.
        total = torch.bmm(_rows(scaled).unsqueeze(1), _rows(difference).unsqueeze(2)).sum()
        if not root:
            ctx.save_for_backward(scaled)
            return total
        total = total.sqrt()
        # A copy: who gets the sum may change it in place.
        ctx.save_for_backward(scaled, total.clone())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Of both maps."""
        scaled, *roots = ctx.saved_tensors
        # Of a root of 0 the maps are equal and `scaled` is 0: divided by anything it stays so.
        ours = scaled * (gradient / torch.where(roots[0] > 0, roots[0], 1) if roots else 2 * gradient)
        return ours, -ours if ctx.needs_input_grad[1] else None, None, None, None


def _rows(feature: Tensor) -> Tensor:
    """A map as rows that lie in memory as they are: no copy."""
    if _is_channels_last(feature):
        feature = feature.permute(0, 2, 3, 1)
    return feature.flatten(2).flatten(0, 1)


def _is_channels_last(feature: Tensor) -> bool:
    return feature.is_contiguous(memory_format=torch.channels_last)


def _mean_square(difference: Tensor) -> Tensor:
    # The mean of nothing is NaN; an empty sum is a zero that still reaches every parameter.
    return difference.square().sum() / max(difference.numel(), 1)
