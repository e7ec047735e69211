"""Imports Ultralytics without its side effects: no settings file of its own, no look at the network, no patches."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from drkd.contracts import DrkdError

# Read once, when Ultralytics is imported; whoever sets one of them means it.
_QUIET = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
_FOLDER = "YOLO_CONFIG_DIR"


def ultralytics_module(name: str) -> Any:
    """A module of Ultralytics, such as "nn.tasks".

    Where this is the first import of Ultralytics in the process, it neither asks the network whether it is online, nor
    sends usage data, nor installs packages, nor writes into the user's folders: its settings go to a private temporary
    folder, unless ``YOLO_CONFIG_DIR`` says where they belong; then they are the user's and stay as they are. What the
    import changes besides (environment variables, ``torch.save``, ``PIL.Image.open``, how numpy prints) is put back.

    Raises:
        DrkdError: If Ultralytics is not installed, or cannot be imported.
    """
    try:
        if "ultralytics" not in sys.modules:
            _import_quietly()
        if f"ultralytics.{name}" not in sys.modules:
            with _unchanged_process():
                importlib.import_module(f"ultralytics.{name}")
        return sys.modules[f"ultralytics.{name}"]
    except ImportError as error:
        raise DrkdError(_explain(error)) from error


def _import_quietly() -> None:
    with _unchanged_process():
        private = not os.environ.get(_FOLDER)
        if private:
            folder = tempfile.mkdtemp(prefix="drkd-ultralytics-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ[_FOLDER] = folder
        for key, value in _QUIET.items():
            os.environ.setdefault(key, value)
        settings = importlib.import_module("ultralytics.utils").SETTINGS
        if private:
            settings.update(sync=False)


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Put back the environment, ``torch.save``, ``PIL.Image.open``, numpy's printing and the threshold of logging."""
    environment, save, threshold = dict(os.environ), torch.save, logging.root.manager.disable
    open_image = Image.open
    # It reports that it made a settings file; ours is nobody's business.
    logging.disable(logging.INFO)
    try:
        with np.printoptions():
            yield
    finally:
        logging.disable(threshold)
        torch.save = save
        # Theirs would tell the user of a damaged file to install a library for HEIC.
        Image.open = open_image
        for key in set(os.environ) - set(environment):
            del os.environ[key]
        os.environ.update(environment)


def _explain(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "ultralytics":
        return (
            "YOLO models need Ultralytics, which is not installed: pip install 'drkd[ultralytics]' "
            "(its licence is AGPL-3.0)."
        )
    hint = ""
    if "libGL" in str(error) or "libgthread" in str(error) or "cv2" in str(error):
        hint = " OpenCV lacks system libraries here: pip install opencv-python-headless brings a build without them."
    return f"Ultralytics is installed but cannot be imported ({str(error).splitlines()[0]}).{hint}"
