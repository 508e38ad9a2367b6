"""Ctrl-C, SIGTERM and SIGHUP: the first ends a run where nothing is lost, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

_PATIENCE = 0.25  # seconds: torchrun and a terminal may both pass one Ctrl-C on


def requests_to_end() -> list[int]:
    """SIGTERM, and SIGHUP, which a closed terminal sends, unless nohup has it ignored."""
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        return [signal.SIGTERM, signal.SIGHUP]
    return [signal.SIGTERM]


def ignore_ends_of_group() -> None:
    """In a process that helps: what reaches the whole group is for the main process to decide."""
    for name in ("SIGINT", "SIGHUP"):  # Ctrl-C, and a terminal that closes
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class StopRequest:
    """Remembers that the user wants an end; a later Ctrl-C ends at once.

    A context manager; outside the main thread it changes nothing.

    Args:
        stop: set at the first request.
        notice: said on stderr then.
    """

    def __init__(self, stop: threading.Event | None = None, notice: str = "") -> None:
        self._stop = stop
        self._notice = notice
        self._since: float | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether there was one."""
        return self._since is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *requests_to_end()):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is not None:
            if number == signal.SIGINT and now - self._since > _PATIENCE:
                raise KeyboardInterrupt
            return
        self._since = now
        if self._stop is not None:
            self._stop.set()
        if self._notice:
            # Not through the console: a handler must not wait for a lock that its thread holds.
            with suppress(OSError):  # a terminal that is gone
                place = sys.__stderr__.fileno() if sys.__stderr__ else 2
                os.write(place, f"{self._notice}\n".encode())
