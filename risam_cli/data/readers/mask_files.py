"""A mask out of an image file: judged by what is in the file, told where that is not sure (ours).

| file | in the mask |
|---|---|
| gray or colour, exact (PNG, TIFF …) of two values, or of labels up to 127 | what is not 0 |
| gray of many values up to 255 (soft edges, probabilities) | 128 and above; a doubt |
| JPEG and other lossy files | 128 and above; half of the largest where nothing is that bright |
| a palette | indices but 0, whose colour is the background's; a doubt where that is not black |
| alpha that varies | 128 and above of alpha; a doubt where the colours say otherwise |

EXIF orientation is applied, as to images.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from risam_cli.data.images.bounds import allow_pixels, known_formats, metered, require_bounded
from risam_cli.data.images.orientation import orientation_to_apply, upright
from risam_cli.errors import DataError, reason_of
from risam_cli.masks import rle as masks
from risam_cli.types import Rle

_MAX_FILE = 1 << 28  # bytes
_HALF = 128
_LOSSY = frozenset({"JPEG", "MPO", "JPEG2000", "AVIF"})


def read_mask_file(path: Path, where: str, doubt: Callable[[str], None], *, no_file: str) -> Rle:
    """The mask that an image file holds.

    Args:
        where: it is named, for messages; no_file: what to do where it cannot be opened.
        doubt: told what was decided where the file can be read in two ways.

    Raises:
        DataError: there is no such file, or it is not an image.
    """
    name = f"{where}: the mask {path}"
    try:
        status = os.stat(path)
        # A pipe would be waited on for ever.
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE:
            size = f"has {status.st_size >> 20} MiB" if status.st_size else "is not a regular file"
            raise DataError(f"{name} {size}", "give a PNG, 0 outside the mask")
        data = path.read_bytes()
        # The header first: a few bytes can stand for gigabytes of pixels.
        require_bounded(io.BytesIO(data), name)
        with Image.open(metered(io.BytesIO(data), name), formats=known_formats()) as image:
            allow_pixels(image)
            try:
                orientation = orientation_to_apply(image)
                image.load()
                inside = _inside(image, doubt)
            except (OSError, ValueError, SyntaxError) as error:
                why = f"{name} is not an image that can be read ({error})"
                raise DataError(why, "copy or write it again") from None
            if orientation != 1:
                turned = upright(Image.fromarray(inside.view(np.uint8)), orientation)
                inside = turned.view(np.bool_)
            return masks.encode(inside)
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large: {error}", "cut it up") from None
    except (UnidentifiedImageError, SyntaxError):
        raise DataError(f"{name} is not an image", "give a PNG, 0 outside the mask") from None
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise DataError(f"{name} cannot be read: {reason_of(error)}", no_file) from None


def _inside(image: Image.Image, doubt: Callable[[str], None]) -> NDArray[np.bool_]:
    kind = image.format  # which what is converted no longer has
    if image.mode in ("P", "PA"):
        return _by_palette(image, doubt)
    if image.mode in ("LA", "RGBA", "La", "RGBa"):
        alpha = np.asarray(image.getchannel(image.getbands()[-1]))
        if alpha.min() != alpha.max():
            return _by_alpha(image, alpha, doubt)
        image = image.convert("L" if image.mode in ("LA", "La") else "RGB")
    elif image.mode in ("CMYK", "YCbCr", "LAB"):
        image = image.convert("RGB")
    levels = np.asarray(image)
    bright = levels if levels.ndim == 2 else levels[..., :3].max(axis=2)
    if bright.dtype == np.bool_:
        return np.asarray(bright, np.bool_)
    if kind in _LOSSY or (kind == "WEBP" and _is_many(bright)):
        most = int(bright.max())
        if 0 < most < _HALF:
            doubt(
                "is a lossy file without a bright pixel: above half of its largest value was taken"
            )
            return np.asarray(bright > most / 2)
        return np.asarray(bright >= _HALF)
    if bright.dtype == np.uint8 and int(bright.max()) >= _HALF and _is_many(bright):
        doubt("holds gray levels between: 128 and above was taken for the mask")
        return np.asarray(bright >= _HALF)
    return np.asarray(bright != 0)


def _by_palette(image: Image.Image, doubt: Callable[[str], None]) -> NDArray[np.bool_]:
    index = np.asarray(image.getchannel(0) if image.mode == "PA" else image)
    colors = image.getpalette("RGB") or []
    if any(colors[:3]) and (index == 0).any():
        doubt("has a palette whose first colour is not black: index 0 was taken for background")
    return np.asarray(index != 0)


def _by_alpha(
    image: Image.Image, alpha: NDArray[np.uint8], doubt: Callable[[str], None]
) -> NDArray[np.bool_]:
    inside = alpha >= _HALF
    levels = np.asarray(image)[..., :-1]
    colored = (levels != 0).any(axis=2)
    if colored[inside].any() and not colored[inside].all():
        doubt("has an alpha channel and colours that differ from it: alpha was taken for the mask")
    return np.asarray(inside)


def _is_many(bright: NDArray[np.generic]) -> bool:
    """Whether it has more than two values."""
    low, high = bright.min(), bright.max()
    return bool(((bright != low) & (bright != high)).any())
