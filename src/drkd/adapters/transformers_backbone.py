"""Backbones for transformers detectors: RT-DETR's ResNets by name, timm's by theirs with ImageNet weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from drkd.adapters.weights import check_fit, package_state, read_state
from drkd.contracts import DrkdError

_STRIDES = (8, 16, 32)
# Of a classifier's file, of torchvision's detectors as drkd builds them, of transformers'.
_PREFIXES = ("", "backbone.body.", "model.backbone.model.", "model.backbone.model._backbone.")
_BASIC, _BOTTLENECK = [64, 128, 256, 512], [256, 512, 1024, 2048]
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {"layer_type": "basic", "hidden_sizes": _BASIC, "depths": [2, 2, 2, 2]},
    "resnet34": {"layer_type": "basic", "hidden_sizes": _BASIC, "depths": [3, 4, 6, 3]},
    "resnet50": {"layer_type": "bottleneck", "hidden_sizes": _BOTTLENECK, "depths": [3, 4, 6, 3]},
    "resnet101": {"layer_type": "bottleneck", "hidden_sizes": _BOTTLENECK, "depths": [3, 4, 23, 3]},
}


@dataclass(frozen=True)
class BackboneChoice:
    """A backbone as a transformers configuration has it.

    Args:
        config: For ``backbone_config``.
        channels: Of the three maps of strides 8, 16 and 32 px that it returns.
        mean: What it was trained with, per channel, where that is known.
        std: The same for the standard deviation.
        freezable: See `is_freezable`.
    """

    config: dict[str, Any]
    channels: tuple[int, ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    freezable: bool = True


def choose_backbone(name: str) -> BackboneChoice:
    """Describe a backbone; nothing is downloaded.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101" (RT-DETR's variant d), or "timm/<name>".

    Raises:
        DrkdError: If there is no such network, or it has no maps of strides 8, 16 and 32 px.
    """
    if name in _RESNETS:
        plan = {"model_type": "rt_detr_resnet", **_RESNETS[name], "out_indices": [2, 3, 4]}
        return BackboneChoice(plan, tuple(_RESNETS[name]["hidden_sizes"][1:]))
    if not name.startswith("timm/"):
        raise DrkdError(f"backbone: expected one of {', '.join(_RESNETS)}, or timm/<name>, got {name!r}.")
    import timm

    timm_name = name.removeprefix("timm/")
    if not timm.is_model(timm_name):
        raise DrkdError(f"backbone: timm {timm.__version__} has no model named {timm_name!r}.")
    try:
        network: Any = timm.create_model(timm_name, features_only=True, pretrained=False)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise DrkdError(f"backbone: timm's {timm_name} cannot return feature maps ({error}).") from error
    strides = list(network.feature_info.reduction())
    if any(stride not in strides for stride in _STRIDES):
        raise DrkdError(f"backbone: {name} has maps of strides {strides} px, expected {list(_STRIDES)} among them.")
    places = [strides.index(stride) for stride in _STRIDES]
    channels = tuple(network.feature_info.channels()[place] for place in places)
    plan = {"model_type": "timm_backbone", "backbone": timm_name, "features_only": True, "out_indices": places}
    trained = network.pretrained_cfg
    return BackboneChoice(
        plan, channels, tuple(trained["mean"]), tuple(trained["std"]), freezable=_has_plain_norms(network)
    )


def is_freezable(backbone_config: Any) -> bool:
    """Whether the batch norms of a configuration's backbone are PyTorch's own.

    transformers freezes them by putting other layers in their place, which loses what others do besides, such as timm's
    ``BatchNormAct2d`` its activation: the network would be all but linear.

    Args:
        backbone_config: An entry ``backbone_config``: values by name, or an object of transformers.
    """
    import timm

    found = backbone_config if isinstance(backbone_config, dict) else getattr(backbone_config, "__dict__", {})
    name = str(found.get("backbone"))
    if found.get("model_type", "timm_backbone") != "timm_backbone" or not timm.is_model(name):
        return True
    return _has_plain_norms(timm.create_model(name, features_only=True, pretrained=False))


def _has_plain_norms(network: nn.Module) -> bool:
    return {type(layer) for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)} <= {nn.BatchNorm2d}


def load_backbone(model: Any, name: str, weights: str) -> None:
    """Fill the timm backbone of a transformers detector with weights of the same network.

    Args:
        model: The detector.
        name: "timm/<name>".
        weights: "imagenet" (timm's published ones, needs a network), "package:efficientnet_lite0", or a file: a
            classifier's, or a detector's on the same backbone.

    Raises:
        DrkdError: If the backbone is not timm's, or the weights cannot be found or do not fit.
    """
    if not name.startswith("timm/"):
        raise DrkdError(
            f"backbone_weights: {name} is transformers' own network, whose names no classifier's file has. Use "
            "timm/<name>, or PretrainedDetrBuilder, which loads a whole detector."
        )
    outer = body_of(model)
    body: Any = getattr(outer, "_backbone", outer)
    wanted = body.state_dict()
    state = _published(name) if weights == "imagenet" else _read(weights, name)
    chosen = {key: state[found] for key in wanted if (found := _find(key, state)) is not None}
    check_fit(wanted, chosen, weights, what=f"backbone {name}")
    body.load_state_dict(chosen, strict=False)


def backbone_of(model: Any) -> nn.Module:
    """The backbone of a transformers detector; DEIMv2 calls it otherwise than the rest."""
    parts = model.model
    backbone: nn.Module = parts.backbone if hasattr(parts, "backbone") else parts.conv_encoder
    return backbone


def body_of(model: Any) -> nn.Module:
    """The network alone inside the backbone of a transformers detector; DEIMv2 keeps projections beside it."""
    parts = backbone_of(model)
    body: nn.Module = next((getattr(parts, name) for name in ("model", "backbone") if hasattr(parts, name)), parts)
    return body


def _read(weights: str, name: str) -> dict[str, Tensor]:
    return package_state(weights, name) if weights.startswith("package:") else read_state(weights)


def _find(key: str, state: dict[str, Tensor]) -> str | None:
    """The key's name in a file, where "blocks.2.x" may be flattened to "blocks_2.x", and prefixed by a detector."""
    first, _, rest = key.partition(".")
    forms = (key, f"{first[::-1].replace('_', '.', 1)[::-1]}.{rest}", key.replace(".", "_", 1))
    return next((name for prefix in _PREFIXES for form in forms if (name := prefix + form) in state), None)


def _published(name: str) -> dict[str, Tensor]:
    import timm

    try:
        network = timm.create_model(name.removeprefix("timm/"), pretrained=True)
    except (OSError, RuntimeError) as error:
        raise DrkdError(
            f"backbone_weights: the published ImageNet weights of {name} could not be downloaded ({error}). Without a "
            "network, give the path of a checkpoint, or use package:efficientnet_lite0 with timm/tf_efficientnet_lite0."
        ) from error
    return dict(network.state_dict())
