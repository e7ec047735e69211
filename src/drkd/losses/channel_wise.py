"""CWD: the distribution of each channel over space is distilled."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from drkd.losses.alignment import AdapterInit, FeatureScale, MapAdapter, check_adapter, check_scale, rescale
from drkd.losses.distance import full_precision


class ChannelWiseLoss(nn.Module):
    r"""Channel-wise distillation of one pyramid level (CWD, Shu et al., ICCV 2021, arXiv:2011.13256), equation 4.

    .. math:: \frac{\tau^2}{B C} \sum_{b, c} \mathrm{KL}\big(\mathrm{softmax}_{HW}(t_{bc} / \tau) \,\|\,
              \mathrm{softmax}_{HW}(s_{bc} / \tau)\big)

    The softmax runs over the H*W positions of each channel, so the student learns where a channel fires, not how
    strongly. A 1x1 map gives 0. Reference code: mmrazor; equal to it up to the adapter where channels differ.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        temperature: tau, units of the feature, > 0.
        scale: ``none``, the authors', or ``teacher_rms``, see `rescale`: tau is then in units of the teacher's root
            mean square.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal; not with
            the ``adapter_init`` ``none``.
        adapter_init: Its start, see `make_adapter`; ``default`` draws a random basis.

    Shape:
        student, teacher: see `MapAdapter`.
        output: 0-d, at least float32, nats, averaged over batch and channels.

    Raises:
        ValueError: If ``temperature <= 0`` or the shapes do not fit.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        temperature: float = 1.0,
        scale: FeatureScale = "none",
        always_adapt: bool = False,
        adapter_init: AdapterInit = "default",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"Expected a temperature above 0, got {temperature}")
        check_adapter(adapter_init, always=always_adapt)
        self.align = MapAdapter(student_channels, teacher_channels, always=always_adapt, init=adapter_init)
        self.temperature = temperature
        check_scale(scale)
        self.scale: FeatureScale = scale

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Divergence of the student's channels from the teacher's."""
        student, teacher = self.align(*rescale(student, teacher, scale=self.scale))
        with full_precision(student):
            logs = [(feature.flatten(2) / self.temperature).log_softmax(dim=2) for feature in (student, teacher)]
            divergence = functional.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
            return self.temperature**2 / (student.shape[0] * student.shape[1]) * divergence
