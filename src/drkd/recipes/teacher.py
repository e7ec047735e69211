"""What kind of detector a teacher's checkpoint holds, and whether its classes are those of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from drkd.adapters.checkpoint import FORMAT, SavedDetectorBuilder, read_preprocessing
from drkd.adapters.class_map import build_mapped, check_targets
from drkd.adapters.mmdetection import MMDetectionBuilder, read_architecture
from drkd.adapters.ultralytics import UltralyticsBuilder
from drkd.adapters.ultralytics_files import is_ultralytics_file
from drkd.adapters.weights import read_checkpoint, read_state
from drkd.adapters.zoo import ZOO_NAMES, ZooBuilder
from drkd.adapters.zoo_files import count_file_outputs
from drkd.contracts import Detector, DetectorBuilder, DetectorSpec, DrkdError
from drkd.recipes.class_map import read_class_map
from drkd.recipes.loading import find_checkpoint

_COCO_SLOTS = 91


@dataclass(frozen=True)
class Teacher:
    """A teacher that was looked at.

    Args:
        source: What the user named.
        class_path: Builder for the recipe.
        init_args: Its arguments.
        findings: What was seen, one line each.
        image_size: Short side and limit of the long side that it was trained at, px, where known.
    """

    source: str
    class_path: str
    init_args: dict[str, object]
    findings: tuple[str, ...]
    image_size: tuple[int, int] | None = None


def look_at_teacher(
    source: str, class_names: Sequence[str], *, class_map: str | None = None, trust_pickle: bool = False
) -> Teacher:
    """Load a teacher for these classes.

    Args:
        source: A file or run folder of drkd, a torchvision detector's state dict, or the name of a published one.
        class_names: The data's classes.
        class_map: As the recipe's; None expects the data's classes.
        trust_pickle: Let the code in a checkpoint of Ultralytics' run.

    Raises:
        DrkdError: If it cannot be loaded, or its classes are not the data's and are not joined with them.
    """
    names: Mapping[str, str] | None = None if class_map is None else read_class_map(class_map)
    check_targets(names or {}, class_names)

    def build(builder: DetectorBuilder) -> Detector:
        return builder.build_teacher(class_names) if names is None else build_mapped(builder, class_names, names)

    if source in ZOO_NAMES:
        spec = build(ZooBuilder(name=source)).spec
        arguments: dict[str, object] = {"name": source, "weights": "DEFAULT", "head": "coco"}
        return Teacher(source, "drkd.adapters.ZooBuilder", arguments, _describe(source, spec))
    if not Path(source).exists() and not any(mark in source for mark in "/.:"):
        raise DrkdError(
            f"There is no teacher checkpoint {source}, and torchvision publishes no detector of that name that drkd "
            f"knows. Expected a file, a run folder, or one of {', '.join(ZOO_NAMES)}."
        )
    file = find_checkpoint(Path(source))
    if trust_pickle and is_ultralytics_file(file):
        builder = UltralyticsBuilder(weights=str(file), trust_pickle=True, head="own")
        detector = build(builder)
        arguments = {"weights": str(file), "trust_pickle": True, "head": "own"}
        missing = getattr(detector, "missing_classes", ()) if detector.spec.predictions is None else ()
        findings = _describe(str(file), detector.spec, missing=missing)
        return Teacher(str(file), "drkd.adapters.UltralyticsBuilder", arguments, findings)
    content = {"format": FORMAT} if source.startswith("drkd:") else read_checkpoint(file)
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        spec = build(SavedDetectorBuilder(path=str(file))).spec
        settings = read_preprocessing(file)
        size = int(settings["min_size"]), int(settings["max_size"])
        path = "drkd.adapters.SavedDetectorBuilder"
        return Teacher(source, path, {"path": str(file)}, _describe(str(file), spec), size)
    return _look_at_state(file, read_state(file), class_names, build)


def _look_at_state(
    file: Path, state: Mapping[str, Tensor], class_names: Sequence[str], build: Callable[[DetectorBuilder], Detector]
) -> Teacher:
    """Find the torchvision detector that a bare state dict belongs to, or read it as one of MMDetection's."""
    if any(key.startswith("neck.lateral_convs.") for key in state):
        part: Literal["detector", "features"] = "detector" if read_architecture(state, str(file)).family else "features"
        spec = build(MMDetectionBuilder(path=str(file), part=part)).spec
        init_args: dict[str, object] = {"path": str(file), "part": part}
        note = " (trained in MMDetection; give teacher.style: caffe if its configuration says so)"
        return Teacher(
            str(file), "drkd.adapters.MMDetectionBuilder", init_args, _describe(str(file), spec, note=note), (800, 1333)
        )
    candidates = [name for name in ZOO_NAMES if name.startswith(_zoo_prefix(state))]
    outputs = count_file_outputs(state)
    reasons = []
    for name in candidates if outputs is not None else []:
        head: Literal["coco", "new"] = (
            "coco" if outputs == _COCO_SLOTS and len(class_names) != _COCO_SLOTS - 1 else "new"
        )
        background = name.startswith(("fasterrcnn", "maskrcnn", "ssd"))
        found = outputs - int(background) if outputs is not None else 0
        # Trained torchvision's way, a RetinaNet or FCOS has an output for a background too.
        fits = head == "coco" or found == len(class_names) or (not background and found == len(class_names) + 1)
        after = head == "new" and not background and found == len(class_names) + 1
        builder = ZooBuilder(name=name, weights=str(file), head=head, first_label=1 if after else None)
        try:
            spec = build(builder).spec if fits else builder.build([str(number) for number in range(found)]).spec
        except DrkdError as error:
            reasons.append(str(error))
            continue
        if not fits:
            counts = f"{found} classes" if background else f"{found} classes (or {found - 1} after a background)"
            raise DrkdError(
                f"{file}: this teacher ({name}) knows {counts}, but the data has {len(class_names)} "
                f"({', '.join(class_names[:8])}{', ...' if len(class_names) > 8 else ''}). Use the data that it was "
                "trained on, or a teacher of these classes."
            )
        arguments: dict[str, object] = {"name": name, "weights": str(file), "head": head}
        arguments |= {"first_label": 1} if after else {}
        place = ", after a background" if after else ""
        note = f" (the file names no classes; they are taken to be the data's, in its order{place})"
        note = "" if head == "coco" else note
        return Teacher(str(file), "drkd.adapters.ZooBuilder", arguments, _describe(str(file), spec, note=note))
    why = f" Closest: {reasons[0]}" if reasons else ""
    raise DrkdError(
        f"{file}: this is neither a detector saved by drkd nor the state dict of one of torchvision's "
        f"({', '.join(ZOO_NAMES)}).{why} For another architecture, write the recipe's teacher by hand: a builder of "
        "drkd.adapters, or a class of your own."
    )


def _zoo_prefix(state: Mapping[str, Tensor]) -> str:
    if any(key.startswith("roi_heads.mask_head.") for key in state):
        return "maskrcnn"
    if any(key.startswith("roi_heads.") for key in state):
        return "fasterrcnn"
    if any(key.startswith("head.classification_head.module_list.") for key in state):
        return "ssd"
    return "fcos" if any("bbox_ctrness" in key for key in state) else "retinanet"


def _describe(source: str, spec: DetectorSpec, *, note: str = "", missing: Sequence[str] = ()) -> tuple[str, ...]:
    """Lines about a teacher; ``missing`` are classes that it lacks where its spec shows no predictions."""
    missing = spec.predictions.missing_classes if spec.predictions is not None else missing
    note += f" ({', '.join(missing)} unknown to it)" if missing else ""
    levels = ", ".join(f"{level.name} ({level.channels} channels, stride {level.stride:g})" for level in spec.levels)
    return (f"teacher: {source}: {spec.family}, {spec.num_classes} classes{note}", f"teacher's levels: {levels}")
