"""The folder that an export is written to: files whole or not at all, and never another's lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from json import dumps
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.errors import DataError, OutputError, reason_of, require_machine, setting
from risam_cli.files.confine import require_own
from risam_cli.files.folder import OTHER, OutputFolder, read_summary
from risam_cli.files.locks import PRIVATE
from risam_cli.files.write import create, sync_tree, writing

SUMMARY = "export.json"
_CHUNK = 1 << 20
EXPLANATION = "explanation"
"""The kind of what ``risam explain`` writes."""


class ExportFolder(OutputFolder):
    """An output folder with ``export.json``, which says what is in it and whether it is complete.

    What is in the making lies aside, and is deleted by the next export where a kill left it.

    Args:
        path: the folder; made where it is missing.
        kind: the format, for ``export.json``.
        owns: names directly in the folder that the format writes.
        overwrite: an earlier export's own files are removed first; files that no export wrote
            stay, unless they have a name that this export writes.

    Raises:
        OutputError: the folder has files and ``overwrite`` is not set, or as its base.
    """

    def __init__(self, path: Path, kind: str, owns: Sequence[str], *, overwrite: bool) -> None:
        self._head: dict[str, Any] = {"kind": kind, "owns": [*owns, "failures.jsonl"]}
        maker = "explain" if kind == EXPLANATION else "export-masks"
        super().__init__(path, maker, (SUMMARY,))
        try:
            with writing(path, OTHER):
                _require_free(path, overwrite=overwrite)
                earlier = self._earlier()
                # Before anything goes: what is no longer whole does not say that it is.
                head = {**self._head, "owns": sorted({*earlier, *self._head["owns"]})}
                self.write_json(SUMMARY, {**head, "complete": False})
                for name in head["owns"] if earlier else ():
                    self._remove(name)
                require_own(path, self._head["owns"])
        except BaseException:
            self.close()
            raise

    def _earlier(self) -> set[str]:
        """What an earlier export says that it wrote directly in this folder."""
        said = read_summary(self.path).get("owns")
        # The list is a file's word.
        return {
            name
            for name in (said if isinstance(said, list) else ())
            if isinstance(name, str) and name not in {"", ".", "..", PRIVATE}
            if Path(name).name == name and "\0" not in name
        }

    def _remove(self, name: str) -> None:
        place = self.path / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def write(
        self, name: str, content: bytes | str | Callable[[Path], object], *, sync: bool = False
    ) -> None:
        """As its base; all files are synced together at the end."""
        super().write(name, content, sync=sync)

    def write_json(self, name: str, value: object, *, sync: bool = False) -> None:
        """Write one JSON file, indented."""
        self.write(name, dumps(value, indent=1, ensure_ascii=False) + "\n", sync=sync)

    def copy(self, source: BinaryIO, path: Path, name: str) -> None:
        """Copy the file at ``path``, which is open, in, whole or not at all.

        Raises:
            DataError: it cannot be read to its end.
            OutputError: it cannot be written.
        """

        def fill(part: Path) -> None:
            with open(part, "wb") as out:
                while chunk := _read(source, path):
                    out.write(chunk)

        self.write(name, fill)

    @contextmanager
    def spool(self, name: str) -> Iterator[Spool]:
        """A file that grows while the export runs; removed at the end, see :meth:`publish`."""
        path = self.staging / name
        with writing(path):
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

        def join(part: Path) -> None:
            with open(part, "wb") as out:
                for piece in pieces:
                    if isinstance(piece, Spool):
                        piece.copy_to(out)
                    else:
                        out.write(_bytes(piece))

        self.write(name, join)

    def complete(self, summary: Mapping[str, Any]) -> None:
        """Say in ``export.json`` that all is there, once all is on the disk, and close."""
        with writing(self.path):
            sync_tree(self.path)
        self.write_json(SUMMARY, {**self._head, "complete": True, **summary}, sync=True)
        self.close()


class Spool:
    """Text on disk that is appended to and read back once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        create(path).close()
        self._file = open(path, "r+b")  # noqa: SIM115 - closed by ExportFolder.spool
        self.count = 0

    def add(self, text: str, *, between: str = "") -> None:
        """Append one entry; ``between`` stands before every entry but the first.

        Raises:
            OutputError: the disk is full or gone.
        """
        with writing(self._path):
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


def _read(source: BinaryIO, path: Path) -> bytes:
    try:
        return source.read(_CHUNK)
    except OSError as error:
        require_machine(error)
        raise DataError(f"{path}: {reason_of(error)}", "copy it yourself") from error


def _require_free(path: Path, *, overwrite: bool) -> None:
    """Raises OutputError where a folder holds what an export must not replace unasked."""
    if overwrite or all(entry.name == PRIVATE for entry in path.iterdir()):
        return
    if read_summary(path).get("complete") is False:
        raise OutputError(
            f"{path} holds an interrupted export", f"start over with {setting('overwrite')}"
        )
    raise OutputError(
        f"{path} is not empty", "choose another folder", f"give {setting('overwrite', True)}"
    )


def _bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate, which that cannot hold, is written as its escape."""
    return text.encode("utf-8", "backslashreplace")
