"""Threads of a CPU that share the pieces of one image's work, each at its own pace (ours).

PyTorch's own threads meet after every operator, and the slowest of them, such as one whose core
another program wants too, holds up all at each. Here a thread takes a piece through a whole chain
of operators, and then the next that is left: a busy neighbour costs its share and no more.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import TypeVar

import torch

T = TypeVar("T")


def share(pieces: Sequence[T], work: Callable[[T], None], threads: int) -> None:
    """Works on all pieces, in any order: whoever is free takes the next.

    To be called within ``threads_of(1)``, so that what a piece gives does not depend on how many
    threads there are. Helpers compute under the caller's autocast, and without gradients.

    Args:
        threads: how many work, the caller among them.

    Raises:
        BaseException: what a piece raised; pieces that nobody had begun are left.
    """
    numbers = itertools.count()
    failed = False

    def take_all() -> None:
        nonlocal failed
        try:
            while not failed and (number := next(numbers)) < len(pieces):
                work(pieces[number])
        except BaseException:
            failed = True
            raise

    helpers = min(threads, len(pieces)) - 1
    if helpers < 1:
        take_all()
        return
    helped = partial(_in_modes, take_all, _autocast_dtype(), torch.is_inference_mode_enabled())
    begun = [_helpers().submit(helped) for _ in range(helpers)]
    try:
        take_all()
    finally:
        for helper in begun:
            if not helper.cancel():
                helper.result()


def _autocast_dtype() -> torch.dtype | None:
    """The format of the calling thread's autocast; None where it has none."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def _in_modes(work: Callable[[], None], autocast: torch.dtype | None, inference: bool) -> None:
    """Works under modes that PyTorch keeps for each thread apart."""
    with (
        torch.inference_mode() if inference else torch.no_grad(),
        nullcontext() if autocast is None else torch.autocast("cpu", autocast),
    ):
        work()


@cache
def _helpers() -> ThreadPoolExecutor:
    """Of this process, for all that share: no more than there are cores."""
    return ThreadPoolExecutor(
        os.cpu_count() or 1, "risam-crew", initializer=torch.set_num_threads, initargs=(1,)
    )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not come along


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
