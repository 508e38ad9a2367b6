"""Where a mask is written: names that people can read, that stay inside, and never collide.

``masks/``, the image's path as given, two underscores, the expression's number, its words::

    street/car.jpg, first expression "the red car"  ->  masks/street/car.jpg__0-the-red-car.png

A path that cannot be taken as it is (``..``, absolute, capitals that a file system may not tell
apart, characters that some systems refuse, too long) is brought into shape, and the file's name
then ends in ten digits of the exact path's hash. So two images share a name only if they share a
path, on any file system, and a name depends on nothing but its own image and expression. No folder
under ``masks/`` is ever called ``….png``, so that ``*.png`` finds masks only.

Where a run's inputs are absolute paths, :class:`Names` leaves the folder that they have in common
out of the names.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass

from risam_cli.data.identity import normalized

MASKS = "masks"
OVERLAYS = "overlays"
GALLERY = "gallery"

_SLUG = 40  # characters of an expression in a name
_PART = 80  # bytes of one folder's name
_WHOLE = 200  # bytes of the image's path, within what every system takes
_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))]
)
UNSAFE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)
"""Characters that some system refuses, or that turn round how a name is shown."""
_NOT_WORD = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Names:
    """What images are called in the names of their files.

    Attributes:
        root: an absolute folder; images below it are named from there, and images elsewhere keep
            their whole path and a mark, so that they never meet.
        base: by their last part alone; the run sees to it that these differ.
    """

    root: str | None = None
    base: bool = False

    def of(self, image: str) -> tuple[str, bool]:
        """An image's name here, and whether its files must carry a mark."""
        if self.base:
            return image.rstrip("/").rpartition("/")[2], False
        if self.root is None:
            return image, False
        start = self.root if self.root.endswith("/") else f"{self.root}/"
        inside = image.startswith(start) and ".." not in image.split("/")
        return (image[len(start) :], False) if inside else (image, True)

    def to_json(self) -> dict[str, str | bool]:
        """For a run's identity; empty where images are named as they are given."""
        root = {} if self.root is None else {"root": self.root}
        return {**root, "base": True} if self.base else {**root}

    @classmethod
    def from_json(cls, value: object) -> Names:
        """From a run's identity."""
        if not isinstance(value, dict):
            return cls()
        root = value.get("root")
        return cls(root if isinstance(root, str) else None, value.get("base") is True)


AS_GIVEN = Names()


def mask_name(
    image: str,
    number: int,
    expression: str,
    instance: int | None = None,
    names: Names = AS_GIVEN,
) -> str:
    """Path of a mask relative to the output folder, with forward slashes.

    Args:
        image: the image's path as it stands in the records.
        number: which of this image's expressions it is, from 0; unique for the image.
        expression: its text.
        instance: which of the expression's instances it is, where each has a mask.
        names: what images are called.
    """
    base, mark = _base(image, names)
    words = slug(expression)
    # Behind a dot, which no words have.
    each = "" if instance is None else f".{instance}"
    return f"{MASKS}/{base}__{number}{'-' if words else ''}{words}{each}{mark}.png"


def overlay_name(image: str, number: int, names: Names = AS_GIVEN) -> str:
    """Path of an overlay relative to the output folder; one for all expressions of a sample.

    Args:
        number: that of the sample's first expression, as in :func:`mask_name`.
        names: what images are called.
    """
    base, mark = _base(image, names)
    return f"{OVERLAYS}/{base}__{number}{mark}.png"


def gallery_name(image: str, number: int, names: Names = AS_GIVEN) -> str:
    """Path of a sample's file in the gallery, relative to the output folder.

    Args:
        number: that of the sample's first expression, as in :func:`mask_name`.
        names: what images are called.
    """
    base, mark = _base(image, names)
    return f"{GALLERY}/items/{base}__{number}{mark}.js"


def slug(expression: str) -> str:
    """The words of an expression in lower-case ASCII, joined by hyphens, cut at a word."""
    plain = unicodedata.normalize("NFKD", expression[: 4 * _SLUG]).encode("ascii", "ignore")
    words = _NOT_WORD.sub("-", plain.decode().lower()).strip("-")
    if len(words) > _SLUG:
        words = words[: _SLUG + 1].rpartition("-")[0] or words[:_SLUG]
    return words


def _base(image: str, names: Names) -> tuple[str, str]:
    """What an image's files begin with, and the mark that they end with where that was changed."""
    called, marked = names.of(image)
    *folders, name = [part for part in called.split("/") if part not in {"", "."}] or ["_"]
    base = "/".join([*map(_folder, folders), _part(name)])
    if len(base.encode()) > _WHOLE:
        base = f"_/{_part(name)}"
    if not marked and base == called and base.isascii() and base == base.lower():
        return base, ""
    return base, "." + hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest()[:10]


def _folder(part: str) -> str:
    safe = _part(part)
    return f"{safe}_" if safe.lower().endswith(".png") else safe


def _part(part: str) -> str:
    """One part of a path as every file system takes it. Different parts may become the same."""
    if part == "..":
        return "_up"
    safe = UNSAFE.sub("_", normalized("NFC", part))
    safe = safe.encode()[:_PART].decode(errors="ignore").rstrip(". ") or "_"
    return f"_{safe}" if safe.partition(".")[0].lower() in _RESERVED else safe
