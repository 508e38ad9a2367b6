"""Annotation files read one record at a time, so that only what is kept stays in memory.

``instances.json`` of a benchmark is some hundred megabytes, and parsed whole it grows six- to
eightfold. Here a file is read in chunks, and each record is handed out as soon as it is whole.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from risam_cli.errors import DataError, reason_of
from risam_cli.files.plain import open_plain

CHUNK = 1 << 20
MAX_RECORD = 1 << 26
"""Characters of one record over which a file is refused; a record is held whole."""
_EDGE = 64  # characters: longer than any literal or escape that a chunk's end can cut
_SPACE = " \t\r\n"


def iter_json(path: Path, source: BinaryIO | None = None) -> Iterator[tuple[str, Any]]:
    """Yield ``(key, record)`` of a JSON file in the file's order.

    A top-level object gives every element of its arrays under the array's key, and its other
    values once under theirs. A top-level list gives its elements under ``""``.

    Args:
        source: the file, where it is open already; it is closed at the end.

    Raises:
        DataError: the file is missing, is not UTF-8, is not JSON or ends too early.
    """
    try:
        with io.TextIOWrapper(source or open_plain(path), encoding="utf-8-sig") as stream:
            cursor = _Cursor(stream, path)
            opening = cursor.peek()
            if opening == "{":
                yield from cursor.members()
            elif opening == "[":
                for record in cursor.elements():
                    yield "", record
            else:
                raise DataError(
                    f"{path} is not an annotation file: it begins with {opening!r}",
                    "a JSON object or list was expected",
                )
            cursor.finish()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start})", "check that it is the JSON file"
        ) from error
    except OSError as error:
        folder = isinstance(error, IsADirectoryError)
        fix = "name the JSON file in it" if folder else "name a file that can be read"
        raise DataError(f"cannot read {path}: {reason_of(error)}", fix) from error
    except RecursionError as error:
        raise DataError(
            f"{path} nests too deeply to be an annotation file", "check where it comes from"
        ) from error


class _Cursor:
    """A place in a JSON text of which only the current chunk is held."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self.stream = stream
        self.path = path
        self.buffer = ""
        self.at = 0
        self.dropped = 0  # characters already let go, for the place in messages
        self.ended = False
        self.decoder = json.JSONDecoder()

    def members(self) -> Iterator[tuple[str, Any]]:
        """The members of the object that starts here; arrays are taken apart."""
        self._take("{")
        if self.peek() == "}":
            self._take("}")
            return
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise self._broken("a key in quotes was expected")
            self._take(":")
            if self.peek() == "[":
                for record in self.elements():
                    yield key, record
            else:
                yield key, self._value()
            if not self._more("}"):
                return

    def elements(self) -> Iterator[Any]:
        """The elements of the list that starts here."""
        self._take("[")
        if self.peek() == "]":
            self._take("]")
            return
        while True:
            yield self._value()
            if not self._more("]"):
                return

    def peek(self) -> str:
        """The next character that is not white space, left in place."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._extend():
                raise self._broken("the file ends in the middle")

    def finish(self) -> None:
        """Check that nothing but white space follows."""
        while True:
            rest = self.buffer[self.at :].strip(_SPACE)
            if rest:
                raise self._broken("more text follows the end")
            self.at = len(self.buffer)
            if not self._extend():
                return

    def _more(self, closing: str) -> bool:
        """Step over a comma (True) or the closing character (False)."""
        character = self.peek()
        if character not in ("," + closing):
            raise self._broken(f"',' or {closing!r} was expected")
        self.at += 1
        return character == ","

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self._broken(f"{character!r} was expected")
        self.at += 1

    def _value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # Only what stands at the edge of the buffer may be mended by reading on.
                at_edge = error.pos > len(self.buffer) - _EDGE or "Unterminated" in error.msg
                if at_edge and self._extend():
                    continue
                cut = error.pos >= len(self.buffer) or "Unterminated" in error.msg
                reason = "the file ends in the middle" if cut else error.msg.lower()
                raise self._broken(reason, error.pos) from error
            except ValueError as error:  # digits beyond what Python turns into a number
                raise self._broken("a number of thousands of digits") from error
            # A number at the edge of the buffer may go on in the next chunk: 1 of 1e+5 is one, too.
            if end + len("e+") < len(self.buffer) or not self._extend():
                self.at = end
                return value

    def _extend(self) -> bool:
        """Read on; the buffer at least doubles, so a huge record is not parsed over and over."""
        held = len(self.buffer) - self.at
        if held > MAX_RECORD:
            raise self._broken(f"a record is longer than {MAX_RECORD >> 20} million characters")
        chunk = "" if self.ended else self.stream.read(max(CHUNK, held))
        if not chunk:
            self.ended = True
            return False
        self.dropped += self.at
        self.buffer = self.buffer[self.at :] + chunk
        self.at = 0
        return True

    def _broken(self, reason: str, position: int | None = None) -> DataError:
        place = self.dropped + (self.at if position is None else position)
        return DataError(
            f"{self.path} is damaged at character {place}: {reason}",
            "download or write the file again",
        )
