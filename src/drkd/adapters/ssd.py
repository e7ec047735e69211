"""torchvision's SSD300 and SSDLite-MobileNetV3, described by plain values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from drkd.adapters.detection_options import check_detection_options
from drkd.adapters.torchvision_detector import TorchvisionDetector
from drkd.adapters.weights import fill, labels_of, read_checkpoint, read_state, state_in, stored_normalisation
from drkd.contracts import DetectorBuilder, DrkdError


@dataclass(frozen=True, kw_only=True)
class SSDBuilder(DetectorBuilder):
    """What the two SSDs share: width, weights and thresholds.

    Args:
        width: Multiplier of the backbone's channels, rounded to multiples of 8.
        backbone_weights: None, "imagenet" (published, needs a network; width 1 only), or the path of a checkpoint of
            torchvision's classifier of the same network.
        weights: Path of a checkpoint of the whole detector, or None.
        image_mean: Per channel, RGB in [0, 1]; None takes what ``weights`` say if drkd saved them, else the network's
            own.
        image_std: The same for the standard deviation.
        foreground_iou: Overlap from which a default box is matched with a box, in training.
        detections_per_image: At most so many detections an image.
        score_threshold: Detections below this are dropped.
        nms_threshold: Intersection over union above which the weaker of two detections is dropped.
    """

    family: ClassVar[str]
    network: ClassVar[str]
    classifier: ClassVar[tuple[str, str]]

    width: float = 1.0
    backbone_weights: str | None = None
    weights: str | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    foreground_iou: float = 0.5
    detections_per_image: int = 200
    score_threshold: float = 0.01
    nms_threshold: float = 0.45

    def __post_init__(self) -> None:
        check_detection_options(vars(self))
        if self.width <= 0:
            raise DrkdError(f"width: expected a positive number, got {self.width}.")
        if self.backbone_weights == "imagenet" and self.width != 1:
            raise DrkdError(
                f"backbone_weights: the published ImageNet weights are those of width 1, got width {self.width}."
            )
        if not 0 < self.foreground_iou < 1:
            raise DrkdError(f"foreground_iou: expected a number between 0 and 1, got {self.foreground_iou}.")

    def build(self, class_names: Sequence[str]) -> TorchvisionDetector:
        """Build the detector for these classes.

        Raises:
            DrkdError: If weights cannot be found or do not fit.
        """
        if not class_names:
            raise DrkdError("class_names: expected at least one class, got none.")
        content = None if self.weights is None else read_checkpoint(self.weights)
        plan = self._plan(len(class_names) + 1)
        mean, std = stored_normalisation(content, str(self.weights))
        for name, values in (("image_mean", mean), ("image_std", std)):
            if values is not None and getattr(self, name) is None:
                plan["detector"][name] = list(values)
        model = get_model(**plan["detector"])
        self._shape(model)
        if self.backbone_weights is not None:
            fill_body(model, self._body_state(self.backbone_weights), self.backbone_weights)
        if self.weights is not None:
            fill(model, state_in(content, self.weights), self.weights)
        label_ids = labels_of(content, str(self.weights), class_names, range(1, len(class_names) + 1))
        return TorchvisionDetector(model, class_names, label_ids=label_ids, plan=plan)

    def _plan(self, outputs: int) -> dict[str, Any]:
        options: dict[str, Any] = {
            "name": self.network,
            "weights": None,
            "weights_backbone": None,
            "num_classes": outputs,
            "iou_thresh": self.foreground_iou,
            "detections_per_img": self.detections_per_image,
            "score_thresh": self.score_threshold,
            "nms_thresh": self.nms_threshold,
        }
        options.update({"image_mean": list(self.image_mean)} if self.image_mean else {})
        options.update({"image_std": list(self.image_std)} if self.image_std else {})
        return {"family": self.family, "detector": options}

    @abstractmethod
    def _shape(self, model: nn.Module) -> None:
        """Give the model the width or size that torchvision's own call cannot."""

    def _body_state(self, weights: str) -> dict[str, Tensor]:
        if weights != "imagenet":
            return read_state(weights)
        name, entry = self.classifier
        published = get_model_weights(name)[entry]
        try:
            return dict(published.get_state_dict(progress=True, check_hash=True))
        except (OSError, RuntimeError) as error:
            raise DrkdError(
                f"backbone_weights: the published ImageNet weights of {name} could not be downloaded ({error}). Where "
                f"there is a network, fetch {published.url} and give the file's path."
            ) from error


@dataclass(frozen=True, kw_only=True)
class SSD300Builder(SSDBuilder):
    """SSD300 on VGG16 (Liu et al., ECCV 2016, arXiv:1512.02325), torchvision's. It sees every image at 300 x 300 px."""

    family: ClassVar[str] = "ssd"
    network: ClassVar[str] = "ssd300_vgg16"
    classifier: ClassVar[tuple[str, str]] = ("vgg16", "IMAGENET1K_FEATURES")

    def _plan(self, outputs: int) -> dict[str, Any]:
        return {**super()._plan(outputs), "size": [300, 300], "narrow": self.width != 1}

    def _shape(self, model: nn.Module) -> None:
        if self.width != 1:
            narrow_vgg(model, self.width)


@dataclass(frozen=True, kw_only=True)
class SSDLiteBuilder(SSDBuilder):
    """SSDLite on MobileNetV3-Large (Howard et al., ICCV 2019, arXiv:1905.02244), torchvision's.

    Its ImageNet weights fill the network up to the last stage, which is half as wide in the detector.

    Args:
        size: Side that every image is resized to, px, a multiple of 32.
    """

    family: ClassVar[str] = "ssdlite"
    network: ClassVar[str] = "ssdlite320_mobilenet_v3_large"
    classifier: ClassVar[tuple[str, str]] = ("mobilenet_v3_large", "IMAGENET1K_V1")

    size: int = 320
    detections_per_image: int = 300
    score_threshold: float = 0.001
    nms_threshold: float = 0.55

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 32 or self.size % 32:
            raise DrkdError(f"size: expected a multiple of 32 px, got {self.size}.")

    def _plan(self, outputs: int) -> dict[str, Any]:
        plan = {**super()._plan(outputs), "size": [self.size, self.size]}
        if self.width != 1:
            plan["detector"]["width_mult"] = self.width
        return plan

    def _shape(self, model: nn.Module) -> None:
        transform: Any = model.transform
        transform.fixed_size = (self.size, self.size)


@torch.no_grad()
def fill_body(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Fill an SSD's backbone from its network's classifier, tensor by tensor in order, wherever the shapes agree.

    Raises:
        DrkdError: If fewer than half of the classifier's features fit.
    """
    backbone: Any = model.backbone
    wanted = [(name, tensor) for name, tensor in backbone.state_dict().items() if name != "scale_weight"]
    given = [tensor for name, tensor in state.items() if name.startswith("features.")]
    fitting = [(own, new) for (_, own), new in zip(wanted, given, strict=False) if own.shape == new.shape]
    if not given or len(fitting) < len(given) / 2:
        raise DrkdError(
            f"backbone_weights: {source} holds the weights of another network: {len(fitting)} of its {len(given)} "
            f"tensors under 'features.' fit this {type(backbone).__name__} in order."
        )
    for own, new in fitting:
        own.copy_(new)


def narrow_vgg(model: nn.Module, width: float) -> None:
    """Replace the convolutions of an SSD300 by narrower or wider ones, freshly initialised as torchvision does."""

    def scaled(channels: int) -> int:
        return channels if channels == 3 else max(8, round(channels * width / 8) * 8)

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Conv2d):
            continue
        outputs = layer.out_channels if name.startswith("head.") else scaled(layer.out_channels)
        new = nn.Conv2d(
            scaled(layer.in_channels),
            outputs,
            kernel_size=layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
        )
        start: Callable[..., Any] = nn.init.xavier_uniform_
        if name.startswith("backbone.features."):
            start = nn.init.kaiming_normal_
        start(new.weight)
        nn.init.zeros_(new.bias)  # type: ignore[arg-type]
        parent, _, place = name.rpartition(".")
        setattr(model.get_submodule(parent), place, new)
    backbone: Any = model.backbone
    backbone.scale_weight = nn.Parameter(torch.full((scaled(backbone.scale_weight.numel()),), 20.0))
