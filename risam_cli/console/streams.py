"""Standard streams that the shell closed (``>&-``), and a terminal that closes during a run.

The first file that a process opens would take a closed stream's number, and what is printed would
go there. The null device takes the number instead; data that would be lost is an error. Messages to
a terminal that is gone are lost, and never end a run.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

from risam_cli.errors import OutputError, UsageError

_CLOSED: set[str] = set()


class _Closed(io.StringIO):
    """A stdout that is not there: whoever has data for it must hear of it."""

    def write(self, text: str) -> int:
        """Refuses.

        Raises:
            OutputError: always.
        """
        raise OutputError("stdout is closed", "give it a file or a pipe")


class _Terminal(io.FileIO):
    """A terminal that may close while it is written to."""

    def write(self, data: Any, /) -> int:
        """As any file's, but once the terminal is closed, nothing is written."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return len(data)


def open_standard_streams() -> None:
    """Put something in the place of every standard stream that is closed or may close."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        _CLOSED.add(name)
        try:
            os.fstat(number)
        except OSError:
            found = os.open(os.devnull, os.O_RDWR)
            if found != number:
                os.dup2(found, number)
                os.close(found)
        stream: Any = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
        setattr(sys, name, _Closed() if name == "stdout" else stream)
    stderr = sys.__stderr__
    if os.name == "posix" and stderr is not None and stderr is sys.stderr and stderr.isatty():
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Terminal(stderr.fileno(), "w", closefd=False)),
            stderr.encoding,
            stderr.errors,
            line_buffering=True,
        )


def require_open(name: str) -> None:
    """Make sure that data can come from ``stdin`` or go to ``stdout``.

    Raises:
        UsageError: the shell closed it.
    """
    if name in _CLOSED:
        raise UsageError(f"{name} is closed", "give it a file or a pipe")
