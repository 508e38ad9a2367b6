"""When two names mean the same: the one rule for images, ids and expressions, in every command.

- **Images** are compared as paths: a backslash parts folders as a slash does, ``.`` and doubled
  slashes do not count, ``a/../b`` is ``b``, and letters are compared in Unicode's composed form
  (NFC). ``./a.png``, ``a.png`` and ``.\\a.png`` are one image; ``A.png`` is another.
- **Ids** are compared as text: 7, 7.0 and "7" are one id, "07" is another.
- **Expressions** are compared without regard to case, white space and punctuation.

A file is *opened* by the name as it is given; only where there is no such file, the composed and
the decomposed form and slashes for backslashes are tried.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Any, Literal

_LONGEST = 1 << 14  # characters
_WHOLE_NUMBER = re.compile("0|-?[1-9][0-9]{0,99}")  # as a number is written
_COCO_NAME = re.compile(r"COCO_(?:train|val|test)20\d\d_(\d{12})")
# REFER's refs name their image with the number of an annotation behind it.
_REFER_NAME = re.compile(r"(.+_\d{12})_\d+")
_NO_WORD = frozenset(["Cc", "Cf", "Zl", "Zp", "Zs", "Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps"])


def normalized(form: Literal["NFC", "NFD", "NFKC"], text: str) -> str:
    """A text in one of Unicode's forms; one longer than names and expressions are stays as it is.

    Marks that combine are put in order in the square of their number.
    """
    return unicodedata.normalize(form, text) if len(text) <= _LONGEST else text


def image_key(name: str) -> str:
    """What two names of one image have in common."""
    parts: list[str] = []
    for part in normalized("NFC", name).replace("\\", "/").split("/"):
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return ("/" if name.startswith(("/", "\\")) else "") + "/".join(parts)


def image_tail(key: str) -> str:
    """The last part of an image's key: what names of one image share at the least."""
    return key.rpartition("/")[2]


def is_tail(key: str, other: str) -> bool:
    """Whether one of two keys is the end of the other, by whole parts."""
    own, others = key.strip("/").split("/"), other.strip("/").split("/")
    shared = min(len(own), len(others))
    return own[-shared:] == others[-shared:]


def image_core(name: str) -> str:
    """What all usual spellings of an image's name share: no folder, no suffix, no REFER number.

    COCO's images of 2014 are named by their numbers alone since 2017.
    """
    stem = PurePosixPath(image_tail(image_key(name))).stem
    refer = _REFER_NAME.fullmatch(stem)
    stem = refer[1] if refer else stem
    coco = _COCO_NAME.fullmatch(stem)
    return coco[1] if coco else stem


def id_text(value: Any) -> str | None:
    """An id as text; None where the value cannot be one (empty, a truth value, not finite)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = str(value)
    return None if text in ("", "nan", "inf", "-inf") else text


def id_key(value: Any) -> Any:
    """What two spellings of one id have in common, to find it by; what is no id stays as it is.

    It parts ids as :func:`id_text` does, but whole numbers stay numbers, which large files need
    less room and time for.
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else str(value)
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value):
        return int(value)
    return value


def expression_key(text: str) -> str:
    """What two spellings of one expression have in common."""
    plain = normalized("NFKC", text).casefold()
    words = "".join(c if c.isalnum() else " " for c in plain).split()
    return " ".join(words) or plain.strip()


def has_words(text: str) -> bool:
    """Whether it has more than white space, punctuation and characters that cannot be seen."""
    return any(c.isalnum() or unicodedata.category(c) not in _NO_WORD for c in text)


def existing(path: str) -> str:
    """The spelling of a path under which there is a file; the path itself where there is none."""
    if (path.isascii() and "\\" not in path) or os.path.lexists(path):  # one spelling, or the first
        return path
    forms = [path]
    if "\\" in path:
        forms.append(path.replace("\\", "/"))
    for form in forms:
        for kind in ("NFC", "NFD"):
            found = normalized(kind, form)
            if os.path.lexists(found):
                return found
        if os.path.lexists(form):
            return form
    return path
