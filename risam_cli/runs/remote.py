"""A run whose output folder is in a store: made on a disk, and uploaded with its ledger last.

A store has no rename and no lock, and no file of it can be added to. So the folder is made in a
place of its own on this machine, by the rules of every other, and its files are uploaded from
there. The store's ``ledger.jsonl`` goes first where there is one, and the new one comes last: as
long as there is none, nothing there counts, and what it lists is whole. What was uploaded is noted
on the disk, so an upload that broke off goes on where it was.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from risam_cli.console.console import get_console
from risam_cli.errors import OutputError, reason_of, setting
from risam_cli.files.caches import cache_folder
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.files.locks import PRIVATE
from risam_cli.files.remote import StoreError
from risam_cli.files.store import (
    RemotePath,
    get_file,
    put_file,
    remove_objects,
    require_writable,
)
from risam_cli.outputs.naming import GALLERY
from risam_cli.outputs.records import FAILURES, PREDICTIONS
from risam_cli.runs.folder import RUN, RunFolder
from risam_cli.runs.ledger import LEDGER, FileMark, file_is_whole, read_marks
from risam_cli.runs.ranks import holds_another

_AT_ONCE = 8  # objects on their way
_NOTES = "uploaded.jsonl"
_RECORDS = (PREDICTIONS, FAILURES, RUN)


@dataclass(frozen=True, slots=True)
class RemoteRun:
    """An output folder in a store, and where it is made.

    Attributes:
        url: of the folder.
        local: on this machine.
    """

    url: RemotePath
    local: Path

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        """Look at what the store takes and holds, and fetch what is to be gone on with.

        Raises:
            OutputError: it holds another run, or does not let itself be read.
        """
        with self._told():
            require_writable(str(self.url))
            if overwrite or not self._object(LEDGER).exists():
                return
            if not resume:
                raise holds_another(self.url)
            if not (self.local / LEDGER).exists():
                self._fetch()

    def publish(self) -> None:
        """Upload what is not there yet, and delete what an earlier run left.

        Raises:
            OutputError: the store does not take it; what was made stays on the disk.
        """
        with self._told():
            stale = self._listed_there()
            remove_objects([str(self._object(LEDGER))])
            marks = {mark.path: mark for mark in read_marks(self.local / LEDGER)}
            notes = self._notes()
            left = [mark for mark in marks.values() if notes.get(mark.path) != mark]
            with (
                get_console().progress("upload", len(left), "files") as progress,
                open(self.local / PRIVATE / _NOTES, "ab") as noted,
            ):
                for mark in self._uploaded(left):
                    noted.write(seal(mark._asdict()))
                    noted.flush()
                    progress.advance()
            pages = [path.relative_to(self.local).as_posix() for path in self._pages()]
            for name in (*pages, *_RECORDS, LEDGER):
                put_file(self.local / name, str(self._object(name)))
            remove_objects(str(self._object(name)) for name in stale - marks.keys())
        shutil.rmtree(self.local, ignore_errors=True)
        get_console().info(f"uploaded to {self.url}")

    # --- the store --------------------------------------------------------------------------------

    def _object(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.url.rstrip('/')}/{name}")

    def _uploaded(self, marks: list[FileMark]) -> Iterator[FileMark]:
        """Uploads files side by side; gives each that is there."""

        def upload(mark: FileMark) -> FileMark:
            put_file(self.local / mark.path, str(self._object(mark.path)))
            return mark

        with ThreadPoolExecutor(_AT_ONCE, "risam-upload") as pool:
            for start in range(0, len(marks), 64 * _AT_ONCE):  # so that an error ends it soon
                yield from pool.map(upload, marks[start : start + 64 * _AT_ONCE])

    def _listed_there(self) -> set[str]:
        """What the store's ledger lists."""
        if not self._object(LEDGER).exists():
            return set()
        with tempfile.TemporaryDirectory() as folder:
            get_file(str(self._object(LEDGER)), Path(folder, LEDGER))
            return {mark.path for mark in read_marks(Path(folder, LEDGER))}

    def _fetch(self) -> None:
        """The run that the store holds, to go on with it here."""
        get_console().info(f"downloading the run in {self.url}")
        with RunFolder(self.local) as folder:
            for name in (*_RECORDS, LEDGER):
                get_file(str(self._object(name)), folder.staging / name)
            marks = list(read_marks(folder.staging / LEDGER))

            def fetch(mark: FileMark) -> None:
                part = folder.staging / hashlib.sha256(mark.path.encode()).hexdigest()
                with suppress(StoreError):  # what is not there is made again
                    get_file(str(self._object(mark.path)), part)
                    folder.place([(part, mark.path)], sync=False)

            with ThreadPoolExecutor(_AT_ONCE, "risam-fetch") as pool:
                list(pool.map(fetch, marks))
            noted = b"".join(
                seal(mark._asdict()) for mark in marks if file_is_whole(folder.path, mark)
            )
            folder.place([(folder.staging / name, name) for name in (*_RECORDS, LEDGER)])
            (folder.private / _NOTES).write_bytes(noted)

    # --- the disk ---------------------------------------------------------------------------------

    def _pages(self) -> list[Path]:
        """What a gallery has beside the items of images."""
        gallery = self.local / GALLERY
        pages = gallery.rglob("*") if gallery.is_dir() else ()
        items = gallery / "items"
        return sorted(path for path in pages if path.is_file() and items not in path.parents)

    def _notes(self) -> dict[str, FileMark]:
        """What was uploaded before."""
        found: dict[str, FileMark] = {}
        with suppress(FileNotFoundError), open(self.local / PRIVATE / _NOTES, "rb") as file:
            for line in file:
                with suppress(ValueError, TypeError):
                    mark = FileMark(**unseal(line))
                    found[mark.path] = mark
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What a store says against the output, as an error of the output."""
        kept = f"the results are kept in {self.local}"
        try:
            yield
        except StoreError as error:
            message, *fixes = error.args
            fix = f"{fixes[0] if fixes else 'try again'}, then go on with {setting('resume')}"
            there = (self.local / LEDGER).exists()
            raise OutputError(f"{message}; {kept}" if there else message, fix) from error
        except OSError as error:
            name = error.filename or self.local
            raise OutputError(f"{name}: {reason_of(error)}; {kept}") from error


def local_place(url: RemotePath) -> Path:
    """Where the output of a URL is made: the same for each call, in the user's cache."""
    digest = hashlib.sha256(url.url.rstrip("/").encode()).hexdigest()[:16]
    return cache_folder() / "outputs" / f"{url.name or 'run'}-{digest}"
