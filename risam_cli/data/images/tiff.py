"""TIFFs of more than 8 bits or more than the usual bands, decoded right where Pillow is not.

Pillow gives a wrong picture for some of them (16-bit colour in planes, 16 bits with white at 0) and
knows others not at all (floating colour, five bands). Here Pillow's decoder unpacks such a file's
strips and tiles as gray bytes, which it does exactly; what the bytes mean is decided here.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from risam_cli.data.images.depth import scale_to_8_bit
from risam_cli.errors import ImageError, setting

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIPS, _ORIENTATION, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 317, 322, 323, 324, 325
_EXTRA, _FORMAT = 338, 339

_WHITE_IS_0, _BLACK_IS_0, _RGB = 0, 1, 2
# What keeps rows of samples as they are; JPEG and fax do not.
_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits"} | {
    34925: "LZMA",
    50000: "ZSTD",
}
_KINDS = {
    (1, 8): "u1",
    (1, 16): "u2",
    (1, 32): "u4",
    (2, 8): "i1",
    (2, 16): "i2",
    (2, 32): "i4",
    (3, 16): "f2",
    (3, 32): "f4",
    (3, 64): "f8",
}
_NAMES = {1: "unsigned", 2: "signed", 3: "floating"}
_MOST_BANDS = 1 << 10
_ASSOCIATED, _UNASSOCIATED = 1, 2


@dataclass(frozen=True, slots=True)
class Tiff:
    """What a TIFF's header says.

    Attributes:
        bits, kind: of each sample; ``kind`` is 1 unsigned, 2 signed, 3 floating.
        extra: what bands beyond the picture's own mean, 1 and 2 being alpha.
        planar: bands lie one behind the other.
    """

    width: int
    height: int
    samples: int
    bits: tuple[int, ...]
    kind: int
    photometric: int
    compression: int
    planar: bool
    orientation: int
    extra: tuple[int, ...]
    tags: Any

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the upright picture."""
        turned = self.orientation in (5, 6, 7, 8)
        return (self.width, self.height) if turned else (self.height, self.width)

    @property
    def bytes(self) -> int:
        """Bytes of all its samples, unpacked."""
        return self.width * self.height * self.samples * -(-max(self.bits, default=8) // 8)

    @property
    def own(self) -> int:
        """Bands that are the picture's own, alpha and others left out."""
        return 3 if self.photometric == _RGB else 1

    @property
    def alpha(self) -> int | None:
        """The band that is alpha, from 0."""
        extra = self.extra[:1]
        given = bool(extra) and extra[0] in (_ASSOCIATED, _UNASSOCIATED)
        return self.own if given and self.samples > self.own else None

    @property
    def is_multiband(self) -> bool:
        """Whether nothing says which of its bands are red, green and blue."""
        known = self.own + (self.alpha is not None)
        return self.photometric != _RGB and self.samples > known

    def describe(self) -> str:
        """Bands and depth in words."""
        bands = f"{self.samples} band{'s' if self.samples > 1 else ''}"
        bits = "/".join(map(str, sorted({*self.bits})))
        return f"a TIFF of {bands} of {bits} bits, {_NAMES.get(self.kind, 'unknown')}"


def read_header(file: BinaryIO) -> Tiff | None:
    """The header of a TIFF; None where the file is none, or cannot be read as one."""
    file.seek(0)
    head = file.read(8)
    if head[2:3] == b"+" or head[3:4] == b"+":  # BigTIFF
        head += file.read(8)
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        samples = int(tags.get(_SAMPLES, 1))
        bits = tuple(int(value) for value in tags.get(_BITS, (1,)))
        kinds = {int(value) for value in tags.get(_FORMAT, (1,))}
        return Tiff(
            int(tags[_WIDTH]),
            int(tags[_HEIGHT]),
            samples,
            bits,
            kinds.pop() if len(kinds) == 1 else 0,
            int(tags.get(_PHOTOMETRIC, _BLACK_IS_0)),
            int(tags.get(_COMPRESSION, 1)),
            int(tags.get(_PLANAR, 1)) == 2,
            int(tags.get(_ORIENTATION, 1)),
            tuple(int(value) for value in tags.get(_EXTRA, ())),
            tags,
        )
    except Exception:  # whatever is wrong with it, Pillow says it better
        return None
    finally:
        file.seek(0)


def is_plain(tiff: Tiff) -> bool:
    """Whether Pillow reads it right: 8 bits and fewer of one, three or four bands."""
    if not {*tiff.bits} <= {1, 2, 4, 8}:
        return False
    if tiff.photometric not in (_WHITE_IS_0, _BLACK_IS_0, _RGB):
        return tiff.kind in (1, 4)
    return tiff.kind == 1 and not tiff.is_multiband and 0 <= tiff.samples - tiff.own <= 1


def read_picture(file: BinaryIO, tiff: Tiff, name: str, bands: Sequence[int] | None) -> Image.Image:
    """A TIFF that is not plain as an upright 8-bit image, transparent pixels on white.

    Args:
        bands: which bands are red, green and blue, from 1; None for what the file says.

    Raises:
        ImageError: it cannot be read, or nothing says which bands are the colours.
    """
    require_readable(tiff, name, bands)
    samples = _samples(file, tiff, name)
    if bands is not None:
        picture = scale_to_8_bit(samples[..., [band - 1 for band in bands]])
    else:
        picture = scale_to_8_bit(samples[..., : tiff.own])
        if tiff.photometric == _WHITE_IS_0:
            picture = 255 - picture
        if tiff.alpha is not None:
            picture = _on_white(picture, samples[..., tiff.alpha], tiff.extra[0])
    if picture.shape[2] == 1:
        picture = np.repeat(picture, 3, axis=2)
    return Image.fromarray(_upright(picture, tiff))


def require_readable(tiff: Tiff, name: str, bands: Sequence[int] | None) -> None:
    """Make sure, by its header, that :func:`read_picture` can read a file.

    Raises:
        ImageError: nothing says which bands are the colours, or its samples cannot be read.
    """
    if bands is None and tiff.is_multiband:
        raise ImageError(
            f"{name}: {tiff.describe()}, and it is not known which are red, green and blue",
            f"say which with {setting('bands', '3,2,1')}",
            "convert it: gdal_translate -b 3 -b 2 -b 1 -ot Byte -scale in.tif out.tif",
        )
    if bands is not None and max(bands) > tiff.samples:
        raise ImageError(
            f"{name}: {tiff.describe()}, but band {max(bands)} is asked for",
            f"its bands are 1 to {tiff.samples}",
        )
    known = (tiff.kind, tiff.bits[0]) in _KINDS and len({*tiff.bits}) == 1
    usual = tiff.photometric in (_WHITE_IS_0, _BLACK_IS_0, _RGB)
    if known and usual and tiff.compression in _COMPRESSIONS and tiff.samples <= _MOST_BANDS:
        return
    raise unreadable(tiff, name)


def unreadable(tiff: Tiff, name: str) -> ImageError:
    """The error of a TIFF that no decoder here reads: what it is, and how to convert it."""
    packed = _COMPRESSIONS.get(tiff.compression, f"number {tiff.compression}")
    return ImageError(
        f"{name}: {tiff.describe()} (compression {packed}, photometric {tiff.photometric}) "
        "cannot be read",
        "convert it to 8 or 16 bits: gdal_translate -ot Byte -scale in.tif out.tif, or "
        "magick in.tif -depth 8 out.png",
    )


def _samples(file: BinaryIO, tiff: Tiff, name: str) -> NDArray[Any]:
    """All samples (H, W, bands) as they are stored."""
    order = "<" if tiff.tags.prefix == b"II" else ">"
    dtype = np.dtype(f"{order}{_KINDS[tiff.kind, tiff.bits[0]]}")
    tags = tiff.tags
    tiled = _TILES in tags
    offsets = list(tags[_TILES if tiled else _STRIPS])
    sizes = list(tags[_TILE_BYTES if tiled else _STRIP_BYTES])
    planes = tiff.samples if tiff.planar else 1
    beside = 1 if tiff.planar else tiff.samples
    each = len(offsets) // planes
    if tiled:
        block = (int(tags[_TILE_HEIGHT]), int(tags[_TILE_WIDTH]))
    else:
        block = (min(int(tags.get(_ROWS, tiff.height)), tiff.height), tiff.width)
    if min(block) < 1:
        raise ImageError(f"{name}: the image is damaged (blocks of zero size)")
    down, across = -(-tiff.height // block[0]), -(-tiff.width // block[1])
    if each < down * across or len(sizes) < len(offsets):
        raise ImageError(f"{name}: the image is damaged (blocks are missing)")
    out = np.empty((tiff.height, tiff.width, tiff.samples), dtype.newbyteorder("="))
    for plane in range(planes):
        for number in range(down * across):
            row, column = number // across * block[0], number % across * block[1]
            rows = block[0] if tiled else min(block[0], tiff.height - row)
            at = plane * each + number
            file.seek(offsets[at])
            data = file.read(sizes[at])
            found = _block(data, tiff, dtype, rows, block[1], beside, name)
            part = out[row : row + rows, column : column + block[1]]
            found = found[: part.shape[0], : part.shape[1]]
            if tiff.planar:
                part[..., plane] = found[..., 0]
            else:
                part[...] = found
    return out


def _block(
    data: bytes, tiff: Tiff, dtype: np.dtype[Any], rows: int, columns: int, beside: int, name: str
) -> NDArray[Any]:
    """One strip or tile (rows, columns, bands), unpacked by Pillow as bytes of gray."""
    wide = columns * beside * dtype.itemsize
    raw = _unpacked(data, tiff.compression, rows, wide)
    if raw.size < rows * wide:
        raise ImageError(f"{name}: the file is truncated within its pixels", "copy it again")
    cells = raw.reshape(rows, wide)
    predictor = int(tiff.tags.get(_PREDICTOR, 1))
    if predictor == 3 and dtype.kind == "f":
        # Differences of bytes, the highest byte of all samples first (Adobe's technical note 3).
        cells = np.cumsum(cells.reshape(rows, -1, beside), axis=1, dtype=np.uint8).reshape(rows, -1)
        samples = cells.reshape(rows, dtype.itemsize, -1).transpose(0, 2, 1)
        floats = np.ascontiguousarray(samples).view(f">f{dtype.itemsize}")
        return floats.reshape(rows, columns, beside).astype(dtype.newbyteorder("="))
    found = np.ascontiguousarray(cells).view(dtype).reshape(rows, columns, beside)
    found = found.astype(dtype.newbyteorder("="))
    if predictor == 2:
        found = np.cumsum(found, axis=1, dtype=found.dtype)
    elif predictor != 1:
        raise ImageError(f"{name}: {tiff.describe()} with the predictor {predictor} cannot be read")
    return found


def _unpacked(data: bytes, compression: int, rows: int, wide: int) -> NDArray[np.uint8]:
    if compression == 1:
        return np.frombuffer(data, np.uint8)[: rows * wide]
    entries = {
        _WIDTH: wide,
        _HEIGHT: rows,
        _BITS: 8,
        _COMPRESSION: compression,
        _PHOTOMETRIC: _BLACK_IS_0,
        _SAMPLES: 1,
        _ROWS: rows,
        _STRIP_BYTES: len(data),
    }
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[_STRIPS] = start
    # One directory of 32-bit numbers, little-endian, then the block itself.
    table = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())
    )
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + struct.pack("<I", 0)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(io.BytesIO(head + data), formats=["TIFF"]) as image:
            return np.asarray(image, np.uint8).ravel()
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _on_white(picture: NDArray[np.uint8], alpha: NDArray[Any], kind: int) -> NDArray[np.uint8]:
    most = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    share = np.clip(np.nan_to_num(alpha.astype(np.float32)) / most, 0, 1)[..., None]
    own = picture if kind == _ASSOCIATED else picture * share
    return np.clip(own + (1 - share) * 255 + 0.5, 0, 255).astype(np.uint8)


def _upright(picture: NDArray[np.uint8], tiff: Tiff) -> NDArray[np.uint8]:
    if tiff.orientation in (2, 3, 7, 8):
        picture = picture[:, ::-1]
    if tiff.orientation in (3, 4, 6, 7):
        picture = picture[::-1]
    if tiff.orientation in (5, 6, 7, 8):
        picture = picture.transpose(1, 0, 2)
    return np.ascontiguousarray(picture)
