"""Writes Lightning's checkpoints so that a reader finds the old one or the new one, whole, and never executes them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from drkd.contracts import DrkdError

_ASIDE = ".part"
# Without these Lightning cannot go on.
_NEEDED: Mapping[str, type | tuple[type, ...]] = {
    "state_dict": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": Mapping,
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
}


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints written beside their place, flushed to the disk and renamed; read as tensors and plain values only.

    Lightning's own writer makes a file in the system's temporary folder and moves it, which is a copy, and can be
    caught half-way, wherever that folder is on another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            DrkdError: If it cannot be written; what was there before is still there, whole.
        """
        del storage_options
        file = Path(path)
        aside = file.with_name(f".{file.name}.{os.getpid()}{_ASIDE}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as target:
                torch.save(checkpoint, target)
                target.flush()
                os.fsync(target.fileno())
            aside.replace(file)
            _sync_folder(file.parent)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as a RuntimeError of its own; the system's error is then its context.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError) and "PytorchStreamWriter" not in str(error):
                raise
            reason = cause.strerror if isinstance(cause, OSError) else "no space is left on the disk, most likely"
            kept = "The checkpoint before it is whole." if file.exists() else "There is none before it."
            raise DrkdError(
                f"{file}: the checkpoint cannot be written ({reason}). {kept} Free some space and go on with --resume."
            ) from (cause or error)
        finally:
            aside.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[[Any, str], Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; objects that would run code are refused whatever ``weights_only`` says.

        Raises:
            DrkdError: If it is missing, damaged, refused, or no checkpoint of a run.
        """
        del weights_only
        try:
            content = torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise DrkdError(f"{path}: there is no such checkpoint.") from None
        except pickle.UnpicklingError as error:
            raise DrkdError(
                f"{path}: not loaded: the checkpoint is damaged, or holds pickled objects, which could run code "
                f"({_first_line(error)})."
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # a damaged pickle can make torch raise anything
            raise DrkdError(f"{path}: the checkpoint is damaged and cannot be read ({_first_line(error)}).") from error
        wrong = (
            [name for name, kind in _NEEDED.items() if not isinstance(content.get(name), kind)]
            if isinstance(content, dict)
            else list(_NEEDED)
        )
        if wrong:
            raise DrkdError(
                f"{path}: this is no checkpoint of a run that could go on: {', '.join(wrong)} missing or of the wrong "
                "kind. A student.pt is for drkd evaluate, predict, or as a teacher."
            )
        return content


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left beside the checkpoints."""
    for file in folder.glob(f".*{_ASIDE}"):
        file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the rename itself survive a power cut, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot; the file's own content is on the disk already
    finally:
        os.close(handle)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
