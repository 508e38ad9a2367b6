"""Messages and progress on stderr; stdout is left to data.

On a terminal, progress is a bar by rich; elsewhere (a log file, a batch system) it is a plain line
every few seconds and one at the end. rich is imported only when a bar is drawn.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress

PLAIN_INTERVAL = 5.0
"""Seconds between two plain progress lines."""

_RATE_WINDOW = 30.0  # seconds over which the rate is taken, so that it follows a change of load
_COLORS = {"warning": "\x1b[33m", "error": "\x1b[31m"}


def sanitize(text: str, *, keep_newlines: bool = False) -> str:
    r"""Text that is safe to show: control, format and surrogate characters as escapes.

    File names and expressions come from others; a terminal must not obey what is in them, and one
    message stays on one line. A byte of a file name that is no UTF-8 shows as ``\xNN``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char == "\n" and keep_newlines
        else _escape(char)
        if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
        else char
        for char in text
    )


def _escape(char: str) -> str:
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    if char in named:
        return named[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps an undecodable byte
        code -= 0xDC00
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


class Progress(Protocol):
    """A running count. All methods may be called from any thread."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count ``n`` more items; ``fields`` are shown beside the rate, as in ``failures=3``."""

    def update(self, *, total: int | None = None, **fields: object) -> None:
        """Show ``fields`` from now on; a ``total`` that became known replaces the old one."""


class Console:
    """Where a run speaks to its user.

    Args:
        quiet: only warnings and errors.
        verbose: also what :meth:`debug` is given.
        tracebacks: show the traceback of an error (``--debug``).
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
        """One line; not with ``--quiet``."""
        if not self.quiet:
            self._write(sanitize(message))

    def debug(self, message: str) -> None:
        """One line; only with ``--verbose``."""
        if self.verbose and not self.quiet:
            self._write(sanitize(message))

    def warn(self, message: str) -> None:
        """One line, marked as a warning."""
        self._write(sanitize(message), "warning")

    def error(self, message: str) -> None:
        """One line, marked as an error."""
        self._write(sanitize(message), "error")

    def block(self, text: str) -> None:
        """Several lines as they are, such as a table; not with ``--quiet``."""
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
            try:
                yield plain
            except BaseException:
                plain.finish(done=False)
                raise
            plain.finish(done=True)

    @contextmanager
    def _drawn(
        self, description: str, total: int | None, unit: str, done: int
    ) -> Iterator[Progress]:
        from rich import progress as rich_progress
        from rich.console import Console as RichConsole

        bar = RichConsole(file=self.stream, no_color=_no_color() or None, highlight=False)
        columns = (
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(bar_width=None),
            rich_progress.TextColumn("{task.fields[text]}", markup=False),
        )
        with rich_progress.Progress(*columns, console=bar, expand=True) as live:
            self._bar = bar
            try:
                yield _Bar(live, sanitize(description), total, unit, self._clock, done)
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


class _Count:
    """The numbers behind a progress display."""

    def __init__(self, total: int | None, unit: str, clock: Callable[[], float], done: int) -> None:
        self.total, self.unit, self.clock = total, unit, clock
        self.done = self.begun_with = done
        self.fields: dict[str, object] = {}
        self.lock = threading.RLock()
        self.started = clock()
        self._recent: deque[tuple[float, int]] = deque([(self.started, done)])

    def add(self, n: int, fields: dict[str, Any]) -> None:
        now = self.clock()
        self.done += n
        self.fields.update(fields)
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and self._recent[1][0] < now - _RATE_WINDOW:
            self._recent.popleft()

    def text(self, *, final: bool = False) -> str:
        """Count, rate and time left (over all of the time where ``final``), then the fields."""
        then, before = (self.started, self.begun_with) if final else self._recent[0]
        now = self.clock()
        rate = (self.done - before) / (now - then) if now > then else 0.0
        known = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.done}{known} {self.unit}"]
        if rate > 0:
            parts.append(f"{rate:.3g} {self.unit}/s" if rate < 100 else f"{rate:.0f} {self.unit}/s")
        if final:
            parts.append(f"took {_duration(now - self.started)}")
        elif rate > 0 and self.total is not None:
            parts.append(f"{_duration(max(self.total - self.done, 0) / rate)} left")
        parts += [f"{name}={_value(value)}" for name, value in self.fields.items()]
        return ", ".join(parts)


class _Plain(_Count):
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
                self._last = self.clock()
                self._console.info(f"{self._description}: {self.text()}")

    def update(self, *, total: int | None = None, **fields: object) -> None:
        with self.lock:
            self.total = self.total if total is None else total
            self.fields.update(fields)

    def finish(self, *, done: bool) -> None:
        with self.lock:
            stopped = "" if done else "stopped at "
            self._console.info(f"{self._description}: {stopped}{self.text(final=True)}")


class _Bar(_Count):
    """A bar on a terminal."""

    def __init__(
        self,
        live: RichProgress,
        description: str,
        total: int | None,
        unit: str,
        clock: Callable[[], float],
        done: int,
    ) -> None:
        super().__init__(total, unit, clock, done)
        self._live = live
        self._task = live.add_task(description, total=total, completed=done, text=self.text())

    def advance(self, n: int = 1, **fields: object) -> None:
        with self.lock:
            self.add(n, fields)
            self._live.update(self._task, completed=self.done, text=self.text())

    def update(self, *, total: int | None = None, **fields: object) -> None:
        with self.lock:
            self.total = self.total if total is None else total
            self.fields.update(fields)
            self._live.update(self._task, total=self.total, text=self.text())


def _duration(seconds: float) -> str:
    """Seconds as ``8s``, ``3m05s`` or ``2h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else sanitize(str(value))


_current = Console()


def get_console() -> Console:
    """The console of this process, as the command line set it."""
    return _current


def set_console(console: Console) -> None:
    """Replace the console of this process."""
    global _current
    _current = console
