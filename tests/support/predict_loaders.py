"""Loaders that break, for the tests of predict; processes import this module."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from risam_cli.inference.loader import Loaded, LoaderSettings, load_image


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
    if path.name.startswith("stalled"):
        time.sleep(60)
    return load_image(path, settings)


def load_or_raise(path: Path, settings: LoaderSettings) -> Loaded:
    """Has a bug."""
    raise LookupError("a bug")


def load_slowly(path: Path, settings: LoaderSettings) -> Loaded:
    """Takes a moment, so that several images are in hand at a time; dies on some."""
    time.sleep(0.05)
    return load_or_die(path, settings)
