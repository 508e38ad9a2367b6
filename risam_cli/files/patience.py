"""Waiting no longer than a time limit for what cannot be interrupted: a drive that stalls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from risam_cli.errors import MachineError, require_machine

T = TypeVar("T")

_MOST_LEFT = 32  # threads left behind
_left: list[threading.Thread] = []


def within(seconds: float, act: Callable[[], T]) -> T:
    """What ``act`` gives, or raises, if it ends in time.

    It runs in a thread of its own. One that does not end is left behind: as a daemon, it holds up
    neither the run nor its exit.

    Raises:
        TimeoutError: it took longer.
        MachineError: too many took longer, or there is no thread to be had.
    """
    _left[:] = [thread for thread in _left if thread.is_alive()]
    if len(_left) >= _MOST_LEFT:
        raise MachineError(
            f"{len(_left)} files could not be read in time", "check the drive that they are on"
        )
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(act())
        except BaseException as error:  # raised again where it is waited for
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="risam-patience")
    try:
        thread.start()
    except RuntimeError as error:
        require_machine(error)
        raise
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not result:
        _left.append(thread)
        raise TimeoutError(f"it took longer than {seconds:g} s")
    return result[0]
