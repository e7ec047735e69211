"""Damaged and hostile files of detectors of Hugging Face transformers, of Ultralytics and of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from attacks import Attacks
from mutations import guarded
from PIL import Image
from torch import Tensor, nn

from drkd.adapters import DetrBuilder, HookedBuilder, UltralyticsBuilder, save_student
from drkd.contracts import DetectorBuilder
from drkd.recipes.prediction import predict

_SETTINGS = {"min_size": 32, "max_size": 64, "size_divisor": 32}
_DETR = {
    **{"d_model": 16, "encoder_hidden_dim": 16, "decoder_in_channels": [16, 16, 16], "encoder_layers": 1},
    **{"encoder_ffn_dim": 16, "decoder_layers": 1, "decoder_ffn_dim": 16, "num_queries": 5, "num_denoising": 2},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
_YOLO = {
    "scales": {"n": [0.33, 0.05, 64]},
    "scale": "n",
    "backbone": [
        *([-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [128, 3, 2]], [-1, 1, "C3k2", [256, False, 0.25]]),
        *([-1, 1, "Conv", [256, 3, 2]], [-1, 1, "Conv", [512, 3, 2]], [-1, 1, "Conv", [512, 3, 2]]),
    ],
    "head": [
        *([-1, 1, "nn.Upsample", [None, 2, "nearest"]], [[-1, 4], 1, "Concat", [1]], [-1, 1, "C3k2", [512, False]]),
        [[3, 8, 5], 1, "Detect", ["nc"]],
    ],
}


class LibraryAttacks(Attacks):
    """One kind a library.

    Args:
        folder: Working folder.

    Attributes:
        whole: The undamaged file of the kind that was begun last.
        image: What is predicted on.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.whole = folder / "whole.pt"
        self.image = folder / "shown.png"
        Image.effect_noise((40, 30), 60).convert("RGB").save(self.image)
        runs = f"__import__('os').mkdir({str(self.marker)!r})"
        self._odd = (*self._odd, runs, "PekingU/rtdetr_r50vd", "TorchVision", "torch.hub.load", "os:getcwd")
        self._hostile = {
            **{"auto_map": {"AutoConfig": "a/b--c.D"}, "use_pretrained_backbone": True, "use_timm_backbone": True},
            **{"backbone": "PekingU/rtdetr_r50vd", "name_or_path": "a/b", "_name_or_path": "a/b", "activation": runs},
            **{"quantization_config": {"quant_method": "bitsandbytes"}, "backbone_kwargs": {"pretrained": True}},
            **{"torch_dtype": runs, "attn_implementation": "kernels-community/flash-attn", "weights": "/etc/passwd"},
        }

    def try_transformers(self) -> str:
        """An RT-DETR's student.pt, predicted with."""
        return self._try()

    def try_ultralytics(self) -> str:
        """A YOLO's student.pt, predicted with."""
        return self._try()

    def try_hooks(self) -> str:
        """The student.pt of a detector of the user's own; a file that is not trusted must be refused, whole or not."""
        trusted = self._chance.random() < 0.8
        outcome = self._try(trust_code=trusted)
        if outcome == "works" and not trusted:
            return "called what a file names, without leave"
        return outcome

    def _prepare(self, kind: str) -> None:
        """Save the whole file, which also imports the library."""
        torch.manual_seed(0)
        builder = self._builder(kind)
        detector = builder.build(["cat"])
        extra = {"category_ids": {"cat": 3}}
        save_student(self.whole, detector, builder=builder, image_settings=_SETTINGS, extra=extra)

    def _builder(self, kind: str) -> DetectorBuilder:
        if kind == "transformers":
            return DetrBuilder(backbone="timm/resnet10t", config=_DETR)
        if kind == "ultralytics":
            description = self._folder / "yolo11n.yaml"  # its name says the scale
            description.write_text(yaml.safe_dump(_YOLO))
            return UltralyticsBuilder(model=str(description))
        return HookedBuilder(
            factory=f"{__name__}:PointDetector",
            losses=f"{__name__}:losses",
            detections=f"{__name__}:detections",
            layers=("body",),
            arguments={"channels": 4},
            image_size=(64, 64),
        )

    def _try(self, *, trust_code: bool = False) -> str:
        # Weights are most of a file, and damage to them is much alike: half of the inputs leave them whole.
        file, chance = self._folder / "input.pt", self._chance
        content = torch.load(self.whole, weights_only=True)
        if chance.random() < 0.3:
            name = chance.choice(list(self._hostile))
            chance.choice(_dicts_of([content["build"], content["builder"]]))[name] = self._hostile[name]
        if chance.random() < 0.5:
            self._damaged(content, file, bytes_share=0.2)
        else:
            rest = {name: value for name, value in content.items() if name != "state_dict"}
            self._damaged(rest, file, bytes_share=0.0, beside={"state_dict": content["state_dict"]})
        output = self._folder / "predicted"
        return guarded(
            lambda: predict(
                *(file, self.image),
                output=output,
                threshold=0.0,
                device="cpu",
                overwrite=True,
                trust_code=trust_code,
            ),
            seconds=30.0,
        )


def _dicts_of(value: Any) -> list[dict[str, Any]]:
    """All dicts within."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) else []
    return own + [found for entry in entries for found in _dicts_of(entry)]


class PointDetector(nn.Module):
    """A detector such as a user may have: for each cell of one map, a score a class and a box around it.

    Args:
        class_names: The classes.
        channels: Width.
    """

    def __init__(self, class_names: Sequence[str], *, channels: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, channels, 8, stride=8)
        self.head = nn.Conv2d(channels, len(class_names), 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, h, w), before the sigmoid."""
        scores: Tensor = self.head(self.body(images))
        return scores


def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """No more than a loss."""
    return {"scores": model(batch.images).square().mean()}


def detections(model: nn.Module, batch: Any) -> list[dict[str, Tensor]]:
    """The best cell of each image."""
    found = []
    for scores in model(batch.images).sigmoid():
        best, place = scores.flatten(1).max(dim=1)
        left, top = place % scores.shape[-1] * 8.0, place // scores.shape[-1] * 8.0
        boxes = torch.stack([left, top, left + 8, top + 8], dim=1)
        found.append({"boxes": boxes, "scores": best, "labels": torch.arange(len(best))})
    return found
