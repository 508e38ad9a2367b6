"""The first Ctrl-C ends a run at the next batch, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def stopping(stop: threading.Event) -> Iterator[threading.Event]:
    """Turns the first Ctrl-C or SIGTERM into ``stop``; a second one ends at once.

    Gives an event that says whether there was one.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        stop.set()
        # Not through the console: a handler must not wait for a lock that its own thread holds.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"stopping after this batch\n")

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_PATIENCE = 1.0  # seconds: torchrun and a terminal may both pass one Ctrl-C on


class StopRequest:
    """Remembers that the user wants an end; a second Ctrl-C ends at once.

    A context manager; outside the main thread it changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested and number == signal.SIGINT and now - self._since > _PATIENCE:
            raise KeyboardInterrupt
        if not self.requested:
            self._since = now
        self.requested = True
