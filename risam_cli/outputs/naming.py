"""Where a mask is written: names that people can read, that stay inside, and never collide.

``masks/``, the image's path as given, two underscores, the expression's number, its words::

    street/car.jpg, first expression "the red car"  ->  masks/street/car.jpg__0-the-red-car.png

A path that cannot be taken as it is (``..``, absolute, capitals that a file system may not tell
apart, characters that some systems refuse, too long) is brought into shape, and the file's name
then ends in ten digits of the exact path's hash. So two images share a name only if they share a
path, on any file system, and a name depends on nothing but its own image and expression. No folder
under ``masks/`` is ever called ``….png``, so that ``*.png`` finds masks only.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

MASKS = "masks"
OVERLAYS = "overlays"
GALLERY = "gallery"

_SLUG = 40  # characters of an expression in a name
_PART = 80  # bytes of one folder's name
_WHOLE = 200  # bytes of the image's path, within what every system takes
_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))]
)
# Refused by some system, or turning round how a name is shown.
_UNSAFE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)
_NOT_WORD = re.compile(r"[^a-z0-9]+")


def mask_name(image: str, number: int, expression: str, instance: int | None = None) -> str:
    """Path of a mask relative to the output folder, with forward slashes.

    Args:
        image: the image's path as it stands in the records.
        number: which of this image's expressions it is, from 0; unique for the image.
        expression: its text.
        instance: which of the expression's instances it is, where each has a mask.
    """
    base, mark = _base(image)
    words = slug(expression)
    # Behind a dot, which no words have.
    each = "" if instance is None else f".{instance}"
    return f"{MASKS}/{base}__{number}{'-' if words else ''}{words}{each}{mark}.png"


def overlay_name(image: str, number: int) -> str:
    """Path of an overlay relative to the output folder; one for all expressions of a sample.

    Args:
        number: that of the sample's first expression, as in :func:`mask_name`.
    """
    base, mark = _base(image)
    return f"{OVERLAYS}/{base}__{number}{mark}.png"


def gallery_name(image: str, number: int) -> str:
    """Path of a sample's file in the gallery, relative to the output folder.

    Args:
        number: that of the sample's first expression, as in :func:`mask_name`.
    """
    base, mark = _base(image)
    return f"{GALLERY}/items/{base}__{number}{mark}.js"


def slug(expression: str) -> str:
    """The words of an expression in lower-case ASCII, joined by hyphens, cut at a word."""
    plain = unicodedata.normalize("NFKD", expression[: 4 * _SLUG]).encode("ascii", "ignore")
    words = _NOT_WORD.sub("-", plain.decode().lower()).strip("-")
    if len(words) > _SLUG:
        words = words[: _SLUG + 1].rpartition("-")[0] or words[:_SLUG]
    return words


def _base(image: str) -> tuple[str, str]:
    """What an image's files begin with, and the mark that they end with where that was changed."""
    *folders, name = [part for part in image.split("/") if part not in {"", "."}] or ["_"]
    base = "/".join([*map(_folder, folders), _part(name)])
    if len(base.encode()) > _WHOLE:
        base = f"_/{_part(name)}"
    if base == image and base.isascii() and base == base.lower():
        return base, ""
    return base, "." + hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def _folder(part: str) -> str:
    safe = _part(part)
    return f"{safe}_" if safe.lower().endswith(".png") else safe


def _part(part: str) -> str:
    """One part of a path as every file system takes it. Different parts may become the same."""
    if part == "..":
        return "_up"
    safe = _UNSAFE.sub("_", unicodedata.normalize("NFC", part))
    safe = safe.encode()[:_PART].decode(errors="ignore").rstrip(". ") or "_"
    return f"_{safe}" if safe.partition(".")[0].lower() in _RESERVED else safe
