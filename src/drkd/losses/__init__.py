"""Losses: tensors in, a 0-d tensor out, one paper's idea a file; no weights are applied here."""

from drkd.losses.alignment import AdapterInit, MapAdapter, adapt, make_adapter, resample
from drkd.losses.anchors import AnchorStyle, level_anchors
from drkd.losses.attention import channel_attention, spatial_attention
from drkd.losses.channel_wise import ChannelWiseLoss
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
from drkd.losses.masked_generation import MaskedGenerationLoss
from drkd.losses.non_local import NonLocalBlock, NonLocalLoss
from drkd.losses.pearson import PearsonLoss
from drkd.losses.pixel_relation import PixelRelationLoss
from drkd.losses.relation_filter import FilterMode, LearnedFilter, RandomFilter

__all__ = [
    "AdapterInit",
    "AnchorStyle",
    "ChannelWiseLoss",
    "Distance",
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
    "PearsonLoss",
    "PixelRelationLoss",
    "RandomFilter",
    "RelationDistance",
    "RelationTarget",
    "TeacherSide",
    "adapt",
    "channel_attention",
    "foreground_weights",
    "instance_distance",
    "level_anchors",
    "make_adapter",
    "pool_instances",
    "resample",
    "spatial_attention",
    "standardise",
    "tensor_distance",
]
