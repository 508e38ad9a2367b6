"""Outlines of the eight shapes and their anti-aliased coverage of the pixel grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

# Sub-pixels along each side of a pixel. 4 gives 16 levels of coverage, which noise hides anyway.
_FINE = 4
# Rings keep a hole of this share of their outer radius.
_RING_HOLE = 0.56


@dataclass(frozen=True, slots=True)
class Form:
    """How an object departs from its shape's plain outline.

    Attributes:
        aspect: width over height in the object's own frame; the area stays.
        detail: -1..1, what is particular to a shape: how far a star's points stand out, how wide
            a cross's arms, a ring's hole, a diamond, how high a triangle.
    """

    aspect: float = 1.0
    detail: float = 0.0


PLAIN = Form()


@dataclass(frozen=True, slots=True)
class Patch:
    """What one object covers.

    Attributes:
        x0, y0: column and row of the patch's first pixel in the image.
        coverage: (h, w) uint8, share of each pixel's area inside the shape, 0..255.
        inside: (h, w) bool, pixels at least half covered.
    """

    x0: int
    y0: int
    coverage: NDArray[np.uint8]
    inside: NDArray[np.bool_]

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the patch in the image."""
        height, width = self.coverage.shape
        return slice(self.y0, self.y0 + height), slice(self.x0, self.x0 + width)


def _regular(corners: int, start: float) -> NDArray[np.float64]:
    angles = start + 2 * math.pi * np.arange(corners) / corners
    return np.stack((np.cos(angles), np.sin(angles)), axis=1)


@cache
def outline(shape: str, form: Form = PLAIN) -> tuple[NDArray[np.float64], ...]:
    """Contours of a shape of radius 1 around the origin, y down; a second one is a hole.

    The factors make shapes of one radius look equally large, though their corners reach
    differently far.
    """
    stretch = np.array([form.aspect**0.5, form.aspect**-0.5])
    return tuple(contour * stretch for contour in _contours(shape, form.detail))


def _contours(shape: str, detail: float) -> tuple[NDArray[np.float64], ...]:
    up = -math.pi / 2
    if shape == "circle":
        return (_regular(72, 0.0),)
    if shape == "ring":
        circle = _regular(72, 0.0)
        return 1.04 * circle, 1.04 * (_RING_HOLE + 0.12 * detail) * circle
    if shape == "square":
        return (0.88 * math.sqrt(2) * _regular(4, math.pi / 4),)
    if shape == "diamond":
        return (1.22 * _regular(4, up) * np.array([0.70 + 0.10 * detail, 1.0]),)
    if shape == "triangle":
        return (1.24 * _regular(3, up) * np.array([1.0, 1.0 + 0.15 * detail]),)
    if shape == "hexagon":
        return (1.06 * _regular(6, 0.0),)
    if shape == "star":
        points = (
            _regular(10, up) * np.where(np.arange(10) % 2 == 0, 1.0, 0.44 + 0.08 * detail)[:, None]
        )
        return (1.24 * points,)
    if shape == "cross":
        arm, half = 1.06, 0.36 + 0.10 * detail
        quarter = np.array([[half, -arm], [half, -half], [arm, -half]])
        turns = [quarter]
        for _ in range(3):
            quarter = np.stack((-quarter[:, 1], quarter[:, 0]), axis=1)
            turns.append(quarter)
        return (np.concatenate(turns),)
    raise ValueError(f"unknown shape {shape!r}")


@cache
def reach(shape: str, form: Form = PLAIN) -> float:
    """Farthest point of the outline from the centre, in radii."""
    return float(
        max(np.hypot(contour[:, 0], contour[:, 1]).max() for contour in outline(shape, form))
    )


def cover(shape: str, x: float, y: float, radius: float, angle: float, form: Form = PLAIN) -> Patch:
    """Coverage of one object.

    Args:
        shape: one of ``SHAPES``.
        x, y: centre in pixels; pixel (row i, column j) has its centre at x = j, y = i.
        radius: nominal radius in pixels.
        angle: turn in degrees, clockwise on the screen.
        form: how it departs from the plain outline.
    """
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    contours = [radius * contour @ rotation for contour in outline(shape, form)]
    centre = np.array([x, y])
    low = contours[0].min(axis=0) + centre
    high = contours[0].max(axis=0) + centre
    x0, y0 = math.floor(low[0]), math.floor(low[1])
    width, height = math.ceil(high[0]) - x0 + 1, math.ceil(high[1]) - y0 + 1
    # Pixel j spans j - 0.5 .. j + 0.5; sub-pixel indices count from the first pixel's left edge.
    offset = (np.array([x - x0, y - y0]) + 0.5) * _FINE - 0.5
    points = [np.rint((contour * _FINE + offset) * 16).astype(np.int32) for contour in contours]
    fine = np.zeros((height * _FINE, width * _FINE), np.uint8)
    cv2.fillPoly(fine, points, 255, shift=4)
    coverage = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    return Patch(x0, y0, np.asarray(coverage, np.uint8), coverage >= 128)
