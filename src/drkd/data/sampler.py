"""Batch samplers whose order is a function of (seed, epoch) and that resume in the middle of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed
from torch.utils.data import Sampler

from drkd.contracts import ImageRecord

Batch = list[tuple[int, int]]
"""``(epoch, position)`` pairs, so that a worker that outlives the epoch still knows it."""


def process_shard() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def aspect_group(record: ImageRecord) -> int:
    """Half-octave of width over height: images of one group waste little padding on one another."""
    height, width = record.size
    return round(2 * math.log2(width / height))


class TrainBatchSampler(Sampler[Batch]):
    """Shuffled batches of full size, of images of like aspect.

    The order is a function of (seed, epoch). All processes draw the same order and take every n-th batch, so no image
    is seen twice in an epoch and all processes make the same number of steps. What is left over in an aspect group
    forms mixed batches; what is then left over is dropped, unless it is all there is.

    Args:
        groups: The aspect group of each image; all equal to switch grouping off.
        batch_size: Images a batch and process.
        seed: Of the order.
        shard: Rank and number of processes; those of torch.distributed by default.

    Attributes:
        epoch: Which order is drawn.
        position: Batches of the epoch handed out so far; the data loader keeps it, since workers fetch ahead.
    """

    def __init__(
        self, groups: Sequence[int], batch_size: int, *, seed: int = 0, shard: tuple[int, int] | None = None
    ) -> None:
        if not groups or batch_size <= 0:
            raise ValueError(f"expected images and a positive batch size, got {len(groups)} and {batch_size}")
        self._groups = torch.tensor(groups)
        self._batch_size = batch_size
        self._seed = seed
        self._rank, self._processes = shard or process_shard()
        self._start = 0
        self.epoch = 0
        self.position = 0

    @property
    def sampler(self) -> TrainBatchSampler:
        """Itself: Lightning calls ``set_epoch`` on a batch sampler's ``sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order. Another epoch starts at its beginning; the same one stays where it was to resume."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in that epoch after that many batches; only the next iteration is shortened."""
        self.epoch = int(state["epoch"])
        self._start = self.position = int(state["position"])

    def __len__(self) -> int:
        """Batches of a whole epoch and process, wherever it is resumed."""
        return max(1, len(self._groups) // (self._batch_size * self._processes))

    def __iter__(self) -> Iterator[Batch]:
        # A generator, because torch's loader asks for an iterator twice and uses the second one only.
        start = self._start if self._start < len(self) else 0
        self._start, self.position = 0, start
        for batch in self._draw()[start:]:
            yield [(self.epoch, index) for index in batch]

    def _draw(self) -> list[list[int]]:
        """This process' batches of the epoch."""
        generator = torch.Generator().manual_seed(_seed_of(self._seed, self.epoch))
        order = torch.randperm(len(self._groups), generator=generator)
        full = self._batch_size * self._processes
        chunks: list[torch.Tensor] = []
        rest: list[torch.Tensor] = []
        for group in self._groups.unique(sorted=True):
            members = order[self._groups[order] == group]
            cut = len(members) // full * full
            chunks.extend(members[:cut].split(full) if cut else ())
            rest.append(members[cut:])
        left = torch.cat(rest)
        cut = len(left) // full * full
        chunks.extend(left[:cut].split(full) if cut else ())
        if not chunks:
            # Fewer images than one step takes: all of them, each process at least one.
            return [
                [int(left[i % len(left)]) for i in range(self._rank, max(len(left), self._processes), self._processes)]
            ]
        shuffled = torch.randperm(len(chunks), generator=generator).tolist()
        return [chunks[i][self._rank :: self._processes].tolist() for i in shuffled]


class EvaluationBatchSampler(Sampler[Batch]):
    """Every image once, in order; with several processes each takes every n-th image.

    None is seen twice, unless there are fewer images than processes: one without an image then detects another's again,
    for Lightning refuses an empty loader beside full ones. The evaluator counts each image once.

    Args:
        count: Number of images.
        batch_size: Images a batch; the last one may be smaller.
        shard: Rank and number of processes; those of torch.distributed by default.
    """

    def __init__(self, count: int, batch_size: int, *, shard: tuple[int, int] | None = None) -> None:
        if batch_size <= 0:
            raise ValueError(f"expected a positive batch size, got {batch_size}")
        rank, processes = shard or process_shard()
        mine: Sequence[int] = range(rank, count, processes)
        if count and not mine:
            mine = [rank % count]
        self._batches = [
            [(0, index) for index in mine[first : first + batch_size]] for first in range(0, len(mine), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _seed_of(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch * 7_919 + 12_345) % (2**63)
