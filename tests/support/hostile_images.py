"""Image files as an attacker or a broken disk would leave them, made by code; a few KB each.

``HOSTILE`` maps a file name to its bytes and to whether a mask may come of it: ``False`` is a
failure row, ``True`` an ordinary record (what is wrong with the file does not touch its pixels).
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_PICTURE = np.arange(24 * 32 * 3, dtype=np.uint32).reshape(24, 32, 3).astype(np.uint8)
SECRET = "secret-outside-of-the-input"


def saved(kind: str, picture: np.ndarray | Image.Image = _PICTURE, **options: Any) -> bytes:
    """An image file of a kind that Pillow writes."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A PNG chunk with its right checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, *between: bytes, depth: int = 8) -> bytes:
    """A PNG whose header says what it likes about gray ``data``."""
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + b"".join(between) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def many_scans(side: int, more: int) -> bytes:
    """A progressive JPEG with so many scans more, which refine nothing."""
    whole = saved("JPEG", np.zeros((side, side, 3), np.uint8), progressive=True)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + last * more + b"\xff\xd9"


def _bomb(side: int) -> bytes:
    """A PNG of ``side`` x ``side`` white pixels: about a thousandth of that in bytes."""
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((side + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return png(side, side, data, depth=1)


def _png_text_bomb() -> bytes:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"A" * (8 << 20), 9))
    return png(4, 4, zlib.compress(b"\0\1\2\3\4" * 4), text)


def _exif(orientation: int, count: int = 1, kind: int = 3) -> bytes:
    entry = struct.pack("<HHII", 0x0112, kind, count, orientation)
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"


def _exif_loop() -> bytes:
    """EXIF whose first directory names itself as the next, and as its own sub-directory."""
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + struct.pack("<I", 8)


def _tiff(*entries: tuple[int, int, int, int], then: int = 0, data: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory: (tag, type, count, value or offset) each."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + packed + struct.pack("<I", then) + data


def _tiff_gray(width: int, height: int, *more: tuple[int, int, int, int], then: int = 0) -> bytes:
    size = 8 + 2 + 12 * (8 + len(more)) + 4
    plain = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, size),
        (278, 4, 1, height),
        (279, 4, 1, width * height & 0xFFFFFFFF),
    ]
    return _tiff(*sorted([*plain, *more]), then=then, data=b"\x7f" * 64)


def _gif(width: int, height: int, frame: tuple[int, int, int, int], codes: bytes) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    block = b"," + struct.pack("<HHHHB", *frame, 0) + b"\x02" + bytes([len(codes)]) + codes + b"\0"
    return screen + block + b";"


def _webp_size(width: int, height: int) -> bytes:
    """An extended WebP whose canvas is what it says and whose frame is missing."""
    canvas = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little")
    chunk_ = b"VP8X" + struct.pack("<I", 10) + canvas + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 4 + len(chunk_)) + b"WEBP" + chunk_


def _bmp(width: int, height: int, bits: int = 24, compression: int = 0) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 64, 0, 0, 54) + head + b"\x11" * 64


def _icc() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _palette_with_transparency() -> bytes:
    picture = Image.fromarray(_PICTURE).convert("P")
    return saved("PNG", picture, transparency=bytes(range(256)))


def _frames(kind: str) -> bytes:
    frames = [Image.fromarray(np.roll(_PICTURE, k, axis=0)) for k in range(5)]
    return saved(kind, frames[0], save_all=True, append_images=frames[1:])


def _jpeg_with(marker: int, data: bytes) -> bytes:
    plain = saved("JPEG")
    return plain[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + plain[2:]


def _cut(kind: str, share: float) -> bytes:
    whole = saved(kind, np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8))
    return whole[: int(len(whole) * share)]


_GOOD_GRAY = zlib.compress(b"\0\1\2\3\4" * 4)
_CMYK = Image.fromarray(_PICTURE).convert("CMYK")
_DEEP = (np.arange(24 * 32, dtype=np.uint32) * 85 % 65536).astype(np.uint16).reshape(24, 32)

HOSTILE: dict[str, tuple[bytes, bool]] = {
    # sizes
    "empty.png": (b"", False),
    "one-byte.jpg": (b"\xff", False),
    "text.png": (b"<script>alert(1)</script>\n", False),
    "claims-65535.png": (png(65535, 65535, _GOOD_GRAY), False),
    "claims-2-31.png": (png(2**31 - 1, 2**31 - 1, _GOOD_GRAY), False),
    "claims-2-32.png": (png(2**32 - 1, 2**32 - 1, _GOOD_GRAY), False),
    "claims-nothing.png": (png(0, 0, _GOOD_GRAY), False),
    "claims-no-width.png": (png(0, 60000, _GOOD_GRAY), False),
    "claims-more-than-it-has.png": (png(4000, 4000, _GOOD_GRAY), False),
    "bomb-14000.png": (_bomb(14000), False),
    "thin-1x60000.png": (saved("PNG", np.full((60000, 1), 9, np.uint8)), True),
    "thin-60000x1.png": (saved("PNG", np.full((1, 60000), 9, np.uint8)), True),
    "dot-1x1.png": (saved("PNG", np.full((1, 1), 9, np.uint8)), True),
    "claims-65535.gif": (_gif(65535, 65535, (0, 0, 65535, 65535), b"\x44\x01"), False),
    "frame-beyond-screen.gif": (_gif(8, 8, (60000, 60000, 5000, 5000), b"\x44\x01"), False),
    "claims-16384.webp": (_webp_size(1 << 24, 1 << 24), False),
    "claims-2-31.bmp": (_bmp(2**31 - 1, 2**31 - 1), False),
    "negative.bmp": (_bmp(-5, -5), False),
    "rle-without-end.bmp": (_bmp(64, 64, 8, 1), False),
    "claims-2-32.tiff": (_tiff_gray(2**32 - 1, 2**32 - 1), False),
    "claims-999999.ppm": (b"P6 999999 999999 255\n" + b"\1" * 64, False),
    "claims-digits.pgm": (b"P5 " + b"9" * 5000 + b" 9 255\n\1", False),
    "negative.ppm": (b"P6 -4 -4 255\n" + b"\1" * 64, False),
    "claims-16-bit.pgm": (b"P5 4 4 65535\n" + b"\1" * 32, True),
    # bombs in what is not pixels
    "text-bomb.png": (_png_text_bomb(), False),
    "icc-bomb.png": (
        png(4, 4, _GOOD_GRAY, chunk(b"iCCP", b"p\0\0" + zlib.compress(b"A" * (8 << 20), 9))),
        False,
    ),
    "many-chunks.png": (png(4, 4, _GOOD_GRAY, *[chunk(b"tEXt", b"k\0v")] * 20000), True),
    "tiff-pages-in-a-circle.tiff": (_tiff_gray(8, 8, then=8), True),
    "tiff-tag-of-4-billion.tiff": (_tiff_gray(8, 8, (270, 2, 2**32 - 1, 8)), True),
    "tiff-strips-beyond.tiff": (
        _tiff((256, 4, 1, 64), (257, 4, 1, 64), (273, 4, 1, 2**31), (279, 4, 1, 2**31)),
        False,
    ),
    "tiff-65535-samples.tiff": (_tiff_gray(8, 8, (277, 3, 1, 65535)), False),
    # metadata
    "exif-turns.jpg": (saved("JPEG", exif=_exif(6)), True),
    "exif-of-nonsense.jpg": (saved("JPEG", exif=_exif(4242)), True),
    "exif-of-4-billion.jpg": (saved("JPEG", exif=_exif(6, 2**32 - 1)), True),
    "exif-of-no-type.jpg": (saved("JPEG", exif=_exif(6, 1, 99)), True),
    "exif-in-a-circle.jpg": (saved("JPEG", exif=_exif_loop()), True),
    "exif-cut.jpg": (saved("JPEG", exif=b"Exif\0\0II*\0\x08\0\0"), True),
    "exif-of-bytes.jpg": (saved("JPEG", exif=b"Exif\0\0" + bytes(range(256))), True),
    "icc-right.jpg": (saved("JPEG", icc_profile=_icc()), True),
    "icc-of-bytes.jpg": (saved("JPEG", icc_profile=bytes(range(256)) * 8), True),
    "icc-part-0-of-9.jpg": (_jpeg_with(0xE2, b"ICC_PROFILE\0\x00\x09" + b"A" * 40), True),
    "mpf-of-bytes.jpg": (_jpeg_with(0xE2, b"MPF\0" + bytes(range(200))), True),
    "photoshop-of-bytes.jpg": (_jpeg_with(0xED, b"Photoshop 3.0\0" + bytes(range(99))), True),
    "comment-with-escapes.jpg": (_jpeg_with(0xFE, b"\x1b]0;owned\x07\x1b[2J"), True),
    # modes
    "cmyk.jpg": (saved("JPEG", _CMYK), True),
    "cmyk-adobe.tiff": (saved("TIFF", _CMYK), True),
    "deep-16.png": (saved("PNG", _DEEP), True),
    "deep-16.tiff": (saved("TIFF", _DEEP), True),
    "float-nan.tiff": (saved("TIFF", np.full((8, 8), np.nan, np.float32)), True),
    "float-inf.tiff": (saved("TIFF", np.full((8, 8), np.inf, np.float32)), True),
    "palette-transparent.png": (_palette_with_transparency(), True),
    "bilevel.png": (saved("PNG", Image.new("1", (9, 9), 1)), True),
    "lab.tiff": (saved("TIFF", Image.new("LAB", (9, 9), (50, 3, 3))), True),
    "animated.gif": (_frames("GIF"), True),
    "animated.webp": (_frames("WEBP"), True),
    "pages.tiff": (_frames("TIFF"), True),
    # damage
    "cut.png": (_cut("PNG", 0.6), False),
    "cut.jpg": (_cut("JPEG", 0.6), False),
    "cut.webp": (_cut("WEBP", 0.6), False),
    "cut.gif": (_cut("GIF", 0.6), False),
    "cut.tiff": (_cut("TIFF", 0.6), False),
    "cut-in-header.jpg": (_cut("JPEG", 0.02), False),
    "wrong-checksum.png": (saved("PNG").replace(b"IDAT", b"IDAU"), False),
    "png-as.jpg": (saved("PNG"), True),
    "pdf-as.jpg": (b"%PDF-1.4\n" + b"\0" * 99, False),
    "postscript-as.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", False),
    "svg-as.png": (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', False),
    "zip-as.png": (b"PK\x03\x04" + b"\0" * 60, False),
}

NAMES = (
    "\x1b]0;owned\x07\x1b[31m.png",
    "new\nline.png",
    "car\rreturn.png",
    "<img src=x onerror=alert(1)>.png",
    "'; rm -rf ~ #.png",
    "$(touch owned).png",
    "-rf.png",
    "=cmd|' C'!A0.png",
    "con.png",
    "aux.tar.png",
    "nul .png",
    "trailing. .png",
    "Same.png",
    "same.png",
    "\u202egnp.exe.png",
    "e\u0301.png",
    "\u00e9.png",
    "back\\..\\..\\slash.png",
    "n" * 240 + ".png",
)
"""Names of sound images that a terminal, a shell, a page or another file system would obey."""

NOT_UTF_8 = b"latin-\xe9\xff.png"


def plant(folder: Path) -> dict[str, bool]:
    """Write everything into a new folder; gives file name -> whether a record may come of it.

    Beside files: names of every bad kind, links that lead out or round in a circle, a pipe, a
    device, a folder called like an image. Of links that lead out, the walk takes none.
    """
    folder.mkdir()
    outside = folder.parent / SECRET
    outside.mkdir()
    (outside / "x.png").write_bytes(saved("PNG"))
    expected = {name: good for name, (_, good) in HOSTILE.items()}
    for name, (data, _) in HOSTILE.items():
        (folder / name).write_bytes(data)
    for name in NAMES:
        (folder / name).write_bytes(saved("PNG"))
        expected[name] = True
    (Path(os.fsdecode(os.fsencode(folder) + b"/" + NOT_UTF_8))).write_bytes(saved("PNG"))
    expected[os.fsdecode(NOT_UTF_8)] = True
    (folder / "folder.png").mkdir()
    (folder / "link-out.png").symlink_to(outside / "x.png")
    (folder / "link-to-folder").symlink_to(outside)
    (folder / "link-up").symlink_to("..")
    (folder / "link-to-self").symlink_to(".")
    (folder / "link-zero.png").symlink_to("/dev/zero")
    (folder / "circle-a.png").symlink_to("circle-b.png")
    (folder / "circle-b.png").symlink_to("circle-a.png")
    (folder / "within.png").symlink_to("dot-1x1.png")
    os.mkfifo(folder / "pipe.png")
    return {**expected, "within.png": True, "pipe.png": False}
