"""Any detector: a module of yours, functions that return its losses and detections, and the names of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from drkd.adapters.box_precision import without_autocast
from drkd.adapters.layer_outputs import LayerName, LayerRecorder
from drkd.adapters.pyramid_probe import find_levels, list_candidates, probe_batch, take_levels, undisturbed
from drkd.adapters.returned_values import read_detections, read_loss
from drkd.contracts import (
    DetectionBatch,
    Detections,
    Detector,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    FeatureMap,
    Size,
    Want,
)

LossFunction = Callable[[nn.Module, DetectionBatch], Mapping[str, Any]]
"""(model, batch) to the task losses by name: 0-d tensors, or lists of them, which are summed."""

DetectionFunction = Callable[[nn.Module, DetectionBatch], Sequence[Any]]
"""(model, batch) to boxes (N, 4) xyxy px of ``batch.images``, scores (N,) and labels (N,) of each image, in any order:
a tuple of the three, or a mapping or an object with ``boxes``, ``scores`` and ``labels``."""

FeatureFunction = Callable[[nn.Module, DetectionBatch], object]
"""(model, batch) to anything; runs at least the layers that are hooked."""

_POSSIBLE = frozenset[Want]({"features", "losses"})
# Bases that say nothing about what a module does.
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_DROPOUTS = (
    torch.dropout,
    *(getattr(functional, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")),
    functional.feature_alpha_dropout,
)


class HookedDetector(Detector):
    """Wraps any module without changing it; `wrap_model` makes one and says what the arguments are.

    Hooks are on the module during a forward pass only. Where features alone are wanted the pass ends as soon as the
    last of the layers has returned.

    Attributes:
        plan: How to build it again: the arguments of the `HookedBuilder` that made it; None where none did.

    Raises:
        DrkdError: If a layer does not exist, is not called, is called more than once, or returns no maps; if a layer
            that follows overwrites its output; if the functions and arguments do not fit.
    """

    _mean: Tensor
    _std: Tensor
    _to_model: Tensor
    _to_ours: Tensor

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        losses: LossFunction | None,
        detections: DetectionFunction | None,
        features: FeatureFunction | None,
        class_names: Sequence[str],
        label_ids: Sequence[int],
        image_size: Size,
        image_mean: Sequence[float] | None,
        image_std: Sequence[float] | None,
        family: str,
    ) -> None:
        super().__init__()
        self.model = model
        self.plan: dict[str, Any] | None = None
        self.label_ids = tuple(label_ids)
        self.image_mean = None if image_mean is None else tuple(image_mean)
        self.image_std = None if image_std is None else tuple(image_std)
        self._losses, self._detections, self._features = losses, detections, features
        self._register_tables()
        names = [LayerName.parse(layer) for layer in layers]
        if not names or len(set(names)) != len(names):
            raise DrkdError(f"layers: expected different names, at least one, got {list(layers)}.")
        first = next((label for label in range(len(self.label_ids)) if self.label_ids[label] >= 0), 0)
        with undisturbed(self):
            self._sources = find_levels(model, names, self._run, probe_batch(model, image_size, label=first))
        self._hooked = list(dict.fromkeys(source.layer.module for source in self._sources))
        self.spec = DetectorSpec(tuple(source.level for source in self._sources), tuple(class_names), family)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers' outputs that are the levels, finest first."""
        return tuple(str(source.layer) for source in self._sources)

    @property
    def missing_classes(self) -> tuple[str, ...]:
        """Classes of the spec that the model has no output for, and never detects."""
        names = zip(self.spec.class_names, self.label_ids, strict=True)
        return tuple(name for name, label in names if label < 0)

    @property
    def body_names(self) -> tuple[str, ...]:
        """The first of "backbone.body.", "backbone." and "body." that names of the model's state dict begin with.

        Raises:
            DrkdError: If none does, for nothing else says where the body of a model of your own ends.
        """
        names = list(self.model.state_dict())
        for beginning in ("backbone.body.", "backbone.", "body."):
            if any(name.startswith(beginning) for name in names):
                return (beginning,)
        raise DrkdError(
            f"drkd cannot tell the backbone of this {self.spec.family} from the rest. Expected parameters "
            f"whose names begin with backbone or body, got {', '.join(names[:3])}, ... `inherit` and "
            "`training.optimization.backbone_learning_rate` need that. Name the module so, or leave them out."
        )

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """Compute features, losses or both from one pass, in train or eval mode alike.

        Raises:
            DrkdError: If a layer is not called, or called more than once, or its map is not as large as its stride
                says; if the losses are no 0-d tensors.
            ValueError: If predictions are wanted, which drkd cannot see in a model that it does not know.
        """
        if want - _POSSIBLE:
            raise ValueError(
                f"want: expected any of {sorted(_POSSIBLE)} of a model that drkd sees through hooks, got {sorted(want)}"
            )
        if "losses" not in want:
            return DetectorOutput(self._only_features(batch)) if want else DetectorOutput()
        with LayerRecorder(self.model, self._hooked if "features" in want else ()) as recorder:
            losses = self._task_losses(batch)
        return DetectorOutput(self._levels(recorder, batch) if "features" in want else (), losses)

    @property
    def can_detect(self) -> bool:
        """Whether a function for detections was given."""
        return self._detections is not None

    @torch.no_grad()
    @without_autocast
    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Detections in px of the original images, in the precision of the weights: autocast is left.

        Raises:
            DrkdError: If no function for detections was given, or it does not return what it should.
            ValueError: In train mode, where batch norm would depend on the other images.
        """
        if self._detections is None:
            raise DrkdError(
                f"This {self.spec.family} was wrapped without a function for its detections, so there are none. Give "
                "`detections`."
            )
        if self.training or self.model.training:
            raise ValueError("detect needs eval mode: call .eval() on the wrapped detector first")
        found = list(self._detections(self.model, self._prepare(batch, targets=False)))
        if len(found) != len(batch):
            raise DrkdError(f"detections: expected one entry for each of {len(batch)} images, got {len(found)}.")
        return [
            self._to_original(*read_detections(entry), size, original)
            for entry, size, original in zip(found, batch.sizes, batch.original_sizes, strict=True)
        ]

    def relabel(self, class_names: Sequence[str], label_ids: Sequence[int]) -> None:
        """Take other classes, or the same ones in another order.

        Args:
            class_names: Names of classes 0..K-1.
            label_ids: The model's label of each; -1 where it does not know the class.
        """
        self.label_ids = tuple(label_ids)
        self.spec = replace(self.spec, class_names=tuple(class_names))
        self._register_tables()

    def _run(self, batch: DetectionBatch) -> object:
        """Run the hooked layers: by the function made for it, or else by the one that suits the mode."""
        if self._features is not None:
            return self._features(self.model, self._prepare(batch, targets=False))
        if self._detections is not None and (not self.training or self._losses is None):
            return self._detections(self.model, self._prepare(batch, targets=False))
        return self._call_losses(batch)

    def _call_losses(self, batch: DetectionBatch) -> Mapping[str, Any]:
        if self._losses is None:
            raise DrkdError(
                f"This {self.spec.family} was wrapped without a function for its losses, so it can teach but not "
                "learn. Give `losses`."
            )
        with _as_in_training(self.model):
            return self._losses(self.model, self._prepare(batch, targets=True))

    def _only_features(self, batch: DetectionBatch) -> tuple[FeatureMap, ...]:
        with LayerRecorder(self.model, self._hooked, stop=True) as recorder:
            self._run(batch)
        return self._levels(recorder, batch)

    def _levels(self, recorder: LayerRecorder, batch: DetectionBatch) -> tuple[FeatureMap, ...]:
        def candidates() -> str:
            with undisturbed(self):
                return list_candidates(self.model, self._run, batch)

        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters())
        return take_levels(recorder, self._sources, batch, candidates=candidates, trains=trains)

    def _task_losses(self, batch: DetectionBatch) -> dict[str, Tensor]:
        if self.missing_classes:
            raise ValueError(f"this model cannot compute losses: it has no output for {list(self.missing_classes)}")
        found = self._call_losses(batch)
        if not isinstance(found, Mapping) or not found:
            raise DrkdError(
                f"losses: expected a dict of tensors by name, got {'an empty one' if found == {} else type(found)}."
            )
        return {str(name): read_loss(str(name), value) for name, value in found.items()}

    def _register_tables(self) -> None:
        """Buffers that are not persistent: the state dict stays the plain model's."""
        device = next((tensor.device for tensor in (*self.model.parameters(), *self.model.buffers())), None)
        # One entry more than labels: -1, for labels of the model beyond those that were asked for.
        to_ours = torch.full((max(self.label_ids, default=-1) + 2,), -1, dtype=torch.int64)
        for ours, theirs in enumerate(self.label_ids):
            if theirs >= 0:
                to_ours[theirs] = ours
        mean = torch.tensor(self.image_mean or (0.0, 0.0, 0.0)).view(1, 3, 1, 1)
        std = torch.tensor(self.image_std or (1.0, 1.0, 1.0)).view(1, 3, 1, 1)
        to_model = torch.tensor(self.label_ids, dtype=torch.int64)
        for name, table in (("_mean", mean), ("_std", std), ("_to_model", to_model), ("_to_ours", to_ours)):
            self.register_buffer(name, table.to(device), persistent=False)

    def _prepare(self, batch: DetectionBatch, *, targets: bool) -> DetectionBatch:
        """Normalise, with zeros in the padding, and give boxes the model's own labels."""
        if self.image_mean is not None or self.image_std is not None:
            images = batch.images
            height, width = batch.image_size
            values = (images - self._mean.to(images.dtype)) / self._std.to(images.dtype)
            if any(size != (height, width) for size in batch.sizes):
                sizes = torch.tensor(batch.sizes).to(images.device, non_blocking=True)
                rows = torch.arange(height, device=images.device) < sizes[:, :1]
                columns = torch.arange(width, device=images.device) < sizes[:, 1:]
                values = values * (rows[:, None, :, None] & columns[:, None, None, :])
            batch = replace(batch, images=values)
        if targets and self.label_ids and self.label_ids != tuple(range(len(self.label_ids))):
            batch = replace(batch, targets=tuple(replace(t, labels=self._to_model[t.labels]) for t in batch.targets))
        return batch

    def _to_original(self, boxes: Tensor, scores: Tensor, labels: Tensor, size: Size, original: Size) -> Detections:
        """Scale boxes to the stored image, clip them to it, drop classes that were not asked for, and sort."""
        scale_y, scale_x = original[0] / size[0], original[1] / size[1]
        boxes = boxes.float()
        boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([original[1], original[0]] * 2))
        beyond = len(self._to_ours) - 1
        ours = self._to_ours[torch.where(labels < 0, beyond, labels.long()).clamp(max=beyond)]
        order = scores.float().argsort(descending=True, stable=True)
        order = order[ours[order] >= 0]
        return Detections(boxes[order], scores.float()[order], ours[order])


def wrap_model(
    model: nn.Module,
    layers: Sequence[str],
    *,
    losses: LossFunction | None = None,
    detections: DetectionFunction | None = None,
    features: FeatureFunction | None = None,
    class_names: Sequence[str] = (),
    first_label: int = 0,
    label_ids: Sequence[int] | None = None,
    image_size: Size = (256, 256),
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    family: str = "",
) -> HookedDetector:
    """Wrap a detector that drkd does not know; strides and channels are found by one forward pass.

    The functions take ``(model, batch)``, a `DetectionBatch` whose images are normalised and whose labels are the
    model's own where that is asked for below. They must not close over the model: it may be copied.

    Args:
        model: Any module.
        layers: Dotted names of the layers whose outputs are the pyramid, in any order. A layer that returns several
            maps gives a level each; ``neck[0]`` or ``backbone[p3]`` takes one of them.
        losses: See `LossFunction`. In eval mode it is called with ``training`` set on the model's containers, its
            norms and dropouts left alone. None for a teacher.
        detections: See `DetectionFunction`. None where none are wanted.
        features: See `FeatureFunction`. By default the pass that computes detections, or losses, is ended when the
            last of the layers has returned.
        class_names: Names of classes 0..K-1, without background.
        first_label: The model's label of the first class; the others follow.
        label_ids: The model's label of each class, where they do not follow; -1 where it does not know the class.
        image_size: Height and width of the images that strides are found with, px; best multiples of the coarsest.
        image_mean: Subtracted from images, per channel, RGB in [0, 1]; None where the functions normalise.
        image_std: Images are divided by it; the same.
        family: What to call it in messages; the class's name by default.

    Raises:
        DrkdError: See `HookedDetector`.
    """
    for argument, given in (("layers", layers), ("class_names", class_names)):
        if isinstance(given, str):
            raise DrkdError(f"wrap_model: {argument}: expected a list of names, got one string, {given!r}.")
    if losses is None and detections is None and features is None:
        raise DrkdError("wrap_model: expected a function that runs the model: losses, detections or features.")
    if detections is not None and not class_names:
        raise DrkdError("class_names: expected the names of the classes that `detections` returns labels of, got none.")
    ids = list(range(first_label, first_label + len(class_names))) if label_ids is None else list(label_ids)
    known = [label for label in ids if label >= 0]
    if len(ids) != len(class_names) or len(set(known)) != len(known) or (ids and not known):
        raise DrkdError(f"label_ids: expected a different label for each of {len(class_names)} classes, got {ids}.")
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if values is not None and (len(values) != 3 or (name == "image_std" and min(values) <= 0)):
            raise DrkdError(f"{name}: expected three numbers, of red, green and blue, got {list(values)}.")
    return HookedDetector(
        model,
        layers,
        losses=losses,
        detections=detections,
        features=features,
        class_names=class_names,
        label_ids=ids,
        image_size=image_size,
        image_mean=image_mean,
        image_std=image_std,
        family=family or type(model).__name__,
    )


class _NoDropout(TorchFunctionMode):
    """Calls of dropout functions hand their input on: a user's block may ask for it by its own ``training``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in place of each of its functions."""
        del types
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention and len(args) < 5:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


@contextmanager
def _as_in_training(model: nn.Module) -> Iterator[None]:
    """Let a model that decides by ``training`` what to return compute its losses; torch's own layers keep their mode.

    So do layers made from them (timm's batch norms hold an activation), and whatever keeps running statistics. So batch
    norm in eval mode still takes its running statistics and leaves them as they are, and dropout drops nothing.
    """
    changed = [
        module
        for module in model.modules()
        if not module.training and any(True for _ in module.children()) and not _is_layer(module)
    ]
    rests = not model.training
    try:
        for module in changed:
            module.training = True
        with _NoDropout() if rests else nullcontext():
            yield
    finally:
        for module in changed:
            module.training = False


def _is_layer(module: nn.Module) -> bool:
    """Whether it is torch's own, a kind of one of torch's layers (not of its containers), or a norm by its buffers."""
    own, *bases = type(module).__mro__
    layers = [own, *(base for base in bases if base not in _CONTAINERS)]
    buffers = dict(module.named_buffers(recurse=False))
    return any(layer.__module__.startswith("torch.nn.") for layer in layers) or "running_mean" in buffers
