"""Several models' masks side by side, after Figure 2 of the paper (layout ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from risam_cli.drawing.drawing import fitted, with_outline, write_text
from risam_cli.drawing.text import fit_text

Rgb = NDArray[np.uint8]

CELL = 240
"""Width of a panel in pixels."""

_MARGIN, _GAP, _HIGHEST = 20, 12, 360
_PAPER, _INK, _SOFT = (255, 255, 255), (28, 32, 36), (92, 102, 112)


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a row.

    Attributes:
        title: above it; note: beneath it.
        mask: (H, W) what is outlined; None shows the image as it is.
    """

    title: str
    mask: NDArray[np.bool_] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One image with one expression: (H, W, 3) uint8, and its panels from left to right."""

    rgb: Rgb
    expression: str
    panels: tuple[Panel, ...]


def draw_comparison(rows: Sequence[ComparisonRow]) -> Rgb:
    """All rows below one another, (H, W, 3); W has room for the longest row.

    Raises:
        ValueError: no row, or one without panels.
    """
    if not rows or not all(row.panels for row in rows):
        raise ValueError("a comparison needs rows with panels")
    most = max(len(row.panels) for row in rows)
    width = 2 * _MARGIN + most * CELL + (most - 1) * _GAP
    strips = [_blank(_MARGIN, width)]
    for row in rows:
        strips += [_line(row.expression, 18, _INK, width, _MARGIN), _blank(4, width)]
        strips += [_panels(row, width), _blank(_MARGIN, width)]
    return np.concatenate(strips)


def _panels(row: ComparisonRow, width: int) -> Rgb:
    picture = fitted(row.rgb, CELL, _HIGHEST)
    drawn = []
    for panel in row.panels:
        shown = picture if panel.mask is None else with_outline(picture, panel.mask)
        framed = _blank(picture.shape[0], CELL)
        framed[:, : picture.shape[1]] = shown
        above, below = _line(panel.title, 14, _INK, CELL), _line(panel.note, 14, _SOFT, CELL)
        drawn.append(np.concatenate([above, framed, below]))
    strip = _blank(drawn[0].shape[0], width)
    for number, panel_of in enumerate(drawn):
        left = _MARGIN + number * (CELL + _GAP)
        strip[:, left : left + CELL] = panel_of
    return strip


def _line(text: str, size: int, tint: tuple[int, int, int], width: int, margin: int = 0) -> Rgb:
    strip = _blank(round(1.5 * size), width)
    write_text(strip[:, margin:], fit_text(text, size, width - 2 * margin), tint)
    return strip


def _blank(height: int, width: int) -> Rgb:
    return np.full((height, width, 3), _PAPER, np.uint8)
