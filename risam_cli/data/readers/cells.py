"""The cells of a table of results as JSON would have them."""

from __future__ import annotations

import ast
from typing import Any

from risam_cli.files.jsonlines import load_json

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


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def is_utf8(text: str) -> bool:
    """Whether a cell was UTF-8: other bytes are surrogates in it."""
    return text.isascii() or not any("\udc80" <= char <= "\udcff" for char in text)
