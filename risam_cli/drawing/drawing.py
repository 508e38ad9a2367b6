"""What every page that shows pictures draws alike: pictures no larger than needed, outlines."""

from __future__ import annotations

import base64

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.masks import rle as masks
from risam_cli.types import Rle

_SLACK = 0.4  # pixels that an outline may move, to save points


def no_larger(rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A picture (H, W, 3) scaled down to ``side`` pixels at its longer side; itself if smaller."""
    return rgb if max(rgb.shape[:2]) <= side else fitted(rgb, side, side)


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


_QUALITY = 75


def outline(rle: Rle, size: tuple[int, int]) -> str:
    """The outline of a mask, holes too, at (width, height), as SVG path data."""
    dense = masks.decode(rle).astype(np.float32)
    how = cv2.INTER_AREA if dense.shape[1] > size[0] else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(dense, size, interpolation=how))
    # A target of a few pixels must not vanish.
    found = resized >= 0.5
    found = found if found.any() or not dense.any() else resized > 0
    return svg_path(found)


def encode_webp(rgb: NDArray[np.uint8], quality: int = _QUALITY) -> bytes:
    """An image (H, W, 3) as a WebP file."""
    done, data = cv2.imencode(".webp", rgb[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, quality])
    if not done:
        raise RuntimeError("OpenCV was built without WebP")
    return data.tobytes()


def webp_uri(rgb: NDArray[np.uint8], quality: int = _QUALITY) -> str:
    """An image (H, W, 3) as a ``data:`` address of a WebP file."""
    return f"data:image/webp;base64,{base64.b64encode(encode_webp(rgb, quality)).decode('ascii')}"


def fitted(rgb: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """A picture (H, W, 3) as large as fits into width and height."""
    scale = min(width / rgb.shape[1], height / rgb.shape[0])
    size = max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(rgb, size, interpolation=how), np.uint8)


def with_outline(picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """A picture (h, w, 3), dim but for a mask (H, W) of any size, whose outline is drawn."""
    height, width = picture.shape[:2]
    how = cv2.INTER_AREA if mask.shape[1] > width else cv2.INTER_LINEAR
    share = cv2.resize(mask.astype(np.float32), (width, height), interpolation=how)
    inside = (np.asarray(share) >= 0.5).astype(np.uint8)
    if not inside.any():
        return picture.copy()
    # No colour stands out on every picture; its own do, once all the rest is dim.
    drawn = np.where(inside[..., None] > 0, picture, (0.4 * picture).astype(np.uint8))
    rings, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(drawn, rings, -1, (0, 0, 0), 4, cv2.LINE_AA)
    cv2.drawContours(drawn, rings, -1, (255, 255, 255), 2, cv2.LINE_AA)
    return drawn


def write_text(
    area: NDArray[np.uint8], text: NDArray[np.uint8], tint: tuple[int, int, int]
) -> None:
    """Writes coverage (h, w) in 0..255 in a colour into the upper left of an area (H, W, 3)."""
    height, width = min(area.shape[0], text.shape[0]), min(area.shape[1], text.shape[1])
    share = text[:height, :width, None].astype(np.float32) / 255
    under = area[:height, :width]
    under[:] = np.round((1 - share) * under + share * np.array(tint)).astype(np.uint8)
