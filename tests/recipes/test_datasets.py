"""The data verbs on the command line, and evaluation on some of a data set's classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tests.conftest import write_coco

from drkd.cli import main
from drkd.contracts import DrkdError
from drkd.data.digits import EMBEDDED
from drkd.recipes.datasets import convert_dataset
from drkd.recipes.evaluation import evaluate


@pytest.mark.parametrize("to", ["yolo", "voc"])
def test_convert_and_check(
    to: str, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "convert", str(tiny_coco), "new", "--to", to, "--images", "link", "--classes=[dog]"]) == 0
    said = capsys.readouterr().out
    assert "train: 6 images, 6 boxes" in said and "boxes of other classes than dog" in said
    assert main(["data", "check", "new", "--format", to]) == 0
    said = capsys.readouterr().out
    assert f"train ({to.upper()}): 6 images" in said and "dog 6" in said and (tmp_path / "drkd-samples.png").is_file()
    assert main(["data", "convert", str(tiny_coco), "new", "--to", to]) == 2
    assert "exists already" in capsys.readouterr().err


def test_check_decodes_as_many_as_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = write_coco(tmp_path / "coco")
    file = root / "train" / "6.png"
    Image.effect_noise((96, 64), 60).save(file, format="JPEG")
    file.write_bytes(file.read_bytes()[:1500])
    assert main(["data", "check", str(root), "--decode", "0"]) == 0
    assert "decoded 0 of 6 images" in capsys.readouterr().out
    assert main(["data", "check", str(root), "--decode", "all"]) == 2
    assert "6.png: the image cannot be decoded" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "check", str(root), "--picture", str(root / "train" / "1.png")]) == 2
    assert "is not replaced" in " ".join(capsys.readouterr().err.split())


def test_both_embedded_sets_can_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRKD_CACHE", str(tmp_path / "cache"))
    for count, name in enumerate(["digits", "digits2"], start=3):
        monkeypatch.setitem(EMBEDDED, name, replace(EMBEDDED[name], train=count, tune=1, val=2))
        assert convert_dataset(Path(name), tmp_path / f"new-{name}", to="yolo").images["train"] == count
    # A folder of that name is the user's own.
    write_coco(tmp_path / "digits2", classes=("cat", "dog"))
    assert set(convert_dataset(Path("digits2"), tmp_path / "own", to="voc").boxes) == {"train", "val"}


def test_some_of_the_classes_can_be_evaluated(tmp_path: Path, tiny_detector: Path) -> None:
    data = write_coco(tmp_path / "data", classes=("cat", "dog", "owl"))
    with pytest.raises(DrkdError, match="'owl' not among the expected 2 classes"):
        evaluate(tiny_detector, data=str(data), device="cpu", workers=0)
    found = evaluate(tiny_detector, data=str(data), classes=["dog"], device="cpu", workers=0)
    assert set(found.metrics["per_class"]) == {"cat", "dog"} and found.metrics["per_class"]["cat"] is None
