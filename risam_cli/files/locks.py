"""One process to an output folder: a lease that all systems and all drives see alike.

``.risam/lock`` names the machine, the space of process numbers (a container has its own), the
process and when it began, and its time is renewed while the process lives (:mod:`filelock`). From
a process that is known to be gone the lease is taken at once; from one that cannot be looked at,
as that of another machine, once it has stood still for :data:`LEASE_SECONDS`. A process that was
stopped for so long has lost its lease: :meth:`FolderLock.require_held` has it write no further.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from risam_cli.console.console import get_console
from risam_cli.errors import OutputError
from risam_cli.files.confine import require_own

PRIVATE = ".risam"
"""The folder, within an output folder, that holds the lock and what is in the making."""

LEASE_SECONDS = 30.0
_RENEWED = 5.0  # seconds between two renewals
_LOOK = 0.25  # seconds between two looks at a lease that may be a dead one's
_BEGUN = 2.0  # seconds after which a lease without a word is that of a killed process
_TRIES = 100  # to make a lock whose folder others remove


class Taken(OutputError):
    """Another process works in the folder."""


class FolderLock:
    """An output folder, locked for this process; a context manager.

    Args:
        folder: made if it is not there.

    Raises:
        Taken: another process works in it.
        OutputError: a link stands where the lock would.
        OSError: it cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private = folder / PRIVATE
        self._path = self.private / "lock"
        self._lease = SoftFileLease(
            self._path,
            lease_duration=LEASE_SECONDS,
            heartbeat_interval=_RENEWED,
            thread_local=False,
        )
        require_own(folder, [PRIVATE])
        require_own(self.private, os.listdir(self.private) if self.private.is_dir() else ())
        self._acquire()
        self._mark = os.lstat(self._path)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lock back; the private folder goes with it if nothing else is in it."""
        if self._lease.is_locked:
            self._lease.release()
            with suppress(OSError):
                self.private.rmdir()

    def require_held(self) -> None:
        """To be called before results are put in their places.

        Raises:
            OutputError: the lease was lost, so that another process may write by now.
        """
        for _ in range(4):  # whoever looks whether a lease is dead moves it aside for a moment
            with suppress(OSError):
                if os.path.samestat(os.lstat(self._path), self._mark):
                    return
            time.sleep(0.05)
        raise OutputError(
            f"{self.folder} was taken over by another run, deleted or replaced during the run",
            "make sure that only one run at a time writes to it",
        )

    def _acquire(self) -> None:
        """Takes the lease, if need be after watching whether its holder still renews it."""
        for _ in range(_TRIES):
            self.private.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # whoever gave the lock back took the folder along
                return self._watch()
        return self._watch()

    def _watch(self) -> None:
        begun = time.monotonic()
        seen: os.stat_result | None = None
        while True:
            try:
                self._lease.acquire(timeout=0)
                return
            except LeaseSettingsMismatch:
                raise self._taken() from None
            except Timeout:
                pass
            found = os.lstat(self._path)
            renewed = seen is not None and seen.st_mtime_ns != found.st_mtime_ns
            waited = time.monotonic() - begun
            if renewed or self._lives() or waited > LEASE_SECONDS + 2:
                raise self._taken()
            if seen is None:
                get_console().info(f"{self.folder}: checking whether another run is writing to it")
            elif found.st_size == 0 and waited > _BEGUN:
                self._lease.force_break()  # filelock never takes over an empty one
            seen = found
            time.sleep(_LOOK)

    def _lives(self) -> bool:
        """Whether the holder is a process of this system: filelock took no lease of a dead one."""
        owner = self._lease.owner
        return owner is not None and owner.hostname == _own_host()

    def _taken(self) -> Taken:
        owner = self._lease.owner
        host = "" if owner is None else owner.hostname.partition("?")[0]  # what follows is a number
        by = "" if owner is None else f" (process {owner.pid} on {host})"
        return Taken(
            f"{self.folder}: another run is writing to this folder{by}",
            f"wait for it, or choose another output folder; if no such process is running, "
            f"delete {self._path}",
        )


def _own_host() -> str | None:
    """The name by which leases know this system, its space of process numbers included."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SoftFileLease(os.path.join(folder, "lock")) as lease,
    ):
        return None if lease.owner is None else lease.owner.hostname
