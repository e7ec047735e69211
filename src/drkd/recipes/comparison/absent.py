"""What cells would fail for at once: data, splits and files that their settings name and that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from drkd.adapters.weights import shipped_checkpoint
from drkd.contracts import DrkdError
from drkd.data.batches import check_embedded
from drkd.data.digits import EMBEDDED
from drkd.data.formats.reading import find_sources
from drkd.recipes.comparison.cell import Cell
from drkd.recipes.setting_changes import leaves

_SPLITS = ("data.train_split", "data.val_split", "evaluation.split")
# A value that ends so is a file; others may be the name of something published.
_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json", ".yaml", ".yml")
_SAVED = "SavedDetectorBuilder"


def find_absent(cells: Iterable[Cell]) -> list[str]:
    """Say what is not there, each thing once with the pairs that name it; nothing is read but folders' lists.

    Args:
        cells: The cells that are to be measured.

    Returns:
        Lines such as ``retinanet, faster_rcnn: teacher.init_args.path: there is no runs/teacher``.
    """
    named: dict[str, dict[str, None]] = {}
    for cell in cells:
        settings = leaves(cell.settings, plain=False)
        for line in (*_absent_data(settings), *_absent_files(settings)):
            named.setdefault(line, {})[cell.pair] = None
    return [f"{', '.join(pairs)}: {line}" for line, pairs in named.items()]


def _absent_data(settings: Mapping[str, Any]) -> Iterator[str]:
    root = settings.get("data.root")
    if not isinstance(root, str):
        return
    if root in EMBEDDED:
        try:
            check_embedded(root, format=settings.get("data.format") or "auto")
        except DrkdError as error:
            yield str(error)
        return
    try:
        found = find_sources(Path(root), format=settings.get("data.format") or "auto")
    except (DrkdError, OSError) as error:
        yield f"data.root: {error}"
        return
    for key in _SPLITS:
        name = settings.get(key)
        if isinstance(name, str) and name not in found:
            yield f"{key}: {root} has no split '{name}'; it has {', '.join(sorted(found))}"


def _absent_files(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        # What a function of the user's own takes, and what is fetched, is no file that drkd would open.
        if key.startswith("data.") or ".arguments." in key or not isinstance(value, str) or "://" in value:
            continue
        start, _, last = key.rpartition(".init_args.")
        saved = last == "path" and str(settings.get(f"{start}.class_path", "")).endswith(_SAVED)
        if not (saved or value.startswith("drkd:") or value.lower().endswith(_FILES)):
            continue
        try:
            absent = not shipped_checkpoint(value).exists()
        except DrkdError as error:
            yield f"{key}: {error}"
            continue
        if absent and not _is_of_a_library(key):
            yield f"{key}: there is no {value}"


def _is_of_a_library(key: str) -> bool:
    """Whether a name that ends like a file may be one that a library brings, as Ultralytics' yolo11n.yaml."""
    return key.endswith(".model")
