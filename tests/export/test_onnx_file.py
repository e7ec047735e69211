"""Files as onnxruntime runs them, and the whole verb on a tiny detector."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.conftest import write_coco
from tests.export.test_graph import BUILDERS, make_batch, make_detector

from drkd import cli
from drkd.adapters import TorchvisionDetector, save_student
from drkd.contracts import Detections, DrkdError
from drkd.export import onnx_file
from drkd.export.agreement import Agreement, compare
from drkd.export.onnx_detector import OnnxDetector
from drkd.export.onnx_file import ImageSize, write_onnx
from drkd.recipes import exporting

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIZE = ImageSize(64, 96, 32)


def _agreement(detector: Any, found: OnnxDetector, *shapes: tuple[int, int, int]) -> Agreement:
    agreement = Agreement()
    for shape in shapes:
        batch = make_batch(*shape)
        for expected, other in zip(detector.detect(batch), found.detect(batch), strict=True):
            compare(
                agreement,
                expected,
                other,
                name=str(shape),
                class_names=detector.spec.class_names,
                score_threshold=0.02,
                nms_threshold=0.5,
                most=100,
            )
    return agreement


@pytest.mark.parametrize(
    ("family", "nms", "dynamic", "shapes"),
    [
        ("faster_rcnn", True, "none", [(2, 96, 96)]),
        pytest.param("fcos", False, "batch", [(1, 96, 96), (3, 96, 96)], marks=pytest.mark.slow),
        pytest.param("retinanet", True, "all", [(2, 64, 96), (1, 128, 64)], marks=pytest.mark.slow),
        pytest.param("faster_rcnn", True, "all", [(2, 64, 96), (1, 128, 64)], marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_finds_what_pytorch_finds(
    family: str, nms: bool, dynamic: Any, shapes: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    detector = make_detector(family)
    path = tmp_path / "student.onnx"
    write_onnx(detector, path, nms=nms, dynamic=dynamic, image_size=SIZE)
    found = OnnxDetector(path)
    assert found.spec.class_names == ("cat", "dog", "owl") and found.spec.family == family
    preprocessing = json.loads(found.metadata["preprocessing"])
    assert preprocessing["color"] == "RGB" and preprocessing["min_size"] == 64
    agreement = _agreement(detector, found, *shapes)
    assert agreement.good and agreement.ties == 0, agreement.mismatches


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved detector whose untrained scores differ, unlike a RetinaNet's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("student") / "student.pt"
    builder = BUILDERS["faster_rcnn"]
    settings = {"min_size": 64, "max_size": 96, "size_divisor": 32}
    save_student(path, builder.build(("cat", "dog")), builder=builder, image_settings=settings)
    return path


@pytest.fixture(scope="module")
def shipped(tiny_coco: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verb's output folder: fp32, int8 and report of the tiny detector."""
    folder = tmp_path_factory.mktemp("shipped")
    code = cli.main(
        [
            *("export", str(student), "--output", str(folder / "tiny.onnx"), "--dynamic=none", "--repeats=2"),
            *(f"--images={tiny_coco / 'val'}", "--image_limit=2"),
            *("--int8", f"--calibration={tiny_coco}", "--calibration_images=2", "--evaluation_images=2"),
        ]
    )
    assert code == 0
    return folder


def test_the_verb_leaves_both_files_and_a_report(shipped: Path) -> None:
    assert {path.name for path in shipped.iterdir()} == {"tiny.onnx", "tiny.int8.onnx", "tiny.onnx.json"}
    report = json.loads((shipped / "tiny.onnx.json").read_text())
    assert report["agreement"]["matched"] > 0 and report["agreement"]["mismatches"] == []
    assert report["agreement"]["worst_box_px"] <= report["agreement"]["bounds"]["box_px"]
    assert report["latency"]["onnxruntime_ms"] > 0 and report["latency"]["pytorch_ms"] > 0
    small = report["int8"]
    assert small["bytes"] < report["bytes"] and small["calibration"]["images"] == 2
    assert small["ap_cost"] == pytest.approx(small["metrics"]["fp32"]["ap"] - small["metrics"]["int8"]["ap"])


def test_the_pages_example_shows_the_image_as_the_check_does(
    shipped: Path, tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    example = page.split("## Use it without drkd")[1].split("```python\n")[1].split("```")[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.open(tiny_coco / "val" / "1.png").save(tmp_path / "photo.jpg", exif=exif)
    (tmp_path / "birds.onnx").write_bytes((shipped / "tiny.onnx").read_bytes())
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example, found)
    (_, batch), *_ = exporting._read_images("photo.jpg", 1, SIZE, "none", tmp_path / "a.onnx")
    assert found["image"].size == (64, 96) and batch.sizes == ((found["height"], found["width"]),)
    # A JPEG decoded and resized by two libraries.
    assert torch.from_numpy(found["images"]).sub(batch.images).abs().mean() < 0.01


def test_the_embedded_images_are_the_default_beside_a_folder_of_their_name(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").mkdir()
    shutil.copy(tiny_coco / "val" / "1.png", tmp_path / "digits" / "mine.png")
    monkeypatch.chdir(tmp_path)
    assert inspect.signature(exporting.export).parameters["images"].default is None
    monkeypatch.setattr(exporting, "build_digits", lambda: tiny_coco)
    read = lambda source: next(exporting._read_images(source, 1, SIZE, "none", tmp_path / "a.onnx"))  # noqa: E731
    (own, _), (named, _) = read(None), read("./digits")
    assert Path(named).name == "mine.png" and Path(own).name != "mine.png"
    with pytest.raises(DrkdError, match=r"write '\./digits' for the folder, or leave it out for the embedded one"):
        read("digits")


def test_the_int8_file_is_quantised_and_detects(shipped: Path) -> None:
    import onnx

    operators = {node.op_type for node in onnx.load(shipped / "tiny.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    assert OnnxDetector(shipped / "tiny.int8.onnx").spec.class_names == ("cat", "dog")


def test_a_file_that_finds_something_else_is_an_error_and_is_not_kept(
    tiny_coco: Path, student: Path, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(x: float) -> Any:
        box = torch.tensor([[x, 5.0, x + 20.0, 25.0]])
        return lambda self, batch: [Detections(box, torch.tensor([0.9]), torch.tensor([1]))] * len(batch)

    def write_copy(detector: Any, path: Path, **_: Any) -> None:
        path.write_bytes((shipped / "tiny.onnx").read_bytes())

    monkeypatch.setattr(exporting, "write_onnx", write_copy)
    monkeypatch.setattr(TorchvisionDetector, "detect", find(10.0))
    monkeypatch.setattr(OnnxDetector, "detect", find(13.0))
    output = tmp_path / "wrong.onnx"
    with pytest.raises(
        DrkdError, match=r"does not find what PyTorch finds: of 3 .* 3 have no partner in it, and 3 of .*3.00 px away"
    ):
        exporting.export(student, output=output, images=str(tiny_coco / "val"), dynamic="none")
    assert list(tmp_path.iterdir()) == []


def test_near_ties_excuse_a_few_detections_only(
    tiny_coco: Path, student: Path, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_copy(detector: Any, path: Path, **_: Any) -> None:
        path.write_bytes((shipped / "tiny.onnx").read_bytes())

    # At the score threshold of 0.02, where rounding decides; the file finds none of them.
    boxes = torch.tensor([[5.0, 5.0, 25.0, 25.0], [30.0, 5.0, 50.0, 25.0], [60.0, 5.0, 80.0, 25.0]])
    found = Detections(boxes, torch.full((3,), 0.0205), torch.tensor([0, 1, 1]))
    nothing = Detections(boxes[:0], found.scores[:0], found.labels[:0])
    monkeypatch.setattr(exporting, "write_onnx", write_copy)
    monkeypatch.setattr(TorchvisionDetector, "detect", lambda self, batch: [found])
    monkeypatch.setattr(OnnxDetector, "detect", lambda self, batch: [nothing])
    with pytest.raises(DrkdError, match="near ties"):
        exporting.export(student, output=tmp_path / "a.onnx", images=str(tiny_coco / "val"), dynamic="none")
    assert list(tmp_path.iterdir()) == []


def test_calibration_data_of_two_formats_are_read_as_the_user_says(
    student: Path, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_copy(detector: Any, path: Path, **_: Any) -> None:
        path.write_bytes((shipped / "tiny.onnx").read_bytes())

    monkeypatch.setattr(exporting, "write_onnx", write_copy)
    data = write_coco(tmp_path / "coco")
    (data / "data.yaml").write_text("train: train\nval: val\nnames: [x]\n")
    told = ["export", str(student), f"--output={tmp_path / 'a.onnx'}", f"--images={data / 'val'}", "--image_limit=1"]
    told += ["--dynamic=none", "--repeats=1", "--int8", f"--calibration={data}", "--calibration_images=1"]
    assert cli.main([*told, "--evaluation_images=1"]) == 2
    assert cli.main([*told, "--evaluation_images=1", "--format=coco"]) == 0
    assert (tmp_path / "a.int8.onnx").is_file()


def test_a_student_of_some_classes_is_calibrated_and_scored_on_those(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "coco", classes=("cat", "owl", "dog"))

    def load(*names: str) -> Any:
        return exporting._Calibration(str(data), "auto", "val", 2, None, SIZE, "all").load(names)

    calibration, scored = load("dog", "cat")
    assert (calibration.val_split.name, len(calibration.val_split)) == ("train", 2)
    assert (scored.val_split.name, len(scored.val_split)) == ("val", 3)
    assert scored.val_split.class_names == ("dog", "cat")
    # Of two or three boxes an image, the second one is an owl.
    assert [record.labels.tolist() for record in scored.val_split.records] == [[1, 0], [1], [1, 0]]
    assert load("owl", "dog", "cat", "bat")[1].val_split.class_names == ("owl", "dog", "cat", "bat")
    # A class that the data lacks beside one that the student lacks: they may be one, and nothing is left out silently.
    with pytest.raises(DrkdError, match="the classes differ: its 'dog' not among"):
        load("cat", "owl", "hound")


@pytest.mark.parametrize(("change", "text"), [("--evaluation_split=tune", "no split 'tune'"), (None, "no such folder")])
def test_wrong_calibration_data_are_refused_before_anything_is_written(
    change: str | None,
    text: str,
    tiny_coco: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(exporting, "write_onnx", lambda *_, **__: pytest.fail("it was exported first"))
    told = [f"--calibration={tiny_coco}", change] if change else [f"--calibration={tmp_path / 'nowhere'}"]
    command = ["export", str(student), f"--output={tmp_path / 'a.onnx'}", f"--images={tiny_coco / 'val'}", "--int8"]
    assert cli.main([*command, *told]) == 2
    assert text in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_an_output_that_would_replace_an_input_is_refused(tiny_coco: Path, student: Path, tmp_path: Path) -> None:
    for name in ("student.pt", "a.onnx", "b.int8.onnx", "c.onnx.json"):
        (tmp_path / name).write_bytes(student.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for checkpoint, output, text in (
        ("student.pt", "student.pt", r"ends in \.onnx"),
        ("student.pt", "new", r"ends in \.onnx"),
        ("a.onnx", "a.onnx", "is read as an input"),
        ("b.int8.onnx", "b.onnx", "is read as an input"),
        ("c.onnx.json", "c.onnx", "is read as an input"),
    ):
        with pytest.raises(DrkdError, match=text):
            exporting.export(
                tmp_path / checkpoint,
                output=tmp_path / output,
                images=str(tiny_coco / "val"),
                int8=True,
                calibration=str(tiny_coco),
            )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_images_that_show_nothing_prove_nothing(
    tiny_coco: Path, student: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = OnnxDetector(shipped / "tiny.onnx")
    with pytest.raises(DrkdError, match="would prove nothing"):
        exporting.check(make_detector("retinanet"), found, [])


def test_int8_wants_data_and_missing_packages_are_named(
    tiny_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DrkdError, match="--calibration"):
        exporting.export(tiny_detector, output=tmp_path / "a.onnx", int8=True)
    with pytest.raises(DrkdError, match="repeats: expected at least 1, got 0"):
        exporting.export(tiny_detector, output=tmp_path / "a.onnx", repeats=0)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(DrkdError, match=r"drkd\[export\]"):
        onnx_file.require_onnx()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(DrkdError, match=r"foreign\.onnx"):
        OnnxDetector(path)


@pytest.mark.parametrize(("divisor", "expected"), [(1, 32), (32, 32), (48, 96), (64, 64)])
def test_sides_are_multiples_of_what_backbones_halve_five_times(divisor: int, expected: int) -> None:
    size = ImageSize(100, 100, divisor)
    assert size.multiple == expected and size.fixed[0] % 32 == 0 == size.fixed[0] % divisor
