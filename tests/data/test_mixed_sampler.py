"""Batches of labelled and unlabelled images: shares, order, resuming, processes."""

from __future__ import annotations

import pytest

from drkd.data.mixed_sampler import MixedBatchSampler

_LABELLED = [0] * 12
_UNLABELLED = [0] * 30


def batches(sampler: MixedBatchSampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert all(entry == epoch for batch in drawn for entry, _ in batch)
    return [[position for _, position in batch] for batch in drawn]


@pytest.mark.parametrize(("share", "unlabelled"), [(0.5, 2), (0.75, 3), (0.01, 1), (0.99, 3)])
def test_every_batch_has_its_share_and_every_labelled_image_its_turn(share: float, unlabelled: int) -> None:
    sampler = MixedBatchSampler(_LABELLED, _UNLABELLED, 4, share=share, seed=1)
    drawn = batches(sampler)
    assert len(drawn) == len(sampler) == 12 // (4 - unlabelled)
    for batch in drawn:
        kinds = [position >= 12 for position in batch]
        assert kinds == sorted(kinds) and sum(kinds) == unlabelled and len(batch) == 4
    assert sorted(position for batch in drawn for position in batch if position < 12) == list(range(12))
    others = [position for batch in drawn for position in batch if position >= 12]
    assert set(others) <= set(range(12, 42))


def test_unlabelled_images_take_turns_over_epochs() -> None:
    sampler = MixedBatchSampler(_LABELLED, _UNLABELLED, 4, share=0.5, seed=1)
    shown = [
        position for epoch in range(5) for batch in batches(sampler, epoch) for position in batch if position >= 12
    ]
    # 6 batches of 2 an epoch: five epochs are two whole decks of 30.
    for deck in (shown[:30], shown[30:]):
        assert sorted(deck) == list(range(12, 42))
    assert shown[:30] != shown[30:]


def test_the_order_is_a_function_of_seed_and_epoch_and_resumes_in_the_middle() -> None:
    def make(seed: int = 3) -> MixedBatchSampler:
        return MixedBatchSampler([0, 1] * 8, [1, 0, 2] * 9, 4, share=0.5, seed=seed)

    whole = batches(make(), 2)
    assert whole == batches(make(), 2) != batches(make(), 1)
    assert whole != batches(make(seed=4), 2)
    resumed = make()
    resumed.load_state_dict({"epoch": 2, "position": 3})
    resumed.set_epoch(2)
    assert [[position for _, position in batch] for batch in resumed] == whole[3:]


def test_processes_share_the_images_and_make_the_same_number_of_steps() -> None:
    ranks = [
        batches(MixedBatchSampler(_LABELLED, _UNLABELLED, 4, share=0.5, seed=1, shard=(rank, 3)), 1)
        for rank in range(3)
    ]
    assert [len(drawn) for drawn in ranks] == [2, 2, 2]
    positions = [position for drawn in ranks for batch in drawn for position in batch]
    assert len(positions) == 24 and len(set(positions)) == 24
    # Every process has labelled images at every step, so that every parameter gets a gradient.
    assert all(sum(position < 12 for position in batch) == 2 for drawn in ranks for batch in drawn)


def test_unlabelled_images_of_like_aspect_come_first() -> None:
    labelled, unlabelled = [0] * 4 + [3] * 4, [0] * 4 + [3] * 4
    for batch in batches(MixedBatchSampler(labelled, unlabelled, 4, share=0.5)):
        groups = {labelled[position] if position < 8 else unlabelled[position - 8] for position in batch}
        assert len(groups) == 1
    lonely = batches(MixedBatchSampler(labelled, [7] * 8, 4, share=0.5))
    assert sorted(position for batch in lonely for position in batch) == list(range(16))


def test_fewer_labelled_images_than_a_batch_takes() -> None:
    (batch,) = batches(MixedBatchSampler([0], [0] * 5, 8, share=0.5))
    assert batch[0] == 0 and len(batch) == 5


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.0}, {"batch_size": 1}, {"unlabelled": []}])
def test_what_cannot_be_mixed_is_refused(wrong: dict[str, object]) -> None:
    settings: dict[str, object] = {"unlabelled": [0], "batch_size": 4, "share": 0.5, **wrong}
    unlabelled, batch_size = settings.pop("unlabelled"), settings.pop("batch_size")
    with pytest.raises(ValueError, match="expected unlabelled images"):
        MixedBatchSampler([0, 0], unlabelled, batch_size, **settings)  # type: ignore[arg-type]
