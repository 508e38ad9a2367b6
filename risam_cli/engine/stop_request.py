"""Ctrl-C and SIGTERM while training: the step is finished and a checkpoint written first."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

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
