"""FitNet's hint: the student's map is regressed onto the teacher's."""

from __future__ import annotations

from torch import Tensor, nn

from drkd.losses.alignment import AdapterInit, MapAdapter
from drkd.losses.distance import Distance, tensor_distance


class HintLoss(nn.Module):
    r"""Hint of one pyramid level (FitNets, Romero et al., ICLR 2015, arXiv:1412.6550), equation 3.

    .. math:: \frac{1}{B C H W} \|r(s) - t\|^2

    with a 1x1 convolution r on the student's side. Deviations: the mean of the squares instead of half their sum, so
    that the value does not follow the map's size; the distillation goes on during the whole training instead of a stage
    of its own; and r starts as the identity where the widths are equal.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        always_adapt: r exists even where the widths are equal, as in the paper.
        adapter_init: Start of r, see `make_adapter`; ``none`` leaves it out whatever ``always_adapt`` says.
        standardised: Compare the maps after `standardise`: half the mean squared difference then.

    Shape:
        student, teacher: see `MapAdapter`.
        output: 0-d, at least float32, squared units of the features.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        always_adapt: bool = True,
        adapter_init: AdapterInit = "identity",
        standardised: bool = False,
    ) -> None:
        super().__init__()
        self.align = MapAdapter(student_channels, teacher_channels, always=always_adapt, init=adapter_init)
        self.kind: Distance = "standardised" if standardised else "mse"

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of the two maps."""
        return tensor_distance(*self.align(student, teacher), kind=self.kind)
