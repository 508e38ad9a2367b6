"""Samples of more than 8 bits as 8 bits; the one rule for every kind of file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BAND_PIXELS = 1 << 22  # rows are scaled in bands of about this many samples


def scale_to_8_bit(deep: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Integers or floats (H, W) or (H, W, bands) as 8 bits, all bands alike.

    16 unsigned bits are scaled (65535 becomes 255). Other integers are taken as 16-bit where they
    fit, floats as 0..1 where they fit; else both are stretched to their own range.
    """
    if deep.dtype == np.uint8:
        return np.asarray(deep, np.uint8)
    low, high = _range_of(deep)
    kind, unsigned = deep.dtype.kind, deep.dtype.kind == "u" and deep.dtype.itemsize == 2
    if unsigned or (kind in "iu" and low >= 0 and high <= 65535):
        low, high = 0.0, 65535.0
    elif kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scale = 255.0 / (high - low) if high > low else 0.0
    result = np.empty(deep.shape, np.uint8)
    rows = max(1, _BAND_PIXELS // (deep[:1].size or 1))  # never the whole image in float
    for top in range(0, deep.shape[0], rows):
        band = np.nan_to_num(deep[top : top + rows].astype(np.float64), posinf=high, neginf=low)
        result[top : top + rows] = np.clip((band - low) * scale + 0.5, 0, 255)
    return result


def _range_of(deep: NDArray[np.generic]) -> tuple[float, float]:
    """Least and greatest finite value."""
    if deep.dtype.kind != "f":
        return float(deep.min()), float(deep.max())
    finite = deep[np.isfinite(deep)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
