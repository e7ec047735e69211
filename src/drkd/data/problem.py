"""What can be wrong with a data set, as one record a finding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from drkd.contracts import DrkdError

Severity = Literal["error", "warning"]


LeaveOut = Callable[[Path, str], None]
"""Takes an image that cannot be read, and why, where that is no error."""


_FEW = 16


def leave_out_some(unreadable: Mapping[Path, str], total: int, leave_out: LeaveOut) -> None:
    """Leave out images that cannot be read, unless they are so many that it is no matter of single files.

    Args:
        unreadable: By image, what is wrong with it.
        total: Images in all.
        leave_out: Told of each.

    Raises:
        DrkdError: If they are more than 16 and more than a tenth.
    """
    count = len(unreadable)
    if count > _FEW and 10 * count > total:
        path, reason = next(iter(unreadable.items()))
        raise DrkdError(
            f"{path}: {reason} So it is with {count} of {total} images: data.unreadable: skip is for single files. Is "
            "the disk there, and the copy whole? `drkd data check PATH` lists all of them."
        )
    for path, reason in unreadable.items():
        leave_out(path, reason)


@dataclass(frozen=True)
class DataProblem:
    """One finding about a data set.

    Args:
        severity: An error stops training; a warning names something that was handled (dropped, clipped) and counted.
        file: The file it was found in.
        record: Which record of the file ("annotation 12", "image 7"), empty for the whole file.
        field: Which field of the record, empty for the whole record.
        message: What was expected and what is there.
    """

    severity: Severity
    file: Path
    record: str
    field: str
    message: str

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.record, f"field '{self.field}'" if self.field else "") if part)
        return f"{self.severity}: {self.file}: {where + ': ' if where else ''}{self.message}"


def raise_errors(problems: Sequence[DataProblem], *, file: Path, shown: int = 3) -> None:
    """Raise one readable error for the errors among the problems; do nothing when there are only warnings.

    Args:
        problems: All findings.
        file: The file that was read, for the message.
        shown: How many errors the message spells out.

    Raises:
        DrkdError: If any problem is an error.
    """
    errors = [problem for problem in problems if problem.severity == "error"]
    if not errors:
        return
    first = "; ".join(str(problem).removeprefix("error: ").removeprefix(f"{file}: ") for problem in errors[:shown])
    more = f"; and {len(errors) - shown} more" if len(errors) > shown else ""
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    raise DrkdError(f"{file} has {count}: {first}{more}. `drkd data check PATH` on its folder lists all of them.")
