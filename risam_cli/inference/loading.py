"""One image file to what a network takes, and what is said where that fails; needs no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from risam_cli.data.images.bounds import SlowImage
from risam_cli.data.images.files import FileStamp, file_stamp
from risam_cli.data.images.frames import Frame
from risam_cli.data.images.images import MAX_PIXELS, Bands, EncoderImage, read_for_encoder
from risam_cli.errors import ImageError, machine_error

if TYPE_CHECKING:
    from risam_cli.inference.compute import Ahead

TIMEOUT = 120.0
"""Seconds that reading and decoding one image may take."""


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """How images are loaded.

    Attributes:
        frames: the network's; images come as each of them wants it.
        workers: loader processes; 0 decodes in threads of this process.
        max_pixels: larger images are refused.
        timeout: seconds for one image.
        full_decode: decode every pixel before scaling; see :mod:`risam_cli.data.images.images`.
        threads: that decode where there are no processes.
        pinned: whether processes' images come in memory that a GPU copies from.
        bands: which bands of a TIFF of several are red, green and blue.
    """

    frames: tuple[Frame, ...]
    workers: int = 0
    max_pixels: int = MAX_PIXELS
    timeout: float = TIMEOUT
    full_decode: bool = False
    threads: int = 2
    pinned: bool = False
    bands: Bands | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of one file.

    Attributes:
        image: None where it failed.
        error: one line, where it failed.
        stamp: of the file, as far as there was one: by it a later run knows a repaired file.
        seconds: taken to read, decode and scale.
        ahead: what was got ready of the image in this process, if the loader was asked to.
        by_machine: that it failed is not the file's fault, and ends the run.
    """

    image: EncoderImage | None
    error: str
    stamp: FileStamp | None
    seconds: float
    ahead: Ahead | None = None
    by_machine: bool = False


Load = Callable[[Path, LoaderSettings], Loaded]


def load_image(path: Path, settings: LoaderSettings) -> Loaded:
    """Loads one file here and now.

    Raises:
        SlowImage: it may take long, and threads are to decode it, which nobody can end.
        MachineError: the machine has run out of something.
    """
    started = time.perf_counter()
    try:
        image = read_for_encoder(
            path,
            settings.frames,
            settings.max_pixels,
            full_decode=settings.full_decode,
            bands=settings.bands,
            quick=not settings.workers,
        )
    except ImageError as error:
        return failed(path, error.raw, time.perf_counter() - started)
    except MemoryError:
        why = f"{path}: not enough memory to decode it"
        return failed(path, why, time.perf_counter() - started)
    return Loaded(image, "", image.stamp, time.perf_counter() - started)


def load_safely(load: Load, path: Path, settings: LoaderSettings) -> Loaded:
    """As ``load``, with whatever it raises as an answer.

    Raises:
        SlowImage: as :func:`load_image`.
    """
    try:
        return load(path, settings)
    except SlowImage:
        raise
    except Exception as error:  # whatever one image does must not end the others
        return unexpected(path, error)


def unexpected(path: Path, error: Exception, seconds: float = 0.0) -> Loaded:
    """The answer where a file's loading raised what no file should cause."""
    if (machine := machine_error(error)) is not None:
        return Loaded(None, machine.raw, None, seconds, by_machine=True)
    return failed(path, f"{type(error).__name__}: {error}", seconds)


def timed_out(seconds: float) -> str:
    """What is said of a file that took longer than the limit."""
    return f"reading it took longer than {seconds:g} s; the drive may be stalled"


def over_time(path: Path, seconds: float) -> Loaded:
    """The answer for a file that took longer than the limit."""
    # No look at the file: the drive that stalls would stall this thread as well.
    return Loaded(None, f"{path}: {timed_out(seconds)}", None, seconds)


def failed(path: Path, why: str, seconds: float) -> Loaded:
    """The answer for a file that cannot be loaded."""
    text = why if str(path) in why else f"{path}: {why}"
    return Loaded(None, text, file_stamp(path), seconds)
