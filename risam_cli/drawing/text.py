"""Text as pixels, in any script that a font at hand knows. No font file is shipped.

OpenCV 5 carries fonts for Latin, Greek, Cyrillic, Hebrew, Chinese, Japanese and Korean. With
OpenCV 4, Pillow's own font writes ASCII, and other text looks for a common font of the system; what
that one lacks shows as its empty box, and without one as an escape, such as ``\\u0e01``.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from risam_cli.console.text import sanitize

Alpha = NDArray[np.uint8]

# OpenCV's fonts keep state: two threads that draw at once cut each other's lines short.
_FONT = threading.Lock()

_HAS_FACES = hasattr(cv2, "FontFace")
_WEIGHT = 500  # a little bolder than regular, for small sizes on colour
_SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "Arial.ttf",
)


def text_mask(text: str, size: int) -> Alpha:
    """Coverage (h, w) in 0..255 of one line of text, cut to its ink's width.

    Args:
        text: control characters are shown as escapes.
        size: height of the letters' box in pixels; ``h`` is the same for all text of one size.
    """
    line = sanitize(text) or " "
    # Far above 0xFFFF OpenCV's fonts have no letters and write a question mark.
    line = "".join(c if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in line)
    return _by_opencv(line, size) if _HAS_FACES else _by_pillow(line, size)


def fit_text(text: str, size: int, width: int) -> Alpha:
    """As :func:`text_mask`, cut in the middle with an ellipsis where it is wider than ``width``."""
    drawn = text_mask(text, size)
    if drawn.shape[1] <= width:
        return drawn
    low, high = 0, len(text)
    while low < high:  # the longest that fits
        keep = (low + high + 1) // 2
        if text_mask(_shorten(text, keep), size).shape[1] <= width:
            low = keep
        else:
            high = keep - 1
    return text_mask(_shorten(text, low), size)[:, :width]


def _shorten(text: str, keep: int) -> str:
    head = (keep + 1) // 2
    tail = keep - head
    return text[:head].rstrip() + "..." + (text[-tail:].lstrip() if tail else "")


def _by_opencv(line: str, size: int) -> Alpha:
    face = _face()
    height, base = round(1.3 * size), round(1.0 * size)
    with _FONT:
        # The canvas is generous: the font's own measure leaves out overhanging strokes.
        (_, _, measured, _) = _rect(line, face, size)
        canvas = np.zeros((height, max(1, measured + size), 3), np.uint8)
        cv2.putText(canvas, line, (size // 4, base), (255, 255, 255), face, size, _WEIGHT)
    return _cut(canvas[..., 0])


def _rect(line: str, face: Any, size: int) -> tuple[int, int, int, int]:
    x, y, w, h = cv2.getTextSize((1 << 15, 1 << 10), line, (0, 0), face, size, _WEIGHT)
    return int(x), int(y), int(w), int(h)


@functools.cache
def _face() -> Any:
    return cv2.FontFace("sans")


def _by_pillow(line: str, size: int) -> Alpha:
    font = _font(size, line.isascii())
    if font is None:
        line = line.encode("ascii", "backslashreplace").decode()
        font = _font(size, True)
    assert font is not None
    width = max(1, round(font.getlength(line)) + size)
    image = Image.new("L", (width, round(1.3 * size)))
    ImageDraw.Draw(image).text((size // 4, size), line, fill=255, font=font, anchor="ls")
    return _cut(np.asarray(image))


@functools.lru_cache(64)
def _font(size: int, plain: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    if plain:
        return ImageFont.load_default(size)
    for name in _SYSTEM_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def _cut(alpha: NDArray[np.uint8]) -> Alpha:
    columns = np.flatnonzero(alpha.any(axis=0))
    if not columns.size:
        return np.zeros((alpha.shape[0], 1), np.uint8)
    return np.ascontiguousarray(alpha[:, columns[0] : columns[-1] + 1])
