"""What a run has done so far, so that it can go on, be checked, and be put together from shards.

``ledger.jsonl`` in the output folder begins with one header line::

    {"ledger": 2, "identity": {...}, "crc32": …}

``identity`` is all that decides the results apart from the inputs: model hash, thresholds,
precision, kind of device, what is saved, and ``"shard": [I, N]``. Runs belong together if their
identities are equal but for ``I``. Then one line follows for each entry (an image file, or a line
of a manifest) in the order of the inputs::

    {"entry": 7, "key": "…", "items": 2, "image": "<sha256>", "stamp": [size, mtime, ctime, inode],
     "predictions": [start, length, crc32], "failures": [start, length, crc32],
     "files": [["masks/a.jpg__0-the-dog.png", bytes, crc32], …], "crc32": …}

- ``entry`` counts all entries of the inputs from 0, over all shards; :mod:`risam_cli.runs.shard`
  says which shard holds which.
- ``items`` is how many records and failures came of the entry; ``key`` hashes what it asked, and
  after a hyphen by which ids and names.
- ``predictions`` and ``failures`` are slices of ``predictions.jsonl`` and ``failures.jsonl``.
- ``files`` lists the masks, overlays and gallery items that the entry wrote.
- the last ``crc32`` is that of the line without it: a line with a flipped bit is none.

So shards are merged by taking, for entry 0, 1, 2, …, its two slices and its files from whichever
shard has it; ``run.json`` says in ``inputs.entries`` how many entries there must be, and in
``inputs.hash`` what all shards must agree on. An entry that is missing, or there twice, shows.

A line is written after the records and before the masks are moved to their places, so whatever
this tool wrote is listed; checksums tell whether an entry is really there. Nothing counts as done
because a file of its name exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from risam_cli.data.images.files import FileStamp
from risam_cli.errors import OutputError, reason_of
from risam_cli.files.jsonlines import seal, unseal
from risam_cli.outputs.naming import GALLERY, MASKS, OVERLAYS

LEDGER = "ledger.jsonl"
FORMAT = 2


class Span(NamedTuple):
    """A slice of a file: where it starts, its bytes, and their CRC-32."""

    start: int
    length: int
    crc: int

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.start + self.length


class FileMark(NamedTuple):
    """A file that was written: its path relative to the output folder, bytes, CRC-32."""

    path: str
    size: int
    crc: int


class LedgerLine(NamedTuple):
    """What was done for one entry; see the module's text. JSON has the fields by their names."""

    entry: int
    key: str
    items: int
    image: str | None
    stamp: FileStamp | None
    predictions: Span
    failures: Span
    files: tuple[FileMark, ...]

    @classmethod
    def from_json(cls, record: Any) -> LedgerLine:
        """A line from its JSON object; TypeError, KeyError or ValueError on anything else."""
        stamp = record["stamp"]
        return cls(
            int(record["entry"]),
            str(record["key"]),
            int(record["items"]),
            None if record["image"] is None else str(record["image"]),
            None if stamp is None else FileStamp(*(int(value) for value in stamp)),
            Span(*(_whole(value) for value in record["predictions"])),
            Span(*(_whole(value) for value in record["failures"])),
            tuple(FileMark(own_path(p), _whole(n), _whole(c)) for p, n, c in record["files"]),
        )


def _whole(value: Any) -> int:
    """A place, a length or a checksum: what no file can have is no ledger's."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(value)
    return value


def own_path(path: Any) -> str:
    """A path of the kind that this tool writes: files in a ledger are deleted by their name."""
    parts = str(path).split("/")
    if "\0" in str(path) or "\\" in str(path):
        raise ValueError(path)
    if parts[0] not in {MASKS, OVERLAYS, GALLERY} or len(parts) < 2 or {"", ".", ".."} & set(parts):
        raise ValueError(path)
    return str(path)


def header_line(identity: Mapping[str, Any]) -> bytes:
    """The first line of a ledger, with its end."""
    return seal({"ledger": FORMAT, "identity": identity})


def read_header(path: Path) -> dict[str, Any] | None:
    """The identity in a ledger's first line; None where there is no whole one.

    Raises:
        OutputError: a ledger of another format, or one that cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path}: {reason_of(error)}") from None
    try:
        header = unseal(line)
        version, identity = header["ledger"], header["identity"]
    except (ValueError, TypeError, KeyError):
        return None
    if version != FORMAT or not isinstance(identity, dict):
        raise OutputError(
            f"{path}: ledger of format {version}, this version knows {FORMAT}",
            "use the version that wrote it, or another folder",
        )
    return identity


def read_lines(path: Path) -> Iterator[tuple[LedgerLine, int]]:
    """The lines after the header, each with the file's length up to its end.

    Ends before the first line that is torn, damaged or out of order: what follows does not count.
    """
    last = -1
    with open(path, "rb") as file:
        end = len(file.readline())
        for raw in file:
            line = _parse(raw)
            if line is None or line.entry <= last:
                return
            last = line.entry
            end += len(raw)
            yield line, end


def read_marks(path: Path, start: int = 0) -> Iterator[FileMark]:
    """The files of every line that is whole, from a place on, whatever stands between."""
    with open(path, "rb") as file:
        file.seek(start)
        for raw in file:
            if (line := _parse(raw)) is not None:
                yield from line.files


def _parse(raw: bytes) -> LedgerLine | None:
    try:
        return LedgerLine.from_json(unseal(raw))
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Redone:
    """An entry that was computed again: its line (spans not yet right) and its new text.

    Kept in a journal of its own until all of them are done and put in their places together.

    Attributes:
        attempt: which retry of all failures it belongs to; 0 outside of any.
    """

    line: LedgerLine
    predictions: bytes
    failures: bytes
    attempt: int = 0

    def to_json(self) -> bytes:
        """One line of the journal, with its end."""
        return seal(
            {
                "attempt": self.attempt,
                "line": self.line._asdict(),
                "predictions": self.predictions.decode("ascii"),
                "failures": self.failures.decode("ascii"),
            }
        )

    @classmethod
    def from_json(cls, raw: bytes) -> Redone:
        """An entry from its line; TypeError, KeyError or ValueError on anything else."""
        record = unseal(raw)
        line = LedgerLine.from_json(record["line"])
        predictions, failures = (str(record[k]).encode() for k in ("predictions", "failures"))
        return cls(line, predictions, failures, int(record["attempt"]))


def read_redone(path: Path) -> Iterator[tuple[Redone, int]]:
    """The journal's entries that are whole, each with its offset.

    A torn line, as a full disk leaves it, hides none that follow. Nothing where there is
    no journal. Of an entry that is there twice, the later one counts.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, outside of this try
    except FileNotFoundError:
        return
    with file:
        start = 0
        for raw in file:
            with suppress(ValueError, TypeError, KeyError, OverflowError):
                yield Redone.from_json(raw), start
            start += len(raw)


def settings_hash(identity: Mapping[str, Any]) -> str:
    """SHA-256 of an identity without its shard: equal for all parts of one run."""
    same = {key: value for key, value in identity.items() if key != "shard"}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def read_span(file: BinaryIO, span: Span) -> bytes | None:
    """The bytes of a slice; None where they are not those that were written."""
    if span.length == 0:
        return b""
    if span.end > os.fstat(file.fileno()).st_size:  # or so much memory would be asked for
        return None
    file.seek(span.start)
    data = file.read(span.length)
    return data if len(data) == span.length and zlib.crc32(data) == span.crc else None


def file_is_whole(folder: Path, mark: FileMark) -> bool:
    """Whether a file is what was written, byte for byte."""
    path = folder / mark.path
    try:
        status = os.stat(path)
        if status.st_size != mark.size or not stat.S_ISREG(status.st_mode):
            return False
        return zlib.crc32(path.read_bytes()) == mark.crc
    except OSError:
        return False
