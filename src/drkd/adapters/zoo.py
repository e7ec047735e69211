"""torchvision's published detectors by name, as teachers or with a new head as students."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection._utils import overwrite_eps

from drkd.adapters.backbones import freeze_batch_norm
from drkd.adapters.detection_options import check_detection_options
from drkd.adapters.labels import coco_categories, coco_labels
from drkd.adapters.torchvision_detector import TorchvisionDetector
from drkd.adapters.weights import fill, update_names
from drkd.adapters.zoo_files import ZooFile, count_file_outputs, read_zoo_file
from drkd.contracts import DetectorBuilder, DrkdError

ZOO_NAMES = (
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
_SIZES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
# These published weights were trained with frozen batch norms without epsilon; torchvision sets it for them.
_WITHOUT_EPSILON = ("retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")
_DEFAULT_EPSILON = 1e-5
_PUBLISHED = ("COCO_V1", "DEFAULT")
_LAST_LAYERS = (
    "roi_heads.box_predictor.",
    "roi_heads.mask_predictor.mask_fcn_logits.",
    "head.classification_head.cls_logits.",
    "head.classification_head.module_list.",
)


@dataclass(frozen=True, kw_only=True)
class ZooBuilder(DetectorBuilder):
    """A published torchvision detector.

    With ``head="coco"`` the model keeps COCO's 91 outputs and your classes are found by name among them; detections
    of other classes are dropped; a class that COCO lacks is never detected (``detector.missing_classes`` lists them),
    though its features still teach. With ``head="new"`` the model gets outputs for your classes alone; weights of
    another number of classes then fill all but the last layer, with a warning, or an error for a teacher.

    torchvision's own RetinaNet and FCOS count a background among their classes: trained its way on K classes they have
    K + 1 outputs, and output 0 is none of them. Such weights are recognised by their number of outputs.

    Args:
        name: One of ``ZOO_NAMES``.
        weights: None, "COCO_V1" or "DEFAULT" (published, needs a network once), or the path of a checkpoint.
        head: "coco" or "new".
        first_label: With ``head="new"``, the model's label of the first class, 0 or 1. None: 1 where there is a
            background (Faster and Mask R-CNN, SSD) or the weights have one output more than there are classes, else 0.
        batch_norm_eps: Epsilon of the frozen batch norms of retinanet_resnet50_fpn, fasterrcnn_resnet50_fpn and
            maskrcnn_resnet50_fpn, with weights. None: 0.0 of torchvision's published weights (a downloaded file is
            recognised by its content), and of a file that drkd saved what it was trained with; of any other
            torchvision's default, 1e-5. Give 0.0 for weights of yours that were fine-tuned from the published ones.
        detections_per_image: At most so many detections an image.
    """

    name: str = "retinanet_resnet50_fpn_v2"
    weights: str | None = None
    head: Literal["coco", "new"] = "coco"
    first_label: int | None = None
    batch_norm_eps: float | None = None
    detections_per_image: int = 100

    def __post_init__(self) -> None:
        check_detection_options(vars(self))
        if self.name not in ZOO_NAMES:
            raise DrkdError(f"name: expected one of {', '.join(ZOO_NAMES)}, got {self.name!r}.")
        if self.head not in ("coco", "new"):
            raise DrkdError(f"head: expected coco or new, got {self.head!r}.")
        allowed = (None,) if self.head == "coco" else (None, 1) if self._has_background else (None, 0, 1)
        if self.first_label not in allowed or isinstance(self.first_label, bool):
            raise DrkdError(
                f"first_label: expected {' or '.join('null' if entry is None else str(entry) for entry in allowed)} "
                f"of {self.name} with head {self.head}, got {self.first_label!r}."
            )

        epsilon = self.batch_norm_eps
        if epsilon is not None and (self.name not in _WITHOUT_EPSILON or self.weights is None):
            raise DrkdError(
                f"batch_norm_eps: expected null, since it is for weights of {', '.join(_WITHOUT_EPSILON)}, got "
                f"{epsilon!r} of {self.name} with weights {self.weights}."
            )
        if epsilon is not None and (type(epsilon) not in (int, float) or not 0 <= epsilon < 1):
            raise DrkdError(f"batch_norm_eps: expected a number from 0 to less than 1, got {epsilon!r}.")

    @property
    def _has_two_stages(self) -> bool:
        return self.name.startswith(("fasterrcnn", "maskrcnn"))

    @property
    def _has_background(self) -> bool:
        return self._has_two_stages or self.name in _SIZES

    def build(self, class_names: Sequence[str]) -> TorchvisionDetector:
        """Build the detector for these classes.

        Raises:
            DrkdError: If weights cannot be found or do not fit, or COCO has none of the classes.
        """
        return self._build(class_names, teaches=False)

    def build_teacher(self, class_names: Sequence[str]) -> TorchvisionDetector:
        """Build the detector for these classes, all of it from the weights where there are any.

        A subclass that overrides ``build`` overrides this too.

        Raises:
            DrkdError: As ``build``, or if the weights have another number of classes.
        """
        return self._build(class_names, teaches=True)

    def _build(self, class_names: Sequence[str], *, teaches: bool) -> TorchvisionDetector:
        if not class_names:
            raise DrkdError("class_names: expected at least one class, got none.")
        given = None if self.weights is None else self._read(str(self.weights))
        if self.head == "coco":
            label_ids = coco_labels(class_names)
            outputs = len(coco_categories())
        else:
            first = self._find_first_label(len(class_names), given)
            label_ids = list(range(first, len(class_names) + first))
            outputs = len(class_names) + first
            if given is not None and set(given.labels) == set(class_names):
                # The file says which of its outputs is which.
                label_ids = [given.labels[name] for name in class_names]
        options: dict[str, Any] = {"name": self.name, "weights": None, "weights_backbone": None, "num_classes": outputs}
        options["box_detections_per_img" if self._has_two_stages else "detections_per_img"] = self.detections_per_image
        model = get_model(**options)
        plan: dict[str, Any] = {"family": "zoo", "detector": options}
        if self.name in _SIZES:
            plan["size"] = [_SIZES[self.name]] * 2
        if given is not None:
            plan.update(self._fill(model, given, class_names, outputs, teaches=teaches))
        return TorchvisionDetector(model, class_names, label_ids=label_ids, plan=plan)

    def _find_first_label(self, classes: int, given: ZooFile | None) -> int:
        if self.first_label is not None or self._has_background:
            return 1 if self.first_label is None else self.first_label
        if given is None or given.outputs != classes + 1 or given.first_label not in (None, 1):
            return 0
        if given.first_label is None:
            warnings.warn(
                f"{self.weights}: {given.outputs} outputs for {classes} classes: the first is taken for a background, "
                "as torchvision's training leaves one. Say so with first_label: 1, or otherwise with first_label: 0.",
                stacklevel=4,
            )
        return 1

    def _read(self, weights: str) -> ZooFile:
        if weights not in _PUBLISHED:
            return read_zoo_file(weights, self._published().url)
        state = self._download()
        # COCO's outputs are no others', however many there are.
        return ZooFile(state, count_file_outputs(state), first_label=0, batch_norm_eps=0.0)

    def _fill(
        self, model: nn.Module, given: ZooFile, class_names: Sequence[str], outputs: int, *, teaches: bool
    ) -> dict[str, Any]:
        """Load published or local weights; returns how the batch norms are to be set when the model is rebuilt."""
        weights = str(self.weights)
        wanted = model.state_dict()
        state = update_names(given.state, wanted)
        new: set[str] = set()
        if self.head == "new":
            last = [name for name in state if name in wanted and name.startswith(_LAST_LAYERS)]
            # What fits of an SSD's last layers comes before the classes; a predictor is new as a whole.
            new = {key for key in last if state[key].shape != wanted[key].shape}
            if given.labels and set(given.labels) != set(class_names):
                # As many as there are may be of other classes.
                new |= {key for key in last if self.name not in _SIZES or key.startswith("head.classification_head.")}
            if new and self.name not in _SIZES:
                new = set(last)
            state = {key: wanted[key] if key in new else value for key, value in state.items()}
        fill(model, state, weights)
        if new:
            self._say_new(class_names, given, outputs, teaches=teaches)
        if self.name.endswith("_v2") or self.name in _SIZES:
            return {}
        # torchvision freezes the batch norms of these models whenever it loads weights.
        epsilon = None
        if self.name in _WITHOUT_EPSILON:
            chosen = self.batch_norm_eps if self.batch_norm_eps is not None else given.batch_norm_eps
            epsilon = _DEFAULT_EPSILON if chosen is None else float(chosen)
            if chosen is None:
                warnings.warn(
                    f"{weights}: nothing says which batch norm epsilon these weights were trained with; "
                    f"{epsilon:g} is taken, torchvision's default. If they were fine-tuned from its published weights, "
                    "or are these, saved again, give batch_norm_eps: 0.0.",
                    stacklevel=4,
                )
        freeze_zoo(model, epsilon)
        return {"batch_norm_eps": epsilon}

    def _say_new(self, class_names: Sequence[str], given: ZooFile, outputs: int, *, teaches: bool) -> None:
        counts = f"{given.outputs} outputs for classes, and {outputs} are needed for {len(class_names)} classes"
        if given.outputs == outputs:
            counts = f"outputs for other classes ({', '.join([*given.labels][:8])}), and {outputs} of these are needed"
        names = f"{', '.join(class_names[:8])}{', ...' if len(class_names) > 8 else ''}"
        if teaches:
            raise DrkdError(
                f"{self.weights}: this {self.name} has {counts} ({names}), so the teacher's class layer would be "
                "random. Expected weights that were trained on these classes, or COCO's with head: coco."
            )
        warnings.warn(f"{self.weights}: {counts}: the class layer of this {self.name} is new.", stacklevel=5)

    def _published(self) -> Any:
        weights = str(self.weights)
        return get_model_weights(self.name)[weights if weights in _PUBLISHED else "DEFAULT"]

    def _download(self) -> dict[str, Tensor]:
        entry = self._published()
        try:
            state = entry.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise DrkdError(
                f"weights: torchvision's {self.name} could not be downloaded ({error}). Where there is a network, "
                f"fetch {entry.url} and give the file's path as weights."
            ) from error
        return dict(state)


def freeze_zoo(model: nn.Module, epsilon: float | None) -> None:
    """Freeze all batch norms, and set their epsilon where one is given."""
    freeze_batch_norm(model)
    if epsilon is not None:
        overwrite_eps(model, epsilon)
