"""Images that are in memory already, brought to what a file would have become."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from risam_cli.data.images.files import FileStamp
from risam_cli.data.images.frames import Frame
from risam_cli.data.images.images import (
    MAX_PIXELS,
    EncoderImage,
    Rgb,
    decoding,
    fit_frames,
    open_image,
    to_rgb,
)
from risam_cli.errors import ImageError

Pixels = Image.Image | NDArray[np.generic]


def pixels_to_rgb(image: Pixels, name: str) -> Rgb:
    """An image in memory as upright (H, W, 3) uint8, by the rules that files are read by.

    Args:
        image: of Pillow's, in any mode, its EXIF orientation applied; or an array: (H, W, 3) RGB,
            (H, W, 4) RGBA or (H, W) and (H, W, 1) gray, uint8; or gray as uint16, int32 or
            float32.
        name: for messages.

    Raises:
        ImageError: it is nothing of the kind.
    """
    if not isinstance(image, Image.Image):
        array = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        gray = array.ndim == 2 and array.dtype in (np.uint8, np.uint16, np.int32, np.float32)
        coloured = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
        if not (gray or coloured) or 0 in array.shape:
            raise ImageError(
                f"{name}: an array of shape {image.shape} and type {image.dtype} is not an image",
                "give (H, W, 3) RGB, (H, W, 4) RGBA or (H, W) gray, as uint8 in 0..255",
            )
        image = Image.fromarray(np.ascontiguousarray(array))
    with decoding(Path(name)):
        return to_rgb(image)


def bytes_to_rgb(data: bytes, name: str) -> Rgb:
    """The picture of a file's bytes as upright (H, W, 3) uint8, as a file on disk is read.

    Raises:
        ImageError: they are no image, damaged, or larger than :data:`MAX_PIXELS`.
    """
    if data == b"":
        raise ImageError(f"{name}: the file is empty")
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: not the bytes of an image", "open the file in binary mode")
    with decoding(Path(name)):
        return to_rgb(open_image(io.BytesIO(data), Path(name), MAX_PIXELS))


def memory_for_encoder(
    image: Pixels, frames: Sequence[Frame], name: str, *, full_decode: bool = False
) -> EncoderImage:
    """As :func:`risam_cli.data.images.images.read_for_encoder`, of an image in memory.

    ``sha256`` is that of the scaled pixels and the own size, ``stamp`` is empty.

    Raises:
        ImageError: it is not an image, or larger than :data:`MAX_PIXELS`.
    """
    shape = image.size if isinstance(image, Image.Image) else image.shape[:2]
    pixels = math.prod(shape)
    if pixels > MAX_PIXELS:
        raise ImageError(
            f"{name}: {pixels} pixels are more than {MAX_PIXELS}",
            "raise max_pixels if you trust the image",
        )
    # As a PNG file of these pixels would be scaled.
    picture = Image.fromarray(pixels_to_rgb(image, name))
    views, own_size = fit_frames(picture, frames, full_decode=full_decode)
    digest = hashlib.sha256(f"{own_size[0]}x{own_size[1]} RGB ".encode())
    for view in views:
        digest.update(view.data)
    return EncoderImage(views, own_size, digest.hexdigest(), FileStamp(0, 0, 0, 0))
