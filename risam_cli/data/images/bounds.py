"""What a decoder may be given of a file from a stranger: so many bytes, scans, entries and blocks.

A few kilobytes can keep a decoder busy for hours or fill the memory without one pixel too many: by
scans that refine nothing, by chunks and tables that hold no pixels, by a file of holes. What no
encoder writes is refused (:class:`ImageError`). What a sound file may hold, but what takes so long
that it must be possible to end it, is :class:`SlowImage` to who cannot.
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import struct
from contextlib import suppress
from typing import BinaryIO, cast

from PIL import Image

from risam_cli.errors import ImageError

MOST_SCANS = 100
"""Scans of one JPEG, as libtiff bounds them; encoders write some ten."""

_QUICK_SCANS = 20
_QUICK_BLOCKS = 1 << 12  # strips or tiles of a TIFF
_MOST_ENTRIES = 1 << 12  # of a TIFF's directory
_MOST_NUMBERS = 1 << 21  # in all of them
_MOST_BYTES = 1 << 29  # likewise; layers of a picture editor among them

_PIXEL = 8  # bytes at most: 16 bits of red, green, blue and alpha, packed by nothing
_ELSE = 1 << 25  # bytes of a file that are no pixels
_READS = 1 << 18
_BEFORE = {b"GIF8": 1 << 22}  # the same, before the pixels: a comment takes the square of its size

_JPEG = b"\xff\xd8"
_J2K = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_SCAN = b"\xff\xda"
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_ALONE = frozenset(b"\x01\xd8")  # markers without a length

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STRIPS, _TILES = 273, 324
_UNITS = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), start=1))  # bytes, by type


class SlowImage(Exception):
    """A file that is to be decoded where it can be ended."""


class Metered(io.BufferedIOBase):
    """A file of which a decoder reads only so much; :meth:`allow` says how much more.

    Raises:
        ImageError: by reading, where it asks for more.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        file.seek(0)
        head = file.read(30)
        file.seek(0)
        width, height = _webp_size(head)
        self.allow(width, height, _BEFORE.get(head[:4], _ELSE))

    def allow(self, width: int, height: int, more: int = _ELSE) -> None:
        """Lets so much be read from now on as a picture of that size can take."""
        self._most = self._left = _PIXEL * width * height + more
        self._reads = _READS + (_PIXEL * width * height >> 7)  # a GIF's blocks are of 255 bytes

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file, within bounds."""
        if size is None or size < 0:
            at = self._file.tell()
            size = self._file.seek(0, io.SEEK_END) - at
            self._file.seek(at)
        data = self._file.read(size) if size <= self._left else self._file.read(self._left + 1)
        self._left -= len(data)
        self._reads -= 1
        if self._left < 0 or self._reads < 0:
            raise ImageError(
                f"{self._name}: it holds more data than a picture of its size can have (over "
                f"{self._most >> 20} MiB, or too many parts)",
                "save it again",
            )
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As of any file; costs nothing."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._file.tell()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True


@functools.cache
def known_formats() -> tuple[str, ...]:
    """The formats whose decoders are safe, as far as this Pillow has them (AVIF came with 11.3)."""
    # Importing a plugin registers it; Image.init() would load forty more.
    for plugin in ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tiff", "WebP", "Jpeg2K", "Avif"):
        with suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    safe = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF")
    return tuple(name for name in safe if name in Image.OPEN)


def metered(file: BinaryIO, name: str) -> BinaryIO:
    """A file for Pillow; a TIFF as it is, which libtiff reads by itself."""
    file.seek(0)
    is_tiff = file.read(4) in _TIFF
    file.seek(0)
    return file if is_tiff else cast(BinaryIO, Metered(file, name))


def allow_pixels(image: Image.Image) -> None:
    """Once an image's size is known: let its file be read as far as that goes."""
    file = getattr(image, "fp", None)
    if isinstance(file, Metered):
        file.allow(*image.size)


def require_bounded(file: BinaryIO, name: str, *, quick: bool = False) -> None:
    """Look at how a file is built, before its pixels are decoded; ends at its beginning.

    Args:
        quick: whether nobody could end the decoder.

    Raises:
        ImageError: it is built as no encoder would.
        SlowImage: it is not, but may take long, and ``quick`` was asked for.
    """
    file.seek(0)
    head = file.read(12)
    slow = head.startswith(_J2K)
    if head.startswith(_JPEG):
        scans = _count_scans(file)
        if scans > MOST_SCANS:
            raise ImageError(f"{name}: a JPEG of {scans} scans", "save it again as an ordinary one")
        slow = scans > _QUICK_SCANS
    else:
        slow = slow or require_modest_tiff(file, name) > _QUICK_BLOCKS
    file.seek(0)
    if slow and quick:
        raise SlowImage(name)


def _count_scans(file: BinaryIO) -> int:
    """The scans of a JPEG's first picture, or a few where they are few."""
    file.seek(0)
    # Thumbnails and second pictures count here as well, and so may what only looks so.
    most, last = 0, b""
    while chunk := file.read(1 << 20):
        most += chunk.count(_SCAN) + (last + chunk[:1] == _SCAN)
        last = chunk[-1:]
    if most <= _QUICK_SCANS:
        return most
    file.seek(0)
    data = file.read()
    scans, at = 0, 2
    while found := _MARKER.search(data, at):
        at, kind = found.end(), data[found.end() - 1]
        if kind == 0xD9:
            break
        if kind in _ALONE:
            continue
        at += int.from_bytes(data[at : at + 2], "big")
        scans += kind == 0xDA
    return scans


def require_modest_tiff(file: BinaryIO, name: str) -> int:
    """The strips or tiles of a TIFF's first picture; 0 of another file, or one that is damaged.

    Raises:
        ImageError: its directory is larger than any encoder writes.
    """
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(16)
    if not head.startswith(_TIFF):
        return 0
    order = "<" if head[:2] == b"II" else ">"
    big = b"+" in head[2:4]
    number, entry = (f"{order}Q", f"{order}HHQQ") if big else (f"{order}H", f"{order}HHII")
    blocks = total = values = 0
    try:
        file.seek(struct.unpack_from(*(number, head, 8) if big else (f"{order}I", head, 4))[0])
        (entries,) = struct.unpack(number, file.read(struct.calcsize(number)))
        table = file.read(min(entries, _MOST_ENTRIES) * struct.calcsize(entry))
        for tag, kind, count, _ in struct.iter_unpack(entry, table):
            unit = _UNITS.get(kind, 8)
            # More than the file has is not read as numbers.
            values += count if 1 < unit <= length // max(1, count) else 0
            total += min(count * unit, length)
            blocks = max(blocks, count) if tag in (_STRIPS, _TILES) else blocks
    except (struct.error, OSError, OverflowError, ValueError):
        return 0  # whatever is wrong with it, Pillow says it better
    if entries > _MOST_ENTRIES or total > _MOST_BYTES or values > _MOST_NUMBERS:
        raise ImageError(
            f"{name}: a TIFF whose directory has {entries} entries of {total >> 20} MiB",
            "save it again with larger strips or tiles",
        )
    return blocks


def _webp_size(head: bytes) -> tuple[int, int]:
    """(width, height) that a WebP claims; it is read whole before its decoder says so."""
    kind, data = head[12:16], head[20:30]
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(data) < 10:
        return 0, 0
    if kind == b"VP8X":
        width, height = int.from_bytes(data[4:7], "little"), int.from_bytes(data[7:], "little")
        return width + 1, height + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", data[6:])
    return width & 0x3FFF, height & 0x3FFF
