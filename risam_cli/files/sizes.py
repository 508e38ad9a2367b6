"""Sizes in bytes, as people write them."""

from __future__ import annotations

import math
import re

from risam_cli.files.jsonlines import brief

_UNITS = {"B": 0, "KB": 1, "MB": 2, "GB": 3, "TB": 4}


def parse_size(text: str) -> int:
    """Bytes of ``50GB``, ``1.5 TB`` or ``4096``; 1 GB is 1024 MB, and so on down to the byte.

    Raises:
        ValueError: it is no size, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?\s*", text, re.IGNORECASE)
    size = 0
    if found is not None and len(found[1]) <= 30:
        size = math.floor(float(found[1]) * 1024 ** _UNITS[f"{found[2].upper()}B"])
    if size <= 0:
        raise ValueError(f"{brief(text)} is not a size; write it as 50GB, 800MB or 1.5TB")
    return size


def show_size(size: float) -> str:
    """Bytes with three digits that count, such as ``14.7 MB``."""
    unit = "B"
    for unit in _UNITS:
        if size < 999.5 or unit == "TB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
