"""What the doctor says: findings, each ok, careful or stop, and the verdict over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["ok", "careful", "stop"]
_ORDER: tuple[Severity, ...] = ("ok", "careful", "stop")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        severity: ok; careful: the run works but look at it; stop: the run would be wasted as it is.
        check: What was looked at: classes, preprocessing, teacher, features, levels, adapters, gradients, cost.
        text: In plain words.
    """

    severity: Severity
    check: str
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings.

    Args:
        findings: In the order of the checks.
        numbers: What was measured, as plain values, by check.
        brief: Whether only the short form was done.
    """

    findings: tuple[Finding, ...]
    numbers: dict[str, Any]
    brief: bool = False

    @property
    def severity(self) -> Severity:
        """The worst of the findings."""
        return max((finding.severity for finding in self.findings), key=_ORDER.index, default="ok")

    @property
    def verdict(self) -> str:
        """One paragraph in plain words."""
        reasons = [finding.text for finding in self.findings if finding.severity == self.severity]
        if self.severity == "ok":
            return "ok: nothing speaks against this run."
        lead = {
            "careful": "careful: the run works, but look at this first",
            "stop": "stop: as it is this run would be wasted",
        }[self.severity]
        return f"{lead}. {' '.join(reasons)}"

    def as_json(self) -> dict[str, Any]:
        """Plain values (``doctor.json`` of a run folder)."""
        return {
            "verdict": self.severity,
            "reasons": self.verdict,
            "form": "short" if self.brief else "whole",
            "findings": [asdict(finding) for finding in self.findings],
            "numbers": self.numbers,
        }


def listing(names: Sequence[str], *, shown: int = 6) -> str:
    """Names in quotes, the first few."""
    text = ", ".join(f"'{name}'" for name in names[:shown])
    return text + (f" and {len(names) - shown} more" if len(names) > shown else "")
