"""The first recipe fits what was seen of data and teacher, and mismatches are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.conftest import TINY_CLASSES, write_coco, write_detector
from torchvision.models import resnet18

from drkd.adapters import ZooBuilder
from drkd.cli import main
from drkd.contracts import Detector, DrkdError
from drkd.data.convert import convert
from drkd.recipes.initialization import DataFacts, _image_size, initialize, look_at_data
from drkd.recipes.recipe import load_recipe
from drkd.recipes.training import assemble_teacher


@pytest.fixture(scope="module")
def torchvision_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare state dict of torchvision's smallest detector, for two classes."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    detector = ZooBuilder(name="fasterrcnn_mobilenet_v3_large_fpn", head="new").build(["a", "b"])
    torch.save(detector.model.state_dict(), path)
    return path


def test_the_data_are_measured(tiny_coco: Path) -> None:
    facts = look_at_data(tiny_coco)
    assert (facts.train_images, facts.val_images, facts.val_split) == (6, 3, "val")
    assert facts.class_names == ("cat", "dog") and facts.boxes == 15
    assert (facts.short_side, facts.long_side) == (64, 96)
    assert facts.box_sides == pytest.approx((16, 18, 20), abs=0.5)


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn", "fcos"])
def test_the_recipe_says_what_was_found_and_loads(
    student: str, tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    output = tmp_path / "recipe.yaml"
    written = initialize(tiny_coco, teacher=str(tiny_detector), student=student, output=output)  # type: ignore[arg-type]
    assert written.command == f"drkd distill --config {output}"
    recipe = load_recipe([output])
    content = yaml.safe_load(recipe.resolved)
    assert type(recipe.student).__name__.lower().startswith(student.replace("_", ""))
    assert content["teacher"]["init_args"]["path"] == str(tiny_detector)
    # The teacher's own image size, and a batch no larger than the data.
    assert (content["data"]["min_size"], content["data"]["max_size"], content["data"]["batch_size"]) == (64, 96, 6)
    assert content["data"]["horizontal_flip"] == 0.5
    assert content["training"]["epochs"] >= 24
    # What the recipe offers as a comment can be used; Faster R-CNN's head has no such thing.
    text = output.read_text()
    assert ("  # init_args: {response" in text) is (student != "faster_rcnn")
    output.write_text(text.replace("  # init_args: {response", "  init_args: {response"))
    method = yaml.safe_load(load_recipe([output]).resolved)["method"]
    assert method["init_args"]["response"] == ("logits" if student == "faster_rcnn" else "cross_head")


def test_without_a_teacher_it_is_a_recipe_to_train_one(tiny_coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "teacher.yaml"
    written = initialize(tiny_coco, backbone="resnet101", output=output)
    assert written.command == f"drkd train --config {output}"
    assert "drkd train --config THIS_FILE" in output.read_text()
    assert any("none given, so the recipe trains a detector alone" in line for line in written.findings)
    recipe = load_recipe([output])
    assert recipe.teacher is None
    assert recipe.method is None
    content = yaml.safe_load(recipe.resolved)
    assert content["student"]["init_args"]["backbone"] == "resnet101"
    # Nothing says how large a teacher's images were: the data's own size.
    assert (content["data"]["min_size"], content["data"]["max_size"]) == (128, 213)


def test_the_command_can_be_pasted_where_the_path_has_spaces(tiny_coco: Path, tmp_path: Path) -> None:
    output = tmp_path / "my recipe.yaml"
    assert initialize(tiny_coco, output=output).command == f"drkd train --config '{output}'"


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet19", "expected one of torchvision's resnet18, resnet34"),
        ("timm/resnet19d", r"no model named 'resnet19d'\. Close to it: timm/resnet"),
    ],
)
def test_a_backbone_that_does_not_exist_is_refused(
    backbone: str, message: str, tiny_coco: Path, tmp_path: Path
) -> None:
    with pytest.raises(DrkdError, match=message):
        initialize(tiny_coco, backbone=backbone, output=tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(("option", "value"), [("class_map", "names"), ("trust_pickle", True)])
def test_what_is_said_about_a_teacher_wants_one(option: str, value: object, tiny_coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match=f"--{option} is about a teacher"):
        initialize(tiny_coco, output=tmp_path / "recipe.yaml", **{option: value})  # type: ignore[arg-type]
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("classes", [("3", "7"), ("a", "b"), ("turn_left", "turn_right")])
def test_classes_that_a_mirror_changes_are_not_flipped(classes: tuple[str, ...], tmp_path: Path) -> None:
    data = write_coco(tmp_path / "coco", classes=classes)
    teacher = write_detector(tmp_path / "teacher.pt", classes=classes)
    initialize(data, teacher=str(teacher), output=tmp_path / "recipe.yaml")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["horizontal_flip"] == 0.0


def test_a_bare_state_dict_of_torchvision_is_recognised(
    tiny_coco: Path, torchvision_teacher: Path, tmp_path: Path
) -> None:
    written = initialize(tiny_coco, teacher=str(torchvision_teacher), output=tmp_path / "recipe.yaml")
    teacher = yaml.safe_load(written.recipe.read_text())["teacher"]
    assert teacher["init_args"]["name"] == "fasterrcnn_mobilenet_v3_large_fpn"
    assert any("2 classes" in line for line in written.findings)


def test_a_bare_state_dict_of_another_class_count_is_refused(torchvision_teacher: Path, tmp_path: Path) -> None:
    data = write_coco(tmp_path / "coco", classes=("cat", "dog", "bird"))
    with pytest.raises(DrkdError, match=r"knows 2 classes, but the data has 3 \(cat, dog, bird\)"):
        initialize(data, teacher=str(torchvision_teacher), output=tmp_path / "recipe.yaml")


def test_a_one_stage_state_dict_with_a_background_is_recognised(tiny_coco: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pth"
    model = ZooBuilder(name="fcos_resnet50_fpn", head="new", first_label=1).build(["a", "b"]).model
    torch.save(model.state_dict(), teacher)
    written = initialize(tiny_coco, teacher=str(teacher), output=tmp_path / "recipe.yaml")
    assert any("2 classes" in line and "in its order, after a background" in line for line in written.findings)
    data = write_coco(tmp_path / "coco", classes=("cat",))
    with pytest.raises(DrkdError, match=r"knows 3 classes \(or 2 after a background\), but the data has 1 \(cat\)"):
        initialize(data, teacher=str(teacher), output=tmp_path / "other.yaml")


def test_a_saved_teacher_of_other_names_is_refused(tiny_coco: Path, tmp_path: Path) -> None:
    teacher = write_detector(tmp_path / "teacher.pt", classes=("cat", "horse"))
    with pytest.raises(DrkdError, match="horse"):
        initialize(tiny_coco, teacher=str(teacher), output=tmp_path / "recipe.yaml")
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("by_file", [True, False])
def test_a_teacher_of_other_classes_is_joined_by_a_map(by_file: bool, tiny_coco: Path, tmp_path: Path) -> None:
    teacher = write_detector(tmp_path / "teacher.pt", classes=("cat", "horse"))
    (tmp_path / "map.yaml").write_text("horse: dog")
    class_map = str(tmp_path / "map.yaml") if by_file else "names"
    written = initialize(tiny_coco, teacher=str(teacher), class_map=class_map, output=tmp_path / "recipe.yaml")
    recipe = load_recipe([written.recipe])
    assert recipe.class_map == class_map
    recipe.data.setup("fit")
    found = assemble_teacher(recipe)
    assert isinstance(found, Detector) and found.spec.class_names == ("cat", "dog" if by_file else "horse")


def test_a_map_that_does_not_fit_is_refused_before_a_recipe_is_written(tiny_coco: Path, tmp_path: Path) -> None:
    teacher = write_detector(tmp_path / "teacher.pt", classes=("cat", "horse"))
    (tmp_path / "map.yaml").write_text("zebra: dog")
    with pytest.raises(DrkdError, match="zebra is none of the teacher's classes"):
        initialize(
            tiny_coco, teacher=str(teacher), class_map=str(tmp_path / "map.yaml"), output=tmp_path / "recipe.yaml"
        )
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("teacher", ["retinanet_resnet5O", "no/such/file.pt"])
def test_a_teacher_that_is_nowhere_is_refused(teacher: str, tiny_coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match=r"no teacher checkpoint|no such file"):
        initialize(tiny_coco, teacher=teacher, output=tmp_path / "recipe.yaml")


def test_an_existing_recipe_is_replaced_only_if_asked(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    output = tmp_path / "recipe.yaml"
    output.write_text("mine")
    with pytest.raises(DrkdError, match="exists already"):
        initialize(tiny_coco, teacher=str(tiny_detector), output=output)
    assert output.read_text() == "mine"
    initialize(tiny_coco, teacher=str(tiny_detector), output=output, overwrite=True)
    assert "student:" in output.read_text()


def test_data_without_a_split_to_train_or_validate_on_is_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    (root / "annotations" / "instances_val.json").unlink()
    with pytest.raises(DrkdError, match="no split to validate on"):
        look_at_data(root)
    with pytest.raises(DrkdError, match="no such folder"):
        look_at_data(tmp_path / "nowhere")


def _facts(long: int, short: int, box: float) -> DataFacts:
    return DataFacts("train", 100, "val", 10, ("cat",), 500, short, long, (box / 2, box, 2 * box))


@pytest.mark.parametrize(
    ("facts", "size", "parts"),
    [
        (_facts(4000, 3000, 40.0), (800, 1333), ("reduced from 3000 px", "half of your boxes are then below 11 px")),
        (_facts(2000, 1200, 300.0), (800, 1334), ("reduced from 1200 px", "below 200 px")),
        (_facts(16000, 200, 60.0), (192, 2000), ("capped at 2000 px", "reduced from 16000 px", "below 8 px")),
    ],
)
def test_a_size_that_makes_boxes_small_is_said(facts: DataFacts, size: tuple[int, int], parts: tuple[str, ...]) -> None:
    found = _image_size(facts, None)
    assert (found.short, found.long) == size
    assert "about what your images have" not in found.reason or "capped" in found.reason
    for part in parts:
        assert part in found.reason and part in found.finding
    assert ("consider tiles" in found.finding) is (facts.box_sides[1] < 100)


def test_a_size_that_leaves_boxes_as_they_are_is_no_finding() -> None:
    for facts in (_facts(640, 480, 60.0), _facts(640, 480, 10.0), _facts(1333, 800, 20.0)):
        assert not _image_size(facts, None).finding


def test_large_images_are_said_on_the_terminal_and_in_the_recipe(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}.json"
        document = json.loads(file.read_text())
        for entry in document["images"]:
            entry["width"], entry["height"] = 4000, 3000
        file.write_text(json.dumps(document))
    written = initialize(root, output=tmp_path / "recipe.yaml")
    (said,) = (line for line in written.findings if line.startswith("image size: "))
    assert "reduced from 3000 px" in said and "consider tiles" in said
    assert "reduced from 3000 px; half of your boxes" in written.recipe.read_text()
    assert load_recipe([written.recipe]).data.image_settings["min_size"] == 800


def test_trainval_is_trained_on_where_there_is_no_train(tiny_coco: Path, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    convert(tiny_coco, root, to="voc")
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    # Its images are in trainval too.
    with pytest.raises(DrkdError, match="no split to validate on; expected tune or test beside trainval"):
        look_at_data(root)
    (lists / "val.txt").rename(lists / "test.txt")
    written = initialize(root, output=tmp_path / "recipe.yaml")
    content = yaml.safe_load(written.recipe.read_text())["data"]
    assert (content["train_split"], content["val_split"]) == ("trainval", "test")
    recipe = load_recipe([written.recipe])
    recipe.data.setup("fit")
    assert len(recipe.data.train_split) == 6


def test_a_folder_of_two_formats_is_read_and_named_as_the_user_says(tiny_detector: Path, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    (root / "data.yaml").write_text("train: train\nval: val\nnames: [x]\n")
    output = tmp_path / "recipe.yaml"
    with pytest.raises(DrkdError, match=r"several formats \(coco, yolo\)"):
        initialize(root, teacher=str(tiny_detector), output=output)
    assert main(["init", str(root), "--teacher", str(tiny_detector), "--output", str(output), "--format=coco"]) == 0
    assert yaml.safe_load(output.read_text())["data"]["format"] == "coco"
    recipe = load_recipe([output])
    recipe.data.setup("fit")
    assert recipe.data.class_names == ("cat", "dog")


def test_the_format_is_not_named_where_it_was_not_given(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    initialize(tiny_coco, teacher=str(tiny_detector), output=tmp_path / "recipe.yaml")
    assert "format" not in yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]


def test_a_teacher_of_mmdetection_is_recognised(tiny_coco: Path, tmp_path: Path) -> None:
    names = {"conv1.weight": (64, 3, 7, 7)}
    names |= {f"bn1.{kind}": (64,) for kind in ("weight", "bias", "running_mean", "running_var")}
    model = resnet18()
    names |= {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith("layer")}
    state = {f"backbone.{name}": torch.ones(shape) for name, shape in names.items()}
    for index, width in enumerate((64, 128, 256, 512)):
        for part, shape in (("lateral_convs", (16, width, 1, 1)), ("fpn_convs", (16, 16, 3, 3))):
            state[f"neck.{part}.{index}.conv.weight"] = torch.zeros(shape)
            state[f"neck.{part}.{index}.conv.bias"] = torch.zeros(16)
    torch.save({"state_dict": {**state, "roi_head.bbox_head.0.fc_cls.weight": torch.zeros(3, 4)}}, tmp_path / "a.pth")
    written = initialize(tiny_coco, teacher=str(tmp_path / "a.pth"), output=tmp_path / "recipe.yaml")
    content = yaml.safe_load(written.recipe.read_text())
    assert content["teacher"]["class_path"] == "drkd.adapters.MMDetectionBuilder"
    # The heads of a cascade cannot be read.
    assert content["teacher"]["init_args"] == {"path": str(tmp_path / "a.pth"), "part": "features"}
    assert any("MMDetection" in line for line in written.findings)
    assert load_recipe([written.recipe]).teacher is not None


def test_a_folder_called_as_the_embedded_data_is_named_as_a_folder(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").symlink_to(tiny_coco, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    written = initialize(Path("digits"), output=tmp_path / "recipe.yaml")
    assert yaml.safe_load(written.recipe.read_text())["data"]["root"] == "./digits"
    assert load_recipe([written.recipe]).data.class_names == TINY_CLASSES


def test_a_leading_tilde_is_the_home_folder(tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(tiny_coco, target_is_directory=True)
    recipe = load_recipe(["digits/retinanet"], ["--data.root=~/data", "--output=~/run", "--teacher.path=~/teacher.pt"])
    assert recipe.output == tmp_path / "run" and recipe.data.root == tmp_path / "data"
    assert f"path: {tmp_path}/teacher.pt" in recipe.resolved
