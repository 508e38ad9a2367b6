"""The output folder of a run: whose it is, who may write to it, and how to start anew in it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from risam_cli.console import get_console
from risam_cli.data.walk import RUN_MARKER
from risam_cli.engine.ledger import LEDGER, LedgerLine, read_lines, read_redone
from risam_cli.errors import OutputError
from risam_cli.outputs.records import FAILURES, PREDICTIONS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN = "run.json"
_OWN = (PREDICTIONS, FAILURES, RUN, LEDGER)  # the ledger last: it says what is still to delete
_SPLICED = (PREDICTIONS, FAILURES, LEDGER)  # in the order in which they are replaced


class RunFolder:
    """An output folder, locked for this process; a context manager.

    The lock belongs to the open file, so the system releases it when the process dies, however.

    Args:
        path: made if it is not there.

    Raises:
        OutputError: it cannot be made or written, or another process works in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private = path / RUN_MARKER
        self.staging = self.private / "staging"
        self._lock: BinaryIO | None = None
        self._is_new = not path.exists()
        try:
            self._take_lock()
            self.finish_splice()
            self.clear_staging()
        except OSError as error:
            self.close()
            raise OutputError(
                f"{error.filename or path}: {error.strerror or error}", "choose another -o"
            ) from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back; a folder that no run was begun in is left as it was found."""
        if self._lock is None:
            return
        if not self.holds_run():
            shutil.rmtree(self.private, ignore_errors=True)
            if self._is_new:
                with suppress(OSError):
                    self.path.rmdir()
        self._lock.close()
        self._lock = None

    @property
    def predictions(self) -> Path:
        """The records."""
        return self.path / PREDICTIONS

    @property
    def failures(self) -> Path:
        """What has no record."""
        return self.path / FAILURES

    @property
    def ledger(self) -> Path:
        """What was done."""
        return self.path / LEDGER

    @property
    def redo(self) -> Path:
        """Entries that were computed again and are not yet in their places."""
        return self.private / "redo.jsonl"

    def holds_run(self) -> bool:
        """Whether there is anything of a run in it."""
        return any((self.path / name).exists() for name in _OWN)

    def start_anew(self) -> None:
        """Deletes what this tool wrote here, and nothing else.

        Raises:
            OutputError: the folder holds records but no ledger that says what belongs to them.
        """
        if self.holds_run() and not self.ledger.exists():
            found = ", ".join(name for name in _OWN if (self.path / name).exists())
            raise OutputError(
                f"{self.path} holds {found} but no {LEDGER}, so it is not known what else is its",
                "delete the folder yourself, or choose another -o",
            )
        if self.ledger.exists():
            for line, _ in read_lines(self.ledger):
                self.delete_files(line)
        for redone, _ in read_redone(self.redo):
            self.delete_files(redone.line)
        self.redo.unlink(missing_ok=True)
        for name in _OWN:
            (self.path / name).unlink(missing_ok=True)
        for name in ("masks", "overlays"):
            remove_empty_folders(self.path / name)

    def delete_files(self, line: LedgerLine) -> None:
        """Deletes the masks and overlays of one entry."""
        for mark in line.files:
            (self.path / mark.path).unlink(missing_ok=True)

    def clear_staging(self) -> None:
        """Forgets files that were written and never came to count."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True, exist_ok=True)

    # --- replacing the three files together -------------------------------------------------------

    def spliced(self, name: str) -> Path:
        """Where the new version of one of the three files is written."""
        return self.private / f"{name}.new"

    def splice(self) -> None:
        """Puts the new versions of the three files in place, all or none whatever happens."""
        for name in _SPLICED:
            sync_file(self.spliced(name))
        marker = self.private / "splice"
        marker.touch()
        sync_folder(self.private)
        self.finish_splice()

    def finish_splice(self) -> None:
        """Ends a splice that was begun; drops one that was only prepared."""
        marker = self.private / "splice"
        if marker.exists():
            for name in _SPLICED:
                if self.spliced(name).exists():
                    os.replace(self.spliced(name), self.path / name)
            sync_folder(self.path)
            self.redo.unlink(missing_ok=True)
            marker.unlink()
        for name in _SPLICED:
            self.spliced(name).unlink(missing_ok=True)

    def _take_lock(self) -> None:
        path = self.private / "lock"
        while self._lock is None:
            self.private.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")  # noqa: SIM115 - held while we live
            if fcntl is not None:
                self._flock(file)
            # Who held it before may have removed it, and we hold what no one else will find.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                self._lock = file
            else:
                file.close()

    def _flock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OutputError(
                f"{self.path}: another run is writing to this folder",
                "wait for it, or choose another -o",
            ) from None
        except OSError as error:  # some network drives have no locks
            get_console().warn(
                f"{self.path} cannot be locked ({error.strerror}): see to it yourself that no two "
                "runs share it"
            )


def remove_empty_folders(root: Path) -> None:
    """Removes a folder and those under it as far as they hold no file."""
    for folder, _, _ in os.walk(root, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)


def sync_file(path: Path) -> None:
    """Has the system write a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Has the system write a folder's names to the disk, where folders can be opened."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
