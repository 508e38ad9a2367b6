"""The folder that an export is written to: files whole or not at all, and never another's lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.confine import Confined, require_own
from risam_cli.errors import OutputError
from risam_cli.outputs.png import write_whole

SUMMARY = "export.json"
_PART = ".risam-export-part"


class ExportFolder:
    """An output folder with ``export.json``, which says what is in it and whether it is complete.

    Args:
        path: the folder; made where it is missing.
        kind: the format, for ``export.json``.
        owns: names directly in the folder that the format writes.
        overwrite: an earlier export's own files are removed first; files that no export wrote
            stay, unless they have a name that this export writes.

    Raises:
        OutputError: the folder has files and ``overwrite`` is not set, or cannot be written.
    """

    def __init__(self, path: Path, kind: str, owns: Sequence[str], *, overwrite: bool) -> None:
        self.path = path
        self._confined = Confined(path)
        self._head: dict[str, Any] = {"kind": kind, "owns": [*owns, "failures.jsonl"]}
        self._parts: list[Path] = []
        with _told(path):
            path.mkdir(parents=True, exist_ok=True)
            holds = any(path.iterdir())
            if holds and not overwrite:
                raise OutputError(
                    f"{path} is not empty", "choose another folder or give --overwrite"
                )
            if holds:
                self._clear()
            require_own(path, [SUMMARY, *self._head["owns"]])
        self.write_json(SUMMARY, {**self._head, "complete": False})

    def _clear(self) -> None:
        for left in self.path.glob(f"*{_PART}"):
            left.unlink()
        try:
            earlier = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))["owns"]
        except (OSError, ValueError, KeyError, TypeError):
            return
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
        self._confined.require((self.path / name).parent)
        write_whole(self.path / name, data)

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
        part = self.path / f"copy{_PART}"
        with _told(target):
            self._confined.make(target.parent)
            try:
                shutil.copyfile(source, part)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)

    @contextmanager
    def spool(self, name: str) -> Iterator[Spool]:
        """A file that grows while the export runs; removed at the end, see :meth:`publish`."""
        path = self.path / f"{name}{_PART}"
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
        target, part = self.path / name, self.path / f"{name}.whole{_PART}"
        with _told(target):
            try:
                with open(part, "wb") as out:
                    for piece in pieces:
                        if isinstance(piece, Spool):
                            piece.copy_to(out)
                        else:
                            out.write(_bytes(piece))
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)

    def complete(self, summary: Mapping[str, Any]) -> None:
        """Say in ``export.json`` that all is there."""
        self.write_json(SUMMARY, {**self._head, "complete": True, **summary})


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
            f"{place}: {error.strerror or error}", "make room or choose another place"
        ) from error
