"""What every page that shows pictures draws alike: pictures no larger than needed, outlines."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

_SLACK = 0.4  # pixels that an outline may move, to save points


def no_larger(rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture (H, W, 3) scaled down to ``side`` pixels at its longer side; itself if smaller."""
    scale = side / max(rgb.shape[:2])
    if scale >= 1:
        return rgb
    size = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)


def svg_path(mask: NDArray[np.bool_]) -> str:
    """The rings around a mask (H, W) and its holes, as the ``d`` of an SVG path, in pixels."""
    contours, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return "".join(_ring(np.asarray(contour, np.int32)) for contour in contours)


def _ring(contour: NDArray[np.int32]) -> str:
    points = np.asarray(cv2.approxPolyDP(contour, _SLACK, closed=True)).reshape(-1, 2)
    if len(points) < 3:  # a dot or a line: give it an area, or nothing would be drawn
        (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0) + 1
        points = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return "M" + " ".join(f"{x},{y}" for x, y in points.tolist()) + "Z"
