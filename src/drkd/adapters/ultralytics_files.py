"""Ultralytics' own checkpoints, which are pickled modules: recognised without loading, loaded only where trusted."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

from torch import nn

from drkd.adapters.ultralytics_library import ultralytics_module
from drkd.contracts import DrkdError

_MARK = b"ultralytics"


def is_ultralytics_file(path: str | Path) -> bool:
    """Whether a file looks like a checkpoint of Ultralytics'; nothing in it is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(_MARK in archive.read(name) for name in pickles)
    except (OSError, zipfile.BadZipFile, KeyError, RuntimeError):
        return False


def require_file(path: str | Path) -> None:
    """Raise a `DrkdError` where there is no such file."""
    if not Path(path).is_file():
        raise DrkdError(f"{path}: no such checkpoint file. drkd does not download Ultralytics' weights.")


def refuse_pickle(path: str | Path) -> str:
    """Why such a file is not loaded, and what to do about it, in one paragraph."""
    return (
        f"{path}: not loaded, since it is a checkpoint of Ultralytics', a pickled module, and loading a pickle runs "
        "whatever code is in it. If you trust where it comes from, turn it once into a file of plain tensors, which "
        f"drkd reads from then on: drkd yolo import {path} --trust-pickle --output teacher.pt. Or load it each time "
        "with --trust-pickle (in a recipe: trust_pickle: true)."
    )


def read_trusted(path: str | Path, *, trust_pickle: bool) -> nn.Module:
    """Unpickle the model of a checkpoint of Ultralytics': float32, eval mode, on the CPU.

    Raises:
        DrkdError: If the pickle is not trusted, the file is missing or cannot be loaded.
    """
    file = Path(path)
    # Asked first: for a missing file, Ultralytics would look in the network.
    require_file(file)
    if not trust_pickle:
        raise DrkdError(refuse_pickle(file))
    warnings.warn(f"{file} is a pickle: loading it runs the code in it, because you said to trust it.", stacklevel=2)
    tasks = ultralytics_module("nn.tasks")
    try:
        loaded: tuple[Any, Any] = tasks.load_checkpoint(str(file))
    except Exception as error:
        # What unpickling runs can fail in any way.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DrkdError(f"{file}: Ultralytics cannot load this checkpoint ({reason}).") from error
    model: nn.Module = loaded[0]
    return model
