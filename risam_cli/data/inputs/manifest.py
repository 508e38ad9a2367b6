"""Manifests (JSON Lines, CSV, TSV) line by line; a wrong line is one failure, not the end."""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.data.readers.cells import is_utf8
from risam_cli.errors import DataError, reason_of, setting
from risam_cli.files.jsonlines import brief, parse_json, read_lines
from risam_cli.files.store import open_place
from risam_cli.files.tables import Lines, Table

MAX_LINE = 16 << 20
"""Bytes of one line over which it is refused."""

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "table",
    ".tsv": "table",
    ".json": "coco",
}


def kind_of(path: str) -> str | None:
    """What kind of manifest a file is by its name, ``.gz`` behind it or not; None for others."""
    stem, suffix = os.path.splitext(path.lower())
    return SUFFIXES.get(os.path.splitext(stem)[1] if suffix == ".gz" else suffix)


_IMAGES = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|\0\0\0|(RIFF|BM).{,9}[\0-\x08\x0e-\x1f]", re.S
)
"""What files of images begin with; letters alone may be a path's, such as BMW.jpg."""
_CELL = re.compile(rb'[,;\t|"\s\xef\xbb\xbf]+')
_COLUMNS = ("id", "image", "expression")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a manifest.

    Attributes:
        where: its place, for messages.
        name: a short one, for the id of a failure that has no other.
        image: as the manifest names it; empty where it names none.
        expressions: what it asks; empty where it brings none.
        id: its own, or None.
        error: what is wrong with it, or None.
    """

    where: str
    name: str
    image: str = ""
    expressions: tuple[str, ...] = ()
    id: str | None = None
    error: DataError | None = None


def read_stream(
    stream: BinaryIO, name: str, *, paths: bool = False, null: bool = False
) -> Iterator[Row]:
    """The rows of a stream: JSON Lines with ``image``, ``expression`` or ``expressions``, and
    ``id``; and paths where expressions are given elsewhere.

    Args:
        paths: a line that does not begin with ``{`` is the path of an image.
        null: all are paths, and each ends in NUL.
    """
    lines = read_lines(stream, MAX_LINE, b"\0" if null else b"\n")
    first = next(lines, None)
    if first is None:
        return
    begin = (first[1] or b"").removeprefix(codecs.BOM_UTF8)
    if _IMAGES.match(begin):
        raise DataError(
            f"{name} holds an image, not a list of images", "write it to a file, and name that"
        )
    lines = chain([(first[0], first[1] and begin)], lines)
    is_json = begin.lstrip(b" \t")[:1] in (b"{", b"[")
    if not (null or is_json) and {b"image", b"expression"} <= {*_CELL.split(begin.lower())}:
        yield from read_table(lines, name)
        return
    for number, line in lines:
        where, short = f"{name}, line {number}", f"{os.path.basename(name)}:{number}"
        if line is not None and not line.strip():
            continue
        try:
            if line is None:
                raise DataError(f"{where}: longer than {MAX_LINE >> 20} MiB", "split it")
            if paths and not null and b"\0" in line:
                raise DataError(
                    f"{where}: NUL-terminated paths", f"give {setting('null_separated')}"
                )
            if null or (paths and line.lstrip(b"\xef\xbb\xbf \t")[:1] not in b"{["):
                yield Row(where, short, os.fsdecode(line))
            else:
                yield row_of_object(_object(line, where, paths), where, short)
        except DataError as error:
            yield Row(where, short, error=error)


def _object(line: bytes, where: str, paths: bool) -> Any:
    try:
        return parse_json(line, where)
    except DataError as error:
        if paths or line.lstrip()[:1] in b"{[":
            raise
        raise DataError(
            error.message, "write JSON Lines; plain paths are accepted if expressions are given"
        ) from None


def read_table(stream: BinaryIO | Lines, name: str) -> Iterator[Row]:
    """The rows of a table with the columns ``image`` and ``expression``, and maybe ``id``.

    Raises:
        DataError: there is no header, or it lacks ``image``.
    """
    for row in open_table(stream, name):
        where, short = row.where(name), f"{os.path.basename(name)}:{row.first}"
        try:
            if row.error is not None:
                raise row.error
            yield _row_of_cells(row.cells, where, short)
        except DataError as error:
            yield Row(where, short, error=error)


def open_table(stream: BinaryIO | Lines, name: str) -> Table:
    """The table of a manifest, its header checked; raises as :func:`read_table`."""
    return Table(stream, name, _COLUMNS, ["image"], "image,expression")


# --- JSON -----------------------------------------------------------------------------------------


def row_of_object(obj: Any, where: str, short: str) -> Row:
    """The row of a manifest's JSON object.

    Raises:
        DataError: it is no object, or its id is none.
    """
    if not isinstance(obj, Mapping):
        fix = 'write {"image": …}, one object a line'
        if isinstance(obj, list):
            fix += "; jq -c '.[]' parts an array"
        raise DataError(f"{where}: {brief(obj)} is not an object", fix)
    own = _id(obj.get("id"), where)
    image = obj.get("image")
    try:
        if not isinstance(image, str) or not image:
            missing = "lacks 'image'" if image is None else f"has the image {brief(image)}"
            raise DataError(f"{where}: {missing}", "give the path of an image")
        return Row(where, short, image, _expressions(obj, where), own)
    except DataError as error:
        return Row(where, short, image if isinstance(image, str) else "", id=own, error=error)


def _expressions(obj: Mapping[str, Any], where: str) -> tuple[str, ...]:
    one, several = obj.get("expression"), obj.get("expressions")
    if one is not None and several is not None:
        raise DataError(f"{where}: has 'expression' and 'expressions'", "give one of them")
    if one is not None:
        several = [one]
    if several is None:
        return ()
    if not isinstance(several, list) or not all(isinstance(text, str) for text in several):
        key = "expressions" if one is None else "expression"
        found = several if one is None else one
        raise DataError(f"{where}: {key!r} is {brief(found)}", "give text, or a list of texts")
    return tuple(several)


def _id(value: Any, where: str) -> str | None:
    if value is None:
        return None
    odd = isinstance(value, bool) or not isinstance(value, (str, int, float)) or value == ""
    if odd or value != value or value in (math.inf, -math.inf):
        raise DataError(f"{where}: 'id' is {brief(value)}", "give a string or a number")
    return str(value)


# --- CSV ------------------------------------------------------------------------------------------


def _row_of_cells(cells: Mapping[str, str], where: str, short: str) -> Row:
    image, text = cells["image"], cells.get("expression", "")
    own = cells.get("id") or None
    if not image:
        raise DataError(f"{where}: lacks 'image'", "give the path of an image")
    if not is_utf8(text):
        problem = DataError(f"{where}: the expression is not UTF-8", "save the file as UTF-8")
        return Row(where, short, image, id=own, error=problem)
    return Row(where, short, image, (text,) if text.strip() else (), own)


def open_manifest(path: Path) -> BinaryIO:
    """The file, open, wherever it lies.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return open_place(path)
    except OSError as error:
        raise DataError(f"{path}: {reason_of(error)}", "check the path") from None
