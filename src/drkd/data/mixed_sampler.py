"""A batch sampler that puts a fixed share of unlabelled images into every batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from drkd.data.sampler import TrainBatchSampler


class MixedBatchSampler(TrainBatchSampler):
    """Batches of labelled images, each filled up with unlabelled ones.

    An epoch is one pass over the labelled images. The unlabelled ones are dealt from one endless deck, shuffled anew
    each time it is used up, that goes on from epoch to epoch; all of it is a function of (seed, epoch), so a run
    resumes as it would have gone on. Within a process and an epoch, batches get unlabelled images of their own aspect
    as far as there are any.

    Args:
        labelled: The aspect group of each labelled image; their positions are 0, 1, ...
        unlabelled: The same of each unlabelled image; their positions follow.
        batch_size: Images a batch and process.
        share: Share of each batch that is unlabelled, in (0, 1); at least one image of either kind is in each batch.
        seed: Of the order.
        shard: Rank and number of processes; those of torch.distributed by default.

    Raises:
        ValueError: If there are no images of a kind, or the batch is too small for both.
    """

    def __init__(
        self,
        labelled: Sequence[int],
        unlabelled: Sequence[int],
        batch_size: int,
        *,
        share: float,
        seed: int = 0,
        shard: tuple[int, int] | None = None,
    ) -> None:
        if not unlabelled or not 0 < share < 1 or batch_size < 2:
            raise ValueError(
                "expected unlabelled images, a share in (0, 1) and a batch of at least two, "
                f"got {len(unlabelled)}, {share} and {batch_size}"
            )
        self._filled = min(max(1, round(share * batch_size)), batch_size - 1)
        super().__init__(labelled, batch_size - self._filled, seed=seed, shard=shard)
        self._others = list(unlabelled)
        # Not the labelled images' seed: two shuffles of like length would go hand in hand.
        self._deck_seed = seed * 1_000_003 + 777_767_777

    def _draw(self) -> list[list[int]]:
        """This process' batches of the epoch: labelled images first, then unlabelled ones."""
        batches = super()._draw()
        # Every process takes part in every step, so all count alike.
        needed = len(batches) * self._processes * self._filled
        mine = self._deal(self.epoch * needed, needed)[self._rank :: self._processes]
        waiting: dict[int, list[int]] = {}
        for position in reversed(mine):
            waiting.setdefault(self._others[position], []).append(position)
        filled = [
            [waiting.get(group, []).pop() for _ in range(count)] for group, count in self._wanted(batches, waiting)
        ]
        rest = iter([position for group in sorted(waiting) for position in reversed(waiting[group])])
        first = len(self._groups)
        return [
            [*batch, *(first + position for position in [*own, *(next(rest) for _ in range(self._filled - len(own)))])]
            for batch, own in zip(batches, filled, strict=True)
        ]

    def _wanted(self, batches: list[list[int]], waiting: dict[int, list[int]]) -> list[tuple[int, int]]:
        """Of each batch, its commonest aspect group and how many unlabelled images of that group it gets."""
        left = {group: len(positions) for group, positions in waiting.items()}
        wanted = []
        for batch in batches:
            groups = self._groups[batch].tolist()
            group = max(sorted(set(groups)), key=groups.count)
            count = min(self._filled, left.get(group, 0))
            left[group] = left.get(group, 0) - count
            wanted.append((group, count))
        return wanted

    def _deal(self, first: int, count: int) -> list[int]:
        """Cards ``first`` to ``first + count`` of the endless deck."""
        size = len(self._others)
        decks = range(first // size, math.ceil((first + count) / size))
        cards: list[int] = []
        for deck in decks:
            generator = torch.Generator().manual_seed((self._deck_seed + deck * 7_919) % 2**63)
            cards += torch.randperm(size, generator=generator).tolist()
        start = first - decks.start * size
        return cards[start : start + count]
