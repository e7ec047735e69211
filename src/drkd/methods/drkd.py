"""Dual relation knowledge distillation: pixel relations, instance relations and instances, level by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from drkd.contracts import Decay, DetectionBatch, DetectorOutput, DetectorSpec, KDMethod, Want
from drkd.losses import (
    AdapterInit,
    Distance,
    FilterMode,
    GraphNorm,
    InstanceDistance,
    InstanceFeatureLoss,
    InstanceLayout,
    InstanceRelationLoss,
    PixelReasoning,
    PixelRelationLoss,
    RelationDistance,
    RelationTarget,
    TeacherSide,
    adapt,
    make_adapter,
    pool_instances,
    resample,
    standardise,
)
from drkd.losses.instances import count_boxes
from drkd.losses.pixel_relation import WEIGHABLE
from drkd.methods.drkd_response import SHARE, Response, make_response
from drkd.methods.image_share import WHOLE_RUN
from drkd.methods.levels import LevelPair, Levels, MissingLevels, finest, maps_by_name, match_levels, spec_of_maps
from drkd.methods.term_weights import by_stages

PIXEL, RELATION, INSTANCE, RESPONSE = "pixel_relation", "instance_relation", "instance", "response"

_FEATURES = frozenset[Want]({"features"})


@dataclass(frozen=True)
class LevelRelations:
    """What DRKD compares at one level, for pictures and measurements; a field is None where its term is off.

    Args:
        name: The student's name for the level.
        teacher_name: The teacher's.
        student_map: (B, C, H, W), the student's map after graph reasoning.
        teacher_map: Same for the teacher.
        student_graph: (B, C', H, W), what graph reasoning adds to the student's map.
        teacher_graph: Same for the teacher.
        student_matrix: (B, Nmax, Nmax), the student's relation matrices, zero where there is no instance.
        teacher_matrix: Same for the teacher.
        filter: (B, Nmax, Nmax), the teacher-side weights of the pairs; None where the filter is off.
    """

    name: str
    teacher_name: str
    student_map: Tensor | None = None
    teacher_map: Tensor | None = None
    student_graph: Tensor | None = None
    teacher_graph: Tensor | None = None
    student_matrix: Tensor | None = None
    teacher_matrix: Tensor | None = None
    filter: Tensor | None = None


class DRKD(KDMethod):
    """DRKD (Ni, Yang, Wen, Zhang; IJCAI 2023; arXiv:2302.05637), every choice an argument; these defaults are ours.

    Terms, one a level each: ``pixel_relation`` (`PixelRelationLoss`), ``instance_relation`` (`InstanceRelationLoss`),
    ``instance`` (`InstanceFeatureLoss`); and, not in the paper and off by default, what the teacher predicts:
    ``response_classification`` and ``response_box`` (`CrossKD` or `LogitKD`). A term of weight 0 is neither built nor
    computed. `PaperDRKD` and `ReleasedDRKD` have the paper's and the released code's choices as defaults.

    Departures of these defaults from the paper, all for one reason (features of unlike size and norms of unlike scale
    left the distillation silently off): maps are standardised first, distances do not grow with them, weights are
    ratios of gradient norms, and the relation logits are scaled. And one for another: one module serves both sides and
    is not trained, because a trained one moves the target while the student learns (trial 14 in the repository).

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        pixel_weight: Of ``pixel_relation``. None is 1 for a student of two stages (whose ``spec.predictions`` are
            ``regions``), 3 for any other.
        relation_weight: Of ``instance_relation``.
        instance_weight: Of ``instance``.
        response: How predictions are compared, see `Response`; needs a ``response_weight``, as its share and span do.
        response_weight: Of the two response terms. None is 1 where the two can be compared so, and no such term where
            they cannot, or where there are only feature maps (`for_features`).
        response_share: Of a batch's images that the teacher's head is asked about for the response; less than one image
            leaves it out of some steps, see `ImageShare`.
        response_span: From which part of the run to which part there is a response, such as (0.5, 0.75): elsewhere
            the teacher's head rests, but where norms are measured. A `Distiller` of one's own needs ``total_steps``.
        balanced: Whether weights are ratios of gradient norms, see `KDMethod`; otherwise plain multipliers.
        warmup_steps: Steps over which all weights rise from 0.
        decay: How they fall towards the end of the run, see `KDMethod`.
        levels: Student levels to use, or pairs with the teacher's, see `match_levels`; None is all that find a partner.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        pixel_levels: How many of them, finest first, have pixel relations; None is all.
        instance_levels: How many of them, finest first, have the two instance terms (released: 2); None is all.
        normalise_features: `standardise` every map over batch and space once; all terms then read that.
        teacher_side: See `TeacherSide` (released: joint). Of the pixel relations and of the embeddings of the instance
            relations; the relation filter is learned in any case.
        adapter_init: Start of the adapters on the student's side, see `make_adapter`.
        adapter_size: Cells a side of these convolutions, odd (paper, released: 1); more than 1 for a
            ``shared_adapter`` only.
        adapter_separable: Of more than one cell a side: each channel by itself, then one cell across channels, see
            `make_adapter`; False is one dense convolution, of as many times the price as it has cells.
        shared_adapter: One adapter a level, before everything else, for all three terms; False gives each term its own
            (paper, released).
        pixel_reasoning: See `PixelRelationLoss`: the paper's ``graph``, or for an ablation ``non_local`` or ``none``.
        nodes: Graph nodes (C2): one number, or one a level, finest first, the last holding for all after it.
        states: Width of a graph node (C1): same.
        normalise: Divide the graph's states by the number of positions (released: no).
        norm: After the graph's reprojection: group, batch (released) or none.
        graph_gain: Initial weight of that norm: how loud the relations are beside the map itself (released: 1). With
            the norm ``none`` a constant factor on the relations.
        activation_before_update: ReLU in the graph as released; False is the paper's linear update.
        pixel_distance: See `tensor_distance` (paper, released: frobenius). None is ``mse`` for a student of two
            stages and ``rms`` for any other, a norm, whose gradient does not fall as the maps come nearer (trial 23 in
            the repository).
        pixel_object_share: Part of ``pixel_relation`` that lies on an image's objects, each alike, see
            `object_weights`; 0 with distances other than ``mse`` and ``rms``, which cannot be weighed. None is 0.5 for
            a student of two stages, 0 for any other.
        roi_size: Cells a side of a pooled instance (released: 3).
        roi_aligned: Exact RoIAlign; False is the released, unshifted one.
        roi_sampling_ratio: Samples a cell and axis; -1 adapts to the box (released).
        instance_target: ``matrix`` (paper) or ``features`` (released).
        relation_distance: ``frobenius`` (paper, released), ``mse``; ``kl`` for matrix only, ``relative`` for features.
        relation_filter: ``learned`` (paper), ``random`` (released), ``off``.
        across_images: Relate the instances of the whole batch to each other.
        embed_channels: Width of the relation's embeddings; None is half a flattened instance (paper, released).
        logit_scale: Of the relation logits; None is 1 / sqrt(embed_channels) (paper, released: 1).
        matrix_connector: f on a relation matrix: ``identity`` or scalar ``affine``.
        instance_distance: ``mse``, ``relative``, ``standardised``, ``norm`` (paper), ``frobenius`` (released).

    Raises:
        DrkdError: If the pyramids do not match, or a response is asked for where the predictions do not, or without a
            weight.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        pixel_weight: float | None = None,
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
        normalise_features: bool = True,
        teacher_side: TeacherSide = "fixed",
        adapter_init: AdapterInit = "identity",
        adapter_size: int = 1,
        adapter_separable: bool = False,
        shared_adapter: bool = True,
        pixel_reasoning: PixelReasoning = "graph",
        nodes: int | Sequence[int] = 32,
        states: int | Sequence[int] = 64,
        normalise: bool = True,
        norm: GraphNorm = "group",
        graph_gain: float = 0.3,
        activation_before_update: bool = True,
        pixel_distance: Distance | None = None,
        pixel_object_share: float | None = None,
        roi_size: int = 3,
        roi_aligned: bool = True,
        roi_sampling_ratio: int = 2,
        instance_target: RelationTarget = "matrix",
        relation_distance: RelationDistance = "kl",
        relation_filter: FilterMode = "learned",
        across_images: bool = False,
        embed_channels: int | None = 128,
        logit_scale: float | None = None,
        matrix_connector: Literal["identity", "affine"] = "identity",
        instance_distance: InstanceDistance = "mse",
    ) -> None:
        super().__init__()
        if pixel_weight is None:
            pixel_weight = by_stages(student, 3.0, 1.0)
        distance: Distance = by_stages(student, "rms", "mse") if pixel_distance is None else pixel_distance
        if pixel_object_share is None:
            pixel_object_share = by_stages(student, 0.0, 0.5) if distance in WEIGHABLE else 0.0
        weights = {PIXEL: pixel_weight, RELATION: relation_weight, INSTANCE: instance_weight}
        if min(*weights.values(), response_weight or 0) < 0 or max(weights.values()) == 0:
            raise ValueError(
                f"Expected weights of at least 0, one of the relations' above 0, got {weights} and {response_weight}"
            )
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        minimum = {RELATION: 2 if instance_target == "matrix" else 1, INSTANCE: 1}
        self.minimum_boxes = {name: count for name, count in minimum.items() if name in self.weights}
        self.response = make_response(
            response,
            student,
            teacher,
            weight=response_weight,
            share=response_share,
            span=response_span,
            balanced=balanced,
        )
        pools = bool(self.minimum_boxes)
        if self.response is not None:
            self.needs, self.teacher_needs = self.response.needs | _FEATURES, self.response.teacher_needs | _FEATURES
            self.weights |= {f"{RESPONSE}_{name}": weight for name, weight in self.response.weights.items()}
            self.minimum_boxes |= {f"{RESPONSE}_{name}": n for name, n in self.response.minimum_boxes.items()}
        self._looks, self._spread = False, dict[str, Tensor]()
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self.normalise_features = normalise_features
        self.roi_size = roi_size
        self.roi_aligned = roi_aligned
        self.roi_sampling_ratio = roi_sampling_ratio
        pairs = match_levels(student, teacher, names=levels, missing=missing_levels)
        pixel_pairs = finest(pairs, pixel_levels, name="pixel_levels")
        instance_pairs = finest(pairs, instance_levels, name="instance_levels")
        self.pixel_pairs = pixel_pairs if PIXEL in self.weights else ()
        self.instance_pairs = instance_pairs if pools else ()
        used = {pair.name: pair for pair in (*self.pixel_pairs, *self.instance_pairs)}.values()
        self.adapters = nn.ModuleDict()
        own: AdapterInit = adapter_init
        shared = shared_adapter and adapter_init != "none"
        if adapter_size < 1 or adapter_size % 2 == 0 or (adapter_size > 1 and not shared):
            raise ValueError(
                "Expected an odd adapter_size, and 1 where shared_adapter is false or adapter_init 'none', got "
                f"{adapter_size} with shared_adapter {shared_adapter} and adapter_init {adapter_init!r}"
            )
        if adapter_separable and adapter_size == 1:
            raise ValueError(
                "Expected an adapter_size above 1 with adapter_separable, which parts one of several cells"
            )
        if shared_adapter:
            own = "none"
            for pair in used:
                self.adapters[_key(pair.name)] = make_adapter(
                    pair.student.channels,
                    pair.teacher.channels,
                    init=adapter_init,
                    kernel_size=adapter_size,
                    separable=adapter_separable,
                )

        def student_channels(pair: LevelPair) -> int:
            return pair.teacher.channels if shared_adapter else pair.student.channels

        self.pixel_losses = nn.ModuleList(
            PixelRelationLoss(
                student_channels(pair),
                pair.teacher.channels,
                reasoning=pixel_reasoning,
                nodes=_at_level(nodes, index),
                states=_at_level(states, index),
                normalise=normalise,
                norm=norm,
                gain=graph_gain,
                activation_before_update=activation_before_update,
                distance=distance,
                object_share=pixel_object_share,
                teacher_side=teacher_side,
                normalise_features=False,
                adapter_init=own,
            )
            for index, pair in enumerate(self.pixel_pairs)
        )
        self.relation_losses = nn.ModuleList(
            InstanceRelationLoss(
                student_channels(pair),
                pair.teacher.channels,
                size=roi_size,
                target=instance_target,
                distance=relation_distance,
                filter_mode=relation_filter,
                embed_channels=embed_channels,
                logit_scale=logit_scale,
                across_images=across_images,
                teacher_side=teacher_side,
                connector=matrix_connector,
                adapter_init=own,
            )
            for pair in (self.instance_pairs if RELATION in self.weights else ())
        )
        self.instance_losses = nn.ModuleList(
            InstanceFeatureLoss(
                student_channels(pair), pair.teacher.channels, distance=instance_distance, adapter_init=own
            )
            for pair in (self.instance_pairs if INSTANCE in self.weights else ())
        )

    def begin_pass(self, number: int, *, measured: bool, progress: float | None = None) -> None:
        """Have the spread of the targets looked at where gradient norms are measured."""
        del number, progress
        self._looks = measured and self.training

    def inner_methods(self) -> dict[str, KDMethod]:
        """The response."""
        return {} if self.response is None else {f"{RESPONSE}_": self.response}

    def target_spread(self) -> dict[str, Tensor]:
        """Of the pixel relations' targets."""
        return dict(self._spread)

    @classmethod
    def for_features(
        cls,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        *,
        image_size: tuple[int, int],
        **options: Any,
    ) -> Self:
        """Build the method for two dicts of feature maps, reading channels and strides off their shapes.

        Args:
            student_features: (B, C, h, w) by name.
            teacher_features: Same for the teacher; names and sizes may differ from the student's.
            image_size: Height and width of the image tensor, px.
            options: Keyword arguments of the class. Maps do not tell a student's stages: the defaults are those of one
                stage. A schedule (``warmup_steps``, ``decay``) and plain weights (``balanced=False``) are not known to
                a `GradientBalance`; see `KDMethod.total` and `KDMethod.schedule`.

        Returns:
            The method, on the device of the student's maps.
        """
        student = spec_of_maps(student_features, image_size=image_size)
        teacher = spec_of_maps(teacher_features, image_size=image_size)
        return cls(student, teacher, **options).to(next(iter(student_features.values())).device)

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """The unweighted terms, named ``<term>/<student level>``."""
        terms = self.from_features(
            maps_by_name(student.features),
            maps_by_name(teacher.features),
            batch.boxes,
            image_size=batch.image_size,
        )
        if self.response is not None:
            responses = self.response(student, teacher, batch)
            terms |= {f"{RESPONSE}_{name}": term for name, term in responses.items()}
        return terms

    def from_features(
        self,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        *,
        image_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """The unweighted terms of feature maps by level name and one (N, 4) tensor of xyxy px boxes an image.

        Maps have no responses: those terms are left out.
        """
        terms: dict[str, Tensor] = {}
        maps = self._maps(student_features, teacher_features)
        device = next(iter(student_features.values())).device
        boxes = [own.to(device, non_blocking=True) for own in boxes]
        layout = InstanceLayout.build(count_boxes(boxes), device)
        pixel = dict(zip(self.pixel_pairs, self.pixel_losses, strict=True))
        pooled = []
        # Level by level and side by side: the maps of the finest level are what a step pays for in memory, so the
        # teacher's are let go before the student's are made, and both before the next level's.
        for pair, (ours, theirs) in maps.items():
            relation = cast(PixelRelationLoss | None, pixel.get(pair))
            pools = pair in self.instance_pairs
            teacher = self._teacher_map(theirs)
            target, weights = None, None
            if relation is not None:
                weights = relation.weigh(teacher, boxes, image_size=image_size, layout=layout)
                target = relation.target(teacher)
                if self._looks:
                    self._spread[f"{PIXEL}/{pair.name}"] = relation.target_spread(target)
            theirs_pooled = self._pool(teacher, boxes, image_size, layout) if pools else None
            del teacher
            student = self._student_map(pair, ours)
            if relation is not None and target is not None:
                terms[f"{PIXEL}/{pair.name}"] = relation(self._at_size(student, target), None, weights, target=target)
            del target
            if theirs_pooled is not None:
                pooled.append((self._pool(student, boxes, image_size, layout), theirs_pooled))
            del student
        if RELATION in self.weights:
            for pair, loss, instances in zip(self.instance_pairs, self.relation_losses, pooled, strict=True):
                terms[f"{RELATION}/{pair.name}"] = loss(*instances, boxes, image_size=image_size)
        if INSTANCE in self.weights:
            for pair, loss, instances in zip(self.instance_pairs, self.instance_losses, pooled, strict=True):
                terms[f"{INSTANCE}/{pair.name}"] = loss(*instances, layout=layout)
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of terms, for a training loop without drkd's engine.

        The weights serve as plain multipliers here: balancing by gradient ratios and warm-up are the engine's.
        """
        return torch.stack([self.weights[name.partition("/")[0]] * term for name, term in terms.items()]).sum()

    @torch.no_grad()
    def relations(
        self,
        student_features: Mapping[str, Tensor],
        teacher_features: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        *,
        image_size: tuple[int, int],
    ) -> tuple[LevelRelations, ...]:
        """The maps and matrices that the two relation terms compare, level by level, without gradient."""
        prepared = {
            pair: (self._student_map(pair, ours), self._teacher_map(theirs))
            for pair, (ours, theirs) in self._maps(student_features, teacher_features).items()
        }
        found: dict[str, LevelRelations] = {}
        for pair, loss in zip(self.pixel_pairs, self.pixel_losses, strict=True):
            pixel = cast(PixelRelationLoss, loss)
            maps = self._at_size(*prepared[pair]), prepared[pair][1]
            related, graph = pixel.maps(*maps), pixel.graph_maps(*maps)
            found[pair.name] = LevelRelations(pair.name, pair.teacher.name, *related, *graph)
        for pair, loss in zip(self.instance_pairs, self.relation_losses, strict=False):
            instance = cast(InstanceRelationLoss, loss)
            layout = InstanceLayout.build(count_boxes(boxes), prepared[pair][0].device)
            ours, theirs = prepared[pair]
            pooled = self._pool(ours, boxes, image_size, layout), self._pool(theirs, boxes, image_size, layout)
            student_matrix, teacher_matrix, _ = instance.matrices(*pooled, boxes, image_size=image_size)
            found[pair.name] = replace(
                found.get(pair.name, LevelRelations(pair.name, pair.teacher.name)),
                student_matrix=student_matrix,
                teacher_matrix=teacher_matrix,
                filter=instance.filter_weights(*pooled, boxes, image_size=image_size),
            )
        return tuple(found.values())

    def _maps(
        self, student_features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]
    ) -> dict[LevelPair, tuple[Tensor, Tensor]]:
        """The maps, as they were given, of each level that some term reads."""
        pairs = dict.fromkeys((*self.pixel_pairs, *self.instance_pairs))
        ours = _select({pair.student.name for pair in pairs}, student_features, owner="student")
        theirs = _select({pair.teacher.name for pair in pairs}, teacher_features, owner="teacher")
        return {pair: (ours[pair.student.name], theirs[pair.teacher.name]) for pair in pairs}

    def _student_map(self, pair: LevelPair, feature: Tensor) -> Tensor:
        """What all terms read of the student's map: adapted and standardised, where asked for."""
        if self.adapters:
            feature = adapt(self.adapters[_key(pair.name)], feature)
        return standardise(feature) if self.normalise_features else feature

    def _at_size(self, student: Tensor, target: Tensor) -> Tensor:
        """The student's map at the target's size: what resampling has averaged away is given its variance again."""
        size = (target.shape[-2], target.shape[-1])
        if student.shape[-2:] == target.shape[-2:] or not self.normalise_features:
            return student
        return standardise(resample(student, size))

    def _teacher_map(self, feature: Tensor) -> Tensor:
        """What they read of the teacher's, a constant."""
        feature = feature.detach()
        return standardise(feature) if self.normalise_features else feature

    def _pool(
        self, feature: Tensor, boxes: Sequence[Tensor], image_size: tuple[int, int], layout: InstanceLayout
    ) -> Tensor:
        return pool_instances(
            feature,
            boxes,
            image_size=image_size,
            output_size=self.roi_size,
            aligned=self.roi_aligned,
            sampling_ratio=self.roi_sampling_ratio,
            layout=layout,
        )


def _key(level: str) -> str:
    """A level's name as a key of a module dict, which takes no dots."""
    return level.replace(".", "_")


def _at_level(numbers: int | Sequence[int], index: int) -> int:
    if isinstance(numbers, int):
        return numbers
    if not numbers:
        raise ValueError("Expected at least one number of graph nodes or states, got none")
    return numbers[min(index, len(numbers) - 1)]


def _select(names: set[str], features: Mapping[str, Tensor], *, owner: str) -> dict[str, Tensor]:
    missing = sorted(names - set(features))
    if missing:
        raise ValueError(f"Expected {owner} features named {', '.join(sorted(names))}, missing {', '.join(missing)}")
    return {name: features[name] for name in sorted(names)}
