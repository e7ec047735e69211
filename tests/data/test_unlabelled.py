"""Unlabelled images and class subsets in the data module."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from drkd.contracts import DrkdError
from drkd.data.dataset import DetectionDataset, load_split
from drkd.data.digits import DigitsConfig, build_digits
from drkd.data.module import DetectionDataModule
from drkd.data.records import PackedRecords
from drkd.data.transforms import eval_transforms
from drkd.data.unlabelled import read_unlabelled

if TYPE_CHECKING:
    from pathlib import Path

    from tests.data.conftest import CocoFolder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DigitsConfig(train=12, tune=2, val=3, long_side=64, max_size=30)
    return build_digits(tmp_path_factory.mktemp("cache"), config=config)


def make(root: Path, **options: object) -> DetectionDataModule:
    defaults = {"batch_size": 4, "min_size": [48, 64], "max_size": 64, "horizontal_flip": 0.0, "workers": 0}
    return DetectionDataModule(str(root), **{**defaults, **options})  # type: ignore[arg-type]


def test_a_folder_of_images_is_shuffled_among_the_labelled(digits: Path) -> None:
    data = make(digits, unlabelled=[str(digits / "val")], batch_size=5)
    batches = list(data.train_dataloader())
    assert sorted(image_id for batch in batches for image_id in batch.image_ids) == list(range(1, 16))
    assert len(data.train_split) == 12
    for batch in batches:
        known = batch.labelled or (True,) * len(batch)
        assert known == tuple(image_id <= 12 for image_id in batch.image_ids)
        assert list(known) == sorted(known, reverse=True)  # labelled ones first
        for labelled, target in zip(known, batch.targets, strict=True):
            assert labelled or target.boxes.shape == (0, 4)
    assert {record.path.parent.name for record in data.unlabelled_records} == {"val"}


def test_all_unreadable_images_of_a_folder_are_named_or_left_out(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(digits / "val", folder)
    for name in ("a.png", "b.jpg"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(DrkdError, match=r"more: 2 of 5 images cannot be read: a\.png: .*; b\.jpg: .*unreadable: skip"):
        _ = make(digits, unlabelled=[str(folder)]).unlabelled_records
    data = make(digits, unlabelled=[str(folder), str(digits / "tune")], unreadable="skip")
    records = data.unlabelled_records
    assert [record.image_id for record in records] == list(range(13, 18))
    assert data.unreadable_files() == [str(folder / name) for name in ("a.png", "b.jpg")]


def test_the_rest_is_what_the_limit_cuts_off_without_its_labels(digits: Path) -> None:
    data = make(digits, unlabelled=["rest"], limit=4, keep_empty=False)
    others = data.unlabelled_records
    assert len(data.train_split) == 4 and len(others) == 8
    paths = {record.path for record in (*data.train_split.records, *others)}
    assert len(paths) == 12
    assert all(not record.labelled and len(record.boxes) == 0 for record in others)
    ids = [record.image_id for record in (*data.train_split.records, *others)]
    assert len(set(ids)) == 12


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("workers", [0, 1])
def test_resumes_bit_by_bit(digits: Path, share: float | None, workers: int) -> None:
    def loader() -> object:
        options = {"unlabelled": ["rest"], "limit": 6, "unlabelled_share": share, "photometric": True}
        return make(digits, workers=workers, **options).train_dataloader()

    whole, resumed = loader(), loader()
    whole.set_epoch(2)
    expected = list(whole)
    resumed.load_state_dict({"epoch": 2, "position": 1})
    resumed.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == len(expected) - 1
    for ours, theirs in zip(rest, expected[1:], strict=True):
        assert ours.image_ids == theirs.image_ids and ours.labelled == theirs.labelled
        assert torch.equal(ours.images, theirs.images)
    if share is not None:
        assert [batch.labelled for batch in expected] == [(True, True, False, False)] * 3


def test_training_alone_leaves_them_out(digits: Path) -> None:
    data = make(digits, unlabelled=["rest"], unlabelled_share=0.5, limit=4)
    data.leave_out_unlabelled()
    (batch,) = data.train_dataloader()
    assert sorted(batch.image_ids) == [1, 2, 3, 4] and batch.labelled == ()


def test_wrong_settings_name_the_field(digits: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"unlabelled": ["rest"]}, r"data\.unlabelled: 'rest' is what data\.limit cuts off"),
        ({"unlabelled": ["a", "a"]}, r"data\.unlabelled: a folder is listed twice"),
        ({"unlabelled": ["a"], "unlabelled_share": 1.0}, r"data\.unlabelled_share: expected a share in \(0, 1\)"),
        ({"unlabelled": ["a"], "unlabelled_share": 0.5, "batch_size": 1}, r"data\.unlabelled_share.*at least two"),
        ({"unlabelled_share": 0.5}, r"data\.unlabelled_share: the share is 0\.5, but there are no unlabelled images"),
        ({"unlabelled": [], "unlabelled_share": 0.5}, r"expected folders in data\.unlabelled"),
    ):
        with pytest.raises(DrkdError, match=message):
            make(digits, **options)
    with pytest.raises(DrkdError, match=r"data\.unlabelled: .*gone: there is no such folder"):
        make(digits, unlabelled=[str(tmp_path / "gone")]).train_dataloader()
    for limit in (12, 20):
        with pytest.raises(
            DrkdError, match=rf"'rest' is what data\.limit cuts off, and a limit of {limit} leaves none"
        ):
            make(digits, unlabelled=["rest"], limit=limit, unlabelled_share=0.5).train_dataloader()
    with pytest.raises(DrkdError, match="no image in this folder"):
        make(digits, unlabelled=[str(tmp_path)]).train_dataloader()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DrkdError, match=r"broken\.png: the image cannot be read"):
        make(digits, unlabelled=[str(tmp_path)]).train_dataloader()


def test_a_subset_of_the_classes(coco: CocoFolder) -> None:
    coco.write(split="val")
    coco.write_image("a.png", split="val")
    coco.write_image("b.png", split="val")
    data = make(coco.root, classes=["brush", "dog"])
    split = data.train_split
    assert split.class_names == data.class_names == ("brush", "dog")
    assert split.category_ids == (90, 18)
    # The bicycle, a crowd, is gone; labels follow the order that was asked for.
    assert [record.labels.tolist() for record in split.records] == [[1], [0]]
    assert [record.boxes.tolist() for record in split.records] == [[[10, 5, 30, 15]], [[1.5, 2.5, 4.5, 6.5]]]
    assert [record.labels.tolist() for record in data.val_split.records] == [[1], [0]]


def test_images_that_show_none_of_the_classes_stay_or_go(coco: CocoFolder) -> None:
    assert [len(record.boxes) for record in make(coco.root, classes=["dog"]).train_split.records] == [1, 0]
    kept = make(coco.root, classes=["dog"], keep_empty=False).train_split
    assert [record.image_id for record in kept.records] == [7]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["dgo"], "there is no class 'dgo'; the data has 'bicycle', 'dog', 'brush'"),
        (["dog", "dog"], "each once"),
        ([], "at least one"),
    ],
)
def test_a_wrong_subset_is_an_error(coco: CocoFolder, classes: list[str], message: str) -> None:
    with pytest.raises(DrkdError, match=message):
        _ = make(coco.root, classes=classes).train_split


def test_what_stands_in_for_an_unreadable_image_is_labelled_or_not_as_it_is(
    coco: CocoFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        coco.write_image(name)
    coco.write()
    split = load_split(coco.root, "train")
    for entry in range(3):
        coco.write_image(f"{entry}.png", split="more")
    others = read_unlabelled(coco.root / "more", first_id=100)
    records = (split.records[0], *others[:2], split.records[1], others[2])
    mixed = dataclasses.replace(split, records=records)
    dataset = DetectionDataset(mixed, eval_transforms(min_size=40, max_size=60), substitutes=2)
    ids = [record.image_id for record in records]
    unpacked = []
    unpack = PackedRecords._unpack
    with monkeypatch.context() as patch:
        # Of an image that can be read no other is looked at.
        patch.setattr(PackedRecords, "_unpack", lambda self, *places: unpacked.append(places) or unpack(self, *places))
        assert [dataset[place].image_id for place in range(5)] == ids
    assert unpacked == [(place, place + 1) for place in range(5)]
    for place in (0, 2):
        records[place].path.write_bytes(b"broken")
    found = [dataset[place] for place in range(5)]
    assert [sample.image_id for sample in found] == [ids[3], ids[1], ids[4], ids[3], ids[4]]
    assert [sample.labelled for sample in found] == [record.labelled for record in records]
    assert dataset.unreadable.tolist() == [1, 0, 1, 0, 0]
    records[3].path.write_bytes(b"broken")
    with pytest.raises(DrkdError, match="2 images in a row cannot be read"):
        dataset[0]
