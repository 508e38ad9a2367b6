"""Anyone's predictions, found by id or by image and expression without holding them in memory.

A first pass over the file keeps some 40 bytes a record: two hashes and the line's offset. A record
is read again when its expression is scored.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.readers.source import OnFailure
from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief, read_lines_at
from risam_cli.masks import rle as masks
from risam_cli.types import Expression, Failure, Rle, Sample

FILE_NAME = "predictions.jsonl"
MAX_LINE = 64 << 20
"""Bytes of a line over which it is no record; as in :mod:`risam_cli.outputs.records`."""

_Row = tuple[int, dict[str, Any]]  # its number among the records, and the record


@dataclass(frozen=True, slots=True)
class Answer:
    """What is scored for one expression.

    Attributes:
        segmentation: RLE at the image's size, or at a protocol's canvas.
        no_target: the answer was "nothing fits".
        score, no_target_probability: in 0..1, or nan where unknown.
    """

    segmentation: Rle
    no_target: bool
    score: float = math.nan
    no_target_probability: float = math.nan


class PredictionIndex:
    """The records of a ``predictions.jsonl``, by id and by image and expression.

    Use as a context manager; the file stays open in between.

    Args:
        path: the file, the folder that holds ``predictions.jsonl``, or ``-`` for stdin.
        on_failure: gets every line that is no record.
        size: (H, W) of all masks, where they are not at their images' sizes.
        canvas: side of the square at which a protocol compares masks; masks of that size are taken
            as they are.

    Raises:
        DataError: the file cannot be read or holds no record at all.
    """

    def __init__(
        self,
        path: Path,
        on_failure: OnFailure,
        size: tuple[int, int] | None = None,
        *,
        canvas: int = 0,
    ) -> None:
        self._size = size
        self._canvas = canvas
        self.path = path / FILE_NAME if path.is_dir() else path
        self._stream = _open(self.path)
        self._on_failure = on_failure
        offsets, by_id, by_pair, self.broken = array("q"), array("Q"), array("Q"), 0
        for offset, record in self._scan():
            offsets.append(offset)
            by_id.append(_hash(record["id"]) if "id" in record else 0)
            by_pair.append(_pair_hash(record))
        if not len(offsets):
            self.close()
            raise DataError(
                f"{self.path} holds no prediction" + (" that can be read" if self.broken else ""),
                "one JSON object a line, with id (or image and expression) and segmentation",
            )
        self._offsets = np.array(offsets, np.int64)
        self._ids = _Lookup(np.array(by_id, np.uint64))
        self._pairs = _Lookup(np.array(by_pair, np.uint64))
        self._used = np.zeros(len(offsets), np.bool_)
        self.doubled = 0

    def __len__(self) -> int:
        return len(self._offsets)

    def __enter__(self) -> PredictionIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def find(self, sample: Sample, expression: Expression) -> Answer | None:
        """The answer to an expression; None where there is none.

        A record with the expression's id counts unless it names another image; else one that
        names the image (its path, or the end of it) and the expression. Of several, the first in
        the file is taken and the others are told to ``on_failure``.

        Raises:
            DataError: the record is malformed, or its mask is of another size than the image.
        """
        found = list(self._by_id(sample, expression)) or list(self._by_pair(sample, expression))
        if not found:
            return None
        for row, record in found[1:]:
            if not self._used[row]:
                self.doubled += 1
                self._tell(record, "a second prediction for one expression; not scored")
        self._used[[row for row, _ in found]] = True
        where = f"{self.path}: prediction {expression.id!r}"
        return parse_answer(found[0][1], self._size or sample.size, where, canvas=self._canvas)

    def records(self, name: str) -> list[dict[str, Any]]:
        """All records with an id, in the file's order.

        Raises:
            DataError: one of them is not what it was any more.
        """
        found = (self._record(row) for row in self._ids.rows(_hash(name)))
        return [record for record in found if record.get("id") == name]

    def surplus(self) -> Iterator[tuple[str, str, str]]:
        """Id, image and expression of every record that no expression asked for."""
        for row in np.flatnonzero(~self._used):
            record = self._record(int(row))
            name, image, text = (str(record.get(k, "")) for k in ("id", "image", "expression"))
            yield name, image, text

    @property
    def unused(self) -> int:
        """How many records no expression asked for."""
        return int((~self._used).sum())

    def _scan(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, offset, line in read_lines_at(self._stream, MAX_LINE):
            where = f"{self.path}: line {number}"
            try:
                if line is None:
                    raise DataError(f"{where} is longer than {MAX_LINE >> 20} MiB")
                yield offset, _parse_line(line, where)
            except DataError as error:
                self.broken += 1
                self._on_failure(
                    Failure(f"line {number}", "", None, "read", "DataError", str(error))
                )

    def _by_id(self, sample: Sample, expression: Expression) -> Iterator[_Row]:
        for row in self._ids.rows(_hash(expression.id)):
            record = self._record(row)
            if str(record.get("id")) == expression.id and _same_image(record, sample.image):
                yield row, record

    def _by_pair(self, sample: Sample, expression: Expression) -> Iterator[_Row]:
        texts = {expression.text, str(expression.attributes.get("raw", expression.text))}
        for text in texts:
            wanted = {"image": sample.image, "expression": text}
            for row in self._pairs.rows(_pair_hash(wanted)):
                record = self._record(row)
                if record.get("expression") == text and _same_image(record, sample.image):
                    yield row, record

    def _record(self, row: int) -> dict[str, Any]:
        self._stream.seek(int(self._offsets[row]))
        return _parse_line(self._stream.readline(MAX_LINE + 1), f"{self.path}")

    def _tell(self, record: dict[str, Any], message: str) -> None:
        name, image = str(record.get("id", "")), str(record.get("image", ""))
        text = str(record.get("expression", ""))
        self._on_failure(Failure(name, image, text, "match", "DataError", message))


def parse_answer(
    record: dict[str, Any], size: tuple[int, int] | None, where: str, *, canvas: int = 0
) -> Answer:
    """Check a record's mask, flag and score.

    ``no_target`` may be absent (an empty mask then says it), and so may ``score``; with
    ``no_target`` true, the mask may be absent too.

    Raises:
        DataError: naming ``where``, the field and what is wrong with it.
    """
    flag = record.get("no_target")
    if flag is not None and not isinstance(flag, bool):
        raise DataError(f"{where}: no_target is {flag!r}, not true or false")
    segmentation = record.get("segmentation")
    if segmentation is None and flag and size is not None:
        rle = masks.empty(size)
    else:
        own = segmentation.get("size") if canvas and isinstance(segmentation, dict) else None
        at_canvas = own == [canvas, canvas]
        rle = masks.parse_rle(segmentation, size=None if at_canvas else size, where=where)
    return Answer(
        rle,
        flag if flag is not None else masks.area(rle) == 0,
        _unit(record, "score", where),
        _unit(record, "no_target_probability", where),
    )


def _unit(record: dict[str, Any], key: str, where: str) -> float:
    value = record.get(key)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise DataError(f"{where}: {key} is {value!r}", "give a number in 0..1, or leave it out")
    return float(value)


def _open(path: Path) -> BinaryIO:
    """The file for reading at any place; stdin is first copied to a temporary file."""
    if str(path) == "-":
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (the index closes it)
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.seek(0)
        return copy
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"cannot read the predictions {path}: {error.strerror or error}",
            f"give a {FILE_NAME} or the folder that holds one",
        ) from error


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else " (the file ends in the middle of it)"
        raise DataError(f"{where} is not JSON{cut}: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object")
    if isinstance(record.get("id"), (int, str)):
        record["id"] = str(record["id"])
    elif "id" in record and record["id"] is not None:
        raise DataError(f"{where} has the id {brief(record['id'])}, not a string")
    else:
        record.pop("id", None)
    named = isinstance(record.get("image"), str) and isinstance(record.get("expression"), str)
    if "id" not in record and not named:
        raise DataError(f"{where} has neither an id nor an image and an expression")
    return record


def _same_image(record: dict[str, Any], image: str) -> bool:
    """Whether the record's image, if it names one, is ``image`` or ends like it, or the reverse."""
    named = record.get("image")
    if not isinstance(named, str):
        return True
    own, other = _components(named), _components(image)
    shared = min(len(own), len(other))
    return own[-shared:] == other[-shared:]


def _components(path: str) -> list[str]:
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]


def _pair_hash(record: dict[str, Any]) -> int:
    image, text = record.get("image"), record.get("expression")
    if not isinstance(image, str) or not isinstance(text, str):
        return 0
    return _hash(f"{(_components(image) or [''])[-1]}\0{text}")


def _hash(text: str) -> int:
    """64 bits; 0 is kept for "none"."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


class _Lookup:
    """Rows by 64-bit hash, as two sorted arrays."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def rows(self, value: int) -> list[int]:
        """Rows with this hash, ascending."""
        key = np.uint64(value)
        first = int(np.searchsorted(self._sorted, key, "left"))
        last = int(np.searchsorted(self._sorted, key, "right"))
        return [int(row) for row in self._order[first:last]]
