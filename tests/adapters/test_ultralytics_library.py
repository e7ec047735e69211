"""Ultralytics behind drkd keeps to itself: no socket, no file in the user's folders, nothing of the process changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import drkd
from drkd.adapters import UltralyticsBuilder
from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.contracts import DrkdError

ROOT = Path(drkd.__file__).parents[1]

# Says at the end which sockets and installations were asked for, and what differs in the process.
_WATCH = """
import json, os, sys
asked = []
def watch(event, arguments):
    command = " ".join(map(str, arguments[1])) if event == "subprocess.Popen" else str(arguments)
    if event.startswith("socket.") or (event in ("subprocess.Popen", "os.system") and "install" in command):
        asked.append(event)
sys.addaudithook(watch)
import torch, numpy, PIL.Image, drkd.adapters
early = "ultralytics" in sys.modules
before = dict(os.environ), torch.save, PIL.Image.open, numpy.get_printoptions()
{body}
after = dict(os.environ), torch.save, PIL.Image.open, numpy.get_printoptions()
print("\\n" + json.dumps({{"asked": asked, "same": [a == b for a, b in zip(before, after)], "found": found}}))
"""
_USE = """
from drkd.adapters import UltralyticsBuilder, load_detector, save_student
from drkd.adapters.ultralytics_checkpoint import save_ultralytics
from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.contracts import DetectionBatch
detector = UltralyticsBuilder(model="yolo11n.yaml").build(["cat", "dog"])
target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
batch = DetectionBatch.from_lists([torch.rand(3, 64, 64)], [target])
sum(detector(batch, want=frozenset({"features", "losses"})).losses.values()).backward()
detector.eval().detect(batch)
save_student("student.pt", detector, builder=None, image_settings={"min_size": 64, "max_size": 64, "size_divisor": 32})
save_ultralytics("native.pt", load_detector("student.pt"), image_size=64)
utils = ultralytics_module("utils")
found = [early, dict(utils.SETTINGS)["sync"], utils.ONLINE, ultralytics_module("utils.events").events.enabled]
"""
_PLAIN = """
import ultralytics
found = []
"""

_SETTINGS = """
from drkd.adapters.ultralytics_library import ultralytics_module
found = ultralytics_module("utils").SETTINGS["sync"]
"""


def run(body: str, folder: Path, **environment: str) -> dict:
    """Run a script with a home and a temporary folder of its own."""
    for name in ("home", "temporary", "here"):
        (folder / name).mkdir()
    own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary"), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", _WATCH.format(body=body)],
        cwd=folder / "here",
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **own},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.strip().splitlines()
    return {**json.loads(last), "said": "".join(said).strip()}


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_nothing_leaves_and_nothing_stays(tmp_path):
    pytest.importorskip("ultralytics")
    seen = run(_USE, tmp_path)
    assert seen["asked"] == []
    assert seen["found"] == [False, False, False, False]
    assert seen["same"] == [True, True, True, True]
    assert seen["said"] == ""
    assert files(tmp_path / "home") == [] and files(tmp_path / "temporary") == []
    assert files(tmp_path / "here") == ["native.pt", "student.pt"]


def test_the_check_above_can_fail(tmp_path):
    pytest.importorskip("ultralytics")
    seen = run(_PLAIN, tmp_path, OMP_NUM_THREADS="")
    assert "socket.getaddrinfo" in seen["asked"]
    assert seen["same"] == [False, False, False, False]
    assert files(tmp_path / "home") == [".config/Ultralytics/settings.json"]


def test_a_settings_folder_that_the_user_names_is_the_users(tmp_path):
    pytest.importorskip("ultralytics")
    seen = run(_SETTINGS, tmp_path, YOLO_CONFIG_DIR=str(tmp_path / "mine"))
    assert seen["asked"] == [] and seen["found"] is True
    assert files(tmp_path / "mine") == ["Ultralytics/settings.json"]


def test_drkd_imports_it_in_one_place():
    importing = [
        path.name
        for path in (ROOT / "drkd").rglob("*.py")
        if any(
            line.lstrip().startswith(("import ultralytics", "from ultralytics ", "from ultralytics."))
            for line in path.read_text(encoding="utf-8").splitlines()
        )
        or 'import_module(f"ultralytics' in path.read_text(encoding="utf-8")
    ]
    # One imports it; the other quotes, as text, what a user may run without drkd.
    assert sorted(importing) == ["ultralytics_checkpoint.py", "ultralytics_library.py"]


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        """Finds no Ultralytics, as in an environment without it."""

        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "ultralytics":
                raise ModuleNotFoundError(f"No module named {name!r}", name="ultralytics")

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(DrkdError, match=r"pip install 'drkd\[ultralytics\]' \(its licence is AGPL-3.0\)") as caught:
        UltralyticsBuilder().build(["cat"])
    assert "\n" not in str(caught.value)


def test_opencv_without_its_system_libraries(monkeypatch):
    # Another test of the same process may have imported it.
    for name in [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, name)

    def fail(name):
        raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("drkd.adapters.ultralytics_library.importlib.import_module", fail)
    with pytest.raises(DrkdError, match=r"cannot be imported \(libGL.so.1.*pip install opencv-python-headless"):
        ultralytics_module("nn.tasks")
