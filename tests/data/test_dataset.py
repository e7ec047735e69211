"""Finding and loading splits, and serving samples whose augmentation depends on seed, epoch and image only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from drkd.contracts import DrkdError
from drkd.data.dataset import DetectionDataset, find_splits, load_split
from drkd.data.transforms import eval_transforms, train_transforms

if TYPE_CHECKING:
    from tests.data.conftest import CocoFolder


@pytest.mark.parametrize(
    ("annotations", "images", "split"),
    [
        ("annotations/instances_train.json", "train", "train"),
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_val2017.json", "images/val2017", "val"),
        ("annotations/instances_val.json", "images/val", "val"),
        ("annotations/instances_val.json", "images", "val"),
        ("annotations/instances_val.json", "val2017", "val"),
        ("annotations/train.json", "train", "train"),
        ("annotations/instances_tune.json", "tune", "tune"),
        ("valid/_annotations.coco.json", "valid", "val"),
        ("test/_annotations.coco.json", "test", "test"),
    ],
)
def test_finds_the_usual_layouts(tmp_path: Path, annotations: str, images: str, split: str) -> None:
    (tmp_path / annotations).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    (tmp_path / annotations).write_text("{}")

    assert find_splits(tmp_path) == {split: (tmp_path / annotations, tmp_path / images)}


def test_other_annotations_are_left_alone(coco: CocoFolder) -> None:
    for name in ("captions_train2017", "person_keypoints_train2017", "image_info_test2017"):
        (coco.root / "annotations" / f"{name}.json").write_text("{}")

    assert list(find_splits(coco.root)) == ["train"]


def test_two_files_for_a_split_are_an_error(coco: CocoFolder) -> None:
    coco.write(split="train2017")

    with pytest.raises(DrkdError, match=r"two annotation files for the split 'train'"):
        find_splits(coco.root)


def test_nothing_found_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match="Expected COCO: annotations/instances_train"):
        find_splits(tmp_path)
    with pytest.raises(DrkdError, match="no such folder"):
        find_splits(tmp_path / "gone")


def test_a_missing_split_lists_those_there(coco: CocoFolder) -> None:
    with pytest.raises(DrkdError, match="no split 'val'; this folder has train"):
        load_split(coco.root, "val")


def test_labels_follow_given_class_names(coco: CocoFolder) -> None:
    split = load_split(coco.root, "train", class_names=["dog", "cat", "brush", "bicycle"])

    assert split.class_names == ("dog", "cat", "brush", "bicycle")
    assert split.category_ids == (18, -1, 90, 2)
    assert [record.labels.tolist() for record in split.records] == [[0, 3], [2]]


def test_names_that_differ_are_an_error(coco: CocoFolder) -> None:
    with pytest.raises(DrkdError, match=r"classes differ: its 'bicycle', 'brush' not among the expected 2 classes"):
        load_split(coco.root, "train", class_names=["dog", "cat"])
    with pytest.raises(DrkdError, match=r"'dog' are expected more than once"):
        load_split(coco.root, "train", class_names=["dog", "dog", "brush", "bicycle"])


def test_first_images(coco: CocoFolder) -> None:
    split = load_split(coco.root, "train")

    assert [record.image_id for record in split.first(1).records] == [7]
    assert split.first(None) is split
    assert len(split.first(10)) == 2
    with pytest.raises(ValueError, match="must be positive, got 0"):
        split.first(0)


def test_crowds_do_not_train_but_can_be_kept(coco: CocoFolder) -> None:
    split = load_split(coco.root, "train")
    transforms = eval_transforms(min_size=80, max_size=200)

    training = DetectionDataset(split, transforms)[0]
    kept = DetectionDataset(split, transforms, keep_crowds=True)[0]

    assert training.targets.boxes.tolist() == [[20.0, 10.0, 60.0, 30.0]]
    assert kept.targets.ignore.tolist() == [False, True]
    assert kept.targets.labels.tolist() == [1, 0]
    assert (training.image.shape, training.original_size, training.image_id) == ((3, 80, 120), (40, 60), 7)
    assert type(training.image) is type(training.targets.boxes) is torch.Tensor


def test_boxes_that_became_too_thin_do_not_train(coco: CocoFolder) -> None:
    split = load_split(coco.root, "train")

    sample = DetectionDataset(split, eval_transforms(min_size=10, max_size=200), minimum_side=1.0)[1]

    assert len(sample.targets.boxes) == 0  # 3 px wide at a quarter


def test_augmentation_is_a_function_of_seed_epoch_and_image(coco: CocoFolder) -> None:
    split = load_split(coco.root, "train")
    transforms = train_transforms(min_size=[30, 40, 50, 60, 70], max_size=200, photometric=True)
    dataset, again, other = (DetectionDataset(split, transforms, seed=seed) for seed in (1, 1, 2))

    expected = [dataset[(epoch, 0)].image for epoch in range(4)]
    dataset[(0, 1)], torch.rand(3)  # neither the order nor the global generator matters

    for epoch in reversed(range(4)):
        assert torch.equal(again[(epoch, 0)].image, expected[epoch])
    assert any(not torch.equal(image, expected[0]) for image in expected[1:])
    assert any(not torch.equal(other[(epoch, 0)].image, expected[epoch]) for epoch in range(4))
    assert torch.equal(dataset[0].image, expected[0])


def test_augmentation_leaves_the_global_generator_alone(coco: CocoFolder) -> None:
    dataset = DetectionDataset(load_split(coco.root, "train"), train_transforms(min_size=40, photometric=True))
    state = torch.random.get_rng_state()

    dataset[0]

    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_image_of_another_size_is_an_error_when_it_is_loaded(coco: CocoFolder) -> None:
    coco.write_image("a.png", size=(41, 60))
    dataset = DetectionDataset(load_split(coco.root, "train"), eval_transforms())

    with pytest.raises(DrkdError, match=r"a\.png: the image is 60 x 41 px.*say 60 x 40"):
        dataset[0]


def test_a_spoilt_image_is_an_error_when_it_is_loaded(coco: CocoFolder) -> None:
    (coco.images / "a.png").write_bytes(b"junk")
    dataset = DetectionDataset(load_split(coco.root, "train"), eval_transforms())

    with pytest.raises(DrkdError, match=r"a\.png: this is not an image"):
        dataset[0]


def test_loading_does_not_change_the_file(coco: CocoFolder) -> None:
    before = coco.annotations.read_bytes()
    load_split(coco.root, "train")

    assert coco.annotations.read_bytes() == before
    assert json.loads(before)["categories"][0]["id"] == 90


def test_classes_that_are_too_many_may_be_left_out(coco: CocoFolder) -> None:
    """The message names the way for a detector that knows some of them, and none where it knows others too."""
    with pytest.raises(
        DrkdError, match=r"rename the categories, or keep those classes only \(--classes, data\.classes"
    ):
        load_split(coco.root, "train", class_names=["dog"])
    with pytest.raises(DrkdError, match=r"rename the categories\.$"):
        load_split(coco.root, "train", class_names=["dog", "horse"])
