"""Files that would keep a decoder busy, or fill the memory, without one pixel too many."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.hostile_images import chunk, many_scans, png, saved

from risam_cli.data.images.bounds import SlowImage
from risam_cli.data.images.frames import sam_frame
from risam_cli.data.images.images import image_size, open_rgb, read_for_encoder
from risam_cli.data.readers.mask_files import read_mask_file
from risam_cli.errors import DataError, ImageError

_GRAY = zlib.compress((b"\0" + b"\x55" * 8) * 8)
_SPARSE = 1 << 30


def _gif_comment(size: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"," + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + b"\x02\x02\x44\x01\0;"
    return screen + b"!\xfe" + (b"\xff" + b"c" * 255) * (size >> 8) + b"\0" + frame


def _tiff(*more: tuple[int, int, int, int], entries: int = 0) -> bytes:
    """Little-endian, 64x64 gray; with ``entries`` empty entries besides."""
    table = {256: (4, 1, 64), 257: (4, 1, 64), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    table |= {273: (4, 1, 512), 278: (4, 1, 64), 279: (4, 1, 4096)}
    table |= {tag: (kind, count, value) for tag, kind, count, value in more}
    table |= {1000 + k: (3, 1, 1) for k in range(entries)}
    packed = b"".join(struct.pack("<HHII", tag, *table[tag]) for tag in sorted(table))
    return b"II*\0" + struct.pack("<IH", 8, len(table)) + packed + struct.pack("<I", 0)


def _riff(size: int) -> bytes:
    """A lossless WebP of 64x64 that claims to be of ``size`` bytes."""
    bits = 63 | 63 << 14
    head = b"RIFF" + struct.pack("<I", size - 8) + b"WEBPVP8L" + struct.pack("<I", size - 20)
    return head + b"\x2f" + struct.pack("<I", bits) + bytes(5)


# Name -> content and the length to which the file is stretched by a hole.
HOSTILE: dict[str, Callable[[], tuple[bytes, int]]] = {
    "scans.jpg": lambda: (many_scans(64, 1500), 0),
    "scans-behind-a-thumbnail.jpg": lambda: (
        saved("JPEG")[:2] + b"\xff\xe1" + struct.pack(">H", 4000) + bytes(3998)
        + many_scans(64, 1500)[2:],
        0,
    ),
    "hole.webp": lambda: (_riff(_SPARSE), _SPARSE),
    "hole.avif": lambda: (b"\0\0\0 ftypavif", _SPARSE),
    "hole.png": lambda: (png(8, 8, _GRAY)[:33] + struct.pack(">I", _SPARSE) + b"prVt", _SPARSE),
    "chunks.png": lambda: (png(8, 8, _GRAY, chunk(b"prVt", b"") * 200_000), 0),
    "large-chunk.png": lambda: (png(8, 8, _GRAY, chunk(b"prVt", bytes(40 << 20))), 0),
    "comment.gif": lambda: (_gif_comment(24 << 20), 0),
    "strips.tiff": lambda: (_tiff((273, 4, 1 << 23, 512), (279, 4, 1 << 23, 512)), 40 << 20),
    "entries.tiff": lambda: (_tiff(entries=9000), 1 << 20),
    "the-same-bytes-again.tiff": lambda: (
        _tiff(*[(2000 + k, 2, 250 << 20, 512) for k in range(40)]),
        256 << 20,
    ),
    "bands.tiff": lambda: (
        _tiff((256, 4, 1, 13000), (257, 4, 1, 13000), (258, 3, 1, 64), (277, 3, 1, 900),
              (339, 3, 1, 3)),
        4096,
    ),
}  # fmt: skip


def write(folder: Path, name: str) -> Path:
    path = folder / name
    data, length = HOSTILE[name]()
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(max(length, len(data)))
    return path


@pytest.mark.parametrize("name", HOSTILE)
def test_what_no_encoder_writes_is_refused_before_it_costs_anything(
    name: str, tmp_path: Path
) -> None:
    path = write(tmp_path, name)
    started = time.process_time()
    if name != "chunks.png":  # every one would be counted
        tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=str(path)):
            read_for_encoder(path, [sam_frame(64)], bands=(1, 2, 3))
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 30


@pytest.mark.parametrize("name", ["hole.png", "comment.gif", "strips.tiff", "hole.webp"])
def test_headers_and_masks_are_bounded_as_well(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, name)
    with pytest.raises(ImageError):
        image_size(path)
    with pytest.raises(DataError, match="the mask"):
        read_mask_file(path, "line 1", lambda doubt: None, no_file="")


@pytest.mark.parametrize("name", ["scans.jpg", "large-chunk.png"])
def test_masks_are_bounded_behind_their_headers(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the mask"):
        read_mask_file(write(tmp_path, name), "line 1", lambda doubt: None, no_file="")


def test_what_is_sound_but_may_take_long_is_told_apart(tmp_path: Path) -> None:
    picture = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
    for name, data in (("scans.jpg", many_scans(64, 40)), ("a.jp2", saved("JPEG2000", picture))):
        path = tmp_path / name
        path.write_bytes(data)
        assert open_rgb(path).ndim == 3
        with pytest.raises(SlowImage):
            read_for_encoder(path, [sam_frame(64)], quick=True)
    for name in ("a.jpg", "b.jpg", "a.png", "a.webp", "a.tiff", "a.gif"):
        options = {"progressive": True} if name == "b.jpg" else {}
        Image.fromarray(picture).save(tmp_path / name, **options)
        assert read_for_encoder(tmp_path / name, [sam_frame(64)], quick=True).size == (40, 50)


def test_pictures_behind_the_first_and_films_count_as_no_scans(tmp_path: Path) -> None:
    """Phones put a film, or more pictures, behind a JPEG's end."""
    path = tmp_path / "a.jpg"
    picture = saved("JPEG", progressive=True)
    path.write_bytes(picture + b"\xff\xda" * 5000 + picture * 40)
    assert read_for_encoder(path, [sam_frame(64)], quick=True).size == (24, 32)
