"""Measured cells that are to be measured again: each is kept until its own run begins, and noted in the folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from drkd.contracts import DrkdError
from drkd.recipes.comparison.cell import Cell, forget, read_object
from drkd.recipes.run_folder import write_json

Why = Literal["changed", "all"]

AGAIN_FILE = "rerun.json"
"""In the comparison's folder, while there are such cells: by name, why; ``drkd.reports`` leaves them out."""


class Again:
    """The cells of a ``--rerun`` whose runs have not begun; a later session goes on with them, with or without it.

    Args:
        folder: The comparison's folder.
        noted: By name of a cell why it is to be measured again: its settings changed, or in any case.
    """

    def __init__(self, folder: Path, noted: Mapping[str, Why]) -> None:
        self._folder = folder
        self._noted = dict(noted)

    def __contains__(self, cell: Cell) -> bool:
        return cell.name in self._noted

    def note(self) -> None:
        """Write down which cells these are; nothing stays where there are none."""
        file = self._folder / AGAIN_FILE
        if self._noted:
            write_json(file, self._noted)
        else:
            file.unlink(missing_ok=True)

    def begin(self, cell: Cell) -> None:
        """Remove what was measured of the cell, and then the note, so that no interruption loses the second alone.

        Raises:
            DrkdError: If a file cannot be removed.
        """
        forget(cell)
        del self._noted[cell.name]
        self.note()


def read_again(folder: Path, cells: Iterable[Cell], changed: Iterable[str]) -> dict[str, Why]:
    """By name, the cells that an earlier session was to measure again and did not begin with.

    Args:
        folder: The comparison's folder.
        cells: All cells of the comparison; notes of others are kept, since they may come back.
        changed: Names of those whose settings are not those that they were measured with.

    Raises:
        DrkdError: If the note is damaged.
    """
    file = folder / AGAIN_FILE
    if not file.exists():
        return {}
    noted: dict[str, Why] = {}
    for name, why in read_object(file).items():
        if why not in ("changed", "all"):
            raise DrkdError(f"{file}: field {name}: expected 'changed' or 'all', got {why!r}.")
        noted[name] = why
    # Of what lost its files nothing is to be forgotten, and a change that was taken back needs no second run.
    over = {cell.name for cell in cells if not cell.file.exists() and not (cell.run_folder / "run.json").exists()}
    kept = {cell.name for cell in cells} - set(changed)
    return {name: why for name, why in noted.items() if name not in over and not (why == "changed" and name in kept)}
