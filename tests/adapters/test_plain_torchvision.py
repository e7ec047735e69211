"""A student's file loads into torchvision where drkd cannot be imported, and detects the same."""

from __future__ import annotations

import subprocess
import sys

import torch

from drkd.adapters import FasterRCNNBuilder, FCOSBuilder, RetinaNetBuilder, save_student
from drkd.adapters.plain_code import write_plain_code

CLASSES = ("cat", "dog", "cup")
BACKBONES = {"torchvision": "resnet18", "timm": "timm/resnet10t"}

# Run without drkd: executes the lines that each file carries, then detects in one image.
SCRIPT = """
import os, sys
sys.modules["drkd"] = None
import torch
for folder in sorted(os.listdir()):
    os.chdir(folder)
    names = {}
    exec(torch.load("student.pt", weights_only=True)["code"], names)
    with torch.no_grad():
        torch.save(names["model"](list(torch.load("images.pt"))), "found.pt")
    os.chdir("..")
try:
    import drkd
except ImportError:
    print("drkd was never there")
"""


def _builders():
    shared = {"fpn_channels": 64, "score_threshold": 0.0, "detections_per_image": 20}
    for name, backbone in BACKBONES.items():
        yield f"{name}-retinanet", RetinaNetBuilder(backbone=backbone, **shared)
        yield f"{name}-fcos", FCOSBuilder(backbone=backbone, num_convs=2, **shared)
        yield f"{name}-faster_rcnn", FasterRCNNBuilder(backbone=backbone, representation_size=32, **shared)
    yield "few-levels", RetinaNetBuilder(backbone="timm/tf_efficientnet_lite0", extra="none", **shared)
    yield "width", RetinaNetBuilder(backbone="resnet18", width=0.5, norm="frozen", head_norm="group", **shared)


def test_every_family_and_backbone(make_batch, tmp_path):
    batch = make_batch([(64, 64)])
    ours = {}
    for name, builder in _builders():
        detector = builder.build(CLASSES).eval()
        settings = {"min_size": 64, "max_size": 64, "size_divisor": 32}
        save_student(tmp_path / name / "student.pt", detector, builder=builder, image_settings=settings)
        torch.save(batch.images, tmp_path / name / "images.pt")
        ours[name] = detector
        # Imports, then eight lines.
        assert len(write_plain_code(detector.plan).split("\n\n")[1].strip().splitlines()) == 8
    environment = {"PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "drkd was never there"
    for name, detector in ours.items():
        offset = 1 if detector.spec.family == "faster_rcnn" else 0
        plain = torch.load(tmp_path / name / "found.pt", weights_only=True)
        for mine, theirs in zip(detector.detect(batch), plain, strict=True):
            assert len(mine.boxes) > 0, name
            torch.testing.assert_close(mine.boxes, theirs["boxes"], atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(mine.scores, theirs["scores"], atol=1e-6, rtol=1e-5)
            assert torch.equal(mine.labels, theirs["labels"] - offset), name
