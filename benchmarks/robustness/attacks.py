"""What the attacks on all kinds of files have in common."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mutations import ODD, MakesFolder, mutate_bytes, mutate_value


class Attacks:
    """Feeds damaged and hostile files to drkd: a method ``try_<kind>`` a kind, which makes the next input and tries it.

    Args:
        folder: Working folder.

    Attributes:
        marker: A folder that is there once code of an input has run.
    """

    def __init__(self, folder: Path) -> None:
        self.marker = folder / "ran"
        self._folder = folder
        self._chance = random.Random(0)
        self._odd: tuple[Any, ...] = (*ODD, MakesFolder(self.marker))

    def begin(self, kind: str, *, seed: int) -> None:
        """Get ready for a kind, whose inputs then follow from the seed alone, whatever came before."""
        self._prepare(kind)
        self._chance.seed(f"{kind} {seed}")

    def _prepare(self, kind: str) -> None:
        """Make what a kind's inputs are damaged copies of, where that takes long; nothing for most."""

    def _damaged(
        self, content: Any, file: Path, *, bytes_share: float = 0.4, beside: Mapping[str, Any] | None = None
    ) -> Path:
        """Save content with other values, or whole with other bytes.

        Args:
            content: What a whole file holds; left as it is.
            file: Where to write.
            bytes_share: Of the files, those whose bytes are changed.
            beside: More entries, which are not changed; only where the content is still a dict.
        """
        chance, changed = self._chance, content
        damage_bytes = chance.random() < bytes_share
        if not damage_bytes:
            for _ in range(chance.choice((1, 1, 2))):
                changed = mutate_value(chance, changed, self._odd)
        torch.save({**changed, **beside} if beside and isinstance(changed, dict) else changed, file)
        if damage_bytes:
            file.write_bytes(mutate_bytes(chance, file.read_bytes()))
        return file
