"""Detect objects in a user's images: pictures with boxes, and the detections as COCO JSON."""

from __future__ import annotations

import colorsys
import json
import os
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes

from drkd.contracts import BoxTargets, DetectionBatch, Detections, DrkdError, MachineError
from drkd.data.dataset import Sample
from drkd.data.image import IMAGE_SUFFIXES, decode_image
from drkd.data.image_files import find_image_files
from drkd.data.transforms import collate, eval_transforms
from drkd.evaluation import detections_to_coco
from drkd.recipes.loading import LoadedDetector, choose_device, open_detector
from drkd.recipes.run_folder import write_json

_KEPT_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


@dataclass(frozen=True)
class Predicted:
    """What was predicted.

    Args:
        output: Folder of the pictures, of ``detections.json`` (COCO results) and of ``images.json`` (COCO images and
            categories, which give its ids a meaning, and each image's picture; category ids are those of the data that
            the detector was trained on, 1..K where they are not known). Boxes and sizes are in px of the images as a
            viewer shows them, turned by their EXIF orientation.
        images: Number of images that were read.
        detections: Number of detections in them.
        unreadable: One message for each image that could not be read.
    """

    output: Path
    images: int
    detections: int
    unreadable: tuple[str, ...] = ()


def predict(
    checkpoint: Path,
    path: Path,
    *,
    output: Path,
    threshold: float = 0.5,
    min_size: int | None = None,
    max_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    trust_pickle: bool = False,
    trust_code: bool = False,
) -> Predicted:
    """Detect objects in an image, or in every image of a folder and its sub-folders.

    Images are turned by their EXIF orientation, as a viewer shows them, and boxes are in px of the turned ones. Boxes
    of COCO and VOC data are mostly those of the stored image: to score a split, use ``drkd evaluate``.

    Args:
        checkpoint: A student.pt, or a run folder that holds one.
        path: An image or a folder of images.
        output: Folder for the pictures with boxes, ``detections.json`` and ``images.json``; boxes are in px of the
            images as a viewer shows them, turned by EXIF.
        threshold: Lowest score that is drawn and written, in [0, 1]; 0 keeps all, as scoring with COCO tools wants.
        min_size: Short side that images are resized to, px; the checkpoint's own by default.
        max_size: Limit of the long side, px; the checkpoint's own by default.
        device: auto, cpu, cuda, ...
        overwrite: Replace what an earlier prediction left in the output folder: what its ``images.json`` lists.
        trust_pickle: Load a checkpoint of Ultralytics' own, which is a pickle: loading it runs the code in it.
        trust_code: Call the functions that a checkpoint with a detector of your own names.

    Raises:
        DrkdError: If the checkpoint cannot be used, there is no image, or the output would overwrite something that
            no earlier prediction wrote.
    """
    if not 0 <= threshold <= 1:
        raise DrkdError(f"threshold: expected a score in [0, 1], got {threshold}.")
    sources = find_images(path, output=output)
    own = _written_before(output)
    targets = _plan_pictures(sources, output, own=own, overwrite=overwrite)
    left = sorted(_relative(file, output) for file in own - {*targets.values(), *_listings(output)})
    loaded = open_detector(
        checkpoint, min_size=min_size, max_size=max_size, trust_pickle=trust_pickle, trust_code=trust_code
    )
    chosen = choose_device(device)
    loaded.detector.to(chosen)
    names = loaded.detector.spec.class_names
    # No detections beside a list of other images, should this prediction be cut short: ids would mean other images.
    (output / "detections.json").unlink(missing_ok=True)
    # Said before the first is written: whoever repeats a prediction that was cut short may replace its pictures.
    planned = [{"file_name": name, "picture": _relative(target, output)} for name, target in targets.items()]
    write_json(output / "images.json", {"images": planned, "categories": [], "earlier_pictures": left})
    images: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for number, (name, target) in enumerate(targets.items(), start=1):
        try:
            pixels = _read_pixels(sources[name])
        except (DrkdError, MachineError) as error:
            unreadable.append(str(error))
            continue
        found = _detect(loaded, pixels, number, device=chosen, threshold=threshold)
        _save_picture(_draw(pixels, found, names), target)
        size = {"width": pixels.shape[2], "height": pixels.shape[1]}
        images.append({"id": number, "file_name": name, **size, "picture": _relative(target, output)})
        results += detections_to_coco([number], [found], loaded.category_ids)
    categories = [{"id": number, "name": name} for number, name in zip(loaded.category_ids, names, strict=True)]
    listing = {"images": images, "categories": categories}
    write_json(output / "images.json", listing | {"earlier_pictures": left} if left else listing)
    write_json(output / "detections.json", results)
    return Predicted(output, len(images), len(results), tuple(unreadable))


def _relative(target: Path, output: Path) -> str:
    return target.relative_to(output).as_posix()


def _read_pixels(path: Path) -> Tensor:
    """Decode an image of unknown origin, (3, H, W) uint8.

    Raises:
        DrkdError: Whatever is wrong with the file: a decoder can raise anything on a damaged or hostile one.
        MachineError: If memory or open files ran out.
    """
    try:
        return decode_image(path)
    except (DrkdError, MachineError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DrkdError(f"{path}: the image cannot be decoded ({reason}). The file may be damaged.") from error


def find_images(path: Path, *, output: Path) -> dict[str, Path]:
    """The images to predict on, by their name relative to the folder; hidden ones and those below ``output`` are not.

    Raises:
        DrkdError: If there is no such path or no image in it.
    """
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise DrkdError(f"{path}: there is no such image or folder.")
    own = output.resolve()
    found = {
        file.relative_to(path).as_posix(): file
        for file in find_image_files(path)
        # An output around or beside the images holds none of its own among them.
        if not (path.resolve() in own.parents and own in file.resolve().parents)
    }
    if not found:
        raise DrkdError(f"{path}: no images found in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    return found


def _plan_pictures(sources: dict[str, Path], output: Path, *, own: set[Path], overwrite: bool) -> dict[str, Path]:
    """Where each image's picture goes: to a name of its own, and never onto what no earlier prediction wrote."""
    if output.exists() and not output.is_dir():
        raise DrkdError(f"{output}: expected a folder for the output, this is a file.")
    targets = {name: output / _name_picture(name, sources) for name in sources}
    inputs = {file.resolve() for file in sources.values()}
    clash = next((target for target in targets.values() if target.resolve() in inputs), None)
    if clash is not None:
        raise DrkdError(f"The picture {clash} would overwrite an input image. Choose another folder with --output.")
    wanted = (*targets.values(), *_listings(output))
    if (other := next((file for file in wanted if os.path.lexists(file) and file not in own), None)) is not None:
        raise DrkdError(
            f"{other}: exists already, and no earlier prediction in {output} lists it as its own (images.json, field "
            "'picture'), so it is not replaced. Choose another folder with --output, or remove the file."
        )
    if own and not overwrite:
        raise DrkdError(f"{output} already holds predictions. Replace them (--overwrite) or choose another --output.")
    return targets


def _name_picture(name: str, names: Container[str]) -> str:
    """An image's own name where pictures may end so; else with .png behind it, as often as makes it nobody else's."""
    if Path(name).suffix.lower() in _KEPT_SUFFIXES:
        return name
    picture = f"{name}.png"
    while picture in names:
        picture += ".png"
    return picture


def _written_before(output: Path) -> set[Path]:
    """The files of an earlier prediction in the folder; none if there was none or images.json is somebody else's."""
    try:
        listing = json.loads((output / "images.json").read_text(encoding="utf-8"))
        names = [*(entry["picture"] for entry in listing["images"]), *listing.get("earlier_pictures", ())]
        # A name that leads out of the folder is none that drkd wrote.
        inside = [name for name in map(Path, names) if not name.is_absolute() and ".." not in name.parts]
        pictures = {output / name for name in inside}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return set()
    return {*pictures, *_listings(output)}


def _listings(output: Path) -> tuple[Path, Path]:
    return output / "images.json", output / "detections.json"


@torch.inference_mode()
def _detect(
    loaded: LoadedDetector, pixels: Tensor, image_id: int, *, device: torch.device, threshold: float
) -> Detections:
    transforms = eval_transforms(min_size=loaded.min_size, max_size=loaded.max_size)
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    size = int(pixels.shape[1]), int(pixels.shape[2])
    image = torch.Tensor(transforms(tv_tensors.Image(pixels)))
    batch: DetectionBatch = collate([Sample(image, nothing, size, image_id)], size_divisor=loaded.size_divisor)
    (found,) = loaded.detector.detect(batch.to(device))
    kept = (found.scores >= threshold).cpu()
    return Detections(found.boxes.cpu()[kept], found.scores.cpu()[kept], found.labels.cpu()[kept])


def _draw(pixels: Tensor, found: Detections, names: Sequence[str]) -> Tensor:
    """The image, (3, H, W) uint8, with a box, name and score for each detection, the best on top."""
    # A box of no extent cannot be drawn; it stays in the JSON.
    drawable = ((found.boxes[:, 2:] - found.boxes[:, :2]) > 0).all(dim=1) if len(found.boxes) else found.scores > 0
    order = [index for index in reversed(range(len(found.scores))) if drawable[index]]
    if not order:
        return pixels
    labels = [int(found.labels[index]) for index in order]
    return draw_bounding_boxes(
        pixels,
        found.boxes[order],
        # PIL's built-in font knows Latin letters only.
        labels=[
            f"{names[label].encode('latin-1', 'replace').decode('latin-1')} {found.scores[index]:.2f}"
            for index, label in zip(order, labels, strict=True)
        ],
        colors=[_colour(label, len(names)) for label in labels],
        width=max(1, round(min(pixels.shape[1:]) / 250)),
    )


def _colour(label: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(label / max(1, count), 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _save_picture(pixels: Tensor, path: Path) -> None:
    picture = functional.to_pil_image(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    handle, aside = tempfile.mkstemp(prefix=".picture-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format=kind, **({"quality": 92} if kind == "JPEG" else {}))
        # mkstemp makes private files; pictures are to be shared like any other output.
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    finally:
        Path(aside).unlink(missing_ok=True)
