"""Losses: tensors in, a 0-d tensor out, one paper's idea a file; no weights are applied here."""

from drkd.losses.alignment import AdapterInit, adapt, make_adapter, resample
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
from drkd.losses.pixel_relation import PixelRelationLoss
from drkd.losses.relation_filter import FilterMode, LearnedFilter, RandomFilter

__all__ = [
    "AdapterInit",
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
    "instance_distance",
    "make_adapter",
    "pool_instances",
    "resample",
    "standardise",
    "tensor_distance",
]
