"""Where the files of one image go: the image's own path, made safe, and made unique if need be.

Other tools pair a label with its image by name (``images/a/b.jpg``, ``labels/a/b.txt``), so a name
is changed only where it must be: characters that some system refuses become ``_``, ``..`` becomes
``_up``, and leading slashes go. Images that would then meet (``a.jpg`` beside ``a.png``, ``A.jpg``
beside ``a.jpg``) carry ten digits of the exact path's hash.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Container
from itertools import takewhile
from pathlib import PurePosixPath

import numpy as np

from risam_cli.data.identity import image_key, normalized
from risam_cli.errors import UsageError, setting
from risam_cli.files.hashing import hash64
from risam_cli.outputs.naming import UNSAFE

RELATIVE, BASE, ABSOLUTE = "relative", "base", "absolute"
"""What the setting ``names`` takes."""

_FILES = frozenset(
    {".txt", ".json", ".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
)
_PART = 180  # bytes of one part; the hash and a suffix still fit in the 255 that systems take
_WHOLE = 600  # bytes of the whole


class Placement:
    """Names the files of an export's images; is shown every image before it names any.

    Args:
        without: a folder's name that is left out of all paths: readers of YOLO look for labels by
            exchanging the last ``images`` of a path, so there may be no other.
        names: ``relative`` leaves out what all images have in common where all are absolute paths;
            ``base`` takes the file's name alone; ``absolute`` keeps the whole.
    """

    def __init__(self, without: str | None = None, names: str = RELATIVE) -> None:
        self._without = without
        self._names = names
        self._absolute = True
        self._places = array("Q")  # pairs of an image's place in a split and its hash
        self._split: tuple[float, tuple[int, int]] | None = None
        self._bases: dict[str, str] = {}
        self._keys = array("Q")  # pairs of a target's key and its image's
        self._meeting: frozenset[int] | None = None
        self._common: list[str] | None = None  # of targets
        self._shared: list[str] | None = None  # of the images themselves
        self._all = True

    def see(self, image: str) -> None:
        """Take note of an image; a second time does no harm."""
        self._keys.extend((meeting_key("/".join(self._parts(image))), image_hash(image)))
        *folders, _ = self._parts(image) or [""]
        self._common = _in_common(self._common, folders)
        self._shared = _in_common(self._shared, image_key(image).strip("/").split("/")[:-1])
        self._absolute &= image.startswith("/")
        if self._names == BASE:
            key = image_key(image)
            other = self._bases.setdefault(key.rpartition("/")[2], key)
            if other != key:
                raise UsageError(
                    f"{setting('names', BASE)}: {other} and {key} have the same name",
                    f"give {setting('names', RELATIVE)}",
                )
        self._places.extend(_split_place(image))
        if self._without is not None:
            self._all &= self._without in image_key(image).split("/")[:-1]

    def target(self, image: str) -> str:
        """Relative path, with forward slashes and the image's suffix, for an image's files."""
        if self._meeting is None:
            pairs = np.unique(np.frombuffer(self._keys, np.uint64).reshape(-1, 2), axis=0)
            met, times = np.unique(pairs[:, 0], return_counts=True)
            self._meeting = frozenset(met[times > 1].tolist())
        parts = self._parts(image)
        whole = "/".join(parts)
        marked = self._meeting if meeting_key(whole) in self._meeting else ()
        short = "/".join(parts[min(self._dropped, len(parts) - 1) :])
        mark = {meeting_key(short)} if marked else ()
        return target_name(short, mark, exact=image)

    def own_name(self, image: str) -> str:
        """What :meth:`target` would be if no name had to change."""
        return "/".join(self._parts(image)[self._dropped :])

    def name(self, image: str) -> str:
        """What lists of images call it: as it is given, but for absolute paths and ``base``."""
        if self._names == BASE:
            return image_key(image).rpartition("/")[2]
        if self._names == ABSOLUTE or not self._absolute:
            return image
        own = [part for part in image.split("/") if part not in {"", "."}]
        parts = image_key(image).strip("/").split("/") if ".." in own else own
        return "/".join(parts[len(self._shared or []) :])

    def is_train(self, image: str, share: float) -> bool:
        """Whether an image is for training, where a ``share`` of all is, to the nearest image.

        Images are in an order that hangs on their names alone, and the first ones are for training:
        the same ones in every run, and other images that come or go move few. Neither part of
        several images stays empty.
        """
        if self._split is None or self._split[0] != share:
            places = np.unique(np.frombuffer(self._places, np.uint64).reshape(-1, 2), axis=0)
            count = round(share * len(places))
            if len(places) > 1:
                count = min(max(count, 1), len(places) - 1)
            # What is behind all of them, where all are for training.
            first, second = places[count].tolist() if count < len(places) else (1 << 64, 0)
            self._split = share, (first, second)
        return _split_place(image) < self._split[1]

    @property
    def folder(self) -> str | None:
        """The folder that names of absolute paths start in; None where names are as given."""
        stripped = self._names == RELATIVE and self._absolute and self._shared is not None
        return "/" + "/".join(self._shared or []) if stripped else None

    @property
    def _dropped(self) -> int:
        """How many folders that all images share are left out of targets."""
        # Where every image lies below such a folder, what leads to it is the data set's own place.
        below = self._without is not None and self._all
        return len(self._common or []) if below or self.folder is not None else 0

    def _parts(self, image: str) -> list[str]:
        if self._names == BASE:
            return [image_key(image).rpartition("/")[2]]
        if self._without is None:
            return [part for part in image.split("/") if part not in {"", "."}]
        *folders, name = image_key(image).strip("/").split("/")
        return [*(folder for folder in folders if folder != self._without), name]


def _in_common(before: list[str] | None, folders: list[str]) -> list[str]:
    """The folders that paths begin with, those before and one more."""
    if before is None:
        return folders
    shared = zip(before, folders, strict=False)
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], shared)]


def _split_place(image: str) -> tuple[int, int]:
    """Where an image stands in a split: by its folder and name, wherever these lie, and among
    equals by its whole path.
    """
    tail = "/".join(image_key(image).split("/")[-2:])
    data = hashlib.blake2b(tail.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(data, "big"), image_hash(image)


def target_name(image: str, meeting: Container[int] = (), *, exact: str | None = None) -> str:
    """Relative path, with forward slashes and the image's suffix, for an image's files.

    Args:
        meeting: keys (see :func:`meeting_key`) that more than one image has.
        exact: what the image is called as a whole, where ``image`` is a part of it.
    """
    safe = _safe(image)
    if meeting_key(image) not in meeting:
        return safe
    path = PurePosixPath(safe)
    whole = image if exact is None else exact
    mark = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    # Not with_suffix: a name such as "v1.2" has no suffix that is one.
    stem = path.name[: len(path.name) - len(path.suffix)]
    return str(path.with_name(f"{stem}.{mark}{path.suffix}"))


def meeting_key(image: str) -> int:
    """64 bits that are equal for images whose labels would have one name on some file system."""
    path = PurePosixPath(_safe(image))
    stem = str(path)[: len(str(path)) - len(path.suffix)]
    return hash64(normalized("NFC", stem).casefold())


def image_hash(image: str) -> int:
    """64 bits that are equal for names of one image."""
    return hash64(image_key(image))


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
    safe = UNSAFE.sub("_", part)
    if len(safe.encode()) > _PART:
        suffix = PurePosixPath(safe).suffix
        suffix = suffix if len(suffix.encode()) <= 10 else ""
        room = _PART - len(suffix.encode())
        safe = safe.encode()[:room].decode(errors="ignore") + suffix
    return safe.rstrip(". ") or "_"
