"""Masks as PNG files: 8-bit gray, 0 outside and 255 inside.

8 bits rather than 1, because readers differ on 1: Pillow gives booleans for it, OpenCV 0 and 255.
At the lowest effort and with run-length matching a 1024x1024 mask takes about 1.9 ms and 5 kB,
against 1.5 ms and 8 kB as a 1-bit PNG, and 7.4 ms by Pillow.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.errors import OutputError

_OPTIONS = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
if hasattr(cv2, "IMWRITE_PNG_FILTER"):  # from OpenCV 4.12; four times faster on masks
    _OPTIONS += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """The PNG file of a mask (H, W), in memory."""
    gray = mask.astype(np.uint8) * np.uint8(255)
    done, data = cv2.imencode(".png", gray, _OPTIONS)
    if not done:
        raise OutputError(f"a mask of {mask.shape} could not be written as PNG")
    return data.tobytes()


def encode_rgb(rgb: NDArray[np.uint8]) -> bytes:
    """The PNG file of an image (H, W, 3), in memory."""
    done, data = cv2.imencode(
        ".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1]
    )
    if not done:
        raise OutputError(f"an image of {rgb.shape} could not be written as PNG")
    return data.tobytes()
