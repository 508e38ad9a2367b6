"""Messages and progress on stderr; stdout is left to data.

On a terminal, progress is a bar by rich; elsewhere (a log file, a batch system) it is a plain line
every few seconds and one at the end. rich is imported only when a bar is drawn.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from risam_cli.console.count import STALLED, Count
from risam_cli.console.text import sanitize

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

PLAIN_INTERVAL = 5.0
"""Seconds between two plain progress lines."""


_COLORS = {"warning": "\x1b[33m", "error": "\x1b[31m"}


class Progress(Protocol):
    """A running count. All methods may be called from any thread."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count ``n`` more items; ``fields`` are shown beside the rate, as in ``failures=3``.

        A field that is a mapping from parts to seconds says where the time goes: it is shown as
        the parts' shares of their sum, as in ``busy: encode 75%, write 25%``.
        """

    def update(self, *, total: int | None = None, **fields: object) -> None:
        """Show ``fields`` from now on; a ``total`` that became known replaces the old one."""


class Console:
    """Where a run speaks to its user.

    Args:
        quiet: only warnings and errors.
        verbose: also what :meth:`debug` is given.
        tracebacks: show the traceback of an error.
        stream: instead of ``sys.stderr``, which is looked up at each message.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        quiet: bool = False,
        verbose: bool = False,
        *,
        tracebacks: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.tracebacks = tracebacks
        self._stream = stream
        self._clock = clock
        self._lock = threading.RLock()
        self._bar: RichConsole | None = None

    @property
    def stream(self) -> TextIO:
        """The stream that is written to."""
        return self._stream if self._stream is not None else sys.stderr

    @property
    def is_terminal(self) -> bool:
        """Whether bars can be drawn."""
        return self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def info(self, message: str) -> None:
        """One line; not where it is quiet."""
        if not self.quiet:
            self._write(sanitize(message))

    def debug(self, message: str) -> None:
        """One line; only where it is verbose."""
        if self.verbose and not self.quiet:
            self._write(sanitize(message))

    def warn(self, message: str) -> None:
        """One line, marked as a warning."""
        self._write(sanitize(message), "warning")

    def error(self, message: str) -> None:
        """One line, marked as an error."""
        self._write(sanitize(message), "error")

    def block(self, text: str) -> None:
        """Several lines as they are, such as a table; not where it is quiet."""
        if not self.quiet:
            self._write(sanitize(text, keep_newlines=True).rstrip("\n"))

    @contextmanager
    def progress(
        self, description: str, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Progress]:
        """Show how far a loop is.

        Args:
            description: what is done, as in ``"predict"``.
            total: items to come, or None where that is unknown.
            unit: the items' plural, as in ``"images"``.
            done: items that an earlier run did; they count as done, not towards the rate.
        """
        if self.quiet:
            yield _Silent()
        elif self.is_terminal and self._bar is None:
            with self._drawn(description, total, unit, done) as bar:
                yield bar
        else:
            plain = _Plain(self, sanitize(description), total, unit, self._clock, done)
            ended = threading.Event()
            threading.Thread(target=plain.watch, args=(ended,), daemon=True).start()
            try:
                yield plain
            except BaseException:
                plain.finish(done=False)
                raise
            finally:
                ended.set()
            plain.finish(done=True)

    @contextmanager
    def _drawn(
        self, description: str, total: int | None, unit: str, done: int
    ) -> Iterator[Progress]:
        from rich.console import Console as RichConsole

        from risam_cli.console.bar import Bar

        counted = Count(total, unit, self._clock, done)
        screen = RichConsole(file=self.stream, no_color=_no_color() or None, highlight=False)
        with Bar(counted, sanitize(description), screen) as bar:
            self._bar = screen
            try:
                yield bar
            finally:
                self._bar = None

    def _write(self, text: str, level: str = "") -> None:
        label = f"{level}: " if level else ""
        with self._lock:
            if self._bar is not None:
                style = {"warning": "yellow", "error": "red"}.get(level)
                self._bar.print(label + text, style=style, markup=False, soft_wrap=True)
                return
            stream = self.stream
            if level and stream.isatty() and not _no_color():
                label = f"{_COLORS[level]}{label}\x1b[0m"
            # A log in plain ASCII must not fail on a file name that is not.
            encoding = getattr(stream, "encoding", None) or "utf-8"
            safe = text.encode(encoding, "backslashreplace").decode(encoding)
            stream.write(f"{label}{safe}\n")
            stream.flush()


def _no_color() -> bool:
    """https://no-color.org: set and not empty, whatever its value."""
    return bool(os.environ.get("NO_COLOR"))


class _Silent:
    def advance(self, n: int = 1, **fields: object) -> None:
        pass

    def update(self, *, total: int | None = None, **fields: object) -> None:
        pass


class _Plain(Count):
    """Lines for a log."""

    def __init__(
        self,
        console: Console,
        description: str,
        total: int | None,
        unit: str,
        clock: Callable[[], float],
        done: int,
    ) -> None:
        super().__init__(total, unit, clock, done)
        self._console, self._description = console, description
        self._last = self.started

    def advance(self, n: int = 1, **fields: object) -> None:
        with self.lock:
            self.add(n, fields)
            if self.clock() - self._last >= PLAIN_INTERVAL:
                self._tell()

    def update(self, *, total: int | None = None, **fields: object) -> None:
        with self.lock:
            self.total = self.total if total is None else total
            self.fields.update(fields)

    def finish(self, *, done: bool) -> None:
        with self.lock:
            stopped = "" if done else "stopped at "
            self._console.info(f"{self._description}: {stopped}{self.line(final=True)}")

    def watch(self, ended: threading.Event) -> None:
        """Says so where nothing comes for long, until ``ended``; in a thread of its own."""
        while not ended.wait(STALLED):
            with self.lock:
                if not ended.is_set() and self.clock() - self._last >= STALLED:
                    self._tell()

    def _tell(self) -> None:
        self._last = self.clock()
        self._console.info(f"{self._description}: {self.line()}")


_current = Console()


def get_console() -> Console:
    """The console of this process, as the command line set it."""
    return _current


def set_console(console: Console) -> None:
    """Replace the console of this process."""
    global _current
    _current = console
