"""Prediction draws on copies, writes COCO JSON, and goes on past an image that it cannot read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from drkd.cli import main
from drkd.contracts import DrkdError
from drkd.recipes import prediction
from drkd.recipes.prediction import find_images, predict


@pytest.fixture
def photos(tiny_coco: Path, tmp_path: Path) -> Path:
    """A folder with a sub-folder, images of three kinds, and a file that is none."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    picture = Image.open(tiny_coco / "val" / "1.png")
    picture.save(folder / "one.png")
    picture.save(folder / "deep" / "two.JPG", format="JPEG")
    picture.convert("L").save(folder / "three.bmp")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_folder_is_searched_and_every_image_drawn(photos: Path, tiny_detector: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    predicted = predict(tiny_detector, photos, output=tmp_path / "found", threshold=0.0, device="cpu")
    assert predicted.images == 3 and predicted.detections > 0 and not predicted.unreadable
    for name in ("one.png", "deep/two.JPG", "three.bmp.png"):
        assert Image.open(tmp_path / "found" / name).size == (96, 64)
    assert (tmp_path / "found" / "one.png").read_bytes() != (photos / "one.png").read_bytes()
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_the_json_is_coco_results_with_the_images_they_mean(photos: Path, tiny_detector: Path, tmp_path: Path) -> None:
    predicted = predict(tiny_detector, photos, output=tmp_path / "found", threshold=0.0, device="cpu")
    results = json.loads((tmp_path / "found" / "detections.json").read_text())
    listing = json.loads((tmp_path / "found" / "images.json").read_text())
    assert len(results) == predicted.detections
    assert {entry["file_name"] for entry in listing["images"]} == {"one.png", "deep/two.JPG", "three.bmp"}
    assert listing["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    images = {entry["id"]: entry for entry in listing["images"]}
    for entry in results:
        x, y, width, height = entry["bbox"]
        image = images[entry["image_id"]]
        assert x >= 0 and x + width <= image["width"] + 1e-3 and y >= 0 and y + height <= image["height"] + 1e-3
        assert entry["category_id"] in (1, 2) and 0 <= entry["score"] <= 1


def test_boxes_are_those_of_the_image_as_a_viewer_shows_it(
    tiny_coco: Path, tiny_detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.open(tiny_coco / "val" / "1.png").save(tmp_path / "turned.png", exif=exif)
    predict(tiny_detector, tmp_path / "turned.png", output=tmp_path / "found", threshold=0.0, device="cpu")
    (image,) = json.loads((tmp_path / "found" / "images.json").read_text())["images"]
    assert (image["width"], image["height"]) == (64, 96)
    # The help says so.
    assert main(["predict", "--help"]) == 0
    assert "px of the images as a viewer shows them, turned by EXIF" in " ".join(capsys.readouterr().out.split())


def test_the_threshold_leaves_out_what_is_below(photos: Path, tiny_detector: Path, tmp_path: Path) -> None:
    predicted = predict(tiny_detector, photos / "one.png", output=tmp_path / "found", threshold=1.0, device="cpu")
    assert (predicted.images, predicted.detections) == (1, 0)
    assert json.loads((tmp_path / "found" / "detections.json").read_text()) == []
    assert Image.open(tmp_path / "found" / "one.png").tobytes() == Image.open(photos / "one.png").tobytes()
    with pytest.raises(DrkdError, match="threshold"):
        predict(tiny_detector, photos, output=tmp_path / "other", threshold=1.5)


def test_an_unreadable_image_is_named_and_the_others_go_on(photos: Path, tiny_detector: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"no picture")
    predicted = predict(tiny_detector, photos, output=tmp_path / "found", device="cpu")
    assert predicted.images == 3
    assert len(predicted.unreadable) == 1 and "broken.jpg" in predicted.unreadable[0]


def test_inputs_are_never_overwritten(photos: Path, tiny_detector: Path) -> None:
    for path in (photos, photos / "one.png"):
        with pytest.raises(DrkdError, match="would overwrite an input"):
            predict(tiny_detector, path, output=photos, device="cpu")


def test_an_output_around_the_images_hides_none(tiny_detector: Path, photos: Path) -> None:
    around = photos.parent
    assert predict(tiny_detector, photos, output=around, device="cpu").images == 3
    assert all((around / name).is_file() for name in ("one.png", "deep/two.JPG", "three.bmp.png"))


def test_an_output_within_the_folder_is_not_predicted_on_again(
    photos: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    output = photos / "found"
    assert predict(tiny_detector, photos, output=output, device="cpu").images == 3
    with pytest.raises(DrkdError, match="already holds predictions"):
        predict(tiny_detector, photos, output=output, device="cpu")
    assert predict(tiny_detector, photos, output=output, device="cpu", overwrite=True).images == 3


def test_nothing_but_an_earlier_prediction_is_replaced(photos: Path, tiny_detector: Path, tmp_path: Path) -> None:
    crop, output = tmp_path / "one.png", tmp_path / "found"
    crop.write_bytes((photos / "one.png").read_bytes())
    original = (photos / "one.png").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(DrkdError, match=r"photos/one\.png: exists already, and no earlier prediction"):
            predict(tiny_detector, crop, output=photos, device="cpu", overwrite=overwrite)
        assert (photos / "one.png").read_bytes() == original and not (photos / "images.json").exists()
    predict(tiny_detector, photos, output=output, threshold=0.0, device="cpu")
    # A picture that the earlier prediction did not write.
    (output / "four.png").write_bytes(original)
    (photos / "four.png").write_bytes(original)
    with pytest.raises(DrkdError, match=r"found/four\.png: exists already"):
        predict(tiny_detector, photos, output=output, device="cpu", overwrite=True)
    assert (output / "four.png").read_bytes() == original
    (output / "four.png").unlink()
    assert predict(tiny_detector, photos, output=output, device="cpu", overwrite=True).images == 4
    # A name that leads out of the folder is none of ours.
    listing = json.loads((output / "images.json").read_text())
    listing["earlier_pictures"] = [str(tmp_path / "secret.png"), "../photos/one.png"]
    (output / "images.json").write_text(json.dumps(listing))
    # Of fewer images and then of all again: what the first left is still drkd's.
    assert predict(tiny_detector, crop, output=output, device="cpu", overwrite=True).images == 1
    assert json.loads((output / "images.json").read_text())["earlier_pictures"] == [
        "deep/two.JPG",
        "four.png",
        "three.bmp.png",
    ]
    assert predict(tiny_detector, photos, output=output, device="cpu", overwrite=True).images == 4
    assert "earlier_pictures" not in json.loads((output / "images.json").read_text())


def test_a_prediction_that_was_cut_short_may_be_repeated(
    photos: Path, tiny_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, drawn = prediction._draw, []

    def until_the_second(*arguments: Any) -> Any:
        drawn.append(arguments)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(prediction, "_draw", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        predict(tiny_detector, photos, output=tmp_path / "found", device="cpu")
    with pytest.raises(DrkdError, match="already holds predictions"):
        predict(tiny_detector, photos, output=tmp_path / "found", device="cpu")
    assert predict(tiny_detector, photos, output=tmp_path / "found", device="cpu", overwrite=True).images == 3
    # Cut short again, it leaves no detections whose ids the new list of images gives another meaning.
    drawn.clear()
    with pytest.raises(KeyboardInterrupt):
        predict(tiny_detector, photos / "deep", output=tmp_path / "found", device="cpu", overwrite=True)
        predict(tiny_detector, photos, output=tmp_path / "found", device="cpu", overwrite=True)
    assert (tmp_path / "found" / "images.json").is_file() and not (tmp_path / "found" / "detections.json").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("images.json", '{"images": [{"id": 1, "file_name": "one.png"}], "categories": []}'),
        ("images.json", "[1]"),
        ("images.json", '{"images": [{"picture": 7}], "categories": []}'),
        ("images.json", "no JSON"),
        ("detections.json", "[]"),
    ],
)
def test_a_json_file_of_somebody_else_is_not_replaced(
    name: str, text: str, photos: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    output = tmp_path / "found"
    output.mkdir()
    (output / name).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(DrkdError, match=f"found/{name}: exists already"):
            predict(tiny_detector, photos, output=output, device="cpu", overwrite=overwrite)
    assert (output / name).read_text() == text and len(list(output.iterdir())) == 1


def test_every_image_has_a_picture_of_its_own(photos: Path, tiny_detector: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(photos / "three.bmp.png")
    output = tmp_path / "found"
    assert predict(tiny_detector, photos, output=output, device="cpu").images == 4
    assert Image.open(output / "three.bmp.png").size == (50, 40)
    assert Image.open(output / "three.bmp.png.png").size == (96, 64)
    listing = json.loads((output / "images.json").read_text())
    pictures = {entry["file_name"]: entry["picture"] for entry in listing["images"]}
    assert pictures["three.bmp"] == "three.bmp.png.png" and pictures["deep/two.JPG"] == "deep/two.JPG"


def test_missing_and_empty_folders_are_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match="no such image or folder"):
        find_images(tmp_path / "nowhere", output=tmp_path / "found")
    with pytest.raises(DrkdError, match="no images found"):
        find_images(tmp_path, output=tmp_path / "found")


def test_an_output_that_is_a_file_is_refused(photos: Path, tiny_detector: Path) -> None:
    with pytest.raises(DrkdError, match="expected a folder"):
        predict(tiny_detector, photos / "one.png", output=photos / "notes.txt", device="cpu")


def test_category_ids_are_those_of_the_data_that_it_was_trained_on(
    photos: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    content = torch.load(tiny_detector, weights_only=True)
    content["extra"] = {"category_ids": {"dog": 18, "cat": 90, "owl": 3}}
    torch.save(content, tmp_path / "student.pt")
    predict(tmp_path / "student.pt", photos / "one.png", output=tmp_path / "found", threshold=0.0, device="cpu")
    predict(tiny_detector, photos / "one.png", output=tmp_path / "plain", threshold=0.0, device="cpu")
    listing = json.loads((tmp_path / "found" / "images.json").read_text())
    assert listing["categories"] == [{"id": 90, "name": "cat"}, {"id": 18, "name": "dog"}]
    ours, plain = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("found", "plain"))
    assert ours and [entry["category_id"] for entry in ours] == [{1: 90, 2: 18}[e["category_id"]] for e in plain]


def test_a_name_as_long_as_the_system_allows(photos: Path, tiny_detector: Path, tmp_path: Path) -> None:
    name = f"{'x' * 251}.png"
    (photos / "one.png").rename(photos / name)
    predicted = predict(tiny_detector, photos, output=tmp_path / "found", device="cpu")
    assert predicted.images == 3 and (tmp_path / "found" / name).exists()
    assert not list((tmp_path / "found").glob(".*"))
