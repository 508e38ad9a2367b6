"""The first Ctrl-C ends a run at the next batch, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
