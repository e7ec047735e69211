"""PKD: maps are compared by the correlation of their channels, whatever their magnitude."""

from __future__ import annotations

from torch import Tensor, nn

from drkd.losses.alignment import AdapterInit, MapAdapter, check_adapter
from drkd.losses.distance import full_precision


class PearsonLoss(nn.Module):
    r"""Pearson distillation of one pyramid level (PKD, Cao et al., NeurIPS 2022, arXiv:2207.02039, section 3).

    .. math:: \frac{1}{2 B C H W} \|\hat s - \hat t\|^2, \qquad \hat x = (x - \mu_c) / (\sigma_c + 10^{-6})

    with mean and (unbiased) standard deviation of each channel c over batch and space together; up to the factor
    (n - 1) / n it is 1 minus the mean Pearson correlation of the channels, n = B H W. Reference code: mmrazor.

    Deviations: a deviation below ``smallest_deviation`` counts as that, so that a constant student channel gets a
    bounded gradient (there, in the golden case, a norm of 10874 against 0.04 for all other channels); a single value a
    channel gives 0 (there: NaN); sizes that differ in width alone are resampled too (there: an assertion).

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        eps: Added to the standard deviation, units of the feature.
        smallest_deviation: See above, units of the feature.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal; not with
            the ``adapter_init`` ``none``.
        adapter_init: Its start, see `make_adapter`.

    Shape:
        student, teacher: see `MapAdapter`.
        output: 0-d, at least float32, unitless; between 0 and about 2.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        eps: float = 1e-6,
        smallest_deviation: float = 3e-3,
        always_adapt: bool = False,
        adapter_init: AdapterInit = "identity",
    ) -> None:
        super().__init__()
        check_adapter(adapter_init, always=always_adapt)
        self.align = MapAdapter(student_channels, teacher_channels, always=always_adapt, init=adapter_init)
        self.eps = eps
        self.smallest_deviation = smallest_deviation

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Half the mean squared difference of the standardised maps."""
        student, teacher = self.align(student, teacher)
        with full_precision(student):
            return 0.5 * (self._standardise(student) - self._standardise(teacher)).square().mean()

    def _standardise(self, feature: Tensor) -> Tensor:
        values = feature.numel() // feature.shape[1]
        centred = feature - feature.mean(dim=(0, 2, 3), keepdim=True)
        variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / max(values - 1, 1)
        # Clamped before the root, whose derivative at 0 is infinite.
        deviation = variance.clamp_min(self.smallest_deviation**2).sqrt()
        return centred / (deviation + self.eps)
