"""A recipe's way to a detector that drkd does not know: import paths of the user's functions and names of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from drkd.adapters.hooks import HookedDetector, wrap_model
from drkd.adapters.import_path import import_function
from drkd.adapters.weights import fill, labels_of, read_checkpoint, state_in
from drkd.contracts import DetectorBuilder, DrkdError

LIBRARY = "hooks"
CLASS_PATH = "drkd.adapters.hooked_builder.HookedBuilder"
_FUNCTIONS = ("factory", "losses", "detections", "features")


@dataclass(frozen=True, kw_only=True)
class HookedBuilder(DetectorBuilder):
    """Any detector, see `wrap_model`; functions are import paths such as "my_module:losses".

    A module in the folder where the command is run is found too.

    Args:
        factory: Called as ``factory(class_names, **arguments)``; returns the module.
        layers: Names of the layers whose outputs are the pyramid; ``drkd inspect`` lists them.
        arguments: More arguments of the factory, plain values.
        losses: Function of (model, batch) that returns the task losses; None for a teacher.
        detections: Function of (model, batch) that returns boxes, scores and labels; None where none are wanted.
        features: Function of (model, batch) that runs no more than the layers; None where the others will do.
        weights: Checkpoint of the whole detector (a state dict, or a student.pt of drkd), or None.
        first_label: The model's label of the first class.
        label_ids: The model's label of each class, where they do not follow one another.
        image_size: Height and width of the images that strides are found with, px.
        image_mean: Subtracted from images, RGB in [0, 1]; None where the functions normalise.
        image_std: Images are divided by it.
        family: What to call it in messages; the class's name by default.
    """

    factory: str
    layers: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    losses: str | None = None
    detections: str | None = None
    features: str | None = None
    weights: str | None = None
    first_label: int = 0
    label_ids: tuple[int, ...] | None = None
    image_size: tuple[int, int] = (256, 256)
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[float, float, float] | None = None
    family: str = ""

    def build(self, class_names: Sequence[str]) -> HookedDetector:
        """Build the module, fill and wrap it.

        Raises:
            DrkdError: If a function cannot be imported or does not return what it should, or the weights do not fit.
        """
        if not class_names:
            raise DrkdError("class_names: expected at least one class, got none.")
        functions: dict[str, Callable[..., Any] | None] = {
            name: None if getattr(self, name) is None else import_function(getattr(self, name), field=name)
            for name in _FUNCTIONS[1:]
        }
        try:
            model = import_function(self.factory, field="factory")(list(class_names), **self.arguments)
        except TypeError as error:
            raise DrkdError(f"factory: {self.factory}(class_names, **arguments) failed: {error}.") from error
        if not isinstance(model, nn.Module):
            raise DrkdError(f"factory: expected {self.factory} to return a torch module, got {type(model).__name__}.")
        label_ids = self.label_ids
        if self.weights is not None:
            content = read_checkpoint(self.weights)
            fill(model, state_in(content, self.weights), self.weights)
            if label_ids is None:
                counted = range(self.first_label, self.first_label + len(class_names))
                label_ids = tuple(labels_of(content, self.weights, class_names, counted))
        detector = wrap_model(
            model,
            self.layers,
            **functions,
            class_names=class_names,
            first_label=self.first_label,
            label_ids=label_ids,
            image_size=self.image_size,
            image_mean=self.image_mean,
            image_std=self.image_std,
            family=self.family,
        )
        # The file's own weights replace those that training began with.
        detector.plan = {**asdict(self), "weights": None}
        return detector


def describe_hooked(detector: HookedDetector, image_settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved file says of a detector of the user's own: how to rebuild it, and what its labels mean.

    Args:
        detector: The detector; without a plan (it was wrapped, not built) it cannot be rebuilt from the file.
        image_settings: "min_size" (of several the largest counts), "max_size" and "size_divisor", px.
    """
    labels = sorted(zip(detector.label_ids, detector.spec.class_names, strict=True), key=lambda pair: pair[0])
    sizes = image_settings["min_size"]
    plan = None if detector.plan is None else dict(detector.plan)
    return {
        "build": None if plan is None else {"library": LIBRARY, "arguments": plan["arguments"]},
        "code": None if plan is None else _plain_code(plan["factory"]),
        "builder": None if plan is None else {"class_path": CLASS_PATH, "init_args": plan},
        "class_names": [name for _, name in labels],
        "label_ids": [label for label, _ in labels],
        "preprocessing": {
            "mean": list(detector.image_mean or (0.0, 0.0, 0.0)),
            "std": list(detector.image_std or (1.0, 1.0, 1.0)),
            "min_size": int(sizes) if isinstance(sizes, int) else max(map(int, sizes)),
            "max_size": int(image_settings["max_size"]),
            "size_divisor": int(image_settings["size_divisor"]),
            "color": "RGB",
        },
    }


def rebuild_hooked(
    path: str | Path,
    content: Mapping[str, Any],
    *,
    class_names: Sequence[str],
    label_ids: Sequence[int],
    trusted: bool,
) -> HookedDetector:
    """Build what a file describes, if the user says that it may, in eval mode.

    Args:
        path: The file, for messages.
        content: What it holds.
        class_names: Its classes in the wanted order.
        label_ids: The model's label of each.
        trusted: Whether functions that the file names may be called: they could be any.

    Raises:
        DrkdError: If they may not, or are not there, or the weights do not fit.
    """
    plan = dict(content["builder"]["init_args"])
    if not trusted:
        functions = [str(plan[name]) for name in _FUNCTIONS if plan.get(name)]
        raise DrkdError(
            f"{path}: holds a detector of your own, and loading it calls functions that the file names "
            f"({', '.join(functions)}). If you know where the file comes from, allow it: trust_code=True in Python, "
            "trust_code: true in a recipe, --trust-code of drkd evaluate, predict and inspect. Other commands load no "
            "such file."
        )
    try:
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plan.items()}
        builder = HookedBuilder(**arguments)
    except TypeError as error:
        raise DrkdError(f"{path}: its builder does not fit this version of drkd ({error}).") from error
    # The factory gets the classes as they were numbered in training, whatever their order is to be now.
    builder = replace(builder, label_ids=tuple(content["label_ids"]))
    detector = builder.build(content["class_names"])
    fill(detector.model, content["state_dict"], path)
    detector.relabel(class_names, label_ids)
    return detector.eval()


def _plain_code(factory: str) -> str:
    module, _, name = factory.partition(":") if ":" in factory else factory.rpartition(".")
    return "\n".join(
        [
            "import torch",
            f"from {module} import {name}",
            "",
            'saved = torch.load("student.pt", map_location="cpu", weights_only=True)',
            f'model = {name}(saved["class_names"], **saved["build"]["arguments"])',
            'model.load_state_dict(saved["state_dict"])',
            "model.eval()",
            "",
        ]
    )
