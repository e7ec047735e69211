"""DRKD as its paper describes it and as its released code computes it: other defaults, the same class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import (
    AdapterInit,
    Distance,
    FilterMode,
    GraphNorm,
    InstanceDistance,
    PixelReasoning,
    RelationDistance,
    RelationTarget,
    TeacherSide,
)
from drkd.methods.drkd import DRKD
from drkd.methods.drkd_response import SHARE, Response
from drkd.methods.image_share import WHOLE_RUN
from drkd.methods.levels import Levels, MissingLevels


class PaperDRKD(DRKD):
    """The paper's equations (arXiv:2302.05637): matrix target, learned filter, un-squared norms, unscaled logits.

    Two norms are a reading: L_PR is one Frobenius norm of a level's batch tensor (as written, the mean of k norms,
    over what is left open), and L_IR one Frobenius norm a relation matrix (as written, a sum of norms over its pairs).

    Graph sizes and batch norm, which the equations leave open, are the released code's. The weights remain ratios of
    gradient norms, because plain ones belong to one batch and image size; set ``balanced=False`` to give plain ones
    (the paper's 1/k is then part of the weight). Embeddings are half as wide as a flattened instance: 5.3 M parameters
    a level and side at 256 channels.

    Args: those of `DRKD`, with other defaults.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        pixel_weight: float | None = 0.5,
        relation_weight: float = 0.1,
        instance_weight: float = 0.5,
        response: Response = "logits",
        response_weight: float | None = 0.0,
        response_share: float = SHARE,
        response_span: tuple[float, float] = WHOLE_RUN,
        balanced: bool = True,
        warmup_steps: int = 0,
        decay: Decay = "none",
        levels: Levels | None = None,
        missing_levels: MissingLevels = "skip",
        pixel_levels: int | None = None,
        instance_levels: int | None = 2,
        normalise_features: bool = False,
        teacher_side: TeacherSide = "joint",
        adapter_init: AdapterInit = "default",
        adapter_size: int = 1,
        adapter_separable: bool = False,
        shared_adapter: bool = False,
        pixel_reasoning: PixelReasoning = "graph",
        nodes: int | Sequence[int] = (64, 64, 256),
        states: int | Sequence[int] = (128, 128, 512),
        normalise: bool = False,
        norm: GraphNorm = "batch",
        graph_gain: float = 1.0,
        activation_before_update: bool = False,
        pixel_distance: Distance | None = "frobenius",
        pixel_object_share: float | None = 0.0,
        roi_size: int = 3,
        roi_aligned: bool = True,
        roi_sampling_ratio: int = 2,
        instance_target: RelationTarget = "matrix",
        relation_distance: RelationDistance = "frobenius",
        relation_filter: FilterMode = "learned",
        across_images: bool = False,
        embed_channels: int | None = None,
        logit_scale: float | None = 1.0,
        matrix_connector: Literal["identity", "affine"] = "identity",
        instance_distance: InstanceDistance = "norm",
    ) -> None:
        super().__init__(
            student,
            teacher,
            pixel_weight=pixel_weight,
            relation_weight=relation_weight,
            instance_weight=instance_weight,
            response=response,
            response_weight=response_weight,
            response_share=response_share,
            response_span=response_span,
            balanced=balanced,
            warmup_steps=warmup_steps,
            decay=decay,
            levels=levels,
            missing_levels=missing_levels,
            pixel_levels=pixel_levels,
            instance_levels=instance_levels,
            normalise_features=normalise_features,
            teacher_side=teacher_side,
            adapter_init=adapter_init,
            adapter_size=adapter_size,
            adapter_separable=adapter_separable,
            shared_adapter=shared_adapter,
            pixel_reasoning=pixel_reasoning,
            nodes=nodes,
            states=states,
            normalise=normalise,
            norm=norm,
            graph_gain=graph_gain,
            activation_before_update=activation_before_update,
            pixel_distance=pixel_distance,
            pixel_object_share=pixel_object_share,
            roi_size=roi_size,
            roi_aligned=roi_aligned,
            roi_sampling_ratio=roi_sampling_ratio,
            instance_target=instance_target,
            relation_distance=relation_distance,
            relation_filter=relation_filter,
            across_images=across_images,
            embed_channels=embed_channels,
            logit_scale=logit_scale,
            matrix_connector=matrix_connector,
            instance_distance=instance_distance,
        )


class ReleasedDRKD(DRKD):
    """The released code's arithmetic (nizhenliang/Dual-Relation-Knowledge-Distillation, two_stage.py), for ablation.

    Its weights of the Faster R-CNN configuration; for RetinaNet it has 4e-3, 5e-3 and 6e-3, the first and the last
    commented out. Deviations: each image is pooled from its own map (there all boxes read image 0), images without
    boxes are allowed, the teacher's features are constants, and the embeddings start with the variance of their input.
    Batch norm fails on a 1x1 map of one image in training, as there.

    Args: those of `DRKD`, with other defaults.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        pixel_weight: float | None = 1e-3,
        relation_weight: float = 4e-3,
        instance_weight: float = 2.4e-3,
        response: Response = "logits",
        response_weight: float | None = 0.0,
        response_share: float = SHARE,
        response_span: tuple[float, float] = WHOLE_RUN,
        balanced: bool = False,
        warmup_steps: int = 0,
        decay: Decay = "none",
        levels: Levels | None = None,
        missing_levels: MissingLevels = "skip",
        pixel_levels: int | None = None,
        instance_levels: int | None = 2,
        normalise_features: bool = False,
        teacher_side: TeacherSide = "joint",
        adapter_init: AdapterInit = "default",
        adapter_size: int = 1,
        adapter_separable: bool = False,
        shared_adapter: bool = False,
        pixel_reasoning: PixelReasoning = "graph",
        nodes: int | Sequence[int] = (64, 64, 256),
        states: int | Sequence[int] = (128, 128, 512),
        normalise: bool = False,
        norm: GraphNorm = "batch",
        graph_gain: float = 1.0,
        activation_before_update: bool = True,
        pixel_distance: Distance | None = "frobenius",
        pixel_object_share: float | None = 0.0,
        roi_size: int = 3,
        roi_aligned: bool = False,
        roi_sampling_ratio: int = -1,
        instance_target: RelationTarget = "features",
        relation_distance: RelationDistance = "frobenius",
        relation_filter: FilterMode = "random",
        across_images: bool = False,
        embed_channels: int | None = None,
        logit_scale: float | None = 1.0,
        matrix_connector: Literal["identity", "affine"] = "identity",
        instance_distance: InstanceDistance = "frobenius",
    ) -> None:
        super().__init__(
            student,
            teacher,
            pixel_weight=pixel_weight,
            relation_weight=relation_weight,
            instance_weight=instance_weight,
            response=response,
            response_weight=response_weight,
            response_share=response_share,
            response_span=response_span,
            balanced=balanced,
            warmup_steps=warmup_steps,
            decay=decay,
            levels=levels,
            missing_levels=missing_levels,
            pixel_levels=pixel_levels,
            instance_levels=instance_levels,
            normalise_features=normalise_features,
            teacher_side=teacher_side,
            adapter_init=adapter_init,
            adapter_size=adapter_size,
            adapter_separable=adapter_separable,
            shared_adapter=shared_adapter,
            pixel_reasoning=pixel_reasoning,
            nodes=nodes,
            states=states,
            normalise=normalise,
            norm=norm,
            graph_gain=graph_gain,
            activation_before_update=activation_before_update,
            pixel_distance=pixel_distance,
            pixel_object_share=pixel_object_share,
            roi_size=roi_size,
            roi_aligned=roi_aligned,
            roi_sampling_ratio=roi_sampling_ratio,
            instance_target=instance_target,
            relation_distance=relation_distance,
            relation_filter=relation_filter,
            across_images=across_images,
            embed_channels=embed_channels,
            logit_scale=logit_scale,
            matrix_connector=matrix_connector,
            instance_distance=instance_distance,
        )
