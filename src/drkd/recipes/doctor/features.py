"""Is every level of a pyramid alive?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from drkd.contracts import DetectionBatch, Detector, FeatureMap, Want
from drkd.recipes.doctor.finding import Finding

_DEAD_SHARE = 0.5


@torch.no_grad()
def look_at_features(who: str, detector: Detector, batch: DetectionBatch) -> tuple[list[Finding], list[dict[str, Any]]]:
    """Look for NaN, maps that do not depend on the image or the place, and dead channels.

    Args:
        who: "teacher" or "student".
        detector: In eval mode.
        batch: At least one real image.
    """
    output = detector(batch, want=frozenset[Want]({"features"}))
    return judge_features(who, output.features)


def judge_features(who: str, features: Sequence[FeatureMap]) -> tuple[list[Finding], list[dict[str, Any]]]:
    """The same, of maps that were computed already."""
    findings, numbers = [], []
    for level in features:
        values = level.tensor.float()
        finite = bool(values.isfinite().all())
        spread = values.transpose(0, 1).flatten(1)
        # A map of a single cell and image cannot vary.
        judged = spread.shape[1] > 1
        deviation = spread.std(dim=1, correction=0) if finite else spread.new_zeros(len(spread))
        dead = float((deviation <= 1e-6 * spread.abs().amax(dim=1).clamp_min(1e-12)).float().mean()) if finite else 1.0
        numbers.append({"level": level.name, "finite": finite, "dead_channels": round(dead, 4) if judged else None})
        if not finite:
            findings.append(Finding("stop", "features", f"The {who}'s level {level.name} holds NaN or infinity."))
        elif judged and dead == 1.0:
            findings.append(
                Finding(
                    "stop",
                    "features",
                    f"The {who}'s level {level.name} is constant: it shows nothing of the images. Wrong or missing "
                    "weights?",
                )
            )
        elif judged and dead >= _DEAD_SHARE:
            findings.append(
                Finding(
                    "careful",
                    "features",
                    f"{100 * dead:.0f} % of the channels of the {who}'s level {level.name} are dead.",
                )
            )
    if not findings:
        findings.append(Finding("ok", "features", f"The {who}'s {len(features)} levels are alive."))
    return findings, numbers
