"""Waiting no longer than a time limit for what cannot be interrupted: a drive that stalls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, act: Callable[[], T]) -> T:
    """What ``act`` gives, or raises, if it ends in time.

    It runs in a thread of its own. One that does not end is left behind: as a daemon, it holds up
    neither the run nor its exit.

    Raises:
        TimeoutError: it took longer.
    """
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(act())
        except BaseException as error:  # raised again where it is waited for
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="risam-patience")
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not result:
        raise TimeoutError(f"it took longer than {seconds:g} s")
    return result[0]
