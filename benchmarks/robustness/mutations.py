"""Changes valid files at random, tries what reads them, and watches what that writes and starts."""

from __future__ import annotations

import copy
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from drkd.contracts import DrkdError

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../../escape", "/etc/passwd", "\0", "a" * 3000, [], [[]], {}, {"id": 1}, [1, 2, 3, 4]),
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
_STARTS = ("os.system", "os.exec", "os.spawn", "subprocess.Popen", "socket.connect")
# What a run says of where it comes from.
_ASKED = ("git", "uname")


class Hang(BaseException):
    """No answer in time."""


class MakesFolder:
    """Makes a folder when it is unpickled: what a checkpoint must not be able to do.

    Args:
        place: The folder.
    """

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.place),)


def tiny_detectors(teacher: Path) -> dict[str, Any]:
    """The student and the teacher of a recipe, as small as they can be.

    Args:
        teacher: A saved detector.
    """
    student = {"width": 0.125, "fpn_channels": 32, "extra": "none", "stages": [3, 4]}
    return {
        "student": {"class_path": "drkd.adapters.RetinaNetBuilder", "init_args": student},
        "teacher": {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(teacher)}},
    }


def mutate_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8, 40))):
        kind, place = chance.randrange(5), chance.randrange(len(changed) + 1)
        if kind == 0 and place < len(changed):
            changed[place] = chance.randrange(256)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
        elif kind == 3:
            changed[place:place] = changed[place : place + chance.randrange(1, 200)]
        else:
            del changed[place : place + chance.randrange(1, 30)]
    return bytes(changed)


def mutate_value(chance: random.Random, value: Any, odd: Sequence[Any] = ODD) -> Any:
    """Replace, remove or duplicate one entry somewhere in lists and dicts; a tensor gets other values or another shape.

    Args:
        chance: Source of randomness.
        value: Left as it is.
        odd: What an entry is replaced by.
    """
    changed = copy.copy(value)
    if isinstance(changed, dict) and changed:
        key = chance.choice(list(changed))
        if chance.random() < 0.75 and isinstance(changed[key], dict | list | Tensor) and len_of(changed[key]):
            changed[key] = mutate_value(chance, changed[key], odd)
        elif chance.random() < 0.2:
            del changed[key]
        elif chance.random() < 0.1:
            changed[chance.choice(("id", "", "base", "x", 7))] = changed[key]
        else:
            changed[key] = chance.choice(odd)
        return changed
    if isinstance(changed, list) and changed:
        place = chance.randrange(len(changed))
        if chance.random() < 0.75:
            changed[place] = mutate_value(chance, changed[place], odd)
        elif chance.random() < 0.5:
            changed.append(changed[place])
        else:
            del changed[place]
        return changed
    if isinstance(changed, Tensor) and chance.random() < 0.8:
        return _mutate_tensor(chance, changed)
    return chance.choice(odd)


def mutate_lines(chance: random.Random, lines: Sequence[str], odd: Sequence[Any] = ODD) -> str:
    """Replace, remove or repeat words and lines."""
    changed = [line.split() for line in lines]
    for _ in range(chance.choice((1, 1, 2, 5))):
        changed = mutate_value(chance, changed, [str(value) for value in odd])
        changed = [line if isinstance(line, list) else [line] for line in changed]
    return "\n".join(" ".join(map(str, line)) for line in changed) + "\n"


def len_of(value: Any) -> int:
    """Entries of a list or dict, elements of a tensor."""
    return value.numel() if isinstance(value, Tensor) else len(value)


def _mutate_tensor(chance: random.Random, tensor: Tensor) -> Tensor:
    kind = chance.randrange(8)
    if kind == 0:
        return tensor.flatten()
    if kind == 1:
        return tensor.unsqueeze(0)
    if kind == 2:
        return torch.cat([tensor.flatten(), tensor.flatten()]).reshape(-1, *tensor.shape[1:])
    if kind == 3:
        return tensor.to(chance.choice((torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)))
    if kind == 4:
        return torch.full_like(tensor, chance.choice((float("nan"), float("inf"), 1e30, -1.0)), dtype=torch.float32)
    if kind == 5:
        return tensor.new_zeros(0)
    if kind == 6:
        return tensor.flatten()[:1].reshape(())
    return tensor.to_sparse() if tensor.ndim else -tensor


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise Hang after so many seconds of CPU time."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def guarded(action: Callable[[], Any], *, seconds: float = 10.0) -> str:
    """Say "works", "refused", or what went wrong."""
    try:
        with time_limit(seconds):
            action()
    except DrkdError as error:
        text = str(error).strip()
        return "refused" if text and "\n\n" not in text and "Traceback" not in text else f"no paragraph: {text[:300]}"
    except Hang:
        return f"no answer in {seconds:g} seconds"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]} | {_own_line(error)}"
    return "works"


def _own_line(error: Exception) -> str:
    """The innermost line of drkd in a traceback, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}drkd{os.sep}" in frame.filename]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*own[-1:], *frames[-1:]))


class Watch:
    """Notes files that are changed outside a folder, and programs and connections that are started, while it is on.

    It sees what Python itself does; there is no way to take it off again, so it is made once in a process.

    Args:
        folder: Where files may be written.

    Attributes:
        active: Whether it is on.
        seen: What it noted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder.resolve())
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._look)

    def _look(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.active or (event != "open" and event not in _CHANGES and event not in _STARTS):
            return
        if event == "open":
            paths = details[:1] if isinstance(details[2], int) and details[2] & _WRITES else ()
        elif event in _CHANGES:
            if event != "os.rename" and isinstance(details[-1], int) and details[-1] >= 0:
                return  # relative to an open folder, of a tree that is removed as a whole
            paths = details[:2] if event in ("os.rename", "os.link", "os.symlink") else details[:1]
        else:
            words = [str(word) for word in details[1]] if event == "subprocess.Popen" else [str(details[0])]
            if words[0] not in _ASKED:
                self.seen.append(f"{event} {' '.join(words)[:200]}")
            return
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._may_write(os.fsdecode(path)):
                self.seen.append(f"{event} {os.fsdecode(path)[:200]}")

    def _may_write(self, path: str) -> bool:
        place = os.path.abspath(path)  # noqa: PTH100 - Path.resolve() opens files, and we are called when one is opened
        return (
            place.startswith((f"{self._folder}{os.sep}", os.devnull)) or "__pycache__" in place or place == self._folder
        )
