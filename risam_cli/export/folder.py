"""The folder that an export is written to: files whole or not at all, and never another's lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.errors import OutputError, setting
from risam_cli.files.confine import Confined, require_own
from risam_cli.files.durable import sync_file, sync_folder, sync_tree
from risam_cli.files.locks import PRIVATE, FolderLock

SUMMARY = "export.json"
LEDGER = "ledger.jsonl"
"""By this a folder is known to be one of predict; said here again, held to it by a test."""


class ExportFolder:
    """An output folder with ``export.json``, which says what is in it and whether it is complete.

    Locked for this process until it is complete or closed; a context manager. What is in the making
    lies in a folder of its own, which the next export empties where a kill left it.

    Args:
        path: the folder; made where it is missing.
        kind: the format, for ``export.json``.
        owns: names directly in the folder that the format writes.
        overwrite: an earlier export's own files are removed first; files that no export wrote
            stay, unless they have a name that this export writes.

    Raises:
        OutputError: the folder has files and ``overwrite`` is not set, holds a run of predict,
            belongs to another process now, or cannot be written.
    """

    def __init__(self, path: Path, kind: str, owns: Sequence[str], *, overwrite: bool) -> None:
        self.path = path
        self._confined = Confined(path)
        self._head: dict[str, Any] = {"kind": kind, "owns": [*owns, "failures.jsonl"]}
        with _told(path):
            if path.is_dir():
                _require_free(path, overwrite=overwrite)
            self._lock = FolderLock(path)
        self._making = self._lock.private / "making"
        try:
            with _told(path):
                shutil.rmtree(self._making, ignore_errors=True)
                self._making.mkdir()
                self._clear()
                require_own(path, [SUMMARY, *self._head["owns"]])
            self.write_json(SUMMARY, {**self._head, "complete": False})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ExportFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the folder back to others."""
        shutil.rmtree(self._making, ignore_errors=True)
        self._lock.release()

    def _clear(self) -> None:
        earlier = _summary(self.path).get("owns")
        for name in {*earlier, *self._head["owns"]} if isinstance(earlier, list) else ():
            # The list is a file's word: take nothing that is not directly in this folder.
            if not isinstance(name, str) or name in {"", ".", ".."} or Path(name).name != name:
                continue
            place = self.path / name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            else:
                place.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write one file, ``name`` relative to the folder with forward slashes.

        Raises:
            OutputError: it cannot be written; nothing of it is left.
        """
        target, part = self.path / name, self._making / "file"
        self._confined.require(target.parent)
        with _told(target):
            part.write_bytes(data)
            _move(part, target)

    def write_json(self, name: str, value: object) -> None:
        """Write one JSON file, indented."""
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        self.write(name, _bytes(text))

    def copy(self, source: Path, name: str) -> None:
        """Copy a file in, whole or not at all.

        Raises:
            OutputError: it cannot be read or written.
        """
        target = self.path / name
        part = self._making / "copy"
        with _told(target):
            self._confined.make(target.parent)
            shutil.copyfile(source, part)
            os.replace(part, target)

    @contextmanager
    def spool(self, name: str) -> Iterator[Spool]:
        """A file that grows while the export runs; removed at the end, see :meth:`publish`."""
        path = self._making / name
        with _told(path):
            spool = Spool(path)
        try:
            yield spool
        finally:
            spool.close()
            path.unlink(missing_ok=True)

    def publish(self, name: str, pieces: Sequence[str | Spool]) -> None:
        """Write one file of texts and of what spools hold, in the order given.

        Raises:
            OutputError: it cannot be written; nothing of it is left.
        """
        target, part = self.path / name, self._making / f"{name}.whole"
        with _told(target):
            with open(part, "wb") as out:
                for piece in pieces:
                    if isinstance(piece, Spool):
                        piece.copy_to(out)
                    else:
                        out.write(_bytes(piece))
            os.replace(part, target)

    def complete(self, summary: Mapping[str, Any]) -> None:
        """Say in ``export.json`` that all is there, once all is on the disk, and close."""
        with _told(self.path):
            sync_tree(self.path)
        self.write_json(SUMMARY, {**self._head, "complete": True, **summary})
        with _told(self.path):
            sync_file(self.path / SUMMARY)
            sync_folder(self.path)
        self.close()


class Spool:
    """Text on disk that is appended to and read back once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by ExportFolder.spool
        self.count = 0

    def add(self, text: str, *, between: str = "") -> None:
        """Append one entry; ``between`` stands before every entry but the first.

        Raises:
            OutputError: the disk is full or gone.
        """
        with _told(self._path):
            self._file.write(_bytes(between + text if self.count else text))
        self.count += 1

    def copy_to(self, out: BinaryIO) -> None:
        """Append all of it to ``out``."""
        self._file.flush()
        self._file.seek(0)
        shutil.copyfileobj(self._file, out)

    def close(self) -> None:
        """Close the file. What could not be flushed is lost on purpose: it is never published."""
        with suppress(OSError):
            self._file.close()


def _require_free(path: Path, *, overwrite: bool) -> None:
    """Raises OutputError where a folder holds what an export must not, or may not, replace."""
    if (path / LEDGER).exists():
        raise OutputError(
            f"{path} holds a run of predict, which has files of the same names",
            "choose another folder",
        )
    if overwrite or all(entry.name == PRIVATE for entry in path.iterdir()):
        return
    if _summary(path).get("complete") is False:
        raise OutputError(
            f"{path} holds an interrupted export", f"start over with {setting('overwrite')}"
        )
    raise OutputError(
        f"{path} is not empty", "choose another folder", f"give {setting('overwrite', True)}"
    )


def _summary(path: Path) -> dict[str, Any]:
    """What an earlier export said of the folder; empty where none did."""
    try:
        said = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _move(part: Path, target: Path) -> None:
    try:
        os.replace(part, target)
    except FileNotFoundError:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)


def _bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate, which that cannot hold, is written as its escape."""
    return text.encode("utf-8", "backslashreplace")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """OSError as the one line that a user can act on."""
    try:
        yield
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        raise OutputError(
            f"{place}: {error.strerror or error}", "free disk space or choose another place"
        ) from error
