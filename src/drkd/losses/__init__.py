"""Losses: tensors in, a 0-d tensor out, one paper's idea a file; no weights are applied here."""

from drkd.losses.alignment import AdapterInit, FeatureScale, MapAdapter, adapt, make_adapter, resample, rescale
from drkd.losses.anchors import AnchorStyle, level_anchors
from drkd.losses.attention import channel_attention, spatial_attention
from drkd.losses.box_codes import decode_distances, decode_offsets, distance_overlap, generalised_overlap
from drkd.losses.channel_wise import ChannelWiseLoss
from drkd.losses.cross_head import align_scale, overlap_distance, quality_focal_distance
from drkd.losses.decoupled_feature import choose_levels, decoupled_distance, foreground_mask
from drkd.losses.distance import Distance, TeacherSide, standardise, tensor_distance
from drkd.losses.fine_grained import FineGrainedLoss
from drkd.losses.focal_global import FocalGlobalLoss, GlobalContext, foreground_weights
from drkd.losses.graph_reasoning import GraphNorm, GraphReasoningUnit
from drkd.losses.hint import HintLoss
from drkd.losses.instance_feature import InstanceDistance, InstanceFeatureLoss, instance_distance
from drkd.losses.instance_relation import (
    InstanceRelation,
    InstanceRelationLoss,
    RelationDistance,
    RelationTarget,
)
from drkd.losses.instances import InstanceLayout, pool_instances
from drkd.losses.localization import bin_divergence, valuable_region
from drkd.losses.masked_generation import MaskedGenerationLoss
from drkd.losses.non_local import NonLocalBlock, NonLocalLoss, PairSimilarity
from drkd.losses.object_weights import object_weights
from drkd.losses.pearson import PearsonLoss
from drkd.losses.pixel_relation import PixelReasoning, PixelRelationLoss
from drkd.losses.relation_filter import FilterMode, LearnedFilter, RandomFilter
from drkd.losses.softened_logits import ClassActivation, class_divergence, offset_distance, softened_divergence

__all__ = [
    "AdapterInit",
    "AnchorStyle",
    "ChannelWiseLoss",
    "ClassActivation",
    "Distance",
    "FeatureScale",
    "FilterMode",
    "FineGrainedLoss",
    "FocalGlobalLoss",
    "GlobalContext",
    "GraphNorm",
    "GraphReasoningUnit",
    "HintLoss",
    "InstanceDistance",
    "InstanceFeatureLoss",
    "InstanceLayout",
    "InstanceRelation",
    "InstanceRelationLoss",
    "LearnedFilter",
    "MapAdapter",
    "MaskedGenerationLoss",
    "NonLocalBlock",
    "NonLocalLoss",
    "PairSimilarity",
    "PearsonLoss",
    "PixelReasoning",
    "PixelRelationLoss",
    "RandomFilter",
    "RelationDistance",
    "RelationTarget",
    "TeacherSide",
    "adapt",
    "align_scale",
    "bin_divergence",
    "channel_attention",
    "choose_levels",
    "class_divergence",
    "decode_distances",
    "decode_offsets",
    "decoupled_distance",
    "distance_overlap",
    "foreground_mask",
    "foreground_weights",
    "generalised_overlap",
    "instance_distance",
    "level_anchors",
    "make_adapter",
    "object_weights",
    "offset_distance",
    "overlap_distance",
    "pool_instances",
    "quality_focal_distance",
    "resample",
    "rescale",
    "softened_divergence",
    "spatial_attention",
    "standardise",
    "tensor_distance",
    "valuable_region",
]
