"""The exception family. Every message names the value, the place and the fix, on one line.

::

    RisamError            exit 1: could not start, or could not go on
    ├── UsageError        exit 2: wrong usage that click itself cannot see
    ├── ConfigError       a YAML file, or a value that replaces one of it, that does not fit
    ├── ModelError        a model folder or a checkpoint that is missing, damaged or does not fit
    ├── DataError         an annotation file, a manifest or a split that cannot be read
    │   └── ImageError    one image that cannot be read; an item's failure, never the run's
    ├── OutputError       an output folder that cannot be used or written
    ├── MachineError      out of files, memory or threads: every later item would meet it too
    └── Interrupted       exit 130: stopped by the user; finished work is kept

A message that speaks of a setting holds its key, written by :func:`setting`, not the name that one
front end has for it. The front end in charge (:func:`use_front_end`) puts its own name there: the
command line an option of the command that runs, Python a parameter, a YAML file a key.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130

NameOf = Callable[[str, str], str | None]
"""What a front end calls a setting, from its key and its value ("" for none); None: it has none."""

_SETTING = re.compile("\x1e([a-z_]+)=([^\x1e]*)\x1e")
_NEXT = "\x1d"  # between a message and its fixes, on the way from another process


def setting(key: str, value: object = "") -> str:
    """A setting in a message: ``f"use {setting('device', 'auto')}"``.

    Args:
        key: the name of the command's parameter, which is that of the API's where it has one.
        value: what to set it to; True for a switch.
    """
    return f"\x1e{key}={value}\x1e"


def keyword(key: str, value: str) -> str:
    """A setting as a keyword argument of Python: ``device=auto``."""
    return f"{key}={value}" if value else key


_name_of: NameOf = keyword


def use_front_end(name_of: NameOf) -> NameOf:
    """Let a front end name the settings in this process's messages; gives the one before it."""
    global _name_of
    before, _name_of = _name_of, name_of
    return before


def parts_of(raw: str) -> list[str]:
    """Message and fixes out of :attr:`RisamError.raw`."""
    return raw.split(_NEXT)


def told(text: str) -> str:
    """A text with its settings named as the front end in charge names them.

    Takes :attr:`RisamError.raw` too.
    """
    return str(RisamError(*parts_of(text)))


def _fill(text: str, name_of: NameOf) -> str:
    return _SETTING.sub(lambda m: name_of(m[1], m[2]) or keyword(m[1], m[2]), text)


class RisamError(Exception):
    """Base of every error that a user can cause or fix.

    Args:
        message: what is wrong, naming the value and the place.
        fixes: what to do about it, shown after the message: one way or several. A way that needs a
            setting which the front end does not have is left out.
    """

    exit_code = EXIT_ERROR

    def __init__(self, message: str, *fixes: str) -> None:
        super().__init__(message, *fixes)

    @property
    def settings(self) -> tuple[str, ...]:
        """The keys of the settings that it speaks of."""
        return tuple(key for part in self.args for key, _ in _SETTING.findall(part))

    def named(self, name_of: NameOf | None = None) -> tuple[str, str]:
        """Message and fix with the settings named, by default by the front end in charge."""
        name = name_of or _name_of
        message, *fixes = self.args
        able = [fix for fix in fixes if fix and all(name(*key) for key in _SETTING.findall(fix))]
        return _fill(message, name), _fill(", or ".join(able), name)

    @property
    def message(self) -> str:
        """What is wrong."""
        return self.named()[0]

    @property
    def fix(self) -> str:
        """What to do about it; may be empty."""
        return self.named()[1]

    @property
    def raw(self) -> str:
        """Message and fixes for another process, where :func:`told` names the settings."""
        return _NEXT.join(self.args)

    def __str__(self) -> str:
        return "; ".join(part for part in self.named() if part)


class UsageError(RisamError):
    """Options that contradict each other or the input (exit 2)."""

    exit_code = EXIT_USAGE


class ConfigError(RisamError):
    """A configuration file, or a value that replaces one of it, that does not fit the settings."""


class ModelError(RisamError):
    """A model folder, checkpoint or text encoder that is missing, damaged or does not fit."""


class DataError(RisamError):
    """An annotation file, manifest or split that cannot be read."""


class ImageError(DataError):
    """One image that cannot be read. Fails its item, never the run."""


class OutputError(RisamError):
    """An output folder that cannot be used or written."""


class MachineError(RisamError):
    """The machine has run out of something; the run's fault, never an item's."""


class Interrupted(RisamError):
    """Stopped by Ctrl-C, SIGTERM or SIGHUP; finished work is kept (exit 130)."""

    exit_code = EXIT_INTERRUPTED


NAME_ERRORS = {errno.ENAMETOOLONG, errno.EILSEQ}
"""What the system says against a file's name: the item's fault, and not the disk's."""

_RUN_OUT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


def machine_error(error: BaseException | None) -> MachineError | None:
    """What the machine has run out of, where that is the cause of an error; else None."""
    while error is not None:
        if isinstance(error, MachineError):
            return error
        no_thread = isinstance(error, RuntimeError) and "start new thread" in str(error)
        if no_thread or (isinstance(error, OSError) and error.errno in _RUN_OUT):
            return MachineError(
                f"the machine has run out of resources: {reason_of(error)}",
                "raise the limit (see ulimit -a) or lower the number of workers",
            )
        error = error.__cause__
    return None


def require_machine(error: BaseException) -> None:
    """To be called with what befell an item, before it is counted as the item's own failure.

    Raises:
        MachineError: it was the machine's: no more files or threads can be had.
    """
    found = machine_error(error)
    if found is not None:
        raise found from error


def reason_of(error: BaseException) -> str:
    """What a library or the system says, on one line and not long, without paths of its own."""
    said = error.strerror if isinstance(error, OSError) else None
    return " ".join((said or str(error)).split())[:200] or type(error).__name__
