"""Text from outside, made safe to show on a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def counted(count: int, one: str, several: str = "") -> str:
    """A number with its noun, such as ``1 image`` and ``2 images``.

    Args:
        one: what follows 1.
        several: what follows any other number; by default ``one`` with an s.
    """
    return f"{count} {one if count == 1 else several or one + 's'}"


def first_of(names: Sequence[str], most: int) -> str:
    """The first of several names, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def sanitize(text: str, *, keep_newlines: bool = False) -> str:
    r"""Text that is safe to show: control, format and surrogate characters as escapes.

    File names and expressions come from others; a terminal must not obey what is in them, and one
    message stays on one line. A byte of a file name that is no UTF-8 shows as ``\xNN``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char == "\n" and keep_newlines
        else _escape(char)
        if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        else char
        for char in text
    )


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # how Python keeps an undecodable byte
        char = chr(ord(char) - 0xDC00)
    return char.encode("unicode_escape").decode("ascii")
