"""Loaders that break, for the tests of predict; processes import this module."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

from risam_cli.data.images.bounds import SlowImage
from risam_cli.inference.loading import Loaded, LoaderSettings, load_image


def load_or_die(path: Path, settings: LoaderSettings) -> Loaded:
    """Dies as a decoder that runs into bad memory does."""
    if path.name.startswith("deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    return load_image(path, settings)


def load_or_die_once(path: Path, settings: LoaderSettings) -> Loaded:
    """Dies at the first try."""
    if path.name.startswith("deadly"):
        tried = path.with_suffix(".tried")
        if not tried.exists():
            tried.touch()
            os._exit(3)
    return load_image(path, settings)


def load_or_stall(path: Path, settings: LoaderSettings) -> Loaded:
    """Takes for ever, as a network drive that is gone."""
    if "stalled" in path.name:
        time.sleep(60)
    return load_image(path, settings)


def load_or_die_or_stall(path: Path, settings: LoaderSettings) -> Loaded:
    """Both; for a loader whose threads are left to processes by then."""
    return load_or_stall(path, settings) if "stalled" in path.name else load_or_die(path, settings)


def load_or_hang_apart(path: Path, settings: LoaderSettings) -> Loaded:
    """As a file that may take long and does; where nobody could end it, that is told."""
    if path.name.startswith("slow") and not settings.workers:
        raise SlowImage(path)
    return load_or_stall(path, settings)


def load_out_of_files(path: Path, settings: LoaderSettings) -> Loaded:
    """Where the machine has run out of open files."""
    if path.name.startswith("late"):
        raise OSError(errno.EMFILE, "Too many open files")
    return load_image(path, settings)


def load_or_raise(path: Path, settings: LoaderSettings) -> Loaded:
    """Has a bug."""
    raise LookupError("a bug")


def load_slowly(path: Path, settings: LoaderSettings) -> Loaded:
    """Takes a moment, so that several images are in hand at a time; dies on some."""
    time.sleep(0.05)
    return load_or_die(path, settings)
