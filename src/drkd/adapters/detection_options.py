"""What a detector lets through of what it finds: checked where a detector is made, wherever the values come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from drkd.adapters.argument_types import shown
from drkd.contracts import DrkdError

_SHARES = ("score_threshold", "nms_threshold")


def check_detection_options(options: Mapping[str, Any]) -> None:
    """Refuse thresholds outside [0, 1], a number of detections below 1, and what is of another type.

    Args:
        options: ``score_threshold``, ``nms_threshold``, ``detections_per_image`` and ``several_labels``, as many as the
            detector has; others are left alone.

    Raises:
        DrkdError: If there is one.
    """
    for name in _SHARES:
        value = options.get(name, 0)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise DrkdError(f"{name}: expected a number in [0, 1], got {shown(value)}.")
    count = options.get("detections_per_image", 1)
    if type(count) is not int or count < 1:
        raise DrkdError(f"detections_per_image: expected a whole number of at least 1, got {shown(count)}.")
    several = options.get("several_labels", True)
    if type(several) is not bool:
        raise DrkdError(f"several_labels: expected true or false, got {shown(several)}.")
