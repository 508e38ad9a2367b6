"""The exception family. Every message names the value, the place and the fix, on one line.

::

    RisamError            exit 1: could not start, or could not go on
    ├── UsageError        exit 2: wrong usage that click itself cannot see
    ├── ConfigError       a YAML file or a ``--set`` that does not fit the settings
    ├── ModelError        a model folder or a checkpoint that is missing, damaged or does not fit
    ├── DataError         an annotation file, a manifest or a split that cannot be read
    │   └── ImageError    one image that cannot be read; an item's failure, never the run's
    ├── OutputError       an output folder that cannot be used or written
    └── Interrupted       exit 130: stopped by the user; what was done is kept
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130


class RisamError(Exception):
    """Base of every error that a user can cause or mend.

    Args:
        message: what is wrong, naming the value and the place.
        fix: what to do about it; shown after the message. May be empty.
    """

    exit_code = EXIT_ERROR

    def __init__(self, message: str, fix: str = "") -> None:
        self.message = message
        self.fix = fix
        super().__init__(f"{message}; {fix}" if fix else message)


class UsageError(RisamError):
    """Options that contradict each other or the input (exit 2)."""

    exit_code = EXIT_USAGE


class ConfigError(RisamError):
    """A configuration file or ``--set`` that does not fit the settings."""


class ModelError(RisamError):
    """A model folder, checkpoint or text encoder that is missing, damaged or does not fit."""


class DataError(RisamError):
    """An annotation file, manifest or split that cannot be read."""


class ImageError(DataError):
    """One image that cannot be read. Fails its item, never the run."""


class OutputError(RisamError):
    """An output folder that cannot be used or written."""


class Interrupted(RisamError):
    """Stopped by the user or by SIGTERM; finished work is kept (exit 130)."""

    exit_code = EXIT_INTERRUPTED
