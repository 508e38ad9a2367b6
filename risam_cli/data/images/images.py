"""Image files to upright 8-bit RGB, whatever their kind; a file that cannot be read says why.

What "RGB" means here, decided once (ours):

- EXIF orientation is applied; damaged EXIF and ICC blocks are ignored, the pixels are kept.
- Transparent pixels lie on white, as most viewers show them.
- 16-bit samples are scaled to 8 (65535 becomes 255). 32-bit integers are taken as 16-bit where
  they fit; floats are taken as 0..1 where they fit; else both are stretched to their own range.
- Of several frames or pages (GIF, TIFF, WebP) the first counts.

Only formats whose decoders are safe on files from strangers are opened (no EPS, no WMF).
"""

from __future__ import annotations

import codecs
import functools
import importlib
import logging
import os
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from risam_cli.data.images.files import (
    FileStamp,
    digest_of,
    open_regular,
    stamp_of,
)
from risam_cli.data.images.frames import Frame
from risam_cli.data.images.transforms import fit_size, resize_for_encoder
from risam_cli.errors import ImageError, setting

Rgb = NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""Pixels over which an image is refused: where Pillow's own limit stops being a warning."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib"}
    | {".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"}
)
"""Lower-case file name endings that a folder walk takes as images."""

# Importing a plugin registers it; Image.init() would load forty more.
_PLUGINS = ("Bmp", "Gif", "Jpeg", "Mpo", "Png", "Ppm", "Tiff", "WebP", "Jpeg2K", "Avif")
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF")
_DRAFTING = {"JPEG", "MPO"}  # whose decoder can give less than all pixels
_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MUCH_LARGER = 6  # times the wanted size, from where on a cheaper way down pays
_DRAFTED = 2  # times the wanted size to which a JPEG decoder may go down by itself
_TURNED = {5, 6, 7, 8}  # orientations that swap height and width
_MOST_BYTES = 8  # a pixel: 16 bits of red, green, blue and alpha, packed by nothing
_MOST_ELSE = 1 << 26  # bytes of a file that are no pixels
_BAND_PIXELS = 1 << 22  # rows are scaled from 16 bit in bands of about this many pixels

# What damaged files make Pillow raise, beside OSError.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    NotImplementedError,
    AssertionError,
    RuntimeError,
    struct.error,
)

# The limit is checked here, with a message that names the way out; Pillow's warning says less.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Damaged EXIF, palettes and the like: the pixels are what counts.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# What it logs besides would reach stderr past the console, in the words of the file.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class EncoderImage:
    """An image as a network wants it, from one reading of the file.

    Attributes:
        views: (h, w, 3) uint8 each, as each of the network's frames wants it, not padded.
        size: (H, W) of the upright image.
        sha256: of the file's bytes.
        stamp: of the file when it was opened.
    """

    views: tuple[Rgb, ...]
    size: tuple[int, int]
    sha256: str
    stamp: FileStamp

    @property
    def rgb(self) -> Rgb:
        """The first of the views."""
        return self.views[0]


def open_rgb(path: Path, max_pixels: int = MAX_PIXELS) -> Rgb:
    """The whole image as upright (H, W, 3) uint8.

    Raises:
        ImageError: the file is missing, no image, damaged, or larger than ``max_pixels``.
    """
    with open_regular(path) as file, decoding(path):
        return to_rgb(_open_image(file, path, max_pixels))


def image_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of the upright image, read from the header alone where that suffices.

    Raises:
        ImageError: as :func:`open_rgb`, but damage behind the header is not seen (save in a PNG,
            whose EXIF may stand behind its pixels).
    """
    with open_regular(path) as file, decoding(path):
        return _upright_size(_open_image(file, path, max_pixels))


def open_for_encoder(
    path: Path, size: int, max_pixels: int = MAX_PIXELS
) -> tuple[Rgb, tuple[int, int]]:
    """The image with its longest side at ``size``, (h, w, 3) uint8, and its own (H, W).

    Raises:
        ImageError: as :func:`open_rgb`.
    """
    with open_regular(path) as file, decoding(path):
        return fit_image(_open_image(file, path, max_pixels), size)


def read_for_encoder(
    path: Path, frames: Sequence[Frame], max_pixels: int = MAX_PIXELS, *, full_decode: bool = False
) -> EncoderImage:
    """The image in each of a network's frames, with the file's hash and stamp, read once.

    Args:
        full_decode: scale every image down from all of its pixels, whatever that takes.

    Raises:
        ImageError: as :func:`open_rgb`.
    """
    with open_regular(path) as file, decoding(path):
        stamp = stamp_of(os.fstat(file.fileno()))
        digest = digest_of(file)
        file.seek(0)
        image = _open_image(file, path, max_pixels)
        views, own_size = fit_frames(image, frames, full_decode=full_decode)
    return EncoderImage(views, own_size, digest, stamp)


# --- opening --------------------------------------------------------------------------------------


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file makes the decoder raise into an ImageError."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error), 2 * (Image.MAX_IMAGE_PIXELS or 0)) from None
    except _BROKEN as error:
        text = " ".join(str(error).split())
        if "truncated" in text.lower() or isinstance(error, EOFError):
            raise ImageError(
                f"{path}: the file is cut short ({text})", "copy or download it again"
            ) from None
        detail = text or type(error).__name__
        raise ImageError(f"{path}: the image is damaged ({detail})") from None


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """The formats above that this Pillow has a decoder for (AVIF came with 11.3)."""
    for plugin in _PLUGINS:
        with suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open_image(file: BinaryIO, path: Path, max_pixels: int) -> Image.Image:
    """The image, its header read and its size checked, its pixels not decoded."""
    # WebP and AVIF are read whole, before their size is known.
    size = file.seek(0, os.SEEK_END)
    if size > _MOST_BYTES * max_pixels + _MOST_ELSE:
        raise ImageError(f"{path}: {size} bytes are more than {max_pixels} pixels can take")
    file.seek(0)
    # GIF and ICO-like formats check frames against this one as they decode.
    Image.MAX_IMAGE_PIXELS = max(1, (max_pixels + 1) // 2)
    try:
        image = Image.open(file, formats=_known_formats())
    except UnidentifiedImageError:
        file.seek(0)
        raise ImageError(f"{path}: {_what_else(file.read(512))}") from None
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error), max_pixels) from None
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{path}: the image is damaged (it says {width}x{height} pixels)")
    if width * height > max_pixels:
        raise _too_large(path, f"{width * height} pixels", max_pixels)
    return image


def _too_large(path: Path, told: str, limit: int) -> ImageError:
    """An error that names the pixels, the first number in what was told of them."""
    pixels = re.search(r"\d+", told)
    found = f"{pixels[0]} pixels are" if pixels else "it is"
    return ImageError(
        f"{path}: {found} more than {limit}",
        f"raise {setting('max_pixels')} if you trust the image",
    )


def _what_else(head: bytes) -> str:
    """What a file that no decoder knows seems to be."""
    if head[4:12] in {b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"}:
        return "HEIC is not supported; convert it to JPEG or PNG"
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n":
        return "the file is cut short or damaged within its header; copy or download it again"
    try:
        # Not to the end: the last character may be cut.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        text = "\0"
    if all(char >= " " or char in "\t\r\n\f" for char in text):
        return "the file holds text, not an image"
    return "not an image of a known kind (JPEG, PNG, WebP, TIFF, BMP, GIF, PNM, JPEG 2000, AVIF)"


# --- turning and scaling --------------------------------------------------------------------------


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or it cannot be read."""
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # getexif() would, to look behind the pixels; damage there must be told
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # whatever is wrong with EXIF, the pixels are still good
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = _orientation_to_apply(image) in _TURNED
    return (width, height) if turned else (height, width)


def fit_image(
    image: Image.Image, size: int, *, full_decode: bool = False
) -> tuple[Rgb, tuple[int, int]]:
    """The upright image with its longest side at ``size``, and its own (H, W)."""
    own_size = _upright_size(image)
    fitted = fit_size(*own_size, size)
    turned = own_size != image.size[::-1]
    width, height = fitted if turned else fitted[::-1]  # as stored in the file
    much = 2 * _DRAFTED if image.format in _DRAFTING else _MUCH_LARGER
    if full_decode or min(image.width // width, image.height // height) < much:
        rgb = resize_for_encoder(to_rgb(image), size)
    else:
        rgb = _upright(_shrink(image, (width, height)), _orientation_to_apply(image))
    return np.ascontiguousarray(rgb), own_size


def fit_frames(
    image: Image.Image, frames: Sequence[Frame], *, full_decode: bool = False
) -> tuple[tuple[Rgb, ...], tuple[int, int]]:
    """The upright image as each of the frames wants it, and its own (H, W)."""
    if len(frames) == 1 and frames[0].drafts:
        rgb, own_size = fit_image(image, frames[0].height, full_decode=full_decode)
        return (rgb,), own_size
    whole = to_rgb(image)
    views = tuple(np.ascontiguousarray(frame.resize(whole)) for frame in frames)
    return views, (whole.shape[0], whole.shape[1])


def _shrink(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """Brings a much larger image to ``target`` (width, height) without a second full-size copy.

    The JPEG decoder itself goes down by 2, 4 or 8, to no less than twice the target, in less than
    half the time. Against :func:`resize_for_encoder` on the whole image the mean difference is 0.4
    to 0.9 of 255 gray levels on photos scaled to 256 to 640 pixels, and 8 to 12 at single pixels.
    """
    at_least = (_DRAFTED * target[0], _DRAFTED * target[1])
    drafted = image.draft(image.mode, at_least) if image.format in _DRAFTING else None
    # The decoder rounds sides up; the box says where the image ends within the last pixel.
    box = drafted[1] if drafted else (0.0, 0.0, float(image.width), float(image.height))
    image.load()
    picture = _to_8_bit(image)
    if picture.mode not in {"L", "RGB", "CMYK"} or "transparency" in picture.info:
        picture = _flatten(picture)
    return _flatten(picture.resize(target, Image.Resampling.HAMMING, box))


def to_rgb(image: Image.Image) -> Rgb:
    """Upright (H, W, 3) uint8 of an opened image; decodes it."""
    orientation = _orientation_to_apply(image)
    image.load()
    return _upright(_flatten(_to_8_bit(image)), orientation)


def _orientation_to_apply(image: Image.Image) -> int:
    # Pillow turns TIFF by itself as it decodes, and names the upright size from the start.
    return 1 if image.format == "TIFF" else _orientation(image)


def _upright(picture: Image.Image, orientation: int) -> Rgb:
    if orientation != 1:
        picture = picture.transpose(_TRANSPOSE[orientation])
    return np.array(picture, np.uint8)


def _flatten(image: Image.Image) -> Image.Image:
    """Any 8-bit mode to RGB, transparent pixels on white."""
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or (
        image.mode in {"P", "L", "RGB", "1"} and "transparency" in image.info
    ):
        layered = image if image.mode == "RGBA" else image.convert("RGBA")
        below = Image.new("RGB", layered.size, (255, 255, 255))
        below.paste(layered, mask=layered.getchannel("A"))
        return below
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A gray image with 16 or 32 bits a pixel as 8-bit gray; others as they are."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    deep = np.asarray(image)
    low, high = _range_of(deep)
    if deep.dtype.itemsize == 2 or (deep.dtype.kind == "i" and low >= 0 and high <= 65535):
        low, high = 0.0, 65535.0
    elif deep.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scale = 255.0 / (high - low) if high > low else 0.0
    result = np.empty(deep.shape, np.uint8)
    rows = max(1, _BAND_PIXELS // deep.shape[1])  # never the whole image in float
    for top in range(0, deep.shape[0], rows):
        band = np.nan_to_num(deep[top : top + rows].astype(np.float64), posinf=high, neginf=low)
        result[top : top + rows] = np.clip((band - low) * scale + 0.5, 0, 255)
    return Image.fromarray(result)


def _range_of(deep: NDArray[np.generic]) -> tuple[float, float]:
    """Least and greatest finite value."""
    if deep.dtype.kind != "f":
        return float(deep.min()), float(deep.max())
    finite = deep[np.isfinite(deep)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
