"""Losses: tensors in, a 0-d tensor out, one paper's idea a file; no weights are applied here."""

from drkd.losses.alignment import AdapterInit, adapt, make_adapter, resample
from drkd.losses.box_codes import decode_distances, decode_offsets, distance_overlap, generalised_overlap
from drkd.losses.cross_head import align_scale, overlap_distance, quality_focal_distance
from drkd.losses.decoupled_feature import choose_levels, decoupled_distance, foreground_mask
from drkd.losses.distance import Distance, TeacherSide, standardise, tensor_distance
from drkd.losses.graph_reasoning import GraphNorm, GraphReasoningUnit
from drkd.losses.instance_feature import InstanceDistance, InstanceFeatureLoss, instance_distance
from drkd.losses.instance_relation import (
    InstanceRelation,
    InstanceRelationLoss,
    RelationDistance,
    RelationTarget,
)
from drkd.losses.instances import InstanceLayout, pool_instances
from drkd.losses.localization import bin_divergence, valuable_region
from drkd.losses.pixel_relation import PixelRelationLoss
from drkd.losses.relation_filter import FilterMode, LearnedFilter, RandomFilter
from drkd.losses.softened_logits import ClassActivation, class_divergence, offset_distance, softened_divergence

__all__ = [
    "AdapterInit",
    "ClassActivation",
    "Distance",
    "FilterMode",
    "GraphNorm",
    "GraphReasoningUnit",
    "InstanceDistance",
    "InstanceFeatureLoss",
    "InstanceLayout",
    "InstanceRelation",
    "InstanceRelationLoss",
    "LearnedFilter",
    "PixelRelationLoss",
    "RandomFilter",
    "RelationDistance",
    "RelationTarget",
    "TeacherSide",
    "adapt",
    "align_scale",
    "bin_divergence",
    "choose_levels",
    "class_divergence",
    "decode_distances",
    "decode_offsets",
    "decoupled_distance",
    "distance_overlap",
    "foreground_mask",
    "generalised_overlap",
    "instance_distance",
    "make_adapter",
    "offset_distance",
    "overlap_distance",
    "pool_instances",
    "quality_focal_distance",
    "resample",
    "softened_divergence",
    "standardise",
    "tensor_distance",
    "valuable_region",
]
