"""Lines of text from strangers: read with a bound on their length, parsed with one clear error."""

from __future__ import annotations

import json
import os
import reprlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.errors import DataError
from risam_cli.files.plain import open_plain, plain_chunks

_CHUNK = 1 << 16

# Writes no more of a value than is shown: a value of aliases can be exponentially long.
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 3
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = _BRIEF.maxset = _BRIEF.maxfrozenset = 16


def read_lines(
    stream: BinaryIO, limit: int, ends: bytes = b"\n"
) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers from 1, without their ends; None for one longer than ``limit``.

    Of a longer line no more than the limit is ever held. Lines end at ``ends`` only, and a line
    is given as soon as it is there, so that a pipe can be answered line by line. What is packed or
    in UTF-16 comes as UTF-8.

    Raises:
        DataError: as :func:`risam_cli.files.plain.plain_chunks`.
    """
    number = 1
    held = bytearray()
    too_long = False
    name = getattr(stream, "name", "")
    for chunk in plain_chunks(_chunks(stream), name if isinstance(name, str) else "<stdin>"):
        start = 0
        while (end := chunk.find(ends, start)) >= 0:
            held += chunk[start:end]
            whole = held.rstrip(b"\r") if ends == b"\n" else held
            yield number, None if too_long or len(held) > limit else bytes(whole)
            held.clear()
            too_long = False
            number += 1
            start = end + 1
        held += chunk[start:]
        if len(held) > limit:
            too_long = True
            held.clear()
    if held or too_long:
        yield number, None if too_long else bytes(held.rstrip(b"\r"))


def read_lines_at(stream: BinaryIO, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Number from 1, offset and bytes, with its end, of every line of a file that is not blank.

    None stands for a line longer than ``limit``, of which no more than that is ever held. The
    stream may be read elsewhere only once the iteration is over.
    """
    number, offset = 0, 0
    while line := stream.readline(limit + 1):
        number += 1
        begin, offset = offset, offset + len(line)
        too_long = len(line) > limit
        while too_long and line and not line.endswith(b"\n"):
            line = stream.readline(_CHUNK)
            offset += len(line)
        if too_long or line.strip():
            yield number, begin, None if too_long else line


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    try:
        descriptor = stream.fileno()
    except (OSError, AttributeError, ValueError):
        descriptor = -1
    while True:
        # Past Python's buffer: a thread that waits inside of it would hold its lock at exit.
        chunk = os.read(descriptor, _CHUNK) if descriptor >= 0 else stream.read(_CHUNK)
        if not chunk:
            return
        yield chunk


def read_text(path: Path, limit: int) -> str:
    """A text file of at most ``limit`` bytes, as UTF-8; a device may have no end.

    Raises:
        ValueError: it is longer, or not UTF-8.
        DataError: it is packed and damaged.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"longer than {limit >> 20} MiB")
    return data.decode("utf-8-sig")


def load_json(text: str | bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text, from wherever it comes.

    Args:
        unique: refuse an object that says two things under one key, of which the last would win.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_pairs if unique else None)
    except RecursionError:
        raise ValueError("nested too deep to be read") from None


def unique_pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """The dict of these pairs.

    Raises:
        ValueError: two have one key and different values.
    """
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{brief(key)} is given twice: {brief(found[key])}, {brief(value)}")
    return found


def parse_json(line: bytes, where: str) -> Any:
    """The value that one line of JSON holds.

    Raises:
        DataError: it is not UTF-8, not JSON, or nested too deep; the message begins with ``where``.
    """
    try:
        return load_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8", "save it as UTF-8") from None
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{where}: not JSON ({reason}): {brief(line)}") from None


_SEAL = b', "crc32": '


def seal(record: Mapping[str, Any]) -> bytes:
    """A line of JSON that this tool will read back as truth, with its checksum and its end."""
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return text[:-1] + _SEAL + b"%d}\n" % zlib.crc32(text)


def unseal(line: bytes) -> dict[str, Any]:
    """What :func:`seal` was given.

    Raises:
        ValueError: it is not that line, to the last bit.
    """
    text, _, crc = line.rpartition(_SEAL)
    text += b"}"
    if crc != b"%d}\n" % zlib.crc32(text):
        raise ValueError("its checksum is wrong")
    record: dict[str, Any] = load_json(text)
    return record


def brief(value: object) -> str:
    """A value for a message, on one line and not long."""
    if isinstance(value, bytes):
        text = " ".join(value[:80].decode("utf-8", "backslashreplace").split())
        return f"{text}..." if len(value) > 80 else text
    try:
        text = _BRIEF.repr(value)
    except ValueError:  # a number of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
