"""DRKD's response: how a student's predictions are compared with the teacher's, beside the relations."""

from __future__ import annotations

from typing import Literal

from drkd.contracts import DetectorSpec, DrkdError, NotApplicableError
from drkd.methods.crosskd import CrossKD
from drkd.methods.image_share import WHOLE_RUN, check_span
from drkd.methods.logit_kd import LogitKD

Response = Literal["cross_head", "logits"]
"""How a student's predictions are compared with the teacher's: by `CrossKD` (one-stage pairs), or by `LogitKD`."""

SHARE = 0.25
"""Of a batch's images that the teacher's head is asked about, unless something else is said."""

_RESPONSES: dict[Response, type[CrossKD] | type[LogitKD]] = {"cross_head": CrossKD, "logits": LogitKD}


def make_response(
    response: Response,
    student: DetectorSpec,
    teacher: DetectorSpec,
    *,
    weight: float | None,
    share: float,
    span: tuple[float, float] = WHOLE_RUN,
    balanced: bool,
) -> CrossKD | LogitKD | None:
    """The method that compares predictions; None for a weight of 0, or of None where the pair cannot be compared so.

    Raises:
        DrkdError: If a weight is asked for and the pair cannot be compared so, or a response, a share or a span and no
            weight.
        ValueError: If there is no such response, or the span is none.
    """
    if response not in _RESPONSES:
        raise ValueError(f"Expected a response out of {', '.join(_RESPONSES)}, got {response!r}")
    span = check_span(span)
    if weight == 0:
        if response != "logits" or share != SHARE or span != WHOLE_RUN:
            raise DrkdError(
                f"response: '{response}' of a share of {share} in the span {list(span)} says nothing at "
                "response_weight 0; expected a response_weight too (1 is as loud as the task), or neither response nor "
                f"response_share nor response_span (by default 'logits', {SHARE} and {list(WHOLE_RUN)})."
            )
        return None
    loudness = 1.0 if weight is None else weight
    try:
        return _RESPONSES[response](
            student, teacher, class_weight=loudness, box_weight=loudness, share=share, span=span, balanced=balanced
        )
    except NotApplicableError:
        if weight is None:
            return None
        raise
