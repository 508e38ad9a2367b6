"""CSV and TSV by one set of rules: what a spreadsheet or pandas writes is taken by every command.

The header decides: its words in lower case, white space outside them dropped and inside as ``_``;
the delimiter is the one of comma, semicolon and tab that parts the header into known columns.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief, read_lines

MAX_LINE = 64 << 20
"""Bytes of one line over which it is refused: it may hold the RLE of a huge ragged mask."""

_DELIMITERS = ",;\t|"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row.

    Attributes:
        first, last: its lines, counted from 1.
        cells: by column; bytes that are not UTF-8 stay, as surrogates.
        error: what is wrong with it, or None.
    """

    first: int
    last: int
    cells: dict[str, str]
    error: DataError | None = None

    def where(self, name: str) -> str:
        """The row's place in a message."""
        lines = f"lines {self.first} to {self.last}"
        return f"{name}, {lines if self.last > self.first else f'line {self.last}'}"


Lines = Iterator[tuple[int, bytes | None]]
"""What :func:`risam_cli.files.jsonlines.read_lines` gives."""


class Table:
    """The rows of a table; iterate once.

    Args:
        known: columns by which the delimiter is found; at least one must be there.
        needed: columns that must all be there; ``example`` is a header that has them.

    Attributes:
        columns: of the header, brought into shape.

    Raises:
        DataError: there is no header, or it lacks a column.
    """

    def __init__(
        self,
        stream: BinaryIO | Lines,
        name: str,
        known: Collection[str],
        needed: Collection[str] = (),
        example: str = "",
    ) -> None:
        self._lines = _TextLines(stream)
        self._name = name
        header = next(self._lines, "\n")
        delimiter = max(_DELIMITERS, key=lambda mark: _matches(header, mark, known))
        self._delimiter = delimiter
        try:
            (values,) = list(csv.reader([header], delimiter=delimiter))
        except (csv.Error, ValueError) as error:
            raise DataError(f"{name}, line 1: not a header ({error})") from None
        self.columns = [_column(value) for value in values]
        absent = [column for column in needed if column not in self.columns]
        if absent:
            found = ", ".join(self.columns).strip(", ") or "nothing"
            raise DataError(
                f"{name}, line 1: no column {', '.join(map(repr, absent))} among {brief(found)}",
                f"begin the file with a line such as {example}",
            )

    def __iter__(self) -> Iterator[TableRow]:
        reader = csv.reader(self._lines, delimiter=self._delimiter)
        while True:
            before = self._lines.number
            try:
                values = next(reader, None)
            except csv.Error as error:
                fix = "look for a quotation mark that is never closed"
                yield self._failed(before + 1, f"not a row of the table ({error})", fix)
                continue
            if values is None:
                return
            if self._lines.ended:  # every line ends a row, but inside of quotation marks
                fix = "close it, or double it where it is part of the text"
                yield self._failed(before + 1, "a quotation mark is opened and never closed", fix)
                return
            if any(values):
                yield self._row(values, before + 1)

    def _row(self, values: list[str], first: int) -> TableRow:
        while len(values) > len(self.columns) and not values[-1]:
            values.pop()  # a spreadsheet's empty columns
        if len(values) != len(self.columns):
            reason = f"{len(values)} values for {len(self.columns)} columns"
            fix = "put quotation marks around text that holds the delimiter"
            return self._failed(first, reason, fix)
        cells = dict(zip(self.columns, values, strict=True))
        return TableRow(first, self._lines.number, cells)

    def _failed(self, first: int, reason: str, fix: str) -> TableRow:
        """The row from line ``first`` to the last that was read, which is none."""
        row = TableRow(first, self._lines.number, {})
        return replace(row, error=DataError(f"{row.where(self._name)}: {reason}", fix))


class _TextLines:
    """Lines as the csv module wants them; bytes that are not UTF-8 stay as they are in a path.

    Attributes:
        number: of the last line; ended: whether one after it was asked for.
    """

    def __init__(self, stream: BinaryIO | Lines) -> None:
        is_stream = hasattr(stream, "read")
        self._lines = (
            read_lines(cast(BinaryIO, stream), MAX_LINE) if is_stream else cast(Lines, stream)
        )
        self.number = 0
        self.ended = False

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        try:
            self.number, line = next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        if line is None:
            raise csv.Error(f"a line is longer than {MAX_LINE >> 20} MiB")
        text = line.decode("utf-8", "surrogateescape")
        return (text.removeprefix("\ufeff") if self.number == 1 else text) + "\n"


def _column(value: str) -> str:
    return "_".join(value.strip().lower().split())


def _matches(header: str, delimiter: str, known: Collection[str]) -> int:
    return sum(_column(part.strip().strip('"')) in known for part in header.split(delimiter))
