"""Cases as small pictures: the image with ground truth and answer outlined."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli import masks
from risam_cli.data.images import open_rgb
from risam_cli.engine.evaluate import Case
from risam_cli.errors import ImageError
from risam_cli.types import Rle

TRUTH = (86, 180, 233)
"""Sky blue of Okabe and Ito's palette, told apart from the other by every kind of eye."""
ANSWER = (230, 159, 0)
"""Orange of the same palette."""

_SIDE = 320
_QUALITY = 80
_PLAIN = 96  # gray of the ground where the image is not at hand


@dataclass(frozen=True, slots=True)
class Picture:
    """One case, drawn.

    Attributes:
        uri: a ``data:`` address of a WebP image.
        width, height: of the drawn image in pixels.
        note: why the image itself is not shown, or empty.
    """

    case: Case
    uri: str
    width: int
    height: int
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
    shrinks = rgb.shape[0] > small[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    canvas = np.asarray(cv2.resize(rgb, small, interpolation=how), np.uint8).copy()
    truth, answer = (_resized(rle, small) for rle in (case.target, case.prediction))
    if case.answered_none:
        answer[:] = False
    _tint(canvas, answer, ANSWER)
    # The truth lies broader below the answer, so that both show where they agree.
    lines = [(_contours(truth), TRUTH, 6), (_contours(answer), ANSWER, 2)]
    for contours, _, width_px in lines:
        cv2.drawContours(canvas, contours, -1, (0, 0, 0), width_px + 2, cv2.LINE_AA)
    for contours, color, width_px in lines:
        cv2.drawContours(canvas, contours, -1, color, width_px, cv2.LINE_AA)
    return Picture(case, _uri(canvas), small[0], small[1], note)


def _resized(rle: Rle, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask at (width, height), smooth enough for an outline."""
    dense = masks.decode(rle).astype(np.float32)
    shrinks = dense.shape[1] > size[0]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(dense, size, interpolation=how))
    # A target of a few pixels must not vanish.
    found = resized >= 0.5
    return found if found.any() or not dense.any() else resized > 0


def _tint(canvas: NDArray[np.uint8], mask: NDArray[np.bool_], color: tuple[int, int, int]) -> None:
    canvas[mask] = (0.72 * canvas[mask] + 0.28 * np.array(color)).astype(np.uint8)


def _contours(mask: NDArray[np.bool_]) -> Sequence[NDArray[np.int32]]:
    found, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [np.asarray(contour, np.int32) for contour in found]


def _uri(rgb: NDArray[np.uint8]) -> str:
    done, data = cv2.imencode(".webp", rgb[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, _QUALITY])
    if not done:
        raise RuntimeError("OpenCV was built without WebP")
    return f"data:image/webp;base64,{base64.b64encode(data.tobytes()).decode('ascii')}"
