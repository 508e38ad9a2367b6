"""How the cores of a CPU are shared out: a few images side by side, each by a few threads.

Threads that work on one small image spend much of their time waiting for each other, and, spinning
as they wait, take it from whatever reads and writes beside them; images do not wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

MOST_LANES = 8
"""Images at a time; Python itself, which they share, would not keep up with more."""

_SIDE_A_THREAD = 512  # pixels of the encoder's square input that keep one thread busy


@dataclass(frozen=True, slots=True)
class Cores:
    """A share of a machine's cores.

    Attributes:
        lanes: images that go through the network side by side.
        threads: that work on each; 0 leaves the number to torch.
    """

    lanes: int = 1
    threads: int = 0


def share_cores(device_type: str, side: int, cores: int | None = None) -> Cores:
    """Shares out the cores for images of some size (ours).

    The threads of an image depend on its size and on the machine, never on how many images there
    are or on their neighbours: the last bits of a result may depend on them.

    Args:
        device_type: on other devices than a CPU there is one lane, and torch is left alone.
        side: of the encoder's square input, in pixels.
        cores: to share out; None takes as many as torch's threads, and so ``OMP_NUM_THREADS``.
    """
    if device_type != "cpu":
        return Cores()
    cores = max(1, torch.get_num_threads() if cores is None else cores)
    # Two images at least: what one does alone, such as its last few words, hides behind the other.
    threads = min(max(1, cores // 2), max(1, side * side // _SIDE_A_THREAD**2))
    return Cores(min(MOST_LANES, cores // threads), threads)


class Room:
    """How many images may be in the network at a time; entered by its lanes for each step.

    Args:
        places: at first.
    """

    def __init__(self, places: int = 1) -> None:
        self._places = places
        self._inside = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            while self._inside >= self._places:
                self._changed.wait()
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def halve(self) -> int:
        """Halves the places for good and gives how many there were; 1 stays 1."""
        with self._changed:
            before = self._places
            self._places = max(1, before // 2)
            return before


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """Within it torch works with so many threads in the calling thread; 0 leaves the number.

    At its end the calling thread, and threads that are new then, have the number from before.
    """
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
