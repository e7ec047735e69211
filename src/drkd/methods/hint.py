"""Plain feature imitation, the control that DRKD has to beat: FitNet's hint, or PKD's standardised one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from drkd.contracts import DetectionBatch, DetectorOutput, DetectorSpec, KDMethod
from drkd.losses import Distance, make_adapter, resample, tensor_distance
from drkd.losses.alignment import check_maps
from drkd.methods.levels import MissingLevels, maps_by_name, match_levels


class FeatureHint(KDMethod):
    """Compare the maps of each pyramid level as they are.

    ``standardise=True`` gives each channel zero mean and unit variance over batch and space first, as PKD does (Cao et
    al., NeurIPS 2022, arXiv:2207.02039): half the mean squared difference. False is FitNet's hint (Romero et al., ICLR
    2015, arXiv:1412.6550): the mean squared difference. Maps of unequal size are compared at the teacher's.

    Args:
        student: The student's levels.
        teacher: The teacher's levels.
        weight: Of the term ``hint``.
        standardise: See above.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal (FitNet does, PKD
            does not). Where they differ there is always one.
        levels: Student levels to use; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float = 1.0,
        standardise: bool = True,
        always_adapt: bool = False,
        levels: Sequence[str] | None = None,
        missing_levels: MissingLevels = "skip",
        balanced: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        if weight <= 0:
            raise ValueError(f"Expected a weight above 0, got {weight}")
        self.pairs = match_levels(student, teacher, names=levels, missing=missing_levels)
        self.adapters = nn.ModuleList()
        for pair in self.pairs:
            ours, theirs = pair.student.channels, pair.teacher.channels
            self.adapters.append(make_adapter(ours, theirs) if always_adapt or ours != theirs else nn.Identity())
        self.standardise = standardise
        self.weights = {"hint": weight}
        self.minimum_boxes = {}
        self.balanced = balanced
        self.warmup_steps = warmup_steps

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """One term a level: ``hint/<level>``."""
        ours, theirs = maps_by_name(student.features), maps_by_name(teacher.features)
        terms: dict[str, Tensor] = {}
        for pair, adapter in zip(self.pairs, self.adapters, strict=True):
            feature, target = ours[pair.student.name], theirs[pair.teacher.name].detach()
            check_maps(feature, target, student_channels=pair.student.channels, teacher_channels=pair.teacher.channels)
            for parameter in adapter.parameters():
                feature = feature.to(parameter.dtype)
            feature = resample(adapter(feature), (target.shape[2], target.shape[3]))
            kind: Distance = "standardised" if self.standardise else "mse"
            terms[f"hint/{pair.name}"] = tensor_distance(feature, target, kind=kind)
        return terms
