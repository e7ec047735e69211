"""YOLOs in files: drkd's own, plain Ultralytics without drkd, Ultralytics' checkpoints, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.adapters.yolos import CLASSES, build_yolo, lively

from drkd.adapters import (
    SavedDetectorBuilder,
    UltralyticsBuilder,
    load_detector,
    save_student,
    wrap_ultralytics,
)
from drkd.adapters.checkpoint import read_preprocessing
from drkd.adapters.ultralytics_checkpoint import save_ultralytics
from drkd.adapters.ultralytics_files import is_ultralytics_file
from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.contracts import BoxTargets, DetectionBatch, DrkdError

pytest.importorskip("ultralytics")

SETTINGS = {"min_size": 64, "max_size": 64, "size_divisor": 32}


class Payload:
    """Touches a folder when it is unpickled, and has Ultralytics' name in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def build(name="yolo11n.yaml", **options):
    return lively(build_yolo(name, score_threshold=0.2, **options))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "student.pt"
    save_student(path, build(), builder=UltralyticsBuilder(), image_settings=SETTINGS)
    return path


@pytest.fixture
def native(tmp_path):
    path = tmp_path / "native.pt"
    save_ultralytics(path, build(), image_size=64)
    return path


@pytest.fixture
def pixels():
    """(64, 96, 3) uint8, BGR, as Ultralytics takes images that OpenCV read; and the same as a batch."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(256, (64, 96, 3), dtype=torch.uint8, generator=generator)
    ours = image.flip(2).permute(2, 0, 1).float() / 255
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    return image.numpy(), DetectionBatch(ours[None], ((64, 96),), ((64, 96),), (nothing,), (0,))


def same(first, second):
    for ours, theirs in zip(first, second, strict=True):
        assert len(ours.boxes) > 3
        assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo26n.yaml"])
def test_a_saved_yolo_comes_back(name, make_batch, tmp_path):
    detector = build(name, nms_threshold=0.5, detections_per_image=20, several_labels=False)
    path = tmp_path / "folder" / "student.pt"
    save_student(path, detector, builder=None, image_settings={**SETTINGS, "min_size": [48, 64]}, extra={"seed": 1})
    loaded = load_detector(path)
    assert loaded.spec == detector.spec and not loaded.training and loaded.nms_threshold == 0.5
    assert read_preprocessing(path)["min_size"] == 64
    batch = make_batch([(64, 64), (40, 50)])
    same(detector.detect(batch), loaded.detect(batch))
    turned = SavedDetectorBuilder(str(path)).build(("cup", "cat", "dog")).eval()
    assert turned.label_ids == (2, 0, 1)
    assert torch.equal(turned.detect(batch)[0].labels, (detector.detect(batch)[0].labels + 1) % 3)
    assert [file.name for file in path.parent.iterdir()] == ["student.pt"]


def test_five_lines_of_plain_ultralytics_load_it(saved, pixels):
    content = torch.load(saved, weights_only=True)
    assert len(content["code"].split("\n\n")[1].strip().splitlines()) == 5
    batch = pixels[1]
    torch.save(batch.images, saved.parent / "images.pt")
    script = """
import os, sys
sys.modules["drkd"] = None
import torch
names = {}
exec(torch.load("student.pt", weights_only=True)["code"], names)
with torch.no_grad():
    found = names["model"](torch.load("images.pt", weights_only=True))[0]
torch.save({"found": found, "names": names["model"].names}, "found.pt")
"""
    environment = {
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "YOLO_OFFLINE": "true",
        "YOLO_CONFIG_DIR": str(saved.parent / "settings"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=saved.parent, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    plain = torch.load(saved.parent / "found.pt", weights_only=True)
    with torch.no_grad():
        ours = load_detector(saved).model(batch.images)[0]
    assert plain["names"] == dict(enumerate(CLASSES))
    torch.testing.assert_close(plain["found"], ours, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["yolo11n.yaml", "yolo26n.yaml"])
def test_ultralytics_loads_what_drkd_exports_and_detects_the_same(name, pixels, tmp_path):
    detector = build(name, several_labels=False)
    before = {key: value.clone() for key, value in detector.model.state_dict().items()}
    path = tmp_path / "native.pt"
    save_ultralytics(path, detector, image_size=96)
    model = ultralytics_module("models").YOLO(path)
    assert model.names == dict(enumerate(CLASSES)) and model.task == "detect"
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    image, batch = pixels
    # Ultralytics reads the size from the checkpoint; the image's long side has it already.
    (result,) = model.predict(image, conf=0.2, iou=0.7, verbose=False, save=False, rect=True)
    (ours,) = detector.detect(batch)
    assert len(ours.boxes) > 3
    torch.testing.assert_close(result.boxes.xyxy, ours.boxes, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(result.boxes.conf, ours.scores, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.boxes.cls.long(), ours.labels)


def test_ultralytics_exports_it_to_onnx(native, pixels):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    written = (
        ultralytics_module("models").YOLO(native).export(format="onnx", imgsz=(64, 96), simplify=False, verbose=False)
    )
    session = runtime.InferenceSession(written, providers=["CPUExecutionProvider"])
    batch = pixels[1]
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.images.numpy()})
    with torch.no_grad():
        expected = build().model(batch.images)[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-2)


def test_half_precision_halves_the_checkpoint(native, tmp_path):
    save_ultralytics(tmp_path / "half.pt", build(), half=True)
    assert (tmp_path / "half.pt").stat().st_size < 0.6 * native.stat().st_size
    assert ultralytics_module("models").YOLO(tmp_path / "half.pt").model.names[2] == "cup"


def test_a_pickle_is_never_loaded_without_being_trusted(native, tmp_path):
    assert is_ultralytics_file(native)
    for load in (
        load_detector,
        lambda path: SavedDetectorBuilder(str(path)).build(CLASSES),
        lambda path: UltralyticsBuilder(weights=str(path)).build(CLASSES),
    ):
        with pytest.raises(DrkdError, match=r"native.pt: not loaded.*drkd yolo import .*native.pt --trust-pickle"):
            load(native)
    target = tmp_path / "made_by_the_checkpoint"
    torch.save({"model": Payload(target), "note": "ultralytics"}, tmp_path / "evil.pt")
    with pytest.raises(DrkdError, match="not loaded"):
        UltralyticsBuilder(weights=str(tmp_path / "evil.pt")).build(CLASSES)
    assert not target.exists()


def test_a_trusted_pickle_is_loaded_with_a_warning(native, make_batch):
    batch = make_batch([(64, 64), (40, 50)])
    builder = UltralyticsBuilder(weights=str(native), trust_pickle=True, head="own", score_threshold=0.2)
    with pytest.warns(UserWarning, match="loading it runs the code in it, because you said to trust it"):
        detector = builder.build(CLASSES).eval()
    same(build().detect(batch), detector.detect(batch))
    assert any(parameter.requires_grad for parameter in detector.parameters())
    with pytest.raises(DrkdError, match=r"no such checkpoint file. drkd does not download"):
        UltralyticsBuilder(weights="yolo11n.pt", trust_pickle=True).build(CLASSES)


def test_a_live_yolo_object_needs_no_trust(native, make_batch):
    model = ultralytics_module("models").YOLO(native)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    detector = wrap_ultralytics(model, score_threshold=0.2).eval()
    assert detector.spec.class_names == CLASSES and detector.model is model.model
    trained = {name for name, parameter in detector.model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(list(detector.model.parameters())) - 1 and not any(".dfl." in name for name in trained)
    batch = make_batch([(64, 64)])
    same(build().detect(batch), detector.detect(batch))


def test_a_fused_model_detects_but_is_not_saved(native, tmp_path):
    model = ultralytics_module("models").YOLO(native)
    model.fuse(verbose=False)
    with pytest.raises(DrkdError, match="fused for inference"):
        save_student(tmp_path / "fused.pt", wrap_ultralytics(model), builder=None, image_settings=SETTINGS)


def test_other_classes_get_a_new_head_and_keep_the_rest(saved):
    detector = UltralyticsBuilder(weights=str(saved)).build(("dog", "bus"))
    assert detector.spec.class_names == ("dog", "bus") and not detector.missing_classes
    old, new = load_detector(saved).model.state_dict(), detector.model.state_dict()
    last = "model.23.cv3.0.2.bias"
    assert all(
        torch.equal(value, old[name])
        for name, value in new.items()
        if not name[:-2].endswith((".2.weig", ".2.bi")) or "cv2" in name
    )
    # A class that both know keeps its output; another starts afresh.
    assert torch.equal(new[last][0], old[last][1]) and not torch.equal(new[last][1], old[last][1])
    own = UltralyticsBuilder(weights=str(saved), head="own").build(("dog", "bus"))
    assert own.missing_classes == ("bus",) and own.label_ids == (1, -1)


def test_a_teacher_of_classes_that_its_weights_lack_is_refused(saved, tmp_path):
    builder = UltralyticsBuilder(weights=str(saved))
    with pytest.raises(DrkdError, match=r"student.pt: .* would be new for bus, .* knows 3 classes \(cat, dog, cup\)"):
        builder.build_teacher(("dog", "bus"))
    fewer = builder.build_teacher(("cup", "cat")).model.state_dict()["model.23.cv3.0.2.bias"]
    assert torch.equal(fewer, load_detector(saved).model.state_dict()["model.23.cv3.0.2.bias"][[2, 0]])
    assert UltralyticsBuilder(weights=str(saved), head="own").build_teacher(("dog", "bus")).label_ids == (1, -1)
    torch.save(build().model.state_dict(), tmp_path / "bare.pt")
    UltralyticsBuilder(weights=str(tmp_path / "bare.pt")).build_teacher(CLASSES)
    # Without weights nothing is asked of them, as of every builder.
    assert UltralyticsBuilder().build_teacher(("dog",)).spec.class_names == ("dog",)


def test_a_bare_state_dict_needs_the_name_of_its_model(tmp_path):
    detector = build()
    path = tmp_path / "state.pt"
    torch.save(detector.model.state_dict(), path)
    loaded = UltralyticsBuilder(model="yolo11n.yaml", weights=str(path)).build(CLASSES)
    assert all(
        torch.equal(value, detector.model.state_dict()[name]) for name, value in loaded.model.state_dict().items()
    )
    with pytest.raises(DrkdError, match="weights are those of another model") as caught:
        UltralyticsBuilder(model="yolo11s.yaml", weights=str(path)).build(CLASSES)
    assert str(path) in str(caught.value)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(DrkdError, match="no class branch"):
        UltralyticsBuilder(weights=str(path)).build(CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone": [[-1, 1, "torch_safe_load", ["evil.pt"]]]},
            "expected layers of Ultralytics or torch.nn, got 'torch_safe_load'",
        ),
        ({"backbone": [[-1, 1, "check_requirements", ["evil"]]]}, "got 'check_requirements'"),
        ({"backbone": [[-1, 1, "TorchVision", [512, "resnet18", "DEFAULT"]]]}, "got 'TorchVision'"),
        ({"backbone": [[-1, 1, "nn.init", []]]}, "got 'nn.init'"),
        ({"backbone": "Conv"}, "expected backbone and head as lists"),
        ({"activation": "__import__('os').mkdir('made')"}, "expected the like of 'nn.SiLU"),
        ({"activation": "nn.SiLU() or __import__('os').mkdir('made')"}, "expected the like of 'nn.SiLU"),
    ],
)
def test_a_file_cannot_have_code_of_its_choice_called(change, message, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = torch.load(saved, weights_only=True)
    content["build"]["yaml"].update(change)
    torch.save(content, saved)
    with pytest.raises(DrkdError, match=message) as caught:
        load_detector(saved)
    assert str(saved) in str(caught.value) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["yaml", "names", "options"])
def test_a_file_that_lacks_a_part_says_so(name, saved):
    content = torch.load(saved, weights_only=True)
    del content["build"][name]
    torch.save(content, saved)
    with pytest.raises(DrkdError, match=f"student.pt: this file of a YOLO lacks {name}"):
        load_detector(saved)


def test_models_that_there_are_not():
    with pytest.raises(DrkdError, match=r"there is no yolo99n.yaml. Expected a path, or a model"):
        UltralyticsBuilder(model="yolo99n.yaml").build(CLASSES)
    for name in ("https://example.com/yolo11n.yaml", "yolo11n.pt"):
        with pytest.raises(DrkdError, match=r"expected the name or path of a YAML file, such as yolo11n.yaml"):
            UltralyticsBuilder(model=name).build(CLASSES)
    with pytest.raises(DrkdError, match="expected a detection model"):
        UltralyticsBuilder(model="yolo11n-seg.yaml").build(CLASSES)
    with pytest.raises(DrkdError, match="head: own keeps the classes of the weights, and there are none"):
        UltralyticsBuilder(head="own")


def test_the_export_wants_a_name_that_ultralytics_takes(tmp_path):
    with pytest.raises(DrkdError, match=r"names end in .pt"):
        save_ultralytics(tmp_path / "native.bin", build())
