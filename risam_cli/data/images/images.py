"""Image files to upright 8-bit RGB, whatever their kind; a file that cannot be read says why.

What "RGB" means here, decided once (ours):

- EXIF orientation is applied; damaged EXIF and ICC blocks are ignored, the pixels are kept.
- Transparent pixels lie on white, as most viewers show them.
- 16-bit samples are scaled to 8 (65535 becomes 255). 32-bit integers are taken as 16-bit where
  they fit; floats are taken as 0..1 where they fit; else both are stretched to their own range.
- A TIFF of more bands than its picture needs says which are its colours, or the user does.
- Of several frames or pages (GIF, TIFF, WebP) the first counts.

Only formats whose decoders are safe on files from strangers are opened (no EPS, no WMF).
"""

from __future__ import annotations

import codecs
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

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from risam_cli.data.images.bounds import (
    SlowImage,
    allow_pixels,
    known_formats,
    metered,
    require_bounded,
    require_modest_tiff,
)
from risam_cli.data.images.depth import scale_to_8_bit
from risam_cli.data.images.files import (
    FileStamp,
    fetch_head,
    open_regular,
    stamp_of_file,
)
from risam_cli.data.images.frames import Frame
from risam_cli.data.images.orientation import TURNED, orientation_to_apply, upright
from risam_cli.data.images.tiff import (
    Tiff,
    is_plain,
    read_header,
    read_picture,
    require_readable,
    unreadable,
)
from risam_cli.data.images.transforms import fit_size, resize_for_encoder
from risam_cli.errors import ImageError, require_machine, setting
from risam_cli.files.hashing import sha256_of_stream
from risam_cli.files.store import RemotePath

Rgb = NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""Pixels over which an image is refused: where Pillow's own limit stops being a warning."""

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".tif", ".tiff", ".bmp", ".dib"}
    | {".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"}
    | {".heic", ".heif", ".hif", ".jxl"}  # by a plugin; without it, each says which
)
"""Lower-case file name endings that a folder walk takes as images."""

_DRAFTING = {"JPEG", "MPO"}  # whose decoder can give less than all pixels
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1", b"hevc", b"hevx"}
_MUCH_LARGER = 6  # times the wanted size, from where on a cheaper way down pays
_DRAFTED = 2  # times the wanted size to which a JPEG decoder may go down by itself
_MOST_BYTES = 8  # a pixel: 16 bits of red, green, blue and alpha, packed by nothing
_MOST_SAMPLES = 24  # likewise: red, green and blue of 64 bits
_MOST_ELSE = 1 << 26  # bytes of a file that are no pixels

Bands = tuple[int, int, int]
"""Which bands of a TIFF are red, green and blue, from 1."""

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


def open_rgb(path: Path, max_pixels: int = MAX_PIXELS, bands: Bands | None = None) -> Rgb:
    """The whole image as upright (H, W, 3) uint8.

    Args:
        bands: which bands of a TIFF of several are red, green and blue; others are read as usual.

    Raises:
        ImageError: the file is missing, no image, damaged, or larger than ``max_pixels``.
    """
    with open_regular(path) as file, decoding(path):
        return to_rgb(open_image(file, path, max_pixels, bands))


def image_size(
    path: Path, max_pixels: int = MAX_PIXELS, bands: Bands | None = None
) -> tuple[int, int]:
    """(H, W) of the upright image, read from the header alone where that suffices.

    Args:
        bands: as :func:`open_rgb`.

    Raises:
        ImageError: as :func:`open_rgb`, but damage behind the header is not seen (save in a PNG,
            whose EXIF may stand behind its pixels).
    """
    if isinstance(path, RemotePath):
        head = fetch_head(path)
        with suppress(ImageError), head, decoding(path):  # of one that is cut in its header
            return _size_of(head, path, max_pixels, bands)
    with open_regular(path) as file, decoding(path):
        return _size_of(file, path, max_pixels, bands)


def _size_of(file: BinaryIO, path: Path, max_pixels: int, bands: Bands | None) -> tuple[int, int]:
    tiff = _special_tiff(file, path, max_pixels, bands)
    if tiff is None:
        return _upright_size(_open_plain(file, path, max_pixels))
    require_readable(tiff, str(path), bands if tiff.samples >= 4 else None)
    return tiff.size


def open_for_encoder(
    path: Path, size: int, max_pixels: int = MAX_PIXELS, bands: Bands | None = None
) -> tuple[Rgb, tuple[int, int]]:
    """The image with its longest side at ``size``, (h, w, 3) uint8, and its own (H, W).

    Args:
        bands: as :func:`open_rgb`.

    Raises:
        ImageError: as :func:`open_rgb`.
    """
    with open_regular(path) as file, decoding(path):
        return fit_image(open_image(file, path, max_pixels, bands), size)


def read_for_encoder(
    path: Path,
    frames: Sequence[Frame],
    max_pixels: int = MAX_PIXELS,
    *,
    full_decode: bool = False,
    bands: Bands | None = None,
    quick: bool = False,
) -> EncoderImage:
    """The image in each of a network's frames, with the file's hash and stamp, read once.

    Args:
        full_decode: scale every image down from all of its pixels, whatever that takes.
        bands: as :func:`open_rgb`.
        quick: whether nobody could end the decoder.

    Raises:
        ImageError: as :func:`open_rgb`.
        SlowImage: it may take long, and ``quick`` was asked for.
    """
    with open_regular(path) as file, decoding(path):
        stamp = stamp_of_file(file)
        image = open_image(file, path, max_pixels, bands, quick=quick)
        at = file.tell()  # where the decoder reads on
        file.seek(0)
        digest = sha256_of_stream(file)
        file.seek(at)
        views, own_size = fit_frames(image, frames, full_decode=full_decode)
    return EncoderImage(views, own_size, digest, stamp)


# --- opening --------------------------------------------------------------------------------------


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turns whatever a damaged file makes the decoder raise into an ImageError."""
    try:
        yield
    except (ImageError, MemoryError, SlowImage):
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error), 2 * (Image.MAX_IMAGE_PIXELS or 0)) from None
    except _BROKEN as error:
        require_machine(error)
        text = " ".join(str(error).split())
        if "truncated" in text.lower() or isinstance(error, EOFError):
            raise ImageError(
                f"{path}: the file is truncated ({text})", "copy or download it again"
            ) from None
        detail = text or type(error).__name__
        raise ImageError(f"{path}: the image is damaged ({detail})") from None


def _special_tiff(file: BinaryIO, path: Path, max_pixels: int, bands: Bands | None) -> Tiff | None:
    """The header of a TIFF that Pillow does not read right, or None."""
    require_modest_tiff(file, str(path))
    tiff = read_header(file)
    if tiff is None or (is_plain(tiff) and (bands is None or tiff.samples < 4)):
        return None
    if tiff.width * tiff.height > max_pixels:
        raise _too_large(path, f"{tiff.width * tiff.height} pixels", max_pixels)
    if tiff.bytes > _MOST_SAMPLES * max_pixels:
        raise ImageError(
            f"{path}: {tiff.describe()}: {tiff.bytes >> 20} MiB of samples are too many",
            f"raise {setting('max_pixels')} if you trust the image",
        )
    return tiff


def open_image(
    file: BinaryIO, path: Path, max_pixels: int, bands: Bands | None = None, *, quick: bool = False
) -> Image.Image:
    """The image, its header read and its size checked, its pixels not decoded where Pillow can."""
    require_bounded(file, str(path), quick=quick)
    tiff = _special_tiff(file, path, max_pixels, bands)
    if tiff is None:
        image = _open_plain(file, path, max_pixels)
        return _deep_jpeg2000(file, path) if _is_deep_jpeg2000(image, file) else image
    return read_picture(file, tiff, str(path), bands if tiff.samples >= 4 else None)


def _is_deep_jpeg2000(image: Image.Image, file: BinaryIO) -> bool:
    """Whether it is JPEG 2000 in colour of over 8 bits: Pillow turns its brightest pixels black."""
    if image.format != "JPEG2000" or image.mode not in ("RGB", "RGBA"):
        return False
    file.seek(0)
    head = file.read(1 << 16)
    at = head.find(b"\xff\x4f\xff\x51")  # the code stream's start and its sizes
    components = int.from_bytes(head[at + 40 : at + 42], "big") if at >= 0 else 0
    depths = head[at + 42 : at + 42 + 3 * components : 3]
    return any((depth & 0x7F) + 1 > 8 for depth in depths)


def _deep_jpeg2000(file: BinaryIO, path: Path) -> Image.Image:
    """JPEG 2000 of more than 8 bits in colour, by OpenCV."""
    file.seek(0)
    try:
        pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None or pixels.ndim != 3 or pixels.shape[2] < 3 or pixels.dtype != np.uint16:
        raise ImageError(
            f"{path}: JPEG 2000 of more than 8 bits in colour cannot be read here",
            "convert it to PNG or TIFF",
        )
    order = [2, 1, 0, 3][: pixels.shape[2]]
    return Image.fromarray(scale_to_8_bit(pixels[..., order]))


def _open_plain(file: BinaryIO, path: Path, max_pixels: int) -> Image.Image:
    """As :func:`open_image`, of a file that Pillow reads right."""
    # WebP and AVIF are read whole, before their size is known.
    size = file.seek(0, os.SEEK_END)
    if size > _MOST_BYTES * max_pixels + _MOST_ELSE:
        raise ImageError(f"{path}: {size} bytes are more than {max_pixels} pixels can take")
    file.seek(0)
    # GIF and ICO-like formats check frames against this one as they decode.
    Image.MAX_IMAGE_PIXELS = max(1, (max_pixels + 1) // 2)
    try:
        image = _identified(file, str(path))
    except UnidentifiedImageError:
        tiff = read_header(file)
        if tiff is not None:
            raise unreadable(tiff, str(path)) from None
        file.seek(0)
        raise ImageError(f"{path}: {_what_else(file.read(512))}") from None
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error), max_pixels) from None
    allow_pixels(image)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{path}: the image is damaged (it says {width}x{height} pixels)")
    if width * height > max_pixels:
        raise _too_large(path, f"{width * height} pixels", max_pixels)
    return image


def _identified(file: BinaryIO, name: str) -> Image.Image:
    """The image by Pillow's own decoders, or by a plugin for its kind where one is installed."""
    bounded = metered(file, name)
    try:
        return Image.open(bounded, formats=known_formats())
    except UnidentifiedImageError:
        file.seek(0)
        plugin = _plugin_of(file.read(64))
        if plugin is None or not plugin.load():
            raise
        file.seek(0)
        return Image.open(bounded, formats=(plugin.format,))


@dataclass(frozen=True, slots=True)
class _Plugin:
    """A decoder that is installed by choice: ``pip install risam[extra]``."""

    kind: str
    extra: str
    module: str
    format: str
    register: str = ""

    def load(self) -> bool:
        """Have Pillow know it; False where it is not installed."""
        try:
            module = importlib.import_module(self.module)
        except ImportError:
            return False
        if self.register:
            getattr(module, self.register)()
        return True


_HEIF = _Plugin("HEIC", "heif", "pillow_heif", "HEIF", "register_heif_opener")
_JXL = _Plugin("JPEG XL", "jxl", "pillow_jxl", "JXL")


def _plugin_of(head: bytes) -> _Plugin | None:
    """The plugin that a file beginning so needs."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return _HEIF
    if head[:2] == b"\xff\x0a" or head[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return _JXL
    return None


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
    plugin = _plugin_of(head)
    if plugin is not None:
        return (
            f"{plugin.kind} needs a decoder of its own: pip install 'risam[{plugin.extra}]', or "
            "convert it to JPEG or PNG"
        )
    if head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n":
        return "the file is truncated or damaged within its header; copy or download it again"
    try:
        # Not to the end: the last character may be cut.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        text = "\0"
    if all(char >= " " or char in "\t\r\n\f" for char in text):
        return "the file holds text, not an image"
    return "not an image of a known kind (JPEG, PNG, WebP, TIFF, BMP, GIF, PNM, JPEG 2000, AVIF)"


# --- turning and scaling --------------------------------------------------------------------------


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = orientation_to_apply(image) in TURNED
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
        rgb = upright(_shrink(image, (width, height)), orientation_to_apply(image))
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
    orientation = orientation_to_apply(image)
    image.load()
    return upright(_flatten(_to_8_bit(image)), orientation)


def _flatten(image: Image.Image) -> Image.Image:
    """Any 8-bit mode to RGB, transparent pixels on white."""
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or (
        image.mode in {"P", "L", "RGB", "1"} and "transparency" in image.info
    ):
        if image.mode == "La":  # which Pillow turns into LA only
            image = image.convert("LA")
        layered = image if image.mode == "RGBA" else image.convert("RGBA")
        below = Image.new("RGB", layered.size, (255, 255, 255))
        below.paste(layered, mask=layered.getchannel("A"))
        return below
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """A gray image with 16 or 32 bits a pixel as 8-bit gray; others as they are.

    The colour that stands for transparent pixels, which a PNG may name in 16 bits, goes along.
    """
    clear = image.info.get("transparency")
    if not image.mode.startswith("I") and image.mode != "F":
        if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
            image.info["transparency"] = tuple(value >> 8 for value in clear)  # as Pillow's pixels
        return image
    deep = np.asarray(image)
    picture = Image.fromarray(scale_to_8_bit(deep))
    if isinstance(clear, int):
        picture.putalpha(Image.fromarray((deep != clear).astype(np.uint8) * np.uint8(255)))
    return picture
