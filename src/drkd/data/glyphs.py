"""Draws handwritten digits, and strokes that are none, as soft masks of any size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from drkd.contracts import DrkdError

Mask = npt.NDArray[np.float32]
"""(h, w), opacity in [0, 1]."""

INK = 0.3
"""Opacity above which a pixel counts as drawn: boxes are tight around those."""

_SCAN = 8
_SUPERSAMPLING = 3
_MEASURED_AT = 24.0


def load_scans() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The 1,797 handwritten digits that ship with scikit-learn.

    Returns:
        Scans (N, 8, 8) in [0, 1], ink high, and what they show (N,), 0..9.

    Raises:
        DrkdError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DrkdError(
            "The embedded data set 'digits' is made of scikit-learn's scans and scikit-image's photographs; install "
            "them with `pip install 'drkd[digits]'`."
        ) from None
    source = load_digits()
    return (source.images / 16).astype(np.float32), source.target.astype(np.int64)


def draw_digit(scan: Mask, size: float, random: np.random.Generator) -> Mask:
    """Draw a scan, turned, sheared and with another pen, so that the longer side of its ink is about ``size`` px.

    Args:
        scan: (8, 8) in [0, 1].
        size: Longer side of the tight box, px.
        random: Draws rotation (to 15 degrees), shear, ratio and weight of the stroke.

    Returns:
        The mask, cropped to its ink.
    """
    angle, shear = np.deg2rad(random.uniform(-15, 15)), random.uniform(-0.25, 0.25)
    ratio, weight = np.exp(random.uniform(-0.2, 0.2)), random.uniform(0.32, 0.52)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    form = turn @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([np.sqrt(ratio), 1 / np.sqrt(ratio)])
    # The ink of a scan does not fill its 8 x 8 px: measure it on a small drawing first.
    draft = _warp(scan, form * (_MEASURED_AT / _SCAN), weight, 1)
    scale = size / max(draft.shape) * (_MEASURED_AT / _SCAN)
    return _warp(scan, form * scale, weight, _SUPERSAMPLING if size < 32 else 1)


def _warp(scan: Mask, forward: npt.NDArray[np.float64], weight: float, supersampling: int) -> Mask:
    """Sample the scan along a turned grid and cut its smooth ink off at the pen's weight.

    Args:
        scan: (8, 8) in [0, 1].
        forward: (2, 2), scan px to px of the mask.
        weight: Ink above it is drawn; lower is bolder.
        supersampling: Samples a pixel and direction; large drawings have edges soft enough without.
    """
    corners = np.abs(forward) @ np.full(2, _SCAN / 2 + 0.5)
    side = (int(np.ceil(2 * corners.max())) + 2) * supersampling
    inverse = np.linalg.inv(forward * supersampling)
    padded = np.pad(scan, 3)
    offset = np.full(2, padded.shape[0] / 2) - inverse @ np.full(2, side / 2)
    smooth = Image.fromarray(padded).transform(
        (side, side),
        Image.Transform.AFFINE,
        (inverse[0, 0], inverse[0, 1], offset[0], inverse[1, 0], inverse[1, 1], offset[1]),
        Image.Resampling.BICUBIC,
    )
    ink = np.clip((np.asarray(smooth) - weight) / 0.12 + 0.5, 0, 1)
    return crop_to_ink(_shrink(ink, supersampling))


def _shrink(mask: npt.NDArray[np.floating], factor: int) -> Mask:
    """Average blocks of ``factor`` x ``factor`` px."""
    height, width = (length // factor for length in mask.shape)
    blocks = mask[: height * factor, : width * factor].reshape(height, factor, width, factor)
    return blocks.mean(axis=(1, 3), dtype=np.float32)


def crop_to_ink(mask: Mask) -> Mask:
    """Cut the empty border away; a mask without ink becomes one of a single clear pixel."""
    rows, columns = np.flatnonzero((mask > INK).any(axis=1)), np.flatnonzero((mask > INK).any(axis=0))
    if not len(rows):
        return np.zeros((1, 1), np.float32)
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw_distractor(scan: Mask, size: float, random: np.random.Generator) -> Mask:
    """Draw something of about ``size`` px that could be taken for a digit and is none.

    Args:
        scan: (8, 8), a digit of which a fragment may be used.
        size: Longer side, px.
        random: Draws the kind: a piece of a digit on its side, a letter-like polyline, a blob or a scribble.
    """
    kind = random.integers(4)
    if kind == 0:
        return _draw_fragment(scan, size, random)
    side = max(4, round(size)) * _SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    width = max(_SUPERSAMPLING, int(side * random.uniform(0.06, 0.16)))
    if kind == 1:
        corners = _LETTERS[int(random.integers(len(_LETTERS)))]
        points = [tuple((np.array(c) * 0.7 + 0.15 + random.uniform(-0.05, 0.05, 2)) * side) for c in corners]
        pen.line(points, fill=255, width=width, joint="curve")
    elif kind == 2:
        low, high = sorted(random.uniform(0.1, 0.9, 2) * side)
        pen.ellipse((low * 0.6, low, high, high + 2), fill=255)
    else:
        points = [tuple(random.uniform(0.1, 0.9, 2) * side) for _ in range(int(random.integers(5, 8)))]
        pen.line(points, fill=255, width=width, joint="curve")
    turned = canvas.rotate(float(random.uniform(-20, 20)), Image.Resampling.BILINEAR)
    return crop_to_ink(_shrink(np.asarray(turned, dtype=np.float32) / 255, _SUPERSAMPLING))


_LETTERS = (
    ((0, 0), (0, 1), (1, 1)),
    ((0, 0), (0.5, 1), (1, 0)),
    ((0, 1), (0, 0), (1, 1), (1, 0)),
    ((0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)),
    ((0, 0), (0, 1), (0, 0.5), (1, 0.5), (1, 0), (1, 1)),
    ((0, 0), (1, 1), (0.5, 0.5), (1, 0), (0, 1)),
    ((0, 1), (0, 0), (0, 0.5), (1, 0), (0, 0.5), (1, 1)),
)
"""L V N M H X K: no digit whichever way they lean. Corners (x, y) in [0, 1]."""


def _draw_fragment(scan: Mask, size: float, random: np.random.Generator) -> Mask:
    """Half a digit, on its side."""
    part = np.zeros_like(scan)
    start = int(random.integers(1, 4))
    part[start : start + 4] = scan[start : start + 4]
    return np.ascontiguousarray(np.rot90(draw_digit(part, size, random), int(random.choice([1, 3]))))
