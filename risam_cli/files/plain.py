"""Text files of any common wrapping as plain UTF-8: gzip, UTF-16 and UTF-32 with their marks.

Every reader of JSON, JSON Lines and CSV goes through here, so that what one command takes, all do.
A mark of UTF-8 stays; it is dropped where text is parsed.
"""

from __future__ import annotations

import codecs
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from risam_cli.errors import DataError
from risam_cli.files.store import open_place

MOST = 1 << 36
"""Bytes that a packed file may unpack to: a few kilobytes can stand for gigabytes."""

_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
# UTF-32's little-endian mark begins with UTF-16's: the longer ones come first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_BOMS = [mark for mark, _ in _MARKS]


def plain_chunks(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """The chunks of a file as those of a plain one, each given as soon as it is there.

    Raises:
        DataError: what is packed is damaged, cut or over :data:`MOST`; ``name`` names the file.
    """
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= 4 or not any(mark.startswith(head) for mark in (_GZIP, *_BOMS)):
            break
    rest = _again(head, chunks)
    if head.startswith(_GZIP):
        yield from plain_chunks(_unzipped(rest, name), name)
        return
    encoding = _encoding(head)
    if encoding is None:
        yield from rest
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in rest:
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", final=True).encode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not {encoding.upper()}, as its first bytes say ({error.reason})",
            "save it as UTF-8",
        ) from None


def open_plain(path: Path) -> BinaryIO:
    """A file that can be read from any place: itself, or unpacked to a temporary one.

    Raises:
        DataError: what is packed is damaged.
        OSError: it cannot be read.
    """
    file = open_place(path)
    try:
        if file.seekable():  # no pipe, no <(…)
            # By a file of its own: some readers go past Python's buffer.
            with open(path, "rb", buffering=0) as probe:
                head = probe.read(4)
            if not head.startswith(_GZIP) and _encoding(head) is None:
                return file
        return spooled(plain_chunks(_chunks(file), str(path)), file)
    except BaseException:
        file.close()
        raise


def spooled(chunks: Iterator[bytes], source: BinaryIO | None = None) -> BinaryIO:
    """A temporary file of these bytes, gone when closed; ``source`` is closed once it is read."""
    out = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    try:
        for chunk in chunks:
            out.write(chunk)
        out.seek(0)
    except BaseException:
        out.close()
        raise
    if source is not None:
        source.close()
    return out


def copied(stream: BinaryIO, name: str) -> BinaryIO:
    """A stream that cannot be rewound, such as stdin, as a temporary plain file."""
    return spooled(plain_chunks(_chunks(stream), name))


def _encoding(head: bytes) -> str | None:
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def _again(head: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if head:
        yield head
    yield from chunks


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _unzipped(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Members of a gzip file, one after another."""
    unzip, total = zlib.decompressobj(31), 0
    try:
        for chunk in chunks:
            while chunk:
                if unzip.eof:
                    unzip = zlib.decompressobj(31)
                out = unzip.decompress(chunk, _CHUNK)
                total += len(out)
                if total > MOST:
                    raise DataError(f"{name}: unpacks to more than {MOST >> 30} GiB", "split it")
                yield out
                chunk = unzip.unconsumed_tail or unzip.unused_data
    except zlib.error as error:
        raise DataError(f"{name}: the gzip file is damaged ({error})", "copy it again") from None
    if not unzip.eof:
        raise DataError(f"{name}: the gzip file is truncated", "copy it again")
