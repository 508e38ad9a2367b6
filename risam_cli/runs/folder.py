"""The output folder of a run: whose it is, who may write to it, and how to start anew in it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from risam_cli.errors import OutputError, setting
from risam_cli.files.confine import Confined, require_own
from risam_cli.files.durable import replace_durably, sync_file, sync_folder, sync_folders, sync_tree
from risam_cli.files.locks import PRIVATE, FolderLock
from risam_cli.outputs.gallery import remove_pages
from risam_cli.outputs.naming import GALLERY, MASKS, OVERLAYS
from risam_cli.outputs.records import FAILURES, PREDICTIONS
from risam_cli.runs.ledger import LEDGER, LedgerLine, read_lines, read_redone

RUN = "run.json"
_OWN = (PREDICTIONS, FAILURES, RUN, LEDGER)  # the ledger last: it says what is still to delete
_SPLICED = (PREDICTIONS, FAILURES, LEDGER, RUN)  # in the order in which they are replaced


class RunFolder:
    """An output folder, locked for this process; a context manager.

    The lock ends with the process, however it ends; see :mod:`risam_cli.files.locks`.

    Args:
        path: made if it is not there.

    Raises:
        OutputError: it cannot be made or written, another process works in it, or a link stands
            where it would be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.private = path / PRIVATE
        self.staging = self.private / "staging"
        self.incoming = self.private / "incoming"
        self._lock: FolderLock | None = None
        self._is_new = not path.exists()
        try:
            self.confined = Confined(path)
            require_own(path, (*_OWN, MASKS, OVERLAYS, GALLERY))
            self._lock = FolderLock(path)
            self.finish_splice()
            require_own(path, _OWN)  # again: the splice may have brought what was planted in it
            self.clear_staging()
        except OSError as error:
            self.close()
            raise OutputError(
                f"{error.filename or path}: {error.strerror or error}",
                f"choose another {setting('output')}",
            ) from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back; a folder that no run was begun in is left as it was found."""
        if self._lock is None:
            return
        if self.holds_run():
            with suppress(OSError):
                self.finish_splice()
                self.clear_staging()
        else:
            # Not the lock itself: whoever finds it gone may begin while we are still at it.
            for name in (self.staging, self.incoming):
                shutil.rmtree(name, ignore_errors=True)
            for path in (self.redo, *map(self.spliced, _SPLICED)):
                path.unlink(missing_ok=True)
        begun = self.holds_run()
        self._lock.release()
        self._lock = None
        if self._is_new and not begun:
            with suppress(OSError):
                self.path.rmdir()

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
            OutputError: as :meth:`require_known`.
        """
        self.require_known()
        if self.ledger.exists():
            for line, _ in read_lines(self.ledger):
                self.delete_files(line)
        for redone, _ in read_redone(self.redo):
            self.delete_files(redone.line)
        self.redo.unlink(missing_ok=True)
        for name in _OWN:
            (self.path / name).unlink(missing_ok=True)
        remove_pages(self.path)
        for name in (MASKS, OVERLAYS, GALLERY):
            remove_empty_folders(self.path / name)
        self.confined = Confined(self.path)  # that of before believes the folders to be there

    def require_known(self) -> None:
        """Makes sure that it is known what an earlier run wrote here.

        Raises:
            OutputError: the folder holds records but no ledger that says what belongs to them.
        """
        if self.holds_run() and not self.ledger.exists():
            found = ", ".join(name for name in _OWN if (self.path / name).exists())
            raise OutputError(
                f"{self.path} holds {found} but no {LEDGER}, so it is not known what else is its",
                f"delete the folder yourself, or choose another {setting('output')}",
            )

    def delete_files(self, line: LedgerLine) -> None:
        """Deletes the masks, overlays and gallery items of one entry."""
        for mark in line.files:
            place = self.path / mark.path
            # A ledger is a file's word, and a folder under masks/ may be a link.
            self.confined.require(place.parent)
            with suppress(ValueError):  # no name that a file can have
                place.unlink(missing_ok=True)

    def write_run(self, text: str) -> None:
        """Writes ``run.json``, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        part = self.spliced(RUN)
        try:
            part.write_text(text, encoding="utf-8")
            replace_durably(part, self.path / RUN)
        except OSError as error:
            raise OutputError(
                f"{self.path / RUN}: {error.strerror or error}; what was done is kept",
                f"fix it, then continue with {setting('resume')}",
            ) from error

    def clear_staging(self) -> None:
        """Forgets files that were written and never came to count."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True, exist_ok=True)

    # --- replacing files together -----------------------------------------------------------------

    def spliced(self, name: str) -> Path:
        """Where the new version of records, failures, ledger or ``run.json`` is written."""
        return self.private / f"{name}.new"

    def splice(self) -> None:
        """Puts new versions of files in place, and all that is incoming: all or none of it."""
        for name in _SPLICED:
            if self.spliced(name).exists():
                sync_file(self.spliced(name))
        sync_tree(self.incoming)
        marker = self.private / "splice"
        marker.touch()
        sync_folder(self.private)
        self.finish_splice()

    def finish_splice(self) -> None:
        """Ends a splice that was begun; drops one that was only prepared."""
        marker = self.private / "splice"
        if marker.exists():
            self._move_in()
            for name in _SPLICED:
                if self.spliced(name).exists():
                    os.replace(self.spliced(name), self.path / name)
            sync_folder(self.path)
            self.redo.unlink(missing_ok=True)
            marker.unlink()
        for name in _SPLICED:
            self.spliced(name).unlink(missing_ok=True)
        shutil.rmtree(self.incoming, ignore_errors=True)

    def _move_in(self) -> None:
        """Puts incoming files in the places that they have names for."""
        moved: set[Path] = set()
        for folder, _, names in os.walk(self.incoming):
            target = self.path / os.path.relpath(folder, self.incoming)
            self.confined.make(target)
            moved.add(target)
            for name in names:
                os.replace(os.path.join(folder, name), target / name)
        sync_folders(self.path, moved)


def remove_empty_folders(root: Path) -> None:
    """Removes a folder and those under it as far as they hold no file."""
    for folder, _, _ in os.walk(root, topdown=False):
        with suppress(OSError):
            os.rmdir(folder)
