"""Where the files of one image go: the image's own path, made safe, and made unique if need be.

Other tools pair a label with its image by name (``images/a/b.jpg``, ``labels/a/b.txt``), so a name
is changed only where it must be: characters that some system refuses become ``_``, ``..`` becomes
``_up``, and leading slashes go. Images that would then meet (``a.jpg`` beside ``a.png``, ``A.jpg``
beside ``a.jpg``) carry ten digits of the exact path's hash.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Container
from pathlib import PurePosixPath

# Refused by some system, or turning round how a name is shown.
_UNSAFE = re.compile(
    r'[\x00-\x1f\x7f-\x9f<>:"|?*\\\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]'
)
_FILES = frozenset(
    {".txt", ".json", ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
)
_PART = 180  # bytes of one part; the hash and a suffix still fit in the 255 that systems take
_WHOLE = 600  # bytes of the whole


def target_name(image: str, meeting: Container[int] = ()) -> str:
    """Relative path, with forward slashes and the image's suffix, for an image's files.

    Args:
        meeting: keys (see :func:`meeting_key`) that more than one image has.
    """
    safe = _safe(image)
    if meeting_key(image) not in meeting:
        return safe
    path = PurePosixPath(safe)
    mark = hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    # Not with_suffix: a name such as "v1.2" has no suffix that is one.
    stem = path.name[: len(path.name) - len(path.suffix)]
    return str(path.with_name(f"{stem}.{mark}{path.suffix}"))


def meeting_key(image: str) -> int:
    """64 bits that are equal for images whose labels would have one name on some file system."""
    path = PurePosixPath(_safe(image))
    stem = str(path)[: len(str(path)) - len(path.suffix)]
    folded = unicodedata.normalize("NFC", stem).casefold()
    digest = hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def replace_suffix(target: str, suffix: str) -> str:
    """A target with another suffix, such as ``.txt``."""
    path = PurePosixPath(target)
    return str(path.with_name(path.name[: len(path.name) - len(path.suffix)] + suffix))


def _safe(image: str) -> str:
    parts = [_part(part) for part in image.split("/") if part not in {"", "."}]
    # A folder called as a file may be (a.jpg/b.jpg beside a.jpg) would stand in that file's way.
    parts[:-1] = [f"{p}_" if PurePosixPath(p).suffix.lower() in _FILES else p for p in parts[:-1]]
    whole = "/".join(parts) or "_"
    return whole if len(whole.encode()) <= _WHOLE else f"_/{parts[-1]}"


def _part(part: str) -> str:
    if part == "..":
        return "_up"
    safe = _UNSAFE.sub("_", part)
    if len(safe.encode()) > _PART:
        suffix = PurePosixPath(safe).suffix
        suffix = suffix if len(suffix.encode()) <= 10 else ""
        room = _PART - len(suffix.encode())
        safe = safe.encode()[:room].decode(errors="ignore") + suffix
    return safe.rstrip(". ") or "_"
