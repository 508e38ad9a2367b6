"""One process to an output folder: a lock that nobody who is dead can hold.

The lock is the system's (``flock``) on ``.risam/lock``, and ends with the process however it ends.
Where a network drive or an operating system has no such lock, a lease takes its place:
``.risam/lease`` names machine and process, and its time is renewed while they live. A lease is
taken over from a process of this machine that is gone, and from another machine once its time has
stood still for :data:`LEASE_SECONDS`, by the clock of the drive itself.
"""

from __future__ import annotations

import json
import os
import platform
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.errors import OutputError
from risam_cli.files.confine import require_own

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PRIVATE = ".risam"
"""The folder, within an output folder, that holds the lock and what is in the making."""

LEASE_SECONDS = 120.0
_RENEWED = 20.0  # seconds between two renewals
_TRIES = 100  # to open a file whose folder others remove


class FolderLock:
    """An output folder, locked for this process; a context manager.

    Args:
        folder: made if it is not there.

    Raises:
        OutputError: another process works in it, or a link stands where the lock would.
        OSError: it cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private = folder / PRIVATE
        require_own(folder, [PRIVATE])
        require_own(self.private, os.listdir(self.private) if self.private.is_dir() else ())
        self._file: BinaryIO | None = None
        self._lease: _Lease | None = None
        self._path = self.private / "lock"
        while self._file is None:
            file = self._open()
            try:
                if not _flock(file, folder):
                    self._lease = _Lease(self.private / "lease", folder)
            except BaseException:
                file.close()
                raise
            if _leads_to(self._path, file):
                self._file = file
            else:
                file.close()
                self._end_lease()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lock back; the private folder goes with it if nothing else is in it."""
        if self._file is None:
            return
        self._end_lease()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self.private.rmdir()
        self._file.close()
        self._file = None

    def _open(self) -> BinaryIO:
        """The file to lock, made where it is missing."""
        for _ in range(_TRIES):
            self.private.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # whoever gave the lock back took the folder along
                return open(self._path, "ab")
        return open(self._path, "ab")

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._lease.end()
            self._lease = None


def _leads_to(path: Path, file: BinaryIO) -> bool:
    """Whether a name is still that of an open file: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _flock(file: BinaryIO, folder: Path) -> bool:
    """Locks the file; False where the system or the drive has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(folder) from None
    except OSError:
        return False
    return True


def _taken(folder: Path, by: str = "") -> OutputError:
    return OutputError(
        f"{folder}: another run{by} is writing to this folder",
        "wait for it, or choose another output folder",
    )


class _Lease:
    """A file that says who works here, renewed by a thread until :meth:`end`."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._who = {
            "host": platform.node(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
            "token": _unique(),
        }
        while not self._write():
            held = _read(path)
            if held is not None and not self._is_dead(held):
                raise _taken(folder, f" (process {held.get('pid')} on {held.get('host')})")
            self._remove(held)
        self._ended = threading.Event()
        threading.Thread(target=self._renew, daemon=True, name="risam-lease").start()

    def end(self) -> None:
        """Gives the folder back."""
        self._ended.set()
        self._remove(self._who)

    def _write(self) -> bool:
        """Whether the file is ours now; written whole, since it appears by a link of its own."""
        part = self._path.with_name(f"lease-{self._who['token']}")
        try:
            with open(part, "x", encoding="utf-8") as file:
                file.write(json.dumps(self._who))
            try:
                os.link(part, self._path)
            except FileExistsError:
                return False
            except OSError:  # a drive without hard links
                return self._write_plainly()
            return True
        finally:
            part.unlink(missing_ok=True)

    def _write_plainly(self) -> bool:
        try:
            with open(self._path, "x", encoding="utf-8") as file:
                file.write(json.dumps(self._who))
        except FileExistsError:
            return False
        return True

    def _remove(self, held: dict[str, Any] | None) -> None:
        """Takes a lease away, unless it has become another's meanwhile."""
        aside = self._path.with_name(f"lease-{_unique()}")
        with suppress(OSError):
            os.replace(self._path, aside)
            if _read(aside) != held:
                with suppress(OSError):
                    os.link(aside, self._path)
            aside.unlink()

    def _is_dead(self, held: dict[str, Any]) -> bool:
        pid = held.get("pid")
        # Elsewhere than on POSIX, to ask for a process may be to end it.
        if held.get("host") == self._who["host"] and isinstance(pid, int) and os.name == "posix":
            return not _runs(pid) or _born(pid) != held.get("born")
        return self._age() > LEASE_SECONDS

    def _age(self) -> float:
        """Seconds since the lease was renewed, by the drive's clock and not by ours."""
        probe = self._path.with_name(f"lease-{_unique()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self._path.stat().st_mtime
        except OSError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(_RENEWED):
            with suppress(OSError):
                os.utime(self._path)


def _unique() -> str:
    return os.urandom(16).hex()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _born(pid: int) -> str:
    """What tells a process from a later one of its number; empty where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
