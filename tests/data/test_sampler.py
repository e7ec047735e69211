"""Batch order: a function of seed and epoch, resumable, shared out among processes without overlap."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from drkd.data.sampler import EvaluationBatchSampler, TrainBatchSampler

_GROUPS = [0] * 13 + [1] * 9 + [-1] * 10


def _positions(sampler: TrainBatchSampler) -> list[list[int]]:
    return [[position for _, position in batch] for batch in sampler]


def test_order_depends_on_seed_and_epoch_only() -> None:
    first, second = (TrainBatchSampler(_GROUPS, 4, seed=3) for _ in range(2))
    other = TrainBatchSampler(_GROUPS, 4, seed=4)
    epochs = []
    for epoch in range(3):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        epochs.append(list(first))
        assert epochs[-1] == list(second)
        assert {carried for batch in epochs[-1] for carried, _ in batch} == {epoch}

    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(other)


def test_batches_are_full_and_of_one_aspect_but_for_the_left_over() -> None:
    batches = _positions(TrainBatchSampler(_GROUPS, 4))

    assert len(batches) == len(TrainBatchSampler(_GROUPS, 4)) == 8
    assert {len(batch) for batch in batches} == {4}
    assert sorted(chain.from_iterable(batches)) == list(range(32))
    mixed = [batch for batch in batches if len({_GROUPS[position] for position in batch}) > 1]
    assert len(mixed) == 1  # 13 + 9 + 10 leave 1 + 1 + 2


def test_an_incomplete_batch_is_dropped() -> None:
    batches = _positions(TrainBatchSampler([0] * 10, 4))

    assert [len(batch) for batch in batches] == [4, 4]


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    sampler = TrainBatchSampler([0, 1, 0], 16)

    assert len(sampler) == 1
    assert [sorted(batch) for batch in _positions(sampler)] == [[0, 1, 2]]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch_without_overlap(processes: int) -> None:
    samplers = [TrainBatchSampler(_GROUPS, 2, shard=(rank, processes)) for rank in range(processes)]

    shares = [_positions(sampler) for sampler in samplers]

    assert {len(share) for share in shares} == {len(samplers[0])} == {32 // (2 * processes)}
    seen = Counter(position for share in shares for batch in share for position in batch)
    assert set(seen.values()) == {1}


def test_more_processes_than_images_all_get_one() -> None:
    shares = [_positions(TrainBatchSampler([0, 0], 4, shard=(rank, 3))) for rank in range(3)]

    assert [len(share) for share in shares] == [1, 1, 1]
    assert {len(share[0]) for share in shares} == {1}


def test_resumes_in_the_middle_of_an_epoch() -> None:
    sampler = TrainBatchSampler(_GROUPS, 4, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.position = 3
    state = sampler.state_dict()

    resumed = TrainBatchSampler(_GROUPS, 4, seed=1)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)  # what a trainer does on its way

    assert list(resumed) == whole[3:]
    assert len(resumed) == len(whole)
    assert list(resumed) == whole  # only the first iteration is short


def test_another_epoch_starts_at_its_beginning() -> None:
    sampler = TrainBatchSampler(_GROUPS, 4)
    sampler.load_state_dict({"epoch": 0, "position": 8})
    sampler.set_epoch(1)

    assert len(list(sampler)) == 8


def test_a_finished_epoch_resumes_as_a_whole_one() -> None:
    sampler = TrainBatchSampler(_GROUPS, 4)
    sampler.load_state_dict({"epoch": 0, "position": 8})

    assert len(list(sampler)) == 8


def test_lightning_reaches_set_epoch() -> None:
    sampler = TrainBatchSampler(_GROUPS, 4)
    sampler.sampler.set_epoch(5)

    assert sampler.epoch == 5


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_image_once(processes: int) -> None:
    shares = [list(EvaluationBatchSampler(11, 4, shard=(rank, processes))) for rank in range(processes)]

    flat = [[position for batch in share for _, position in batch] for share in shares]
    assert sorted(chain.from_iterable(flat)) == list(range(11))
    assert all(share == sorted(share) for share in flat)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evaluation_leaves_no_process_without_an_image(count: int) -> None:
    shares = [list(EvaluationBatchSampler(count, 4, shard=(rank, 5))) for rank in range(5)]

    assert all(len(share) == 1 for share in shares)
    assert {position for share in shares for batch in share for _, position in batch} == set(range(count))


def test_evaluation_of_nothing_has_no_batch() -> None:
    assert [list(EvaluationBatchSampler(0, 4, shard=(rank, 2))) for rank in range(2)] == [[], []]


@pytest.mark.parametrize(("groups", "batch_size"), [([], 4), ([0], 0)])
def test_wrong_arguments(groups: list[int], batch_size: int) -> None:
    with pytest.raises(ValueError, match="positive batch size, got"):
        TrainBatchSampler(groups, batch_size)
