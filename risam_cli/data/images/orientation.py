"""Which way up a picture is: EXIF orientation, read and applied."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TURNED = frozenset({5, 6, 7, 8})
"""Orientations that swap height and width."""

_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation_to_apply(image: Image.Image) -> int:
    """EXIF orientation, 1..8, by which decoded pixels are yet to be turned; 1 where none is known.

    Pillow turns TIFF by itself as it decodes, and names the upright size from the start.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # getexif() would, to look behind the pixels; damage there must be told
    try:
        value = image.getexif().get(_TAG, 1)
    except Exception:  # whatever is wrong with EXIF, the pixels are still good
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def upright(picture: Image.Image, orientation: int) -> NDArray[np.uint8]:
    """Pixels (H, W) or (H, W, 3) turned as an EXIF orientation says."""
    if orientation != 1:
        picture = picture.transpose(_TRANSPOSE[orientation])
    return np.array(picture, np.uint8)
