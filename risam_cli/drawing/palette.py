"""Colours that readers with colour-blindness tell apart.

The first seven are those of Okabe and Ito ("Color Universal Design", 2008), without black and in an
order that puts unlike ones next to each other. No larger set is told apart by everyone, so what
comes after repeats the seven, darker and lighter by turns; pictures with more than seven masks
therefore carry numbers as well.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]

OKABE_ITO: tuple[Color, ...] = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (204, 121, 167),  # reddish purple
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermillion
)

_ROUNDS = 8  # rounds of the seven before they repeat exactly: 56 colours


def color(index: int) -> Color:
    """RGB (0..255) of item ``index`` >= 0; equal colours are 56 items apart."""
    base = OKABE_ITO[index % len(OKABE_ITO)]
    turn = index // len(OKABE_ITO) % _ROUNDS
    if turn == 0:
        return base
    step = (turn + 1) // 2
    if turn % 2:  # darker
        share = 1 - 0.18 * step
        red, green, blue = (round(value * share) for value in base)
    else:  # lighter
        share = 0.2 * step
        red, green, blue = (round(value + (255 - value) * share) for value in base)
    return red, green, blue


def ink(background: Color) -> Color:
    """Black or white, whichever is read better on ``background`` (WCAG 2 contrast)."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (channel / 255 for channel in background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else (255, 255, 255)


def indexed_palette() -> NDArray[np.uint8]:
    """(256, 3) RGB for indexed PNG files: 0 is black (background), k is ``color(k - 1)``."""
    table = [(0, 0, 0), *(color(index) for index in range(255))]
    return np.array(table, np.uint8)
