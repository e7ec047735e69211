"""Turns whatever is raised on a checkpoint that loads but makes no sense into one paragraph that names the file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from drkd.contracts import DrkdError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError)


def explained_by_file(
    read: Callable[Concatenate[Any, _Arguments], _Result],
) -> Callable[Concatenate[Any, _Arguments], _Result]:
    """Decorate a function whose first argument is a file, and which can fail for nothing but what the file holds."""

    @functools.wraps(read)
    def wrapped(path: Any, /, *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        try:
            return read(path, *arguments, **options)
        except DrkdError as error:
            if str(path) in str(error):
                raise
            raise type(error)(f"{path}: {error}") from error
        except _DAMAGE as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
            raise DrkdError(
                f"{path}: the checkpoint does not describe a detector that can be built; it is damaged, or of another "
                f"version than is known here ({type(error).__name__}: {reason})."
            ) from error

    return wrapped
