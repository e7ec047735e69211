"""Composes one image of the embedded data set: digits and clutter on a piece of a photograph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from drkd.data.glyphs import INK, Mask, draw_digit, draw_distractor

Pixels = npt.NDArray[np.float32]
"""(h, w, 3), RGB in 0..255."""

_HIDDEN_AT_MOST = 0.6


@dataclass(frozen=True)
class Photo:
    """A photograph that backgrounds are cut from.

    Args:
        name: Unique.
        pixels: (h, w, 3) uint8, RGB.
        grey: Whether it has no colour.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    grey: bool


@dataclass(frozen=True)
class PlacedDigit:
    """A digit in a scene.

    Args:
        box: x, y, width, height, px: tight around the digit's ink, hidden parts included.
        label: 0..9.
        scan: Index of the handwritten scan.
        visible: Share of its ink that nothing later covers.
    """

    box: tuple[int, int, int, int]
    label: int
    scan: int
    visible: float


@dataclass(frozen=True)
class Scene:
    """An image with its digits.

    Args:
        pixels: (h, w, 3) uint8, RGB.
        digits: In the order drawn.
    """

    pixels: npt.NDArray[np.uint8]
    digits: tuple[PlacedDigit, ...]


def compose_scene(
    photo: Photo,
    shape: tuple[int, int],
    count: int,
    *,
    scans: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    pool: npt.NDArray[np.int64],
    sizes: tuple[float, float],
    random: np.random.Generator,
) -> Scene:
    """Compose a scene.

    Args:
        photo: The background's photograph.
        shape: Height and width of the image, px.
        count: Digits to place; fewer where the image has no room.
        scans: All scans, (N, 8, 8) in [0, 1].
        labels: What they show, (N,).
        pool: Indices of the scans that may be used.
        sizes: Limits of the longer side of a digit's box, px; log-uniform between them.
        random: The source of everything that varies.
    """
    canvas = _cut_background(photo, shape, random)
    for _ in range(int(random.integers(0, 5))):
        _paint_distractor(canvas, scans[random.choice(pool)], sizes, random)
    placed: list[tuple[PlacedDigit, npt.NDArray[np.bool_]]] = []
    # Large ones first, so that what hides a digit is a smaller one.
    wanted = np.sort(np.exp(random.uniform(np.log(sizes[0]), np.log(sizes[1]), count)))[::-1]
    for size in wanted.tolist():
        scan = int(random.choice(pool))
        _place(canvas, placed, draw_digit(scans[scan], size, random), int(labels[scan]), scan, random)
    pixels = _expose(canvas, random)
    digits = tuple(
        _with_visible(digit, ink, [later for _, later in placed[i + 1 :]]) for i, (digit, ink) in enumerate(placed)
    )
    return Scene(pixels, digits)


def _cut_background(photo: Photo, shape: tuple[int, int], random: np.random.Generator) -> Pixels:
    """A random piece of the photograph at a random scale, mirrored or not, in slightly other colours."""
    height, width = shape
    full_height, full_width = photo.pixels.shape[:2]
    largest = min(full_height / height, full_width / width)
    scale = float(np.exp(random.uniform(np.log(min(0.8, largest)), np.log(largest))))
    high, wide = int(height * scale), int(width * scale)
    top, left = int(random.integers(full_height - high + 1)), int(random.integers(full_width - wide + 1))
    piece = Image.fromarray(photo.pixels[top : top + high, left : left + wide])
    canvas = np.asarray(piece.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0), dtype=np.float32)
    if random.random() < 0.5:
        canvas = canvas[:, ::-1]
    gains = random.uniform(0.85, 1.15) * (np.ones(3) if photo.grey else random.uniform(0.92, 1.08, 3))
    return np.ascontiguousarray(np.clip(canvas * gains.astype(np.float32), 0, 255))


def _place(
    canvas: Pixels,
    placed: list[tuple[PlacedDigit, npt.NDArray[np.bool_]]],
    mask: Mask,
    label: int,
    scan: int,
    random: np.random.Generator,
) -> None:
    """Paint a digit where it hides no earlier one too much; give up after some tries."""
    (height, width), (high, wide) = canvas.shape[:2], mask.shape
    if high > height or wide > width:
        return
    for _ in range(12):
        top, left = int(random.integers(height - high + 1)), int(random.integers(width - wide + 1))
        ink = np.zeros((height, width), np.bool_)
        ink[top : top + high, left : left + wide] = mask > INK
        if any(
            _with_visible(digit, old, [*_inks(placed, i + 1), ink]).visible < 1 - _HIDDEN_AT_MOST
            or _overlap(digit.box, (left, top, wide, high)) > 0.45
            for i, (digit, old) in enumerate(placed)
        ):
            continue
        spot = canvas[top : top + high, left : left + wide]
        _blend(spot, mask, _ink_colour(spot[mask > INK], random), random.uniform(0.8, 1.0))
        placed.append((PlacedDigit((left, top, wide, high), label, scan, 1.0), ink))
        return


def _inks(placed: list[tuple[PlacedDigit, npt.NDArray[np.bool_]]], start: int) -> list[npt.NDArray[np.bool_]]:
    return [ink for _, ink in placed[start:]]


def _with_visible(digit: PlacedDigit, ink: npt.NDArray[np.bool_], later: list[npt.NDArray[np.bool_]]) -> PlacedDigit:
    if not later:
        return digit
    covered = np.logical_or.reduce(later)
    share = float((ink & ~covered).sum() / ink.sum())
    return PlacedDigit(digit.box, digit.label, digit.scan, round(share, 3))


def _overlap(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> float:
    """Intersection over union of two x, y, width, height boxes."""
    across = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    down = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    shared = max(across, 0) * max(down, 0)
    return shared / (first[2] * first[3] + second[2] * second[3] - shared)


def _ink_colour(behind: Pixels, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """A colour that can be told from the mean of what is behind it: half of the time barely, half of the time well."""
    mean = behind.mean(axis=0)
    distance = random.uniform(55, 90) if random.random() < 0.35 else random.uniform(90, 230)
    best, gap = mean, -np.inf
    for _ in range(12):
        colour = random.uniform(0, 255, 3).astype(np.float32)
        if random.random() < 0.3:
            colour[:] = colour.mean()
        # Brightness tells more than hue does when a digit is ten pixels high.
        apart = float(np.abs(colour - mean) @ np.array([0.3, 0.59, 0.11]))
        if -abs(apart - distance) > gap:
            best, gap = colour, -abs(apart - distance)
    return best


def _blend(spot: Pixels, mask: Mask, colour: npt.NDArray[np.float32], opacity: float) -> None:
    alpha = (mask * opacity)[:, :, None]
    spot *= 1 - alpha
    spot += alpha * colour


def _paint_distractor(canvas: Pixels, scan: Mask, sizes: tuple[float, float], random: np.random.Generator) -> None:
    """Paint clutter, under the digits; it may leave the image."""
    size = float(np.exp(random.uniform(np.log(sizes[0] * 0.7), np.log(sizes[1]))))
    mask = draw_distractor(scan, size, random)
    height, width = canvas.shape[:2]
    top, left = int(random.integers(-3, height - 3)), int(random.integers(-3, width - 3))
    mask = mask[max(0, -top) : height - top, max(0, -left) : width - left]
    top, left = max(top, 0), max(left, 0)
    spot = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    if spot.size:
        _blend(spot, mask, _ink_colour(spot.reshape(-1, 3), random), random.uniform(0.5, 1.0))


def _expose(canvas: Pixels, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """What a camera would add: brightness, contrast, sometimes blur, noise."""
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    if random.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(float(random.uniform(0.3, 0.9))))
    pixels = np.asarray(image, dtype=np.float32)
    pixels = (pixels - 128) * random.uniform(0.75, 1.1) + 128 + random.uniform(-25, 25)
    pixels += random.normal(0, random.uniform(0, 9), size=pixels.shape).astype(np.float32)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
