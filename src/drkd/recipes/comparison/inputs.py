"""The files that a cell's settings name, by content: the same path does not mean the same teacher or the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from drkd.adapters.weights import shipped_checkpoint
from drkd.contracts import DrkdError
from drkd.data.dataset import find_splits
from drkd.data.digits import EMBEDDED, fingerprint

_SPLITS = ("data.train_split", "data.val_split", "evaluation.split")
_DIGITS = 16


def fingerprint_inputs(settings: Mapping[str, Any]) -> dict[str, str]:
    """Digest the checkpoints, class maps and annotation files that settings name.

    Images are not read. What is not there, or cannot be read, is left out: the run says so better.

    Args:
        settings: Values by dotted key, as ``teacher.init_args.path``.

    Returns:
        By dotted key (of annotations with the split: ``data.root val``) the first 16 hexadecimal digits of a SHA-256.
    """
    found = dict(_files(settings))
    root = settings.get("data.root")
    if isinstance(root, str):
        found.update(_annotations(root, settings))
    return found


def changed_inputs(recorded: object, now: Mapping[str, str]) -> list[str]:
    """Say in words which files are not what they were; nothing of those that only one side knows.

    Args:
        recorded: Digests then, as `fingerprint_inputs` gave them; anything else counts as unknown.
        now: Digests now.
    """
    if not isinstance(recorded, Mapping):
        return []
    return [f"{key} is another file" for key, value in now.items() if recorded.get(key, value) != value]


def _files(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if key.startswith("data."):
            continue
        for place, name in enumerate(value if isinstance(value, list) else [value]):
            file = _file(name) if isinstance(name, str) else None
            digest = None if file is None else _digest(file)
            if digest is not None:
                yield (f"{key}[{place}]" if isinstance(value, list) else key), digest


def _file(name: str) -> Path | None:
    """The file that a setting names; None where it is none."""
    try:
        path = shipped_checkpoint(name)
        return path if path.is_file() else None
    except (DrkdError, OSError, ValueError):
        return None


def _annotations(root: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if root in EMBEDDED:
        yield "data.root", fingerprint(EMBEDDED[root])
        return
    try:
        splits = find_splits(Path(root), format=settings.get("data.format") or "auto")
    except (DrkdError, OSError):
        return
    for name in dict.fromkeys(settings.get(key) for key in _SPLITS):
        digest = _digest(splits[name][0]) if name in splits else None
        if digest is not None:
            yield f"data.root {name}", digest


def _digest(file: Path) -> str | None:
    try:
        status = file.stat()
        return _digest_once(str(file.resolve()), status.st_size, status.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _digest_once(file: str, size: int, changed: int) -> str:
    """The digest of a file of this size and time of change, which are there for the cache alone."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:_DIGITS]
