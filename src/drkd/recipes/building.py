"""Turns what Python raises on arguments that make no sense into one paragraph that names the recipe's field."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from drkd.contracts import DrkdError

_WRONG = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError)


@contextmanager
def explained_by_recipe(field: str) -> Iterator[None]:
    """A context in which a part of the recipe is built.

    Types are checked when the recipe is read, but not what every library does with a number that it did not expect.

    Args:
        field: The part, for the message.

    Raises:
        DrkdError: On leaving the context, instead of the error.
    """
    try:
        yield
    except (DrkdError, torch.OutOfMemoryError):
        raise
    except _WRONG as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:300]
        raise DrkdError(
            f"{field}: this cannot be built with the recipe's arguments ({type(error).__name__}: {reason}). "
            "DRKD_TRACEBACK=1 shows where this comes from."
        ) from error
