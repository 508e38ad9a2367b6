"""What a Python caller gives, paths, images and expressions, as the engine's samples."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from risam_cli.data.identity import has_words
from risam_cli.data.images.frames import Frame
from risam_cli.data.images.memory import Pixels, bytes_to_rgb, memory_for_encoder
from risam_cli.data.inputs.inputs import MAX_CHARACTERS
from risam_cli.errors import ImageError, UsageError
from risam_cli.files.store import place
from risam_cli.inference.feeder import ReadySample
from risam_cli.inference.loading import Loaded
from risam_cli.types import Expression, Sample

ImageLike = str | os.PathLike[str] | bytes | BinaryIO | Pixels
"""A path, a file's bytes or an open one, an image of Pillow's, or an array.

See :func:`risam_cli.data.images.memory.pixels_to_rgb`.
"""

Item = ImageLike | tuple[ImageLike, str | Sequence[str]]
"""An image, or an image with what is asked of it."""

Source = Path | Pixels
"""Where an image is to be had again."""


def samples_of(
    images: Iterable[Item],
    common: tuple[str, ...] | None,
    frames: Sequence[Frame],
    *,
    keep: bool,
    full_decode: bool,
) -> Iterator[tuple[Sample, Source | None]]:
    """The samples of what was given, each with its image, for showing.

    Args:
        common: asked of every image that brings nothing of its own.
        frames: the network's.
        keep: also give images that are in memory; without it None stands for them.

    Raises:
        UsageError: an item that is not an image, or one that nothing is asked of.
    """
    for number, item in enumerate(images):
        image, own = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
        texts = common if own is None else texts_of(own)
        if texts is None:
            raise UsageError(
                f"image {number} has no expression",
                "give expressions, or pairs of an image and its expressions",
            )
        sample, source = sample_of(image, texts, frames, number, full_decode=full_decode)
        yield sample, source if keep or isinstance(source, Path) else None


def sample_of(
    image: Any, texts: Sequence[str], frames: Sequence[Frame], number: int, *, full_decode: bool
) -> tuple[Sample, Source]:
    """The sample of one image, and the image itself.

    Raises:
        UsageError: it is nothing that an image can be given as. One that cannot be read is not
            told here: the sample says so where it is loaded.
    """
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        path = place(name)
        return Sample(name, path, expressions_of(name, texts)), path
    name = f"image {number}"
    try:
        image = _decoded(image, name)
        if not isinstance(image, (Image.Image, np.ndarray)):
            kind = "None" if image is None else f"a {type(image).__name__}"
            raise UsageError(
                f"image {number} is {kind}",
                "give a path, a file's bytes, a Pillow image or a numpy array",
            )
        name = getattr(image, "filename", "") or name
        ready = memory_for_encoder(image, frames, name, full_decode=full_decode)
        loaded = Loaded(ready, "", None, 0.0)
    except ImageError as error:
        image, loaded = np.zeros((1, 1), np.uint8), Loaded(None, error.raw, None, 0.0)
    # A path of its own: two images in memory are never the same one.
    path = Path(f"\0image {number}")
    return ReadySample(name, path, expressions_of(name, texts), None, loaded), image


def _decoded(image: Any, name: str) -> Any:
    """The picture of a file in memory, by the rules of files on disk; else what was given."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Image.fromarray(bytes_to_rgb(bytes(image), name))
    if hasattr(image, "read") and not isinstance(image, Image.Image):
        data = image.read()
        if data == b"" and image.seekable() and image.tell():
            raise ImageError(f"{name}: the file is positioned at its end", "rewind it with seek(0)")
        return Image.fromarray(bytes_to_rgb(data, name))
    return image


def expressions_of(name: str, texts: Sequence[str]) -> tuple[Expression, ...]:
    """Expressions with the ids that ``risam predict`` gives them."""
    return tuple(Expression(f"{name}#{k}", text) for k, text in enumerate(texts))


def texts_of(expressions: str | Sequence[str]) -> tuple[str, ...]:
    """One expression or several, checked.

    Raises:
        UsageError: none at all, an empty one, or one that is no text.
    """
    if isinstance(expressions, (bytes, bytearray)):
        raise UsageError("an expression is bytes", "give text")
    if not isinstance(expressions, Iterable):
        kind = type(expressions).__name__
        raise UsageError(f"the expressions are a {kind}", "give text, or a list of texts")
    texts = (expressions,) if isinstance(expressions, str) else tuple(expressions)
    if not texts:
        raise UsageError("no expression is given")
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"an expression is a {type(text).__name__}", "give text")
        if not has_words(text):
            raise UsageError(f"the expression {text!r} has no words", "give some")
        if len(text) > MAX_CHARACTERS:
            raise UsageError(
                f"an expression has {len(text)} characters, more than {MAX_CHARACTERS}",
                "shorten it",
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise UsageError(f"the expression {text!r} is not Unicode text")
    return texts


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A parameter that is a whole number, checked.

    Raises:
        UsageError: it is none, or less than the ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} {value!r} is not a whole number") from None
    if least is not None and number < least:
        raise UsageError(f"{name} {number}", f"give at least {least}")
    return number


def points_of(points: Iterable[Any]) -> tuple[tuple[float, float], ...]:
    """Points of an image, checked: pairs of finite numbers, x before y.

    Raises:
        UsageError: one is not.
    """
    if not isinstance(points, Iterable):
        raise UsageError(f"points {points!r} is not a list", "give pairs of x and y in pixels")
    found = []
    for point in points:
        try:
            x, y = (float(number) for number in point)
        except (TypeError, ValueError):
            x = y = math.nan
        if not (math.isfinite(x) and math.isfinite(y)):
            raise UsageError(f"the point {point!r} is not a pair of numbers", "give x, y in pixels")
        found.append((x, y))
    return tuple(found)


def is_one(images: object) -> bool:
    """Whether it is one image rather than several."""
    if isinstance(images, Mapping):
        raise UsageError(f"the images are a {type(images).__name__}", "give its values, in a list")
    if isinstance(images, np.ndarray):
        may_be_paths = images.ndim > 0 and images.dtype.kind in "OU"
        return images.ndim != 4 and not may_be_paths
    kinds = (str, os.PathLike, Image.Image, bytes, bytearray, memoryview)
    return isinstance(images, kinds) or hasattr(images, "read") or not hasattr(images, "__iter__")
