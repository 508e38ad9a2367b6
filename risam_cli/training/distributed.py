"""The processes of one training run: what torchrun starts, or one alone.

All that is decided (validate, stop, give up) is decided from sums over all processes, so that no
process waits for another that has gone a different way. One of them speaks, and writes.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from risam_cli.console.console import Console, get_console, set_console
from risam_cli.errors import Interrupted, RisamError, UsageError, reason_of, setting

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
_SIGNS = ("gloo", "nccl", "connection", "broken pipe", "timed out", "socket")
_GRACE = 3.0  # seconds that a process which lost another waits for that one's own words


class Processes:
    """This process among those of the run; sums and gathers are over all of them.

    Args:
        rank, world: this process's number of how many; store: shared by them, if they are several.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.world = world
        self._store = store

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes; each gets the same bits."""
        if self.world > 1:
            values = values.clone()
            with self.together():
                dist.all_reduce(values)
        return values

    def gather(self, own: T) -> list[T]:
        """What every process has, in their order."""
        if self.world == 1:
            return [own]
        held: list[Any] = [None] * self.world
        with self.together():
            dist.all_gather_object(held, own)
        return held

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; the others make nothing."""
        if self.world == 1:
            return make()
        held = [make() if self.leads else None]
        with self.together():
            dist.broadcast_object_list(held, src=0)
        made: Any = held[0]
        return made

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(float(flag))) > 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done here needs all processes; :class:`LostProcess` where one is gone."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).lower()
            if self.world > 1 and any(sign in text for sign in _SIGNS):
                raise LostProcess(self.world) from error
            raise

    def speaks_for(self, error: RisamError) -> bool:
        """Whether this process is the one to tell of an error that several may have met.

        The first to ask tells it. One that only lost another lets that one speak first.
        """
        if self._store is None:
            return True
        try:
            if isinstance(error, LostProcess):
                began = time.monotonic()
                while time.monotonic() - began < _GRACE:
                    if self._store.check(["told"]):
                        return False
                    time.sleep(0.05)
            return int(self._store.add("told", 1)) == 1
        except RuntimeError:  # The process that held the store is gone itself.
            return self.leads or self.world == 2


class LostProcess(RisamError):
    """Another process of the run has ended, so that none can go on."""

    def __init__(self, world: int) -> None:
        super().__init__(
            f"one of the {world} processes of this run has ended or cannot be reached",
            "see its message above, or whether memory ran out; then continue with "
            + setting("resume"),
        )


@contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """The processes of this run by torchrun's RANK and WORLD_SIZE; one alone without them.

    All but the first are silent, unless one of them alone meets an error.

    Raises:
        UsageError: the others cannot be reached.
    """
    world = environment.get("WORLD_SIZE", "")
    if not world.isdigit() or int(world) < 2:
        yield Processes()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the {world} processes of WORLD_SIZE cannot find each other: {reason_of(error)}",
            "start them with torchrun",
        ) from error
    told = get_console()
    processes = Processes(rank, size, PrefixStore("risam", store))
    if not processes.leads:
        set_console(Console(quiet=True, stream=io.StringIO()))
    try:
        yield processes
    except RisamError as error:
        if not processes.speaks_for(error):
            raise Told(error.exit_code) from error
        set_console(told)
        if processes.leads or isinstance(error, (LostProcess, Interrupted)):
            raise
        error.args = (f"process {rank} of {size}: {error}",)
        raise
    finally:
        # Where a process is gone, the orderly way out would wait for it.
        dist.destroy_process_group()


class Told(Exception):
    """An error that another process has told the user of; only its exit code is left to give."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(exit_code)
