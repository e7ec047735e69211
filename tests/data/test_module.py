"""The data module: batches, resuming with workers, subsets, the embedded data set."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from drkd.contracts import DetectionBatch, DrkdError
from drkd.data.digits import DigitsConfig, build_digits
from drkd.data.module import DetectionDataModule

if TYPE_CHECKING:
    from tests.data.conftest import CocoFolder

_SMALL = DigitsConfig(train=12, tune=2, val=5, long_side=64, max_size=30)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_digits(tmp_path_factory.mktemp("cache"), config=_SMALL)


def _module(root: Path, **options) -> DetectionDataModule:
    defaults = {"batch_size": 2, "min_size": [48, 64], "max_size": 64, "horizontal_flip": 0.0, "workers": 0}
    return DetectionDataModule(str(root), **{**defaults, **options})


def test_training_batches(digits: Path) -> None:
    data = _module(digits)
    loader = data.train_dataloader()

    batches = list(loader)

    assert len(batches) == len(loader) == 6
    assert sorted(image_id for batch in batches for image_id in batch.image_ids) == list(range(1, 13))
    assert all(isinstance(batch, DetectionBatch) and batch.images.shape[-1] % 32 == 0 for batch in batches)
    assert data.class_names[0] == "zero"
    assert len(data.train_split) == 12


def test_evaluation_batches_are_in_order_and_the_same_each_time(digits: Path) -> None:
    data = _module(digits)
    first, second = list(data.val_dataloader()), list(data.val_dataloader())

    assert [image_id for batch in first for image_id in batch.image_ids] == [1, 2, 3, 4, 5]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_resumes_after_the_batches_handed_out(digits: Path, workers: int) -> None:
    whole = _module(digits, photometric=True).train_dataloader()
    whole.set_epoch(1)
    expected = list(whole)
    interrupted = _module(digits, photometric=True, workers=workers).train_dataloader()
    interrupted.set_epoch(1)
    for count, _ in enumerate(interrupted, start=1):
        if count == 2:
            break

    resumed = _module(digits, photometric=True, workers=workers).train_dataloader()
    resumed.load_state_dict(interrupted.state_dict())
    resumed.set_epoch(1)
    rest = list(resumed)

    assert interrupted.state_dict() == {"epoch": 1, "position": 2}
    assert [batch.image_ids for batch in rest] == [batch.image_ids for batch in expected[2:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, expected[2:], strict=True))
    assert resumed.state_dict() == {"epoch": 1, "position": 6}


def test_an_epoch_set_after_the_iterator_was_made_counts(digits: Path) -> None:
    plain, working = (_module(digits, workers=workers).train_dataloader() for workers in (0, 1))
    plain.set_epoch(1)
    working.load_state_dict({"epoch": 0, "position": 6})

    batches = iter(working)  # Lightning does so when it resumes at the end of an epoch
    working.set_epoch(1)

    assert [batch.image_ids for batch in batches] == [batch.image_ids for batch in plain]


def test_workers_leave_what_they_share_uncollected(digits: Path) -> None:
    loader = _module(digits, workers=1).train_dataloader()
    # Of the worker itself, not of the parent: the collate function runs there.
    loader.collate_fn = lambda samples: gc.get_freeze_count()
    assert all(count > 1000 for count in loader)
    assert gc.get_freeze_count() < 1000


def test_workers_that_outlive_an_epoch_know_the_next(digits: Path) -> None:
    plain, working = (_module(digits, photometric=True, workers=workers).train_dataloader() for workers in (0, 1))

    for epoch in range(2):
        plain.set_epoch(epoch)
        working.set_epoch(epoch)
        for a, b in zip(plain, working, strict=True):
            assert torch.equal(a.images, b.images)


def test_iterating_leaves_the_global_generator_alone(digits: Path) -> None:
    loader = _module(digits, photometric=True).train_dataloader()
    state = torch.random.get_rng_state()

    list(loader)

    assert torch.equal(torch.random.get_rng_state(), state)


def test_processes_share_what_could_not_be_read(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, fails = _module(digits, unreadable="skip"), _module(digits)
    fails.train_dataloader()
    data.share_unreadable(torch.device("cpu"))  # no training, no group: nothing to do
    dataset = data.train_dataloader().dataset
    dataset.unreadable[3] = 1
    data.share_unreadable(torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def another_has_the_fifth(tensor: torch.Tensor, op: torch.distributed.ReduceOp) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        assert tensor.data_ptr() != dataset.unreadable.data_ptr()
        dataset.unreadable[4] = 1  # a worker, meanwhile
        tensor[5] = 1

    monkeypatch.setattr(torch.distributed, "all_reduce", another_has_the_fifth)
    data.share_unreadable(torch.device("cpu"))
    assert dataset.unreadable.nonzero().flatten().tolist() == [3, 4, 5]
    assert len(data.unreadable_files()) == 3
    # Where an unreadable image ends the run, processes have nothing to tell each other.
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    fails.share_unreadable(torch.device("cpu"))


def test_limits(digits: Path) -> None:
    data = _module(digits, limit=3, val_limit=2, batch_size=16)

    (batch,) = data.train_dataloader()
    assert sorted(batch.image_ids) == [1, 2, 3]
    assert [record.image_id for record in data.val_split.records] == [1, 2]


def test_a_limit_that_leaves_no_boxes_is_refused(coco: CocoFolder) -> None:
    first = _module(coco.root).train_split.records[0].image_id
    coco.document["annotations"] = [entry for entry in coco.document["annotations"] if entry["image_id"] != first]
    coco.write()
    with pytest.raises(DrkdError, match=r"none of the first 1 images .* has a box to train on"):
        _ = _module(coco.root, limit=1).train_split


def test_images_without_boxes_can_be_left_out_of_training(coco: CocoFolder) -> None:
    coco.document["annotations"] = coco.document["annotations"][1:]  # image 7 keeps a crowd only
    coco.write()

    assert [record.image_id for record in _module(coco.root, keep_empty=False).train_split.records] == [3]
    assert [record.image_id for record in _module(coco.root).train_split.records] == [7, 3]


def test_no_box_to_train_on_is_an_error(coco: CocoFolder) -> None:
    coco.document["annotations"] = []
    coco.write()

    with pytest.raises(DrkdError, match="no image of the split 'train' has a box"):
        _ = _module(coco.root, keep_empty=False).train_split
    # Where images without boxes are kept there is nothing to learn either.
    with pytest.raises(DrkdError, match="no image of the split 'train' has a box"):
        _ = _module(coco.root).train_split


def test_validation_labels_follow_the_training_classes(coco: CocoFolder) -> None:
    categories = coco.document["categories"]
    coco.document["categories"] = [{"id": 1, "name": "brush"}]
    coco.document["annotations"] = [{"id": 1, "image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4]}]
    coco.write(split="val")
    coco.write_image("a.png", split="val")
    coco.write_image("b.png", split="val")
    data = _module(coco.root)

    assert data.val_split.class_names == data.class_names == ("bicycle", "dog", "brush")
    assert data.val_split.category_ids == (-1, -1, 1)
    assert data.val_split.records[1].labels.tolist() == [2]
    assert len(categories) == 3


def test_a_folder_that_is_only_evaluated_needs_no_training_split(coco: CocoFolder) -> None:
    data = _module(coco.root, train_split="none", val_split="train")

    assert data.class_names == ("bicycle", "dog", "brush")
    assert len(list(data.val_dataloader())) == 1


def test_every_batch_can_have_one_shape(digits: Path) -> None:
    loader = _module(digits, pad_to=(64, 96)).train_dataloader()

    assert {tuple(batch.images.shape[-2:]) for batch in loader} == {(64, 96)}


def test_digits_by_name(monkeypatch: pytest.MonkeyPatch, digits: Path) -> None:
    monkeypatch.setattr("drkd.data.batches.build_digits", lambda config: digits)
    data = _module("digits")
    data.prepare_data()

    assert data.root == digits
    assert len(data.val_split) == 5


@pytest.mark.skipif(
    torch.multiprocessing.get_start_method() != "fork",
    reason="workers are no forks here: what the test replaces does not reach them",
)
def test_a_want_of_shared_memory_ends_a_pass_and_is_not_waited_out(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")

    # The list of what was unreadable is in shared memory already.
    loader = _module(digits, workers=1).train_dataloader()
    loader.timeout = 60
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    with pytest.raises(RuntimeError, match="unable to write to file") as caught:
        next(iter(loader))
    assert "Original Traceback" in str(caught.value)


def test_a_split_may_lack_a_class_that_is_chosen(coco: CocoFolder) -> None:
    coco.document["categories"] = [{"id": 90, "name": "brush"}]
    coco.document["annotations"] = [{"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4]}]
    coco.write(split="val")
    coco.write_image("a.png", split="val")
    coco.write_image("b.png", split="val")
    data = _module(coco.root, classes=["dog", "brush"])
    assert data.train_split.class_names == data.val_split.class_names == ("dog", "brush")
    assert data.val_split.records[1].labels.tolist() == [1] and data.val_split.category_ids == (-1, 90)
    with pytest.raises(DrkdError, match=r"instances_train\.json: data\.classes: there is no class 'cat'"):
        _ = _module(coco.root, classes=["cat", "brush"]).train_split


@pytest.mark.parametrize(("short", "long"), [(1600, 1333), ([480, 800], 640), ([], 640)])
def test_a_short_side_longer_than_the_long_one_is_refused(short: int | list[int], long: int, digits: Path) -> None:
    with pytest.raises(DrkdError, match=r"data\.min_size and data\.max_size: expected .*, got .+ and (1333|640)\."):
        _module(digits, min_size=short, max_size=long)
    with pytest.raises(DrkdError, match=r"data\.min_size\[1\]: expected 1 to 32768, got 0"):
        _module(digits, min_size=[64, 0])


def test_a_folder_called_as_the_embedded_data_is_not_passed_over(
    coco: CocoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(coco.root.parent)
    (coco.root.parent / "digits").mkdir()
    monkeypatch.setattr("drkd.data.batches.build_digits", lambda config: Path("built"))
    assert DetectionDataModule("digits").root == Path("built")  # a folder of something else
    (coco.root.parent / "digits").rmdir()
    coco.root.rename(coco.root.parent / "digits")
    with pytest.raises(DrkdError, match=r"'digits' is the embedded data set, and .*: write '\./digits' for the folder"):
        _ = DetectionDataModule("digits").root
    assert DetectionDataModule("./digits").class_names == ("bicycle", "dog", "brush")


def test_a_faulty_folder_called_as_the_embedded_data_is_not_passed_over_either(
    coco: CocoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set of two formats is one, and so is that which is damaged."""
    monkeypatch.chdir(coco.root.parent)
    coco.root.rename(coco.root.parent / "digits")
    Path("digits/data.yaml").write_text("train: images/train\nnames: [cat]\n")
    for format in ("auto", "coco"):
        with pytest.raises(DrkdError, match=r"'digits' is the embedded data set, and there is a folder of that name"):
            _ = DetectionDataModule("digits", format=format).root


@pytest.mark.parametrize("text", ["root: ./mnist\nbatch_size: 3\n", "a: [1]\n"])
def test_a_folder_with_a_data_yaml_of_another_kind_is_no_data_set(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "data.yaml").write_text(text)
    monkeypatch.setattr("drkd.data.batches.build_digits", lambda config: Path("built"))
    assert DetectionDataModule("digits").root == Path("built")
