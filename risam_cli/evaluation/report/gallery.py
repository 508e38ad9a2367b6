"""Cases as small pictures: the image, with ground truth and answer as outlines over it.

Outlines are vector paths, so that they stay sharp and keep their colours at any zoom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from risam_cli.data.images.images import open_rgb
from risam_cli.drawing.drawing import outline, webp_uri
from risam_cli.errors import ImageError
from risam_cli.evaluation.scoring import Case

TRUTH = (86, 180, 233)
"""Sky blue of Okabe and Ito's palette, told apart from the other by every kind of eye."""
ANSWER = (230, 159, 0)
"""Orange of the same palette."""

_SIDE = 320
_PLAIN = 96  # gray of the ground where the image is not at hand


@dataclass(frozen=True, slots=True)
class Picture:
    """One case, drawn.

    Attributes:
        uri: the image as a ``data:`` address of a WebP file.
        width, height: of the picture in pixels.
        truth, answer: outlines as SVG path data; empty where there is no pixel.
        note: why the image itself is not shown, or empty.
    """

    case: Case
    uri: str
    width: int
    height: int
    truth: str
    answer: str
    note: str = ""


def draw_cases(cases: Sequence[Case]) -> list[Picture]:
    """Every case as a picture; where its image cannot be read, on plain ground, and it says so."""
    return [_draw(case) for case in cases]


def _draw(case: Case) -> Picture:
    height, width = case.target["size"]
    scale = _SIDE / max(height, width)
    small = max(1, round(width * scale)), max(1, round(height * scale))
    note = ""
    try:
        rgb = open_rgb(case.path)
        if rgb.shape[:2] != (height, width):
            note = f"the image is {rgb.shape[0]}x{rgb.shape[1]}, its masks {height}x{width}"
    except ImageError:
        rgb = np.full((small[1], small[0], 3), _PLAIN, np.uint8)
        note = "image not at hand"
    how = cv2.INTER_AREA if rgb.shape[0] > small[1] else cv2.INTER_CUBIC
    canvas = np.asarray(cv2.resize(rgb, small, interpolation=how), np.uint8)
    answer = "" if case.answered_none else outline(case.prediction, small)
    return Picture(case, webp_uri(canvas), *small, outline(case.target, small), answer, note)
