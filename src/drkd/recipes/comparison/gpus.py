"""Which GPU each cell of a comparison has: without that, all of a machine's cells would meet on its first."""

from __future__ import annotations

from collections.abc import Mapping

from drkd.recipes.comparison.cell import Cell

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Gpus:
    """Hands GPUs out to cells that take one; where there are fewer than cells, the one with fewest cells.

    Args:
        names: As ``CUDA_VISIBLE_DEVICES`` names them. With one or none of them nothing is handed out.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._taken: dict[str, str] = {}

    def take(self, cell: Cell) -> dict[str, str]:
        """The environment variables of the cell's process; its GPU is its own until it is given back."""
        if len(self._names) < 2 or not _takes_one(cell):
            return {}
        taken = list(self._taken.values())
        self._taken[cell.name] = min(self._names, key=taken.count)
        return {_VISIBLE: self._taken[cell.name]}

    def give_back(self, cell: Cell) -> None:
        """The cell has ended, or could not start."""
        self._taken.pop(cell.name, None)


def list_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that processes of this environment see: those that it names, else all of the machine."""
    named = environment.get(_VISIBLE)
    if named is None:
        import torch

        # Counts without starting CUDA here, where it would hold memory as long as the comparison takes.
        return [str(place) for place in range(torch.cuda.device_count())]
    names = [name.strip() for name in named.split(",")]
    # What follows a name that is none is not seen either.
    ends = [place for place, name in enumerate(names) if name in ("", "-1")]
    return names[: ends[0]] if ends else names


def _takes_one(cell: Cell) -> bool:
    if cell.seed is None:
        return True  # a teacher is scored on one device
    training = cell.settings.get("training") or {}
    return str(training.get("devices", 1)) == "1" and training.get("accelerator", "auto") in ("auto", "gpu", "cuda")
