"""Paints a layout: background, objects, light, blur and sensor noise.

Only colours are decided here; which pixel belongs to which object is the layout's.
"""

from __future__ import annotations

import colorsys
import math
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.data.refshapes.scene import Dice, Layout
from risam_cli.data.refshapes.shapes import Patch

# Hue in degrees, saturation and value in 0..1. The ranges lie apart even after light and shading
# have moved them: brown is a dark orange, pink a pale red, so these differ in S and V by far.
_COLOR_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-5, 5), (0.82, 0.96), (0.78, 0.95)),
    "orange": ((25, 33), (0.88, 1.0), (0.94, 1.0)),
    "brown": ((20, 30), (0.58, 0.72), (0.38, 0.50)),
    "yellow": ((51, 58), (0.78, 0.96), (0.93, 1.0)),
    "green": ((108, 140), (0.65, 0.90), (0.50, 0.75)),
    "cyan": ((179, 189), (0.65, 0.95), (0.85, 0.98)),
    "blue": ((216, 232), (0.78, 0.95), (0.70, 0.95)),
    "purple": ((270, 284), (0.60, 0.82), (0.50, 0.70)),
    "pink": ((328, 342), (0.36, 0.50), (0.95, 1.0)),
    "gray": ((0, 360), (0.0, 0.04), (0.45, 0.56)),
    "white": ((0, 360), (0.0, 0.03), (0.96, 1.0)),
    "black": ((0, 360), (0.0, 0.10), (0.03, 0.10)),
}
# Least CIELAB distance wanted between a background and every object.
_CONTRAST = 32.0

# The same for wide scenes: as far as a name still fits.
_WIDE_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-8, 8), (0.72, 0.98), (0.64, 0.97)),
    "orange": ((22, 35), (0.80, 1.0), (0.88, 1.0)),
    "brown": ((18, 32), (0.50, 0.76), (0.30, 0.52)),
    "yellow": ((49, 61), (0.66, 0.98), (0.88, 1.0)),
    "green": ((98, 146), (0.50, 0.92), (0.38, 0.80)),
    "cyan": ((176, 193), (0.52, 0.97), (0.76, 1.0)),
    "blue": ((211, 236), (0.68, 0.97), (0.55, 0.97)),
    "purple": ((265, 289), (0.50, 0.86), (0.42, 0.74)),
    "pink": ((324, 346), (0.30, 0.54), (0.90, 1.0)),
    "gray": ((0, 360), (0.0, 0.06), (0.42, 0.60)),
    "white": ((0, 360), (0.0, 0.05), (0.93, 1.0)),
    "black": ((0, 360), (0.0, 0.14), (0.02, 0.13)),
}
LOOKS: tuple[str, ...] = ("flat", "shaded", "glossy", "dotted", "soft")
"""How the objects of a wide scene are painted; one look a scene."""
HELD_OUT_LOOK = "hatched"
"""The look of testC, which no other split has."""

_BOX = np.ones((3, 3), np.uint8)

Image = NDArray[np.float32]
Field = NDArray[np.float32]


def draw_color(dice: Dice, name: str, *, wide: bool = False) -> tuple[float, float, float]:
    """An RGB colour (0..255) that the name fits."""
    ranges = _WIDE_RANGES if wide else _COLOR_RANGES
    hue, saturation, value = (dice.between(*limits) for limits in ranges[name])
    red, green, blue = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return 255 * red, 255 * green, 255 * blue


def paint(dice: Dice, layout: Layout) -> NDArray[np.uint8]:
    """The picture of a layout: (H, W, 3) uint8 RGB."""
    size = layout.instances.shape[0]
    colors = [draw_color(dice, item.color) for item in layout.objects]
    image = _background(dice, size, colors)
    outlined = dice.unit() < 0.3
    for number, (color, patch) in enumerate(zip(colors, layout.patches, strict=True)):
        fill = np.array(color, np.float32)
        alpha = patch.coverage.astype(np.float32) * np.float32(1 / 255)
        region = image[patch.window]
        if dice.unit() < 0.5:
            shade = _ramp(dice, alpha.shape, 0.07)[:, :, None] * fill
        else:
            shade = np.broadcast_to(fill, region.shape)
        rimmed = outlined and dice.unit() < 0.7
        if rimmed or _hides_its_own_color(layout, number):
            width = max(1, round(layout.objects[number].radius / 14))
            shade = _outline(patch.coverage, shade, fill, width)
        region += alpha[:, :, None] * (shade - region)
    image *= _light(dice, size)[:, :, None]
    if dice.unit() < 0.25:
        sigma = dice.between(0.4, 0.9) * size / 256
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)
    if dice.unit() < 0.8:
        image += _noise(dice, size, dice.between(0.5, 10.0))
    return np.asarray(cv2.convertScaleAbs(np.maximum(image, 0)), np.uint8)


def paint_wide(dice: Dice, layout: Layout, look: str | None = None) -> NDArray[np.uint8]:
    """The picture of a wide layout: (H, W, 3) uint8 RGB.

    Args:
        look: of the objects; None draws one of ``LOOKS``.
    """
    size = max(layout.size)
    look = look or dice.pick(LOOKS)
    colors = [draw_color(dice, item.color, wide=True) for item in layout.objects]
    image = _background(dice, size, colors)
    if dice.unit() < 0.25:
        _grid_lines(dice, image)
    frame = slice(layout.size[0]), slice(layout.size[1])
    image = np.ascontiguousarray(image[frame])
    rims, shadow = dice.unit(), dice.unit() < (0.6 if look == "soft" else 0.2)
    for number, (color, patch) in enumerate(zip(colors, layout.patches, strict=True)):
        if shadow:
            _cast_shadow(image, patch)
        fill = np.array(color, np.float32)
        alpha = patch.coverage.astype(np.float32) * np.float32(1 / 255)
        region = image[patch.window]
        shade = _finish(dice, look, fill, alpha.shape)
        if dice.unit() < rims - 0.5 or _hides_its_own_color(layout, number):
            width = max(1, round(layout.objects[number].radius / 14))
            shade = _outline(patch.coverage, shade, fill, width)
        region += alpha[:, :, None] * (shade - region)
    image *= _light(dice, size)[frame][:, :, None] * np.float32(dice.between(0.93, 1.04))
    if look == "soft" or dice.unit() < 0.3:
        sigma = dice.between(0.4, 1.4) * size / 256
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.float32)
    if dice.unit() < 0.8:
        image += _noise(dice, size, dice.between(0.5, 13.0))[frame]
    picture = np.asarray(cv2.convertScaleAbs(np.maximum(image, 0)), np.uint8)
    if dice.unit() < 0.5:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(dice.between(35, 93))]
        _, coded = cv2.imencode(".jpg", picture, quality)
        picture = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return picture


def _finish(
    dice: Dice, look: str, fill: NDArray[np.float32], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """The inside of one object, (h, w, 3), before its edge is cut."""
    height, width = shape
    x, y = _grid(height, width)
    if look in ("shaded", "soft"):
        ramp = _ramp(dice, shape, dice.between(0.05, 0.15))
        return np.asarray(ramp[:, :, None] * fill, np.float32)
    if look == "glossy":
        cx, cy = width * dice.between(0.3, 0.5), height * dice.between(0.28, 0.45)
        reach = np.float32(0.03 * (height**2 + width**2))
        spot = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / reach) * np.float32(dice.between(25, 60))
        return np.asarray(np.minimum(fill + spot[:, :, None], 255), np.float32)
    if look == "dotted":
        pitch = dice.between(5, 9)
        mark = ((x % pitch) < pitch / 3) & ((y % pitch) < pitch / 3)
    elif look == "hatched":
        pitch, angle = dice.between(5, 10), dice.between(0, math.pi)
        mark = ((math.cos(angle) * x + math.sin(angle) * y) % pitch) < 0.4 * pitch
    else:
        return np.broadcast_to(fill, (height, width, 3)).astype(np.float32)
    other = fill * np.float32(0.76) if fill.max() > 60 else fill + np.float32(34)
    return np.where(mark[:, :, None], other, fill).astype(np.float32)


def _cast_shadow(image: Image, patch: Patch) -> None:
    """Darkens what lies below and to the right of an object; drawn in place."""
    height, width = image.shape[:2]
    move = max(2, round(max(height, width) / 64))
    rows, columns = patch.window
    top, left = rows.start + move, columns.start + move
    bottom, right = min(rows.stop + move, height), min(columns.stop + move, width)
    cover = patch.coverage[: bottom - top, : right - left].astype(np.float32) / 255
    image[top:bottom, left:right] *= (1 - np.float32(0.28) * cover)[:, :, None]


def _grid_lines(dice: Dice, image: Image) -> None:
    """Thin lines across the background, in place."""
    size = image.shape[0]
    step = max(6, round(dice.between(12, 40) * size / 256))
    shift = np.float32(dice.between(-26, 26))
    image[dice.below(step) :: step] += shift
    image[:, dice.below(step) :: step] += shift


def _hides_its_own_color(layout: Layout, number: int) -> bool:
    """Whether an object reaches over a lower one of its colour: without a rim nobody could tell
    where one ends.
    """
    upper = layout.objects[number]
    return any(
        upper.color == lower.color
        and math.hypot(upper.x - lower.x, upper.y - lower.y) < 1.05 * (upper.radius + lower.radius)
        for lower in layout.objects[:number]
    )


@lru_cache(maxsize=8)
def _grid(height: int, width: int) -> tuple[Field, Field]:
    """Columns and rows of every pixel, as float32 (1, W) and (H, 1)."""
    return (
        np.arange(width, dtype=np.float32)[None, :],
        np.arange(height, dtype=np.float32)[:, None],
    )


def _ramp(dice: Dice, shape: tuple[int, ...], strength: float) -> Field:
    """A linear brightness ramp around 1 in a random direction, (h, w)."""
    height, width = shape
    x, y = _grid(height, width)
    angle = dice.between(0, 2 * math.pi)
    fx, fy = math.cos(angle) * 2 / width, math.sin(angle) * 2 / height
    middle = 1 - strength * (fx * width / 2 + fy * height / 2)
    return np.float32(strength * fx) * x + (np.float32(strength * fy) * y + np.float32(middle))


def _outline(
    coverage: NDArray[np.uint8], shade: NDArray[np.float32], fill: NDArray[np.float32], width: int
) -> NDArray[np.float32]:
    """Darkens (a dark colour: lightens) the rim of an object."""
    padded = cv2.copyMakeBorder(coverage, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    inner = cv2.erode(padded, _BOX, iterations=width, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    share = (inner[1:-1, 1:-1, None] * np.float32(1 / 255)).astype(np.float32)
    rim = fill * np.float32(0.62) if fill.max() > 60 else fill + np.float32(45)
    return np.asarray(rim + share * (shade - rim), np.float32)


def _background(dice: Dice, size: int, colors: list[tuple[float, float, float]]) -> Image:
    first, second = _background_colors(dice, colors)
    style = dice.weighted(
        ("flat", "gradient", "stripes", "checker", "blotches", "clutter"), (2, 3, 2, 2, 3, 4)
    )
    if style == "flat":
        image = np.empty((size, size, 3), np.float32)
        image[:] = first
        return image
    if style == "clutter":
        mix = _ramp(dice, (size, size), 0.5) - np.float32(0.5) if dice.unit() < 0.5 else None
    else:
        mix = _mixture(dice, style, size)
    image = np.empty((size, size, 3), np.float32)
    for channel in range(3):
        low, high = float(first[channel]), float(second[channel])
        image[:, :, channel] = low if mix is None else mix * np.float32(high - low) + low
    if style == "clutter":
        _clutter(dice, image, first)
    return image


def _mixture(dice: Dice, style: str, size: int) -> Field:
    """How much of the second colour shows at each pixel, (H, W) in 0..1."""
    x, y = _grid(size, size)
    if style == "gradient":
        return np.asarray(_ramp(dice, (size, size), 0.5) - np.float32(0.5), np.float32)
    if style == "stripes":
        period = dice.between(10, 44) * size / 256
        angle = dice.between(0, math.pi)
        phase = np.float32(math.cos(angle) / period) * x + np.float32(math.sin(angle) / period) * y
        return np.asarray((phase % 1) < dice.between(0.3, 0.7), np.float32)
    if style == "checker":
        cell = dice.between(9, 34) * size / 256
        return np.asarray(((x // cell) + (y // cell)) % 2, np.float32)
    cells = 4 + dice.below(20)
    coarse = dice.rng.random((cells, cells), dtype=np.float32)
    field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(field, 0, 1), np.float32)


def _clutter(dice: Dice, image: Image, base: NDArray[np.float32]) -> None:
    """Thin lines, dots and specks that are no objects, in muted colours; drawn in place."""
    size = image.shape[0]
    scale = size / 256
    for _ in range(6 + dice.below(22)):
        color = [min(255.0, max(0.0, float(c) + dice.between(-48, 48))) for c in base]
        x, y = dice.below(size), dice.below(size)
        what = dice.unit()
        if what < 0.4:
            end = (x + int(dice.between(-90, 90) * scale), y + int(dice.between(-90, 90) * scale))
            cv2.line(image, (x, y), end, color, 1 + dice.below(2))
        elif what < 0.75:
            cv2.circle(image, (x, y), max(1, round(dice.between(1, 3.2) * scale)), color, -1)
        else:
            side = max(1, round(dice.between(1, 5) * scale))
            cv2.rectangle(image, (x, y), (x + side, y + side), color, -1)


def _background_colors(
    dice: Dice, colors: list[tuple[float, float, float]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two RGB colours that every object stands out from.

    The first pair drawn with enough contrast, otherwise the pair with most.
    """
    draws = dice.rng.random((32, 7), dtype=np.float32)
    hsv = np.empty((1, 32, 3), np.float32)
    hsv[0, :, 0] = draws[:, 0] * 360
    hsv[0, :, 1] = np.where(draws[:, 6] < 0.15, 0.25 + 0.45 * draws[:, 1], 0.30 * draws[:, 1])
    hsv[0, :, 2] = 0.15 + 0.83 * draws[:, 2]
    first = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0]
    second = np.clip(first + (draws[:, 3:6] - 0.5) * 0.26, 0, 1)
    objects = np.array(colors, np.float32) / 255
    rows = np.concatenate((first, second, (first + second) / 2, objects))
    lab = cv2.cvtColor(rows[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
    grounds, things = lab[:96].reshape(3, 32, 1, 3), lab[96:]
    contrast = np.sqrt(((grounds - things) ** 2).sum(axis=-1)).min(axis=(0, 2))
    fitting = np.flatnonzero(contrast >= _CONTRAST)
    number = int(fitting[0]) if len(fitting) else int(contrast.argmax())
    return first[number] * np.float32(255), second[number].astype(np.float32) * np.float32(255)


def _light(dice: Dice, size: int) -> Field:
    """A smooth field of brightness, (H, W), 0.75..1.1."""
    middle = dice.between(0.86, 1.0)
    spread = dice.between(0.0, 0.11)
    coarse = dice.rng.random((3, 3), dtype=np.float32) * np.float32(2 * spread)
    coarse += np.float32(middle - spread)
    field = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
    return np.asarray(field, np.float32)


@lru_cache(maxsize=2)
def _noise_pool(size: int) -> Image:
    """Normal noise drawn once a process: scenes cut windows from it, which costs a tenth."""
    side = size + 256
    return np.random.default_rng(20231127).standard_normal((side, side, 3), dtype=np.float32)


def _noise(dice: Dice, size: int, sigma: float) -> Image:
    x, y = dice.below(256), dice.below(256)
    window = _noise_pool(size)[y : y + size, x : x + size]
    # Channels change places, so that one window gives six.
    order = dice.sample((0, 1, 2), 3)
    if order != [0, 1, 2] and dice.unit() < 0.3:
        window = window[:, :, order]
    return np.asarray(window * np.float32(sigma), np.float32)
