"""Values as JSON would have them, where tables and tools write them otherwise."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief, load_json

_LONGEST_LITERAL = 1 << 20  # characters; its parser takes a thousandfold in bytes


def cell(key: str, text: str) -> Any:
    """A cell as JSON would have it: numbers, truth values, and what pandas makes of an RLE."""
    if key in ("score", "no_target_probability", "predicted_iou"):
        return _number(text)
    if key in ("height", "width"):
        return whole(text)
    if key == "no_target":
        return {"true": True, "false": False, "1": True, "0": False}.get(text.strip().lower(), text)
    if key in ("segmentation", "bbox", "notes"):
        try:
            return load_json(text)
        except ValueError:
            if len(text) > _LONGEST_LITERAL:
                return text
            try:
                return ast.literal_eval(text)  # values only; nothing is run
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return text
    return text


def whole(value: Any) -> Any:
    """3 for "3", "3.0" and 3.0, as pandas and spreadsheets write it; else the value as it is."""
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if text.isdecimal() and len(text) < 20 else _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def stated_size(
    found: Mapping[str, Any],
    where: str,
    fix: str = "both are whole numbers of pixels above 0",
    keys: tuple[str, str] = ("height", "width"),
) -> tuple[int, int] | None:
    """(H, W) in pixels that an object states, or None where it states neither.

    Raises:
        DataError: one is missing, or is no whole number above 0.
    """
    given = [found.get(key) for key in keys]
    height, width = map(whole, given)
    if height is None and width is None:
        return None
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise DataError(
            f"{where}: '{keys[0]}' and '{keys[1]}' are {brief(given[0])} and {brief(given[1])}", fix
        )
    return height, width


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def is_utf8(text: str) -> bool:
    """Whether a cell was UTF-8: other bytes are surrogates in it."""
    return text.isascii() or not any("\udc80" <= char <= "\udcff" for char in text)
