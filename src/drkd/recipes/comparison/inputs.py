"""The files that a cell's settings name, by content: the same path does not mean the same teacher or the same data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from drkd.adapters.weights import shipped_checkpoint
from drkd.contracts import DrkdError
from drkd.data.digits import EMBEDDED, fingerprint
from drkd.data.formats.reading import find_sources, list_label_files
from drkd.data.formats.source import SplitSource

_SPLITS = ("data.train_split", "data.val_split", "evaluation.split")
_DIGITS = 16
# Of label files, by a digest of their paths, sizes and times of change.
_DIGESTS: dict[bytes, str] = {}
# Which label files a split had when it was last looked at in full, which looks for one beside every image.
_LISTS: dict[SplitSource, list[Path]] = {}


class Fingerprints:
    """Digests what settings name; looks once at a split's label files (YOLO and VOC), which may be many.

    What this process has digested before is not read again while sizes and times of change are the same.

    Args:
        same_files: Do not look for label files that were added since this process last did: a comparison asks before
            and after each cell.
    """

    def __init__(self, *, same_files: bool = False) -> None:
        self._same_files = same_files
        self._labels: dict[SplitSource, str | None] = {}

    def of(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """Digest the checkpoints, class maps and annotation files that settings name.

        Images are not read. What is not there, or cannot be read, is left out: the run says so better.

        Args:
            settings: Values by dotted key, as ``teacher.init_args.path``.

        Returns:
            By dotted key (of annotations with the split: ``data.root val``, and ``data.root val labels`` where each
            image has a file of its own) the first 16 hexadecimal digits of a SHA-256.
        """
        found = dict(_files(settings))
        root = settings.get("data.root")
        if isinstance(root, str):
            found.update(self._annotations(root, settings))
        return found

    def _annotations(self, root: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if root in EMBEDDED:
            yield "data.root", fingerprint(EMBEDDED[root])
            return
        try:
            sources = find_sources(Path(root), format=settings.get("data.format") or "auto")
        except (DrkdError, OSError):
            return
        for name in dict.fromkeys(settings.get(key) for key in _SPLITS):
            if name not in sources:
                continue
            digest, labels = _digest(sources[name].file), self._digest_labels(sources[name])
            if digest is not None:
                yield f"data.root {name}", digest
            if labels is not None:
                yield f"data.root {name} labels", labels

    def _digest_labels(self, source: SplitSource) -> str | None:
        if source not in self._labels:
            try:
                if not self._same_files or source not in _LISTS:
                    _LISTS[source] = list_label_files(source)
                self._labels[source] = _digest_all(_LISTS[source])
            except (DrkdError, OSError, ValueError):
                self._labels[source] = None
        return self._labels[source]


def changed_inputs(recorded: object, now: Mapping[str, str]) -> list[str]:
    """Say in words which files are not what they were; nothing of those that only one side knows.

    Args:
        recorded: Digests then, as `Fingerprints.of` gave them; anything else counts as unknown.
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
            digests = [_digest(file) for file in _named(name)] if isinstance(name, str) else []
            known = [digest for digest in digests if digest is not None]
            if known:
                joined = known[0] if len(known) == 1 else hashlib.sha256("".join(known).encode()).hexdigest()[:_DIGITS]
                yield (f"{key}[{place}]" if isinstance(value, list) else key), joined


def _named(name: str) -> list[Path]:
    """The files that a setting names: a file, a run folder's student, a model saved by transformers; else none."""
    try:
        path = shipped_checkpoint(name)
        if path.is_file():
            return [path]
        if (path / "config.json").is_file():
            described = [path / name for name in ("config.json", "preprocessor_config.json")]
            return [*(file for file in described if file.is_file()), *sorted(path.glob("*.safetensors"))]
    except (DrkdError, OSError, ValueError):
        pass
    return []


def _digest_all(files: Sequence[Path]) -> str | None:
    """One digest of the names and contents of files; None where there are none."""
    if not files:
        return None
    # Of what a hundred thousand files were like a digest is kept, no list.
    seen = hashlib.sha256()
    for file in files:
        status = file.stat()
        seen.update(os.fsencode(f"{file.absolute()}\n{status.st_size} {status.st_mtime_ns}\n"))
    if (key := seen.digest()) not in _DIGESTS:
        digest = hashlib.sha256()
        for file in files:
            digest.update(os.fsencode(file.name) + b"\n")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        _DIGESTS[key] = digest.hexdigest()[:_DIGITS]
    return _DIGESTS[key]


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
