"""Ultralytics' YOLOs as students and teachers, described by plain values. Ultralytics itself is AGPL-3.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from drkd.adapters.detection_options import check_detection_options
from drkd.adapters.ultralytics_checkpoint import read_plain
from drkd.adapters.ultralytics_detector import (
    UltralyticsDetector,
    find_names,
    make_trainable,
    match_names,
    model_names,
    wrap_ultralytics,
)
from drkd.adapters.ultralytics_files import is_ultralytics_file, read_trusted, require_file
from drkd.adapters.ultralytics_models import new_model, read_description
from drkd.adapters.weights import check_fit, fill, read_state
from drkd.contracts import DetectorBuilder, DrkdError

__all__ = ["UltralyticsBuilder", "UltralyticsDetector", "open_ultralytics", "wrap_ultralytics"]

# The branches of the head whose layers depend on the number of classes.
_CLASS_BRANCHES = (".cv3.", ".one2one_cv3.")


@dataclass(frozen=True, kw_only=True)
class UltralyticsBuilder(DetectorBuilder):
    """A YOLO of Ultralytics': YOLOv8, 11 and their kin, that detect boxes. Needs the extra ``ultralytics`` (AGPL-3.0).

    Args:
        model: Name of one of the YAML files that Ultralytics has ("yolov8n.yaml", "yolo11s.yaml"; n, s, m, l or x says
            how large), or the path of your own. Not used where the weights' file says how the model is built.
        weights: None; a file that drkd saved, a ``student.pt`` or what ``drkd yolo import`` writes; a bare state dict;
            or, with ``trust_pickle``, a checkpoint of Ultralytics' own.
        trust_pickle: Load a checkpoint of Ultralytics', which is a pickle: loading it runs the code in it.
        head: "new" makes outputs for your classes, and fills what fits of the class branch; "own" keeps the weights'
            classes, and finds yours among them by name.
        score_threshold: Detections below this are dropped.
        nms_threshold: Intersection over union above which the weaker of two detections is dropped.
        detections_per_image: At most so many detections an image.
        several_labels: Whether one place may detect several classes, as in Ultralytics' validation.
    """

    model: str = "yolo11n.yaml"
    weights: str | None = None
    trust_pickle: bool = False
    head: Literal["new", "own"] = "new"
    score_threshold: float = 0.001
    nms_threshold: float = 0.7
    detections_per_image: int = 300
    several_labels: bool = True

    def __post_init__(self) -> None:
        if self.head not in ("new", "own"):
            raise DrkdError(f"head: expected new or own, got {self.head!r}.")
        check_detection_options(vars(self))
        if self.head == "own" and self.weights is None:
            raise DrkdError(
                "head: own keeps the classes of the weights, and there are none; give weights, or head: new."
            )

    def build(self, class_names: Sequence[str]) -> UltralyticsDetector:
        """Build the detector for these classes.

        Raises:
            DrkdError: If Ultralytics is not installed, or weights cannot be found, are not trusted or do not fit.
        """
        return self._build(class_names, teaches=False)

    def build_teacher(self, class_names: Sequence[str]) -> UltralyticsDetector:
        """Build the detector for these classes, all of it from the weights where there are any.

        Raises:
            DrkdError: As ``build``, or if outputs for the classes would be new.
        """
        return self._build(class_names, teaches=True)

    def _build(self, class_names: Sequence[str], *, teaches: bool) -> UltralyticsDetector:
        if not class_names:
            raise DrkdError("class_names: expected at least one class, got none.")
        if self.weights is None:
            model = new_model(read_description(self.model), class_names, source=self.model)
            return self._wrap(model, class_names, range(len(class_names)))
        description, own, state = self._read()
        if self.head == "own":
            model = new_model(description, own, source=self.weights)
            fill(model, state, self.weights)
            return self._wrap(model, class_names, match_names(own, class_names))
        model = new_model(description, class_names, source=self.weights)
        new = _fill_most(model, own, class_names, state, self.weights)
        if teaches and new:
            raise DrkdError(
                f"{self.weights}: with head: new this YOLO's outputs would be new for {', '.join(new[:5])}"
                f"{', ...' if len(new) > 5 else ''}, so the teacher's would be random. It knows {len(own)} classes "
                f"({', '.join(own[:5])}{', ...' if len(own) > 5 else ''}). Expected weights that were trained on these "
                f"classes{', or head: own, which finds those that it knows' if set(own) & set(class_names) else ''}."
            )
        return self._wrap(model, class_names, range(len(class_names)))

    def _wrap(self, model: nn.Module, class_names: Sequence[str], label_ids: Sequence[int]) -> UltralyticsDetector:
        return UltralyticsDetector(
            model,
            class_names,
            label_ids=label_ids,
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            detections_per_image=self.detections_per_image,
            several_labels=self.several_labels,
        )

    def _read(self) -> tuple[Mapping[str, Any], list[str], dict[str, Tensor]]:
        """Description, names of the outputs and tensors of the weights' file."""
        path = str(self.weights)
        require_file(path)
        if self.trust_pickle and is_ultralytics_file(path):
            source: Any = read_trusted(path, trust_pickle=True)
            return source.yaml, model_names(source), dict(source.state_dict())
        if (plain := read_plain(path)) is not None:
            return plain
        state = read_state(path)
        outputs = [value.shape[0] for name, value in state.items() if name.endswith(".cv3.0.2.bias")]
        if not outputs:
            raise DrkdError(f"{path}: expected the weights of a YOLO that detects boxes, found no class branch in it.")
        return read_description(self.model), [str(index) for index in range(outputs[0])], state


def open_ultralytics(path: str | Path, *, trust_pickle: bool) -> tuple[UltralyticsDetector, int]:
    """Load a checkpoint of Ultralytics' own, in eval mode on the CPU, with the classes and settings that it has.

    Args:
        path: The file.
        trust_pickle: Whether the code in it may run.

    Returns:
        The detector, and the long side of the images that it was trained on, px.

    Raises:
        DrkdError: If the pickle is not trusted, or the file cannot be loaded.
    """
    model: Any = read_trusted(path, trust_pickle=trust_pickle)
    size = model.args.get("imgsz") or 640
    return wrap_ultralytics(model).eval(), int(max(size) if isinstance(size, list | tuple) else size)


def _fill_most(
    model: nn.Module, own: Sequence[str], class_names: Sequence[str], state: Mapping[str, Tensor], source: str
) -> list[str]:
    """Fill a model of other classes: all but the class branch must fit, and of that whatever does.

    Returns:
        The classes whose outputs are new; all of them where a layer before the outputs is.
    """
    wanted = model.state_dict()
    branch = {name for name in wanted if any(mark in name for mark in _CLASS_BRANCHES)}
    rest = {name: value for name, value in wanted.items() if name not in branch}
    given = {name: value for name, value in state.items() if name not in branch}
    check_fit(rest, given, source, what=type(model).__name__, strict=True)
    found = dict(given)
    labels = find_names(own, class_names)
    rows = [(place, label) for place, label in enumerate(labels) if label >= 0]
    for name in sorted(branch & set(state)):
        last = wanted[name].shape[:1] == (len(class_names),) and name.split(".")[-2:-1] == ["2"]
        if last and wanted[name].shape[1:] == state[name].shape[1:]:
            value = wanted[name].clone()
            for place, theirs in rows:
                value[place] = state[name][theirs]
            found[name] = value
        elif not last and wanted[name].shape == state[name].shape:
            found[name] = state[name]
    model.load_state_dict(found, strict=False)
    make_trainable(model)
    if branch - found.keys():
        return list(class_names)
    return [name for name, label in zip(class_names, labels, strict=True) if label < 0]
