"""Results of any tool as records, one object each, that can be read again from any place.

Taken are JSON Lines as `risam predict` writes them, a COCO results file, a JSON array of records,
a COCO file with its own annotations, SAM's ``amg.py`` output, a folder of JSON files of one image
each, CSV and TSV, a folder of mask files with a manifest; packed by gzip or in UTF-16 too; and what
a person has looked at in CVAT or labelme. `risam export-masks` and `risam eval` both read through
here, so what one takes, the other does.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from risam_cli.console.streams import require_open
from risam_cli.data.identity import existing, id_text
from risam_cli.data.images.files import require_inside
from risam_cli.data.readers.cells import cell, is_utf8, whole
from risam_cli.data.readers.cvat import NAME as CVAT
from risam_cli.data.readers.cvat import cvat_records, open_zip
from risam_cli.data.readers.instances import segmentation_to_rle
from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.data.readers.labelme import FOLDER as LABELME
from risam_cli.data.readers.labelme import holds_labelme, is_labelme, labelme_records
from risam_cli.data.readers.mask_files import read_mask_file
from risam_cli.data.readers.names import IMAGE_KEYS, TEXT_KEYS, Names, Record, spoken
from risam_cli.data.readers.shapes import ERROR
from risam_cli.errors import DataError, reason_of
from risam_cli.files.folder import SPLICE, makers_of
from risam_cli.files.jsonlines import brief, parse_json, read_lines_at
from risam_cli.files.locks import PRIVATE
from risam_cli.files.plain import copied, open_plain, spooled
from risam_cli.files.tables import Table
from risam_cli.masks import rle as masks
from risam_cli.types import Rle

PREDICTIONS = "predictions.jsonl"
MANIFESTS = ("manifest.jsonl", "manifest.csv", "manifest.tsv")
"""What a folder of mask files calls its list, in the order in which they are looked for."""
MAX_LINE = 64 << 20
"""Bytes of a line over which it is no record: the RLE of a huge ragged mask stays far below."""

# What a COCO file calls an annotation is not what its expression was called.
_ID_KEYS = ("record_id", "id", "sent_id", "task_id")
_COLUMNS = ("image", "expression", "mask", "segmentation", "id", "score", "no_target", "file_name")
_TEXTS = (*_ID_KEYS, *TEXT_KEYS)
_JSON = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
_PICKLE = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_HEAD = 1 << 16  # bytes of a file that tell what it is, white space before its text included
_LONGEST_SINGLE = 1 << 23  # bytes of a file that is one record
_LISTS = ("", "annotations", "predictions", "results")


class Results:
    """Records of one source. Use as a context manager.

    Args:
        path: a file, a folder that holds one, or ``-`` for stdin.
        annotations: for COCO results: the COCO file that names their images and categories.
        image_root: where names of images begin, for what labels them by their own place.
        confine: refuse mask files outside of ``base``.

    Attributes:
        path: the file that was found.
        base: where paths of mask files start.
        names: what the COCO file says; None where there is none.
        reviewed: whether they come from an annotation tool, where a person has looked at them.

    Raises:
        DataError: the source cannot be read.
    """

    def __init__(
        self,
        path: Path,
        annotations: Path | None = None,
        *,
        image_root: Path | None = None,
        confine: bool = False,
    ) -> None:
        self.path = _find(path)
        self._confine = confine
        self._labelme = self.path.is_dir() and holds_labelme(self.path)
        self._files = [] if self._labelme else _json_files(self.path)  # of a folder
        self._file_of = array("q")  # of each record
        self.base = self.path if self._files else Path() if str(path) == "-" else self.path.parent
        self.names = Names(annotations) if annotations is not None else None
        self.reviewed = False
        self._image_root = image_root
        self._kind = "line"
        self._places: array[int] | None = None
        self._notes: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        try:
            self._stream = self._open()
        except OSError as error:
            place = error.filename if isinstance(error.filename, str) else self.path
            raise DataError(
                f"cannot read the predictions {place}: {reason_of(error)}",
                "name a predictions file or the folder that holds one",
            ) from None

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    @property
    def are_results(self) -> bool:
        """Whether records are items of an array, which have an order but no lines."""
        return self._kind == "result"

    def rows(self) -> Iterator[tuple[int, int, Record | DataError]]:
        """Number and offset of every record with the record itself, or with what is wrong."""
        for number, offset, line in read_lines_at(self._stream, MAX_LINE):
            try:
                if line is None:
                    raise DataError(f"{self.place(number)}: longer than {MAX_LINE >> 20} MiB")
                yield number, offset, self._record(line, number)
            except DataError as error:
                yield number, offset, error

    def read(self, number: int, offset: int) -> Record:
        """The record at a place that :meth:`rows` gave."""
        self._stream.seek(offset)
        return self._record(self._stream.readline(MAX_LINE + 1), number)

    def place(self, number: int) -> str:
        """A record's place, for messages."""
        path = self._files[self._file_of[number - 1]] if self._files else self.path
        if self._places is not None:
            number = self._places[number - 1]
        return f"{path}, {self._kind} {number}"

    def mask(self, record: Record, size: tuple[int, int] | None, where: str) -> Rle | None:
        """The mask of a record, from its segmentation or its mask file; None where it has neither.

        Args:
            size: (H, W) that it must have, or None to take its own.

        Raises:
            DataError: it is malformed, of another size, or polygons of an unknown size.
        """
        found = record.get("segmentation")
        if isinstance(found, str):
            found = cell("segmentation", found)
        if found is None and isinstance(record.get("mask"), Mapping):
            found = record["mask"]
        if isinstance(found, Mapping):
            if "size" not in found and "counts" in found and size is not None:
                found = {**found, "size": list(size)}
            return masks.parse_rle(found, size=size, where=where)
        if found is not None and not (found == [] and record.get("no_target") is True):
            return _from_list(found, size, where)
        name = record.get("mask")
        if name is None or name == "":
            return None
        if not isinstance(name, str):
            raise DataError(f"{where}: 'mask' is {brief(name)}", "name a file")
        path = Path(existing(str(self.base / name)))
        if self._confine and "\0" not in name:
            require_inside(path, self.base, f"{where}: the mask {name!r}")
        rle = read_mask_file(
            path,
            where,
            lambda doubt: self.note(f"mask files: one {doubt}", name),
            no_file="paths are relative to the manifest",
        )
        if size is not None and tuple(rle["size"]) != tuple(size):
            raise DataError(
                f"{where}: the mask {name} is {rle['size'][0]}x{rle['size'][1]} (height x width), "
                f"the image is {size[0]}x{size[1]}",
                "give masks at the image's own size",
            )
        return rle

    def unit(self, record: Record, key: str, number: int) -> float | None:
        """A side field in 0..1; None where it is absent or nothing of the kind, which is noted."""
        value = record.get(key)
        if value is None:
            return None
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if fits and 0 <= value <= 1:  # which NaN is not
            return float(value)
        self._leave_out(key, value, "a number in 0..1", number)
        return None

    def flag(self, record: Record, key: str, number: int) -> bool | None:
        """A side field that is true or false; None where it is absent or neither."""
        value = record.get(key)
        if value is None or isinstance(value, bool):
            return value
        self._leave_out(key, value, "true or false", number)
        return None

    def instance(self, record: Record, number: int) -> int | None:
        """Which object of its expression it is; None where it does not say, or no number, noted."""
        value = record.get("instance")
        if value is None or type(value) is int:
            return value
        self._leave_out("instance", value, "a whole number", number)
        return None

    def notes(self) -> list[str]:
        """What the user must know of all that was read, one line a kind, with numbers."""
        return [f"{n} {what} (the first: {self._first[what]})" for what, n in self._notes.items()]

    def note_ids(self, record: Record, number: int) -> None:
        """Note where a name has to be made of a COCO id."""
        first = self.place(number)
        category = id_text(record.get("category_id"))
        if self.names is None:
            if "image_id" in record and record["image"] == id_text(record["image_id"]):
                what = "results name their image only by an id, which is taken as its name"
                self.note(what, first)
        elif category is not None and category not in self.names.categories:
            self.note(
                "results have a category_id that the COCO file does not list",
                f"{brief(record['category_id'])}, {first}",
            )

    def _leave_out(self, key: str, value: object, wanted: str, number: int) -> None:
        article = "an" if key[0] in "aeiou" else "a"
        self.note(
            f"records have {article} {key} that is not {wanted}; it is left out",
            f"{brief(value)}, {self.place(number)}",
        )

    def note(self, what: str, first: str) -> None:
        """Note what the user must know; records with the same are counted."""
        self._notes[what] += 1
        self._first.setdefault(what, first)

    def _record(self, line: bytes, number: int) -> Record:
        where = self.place(number)
        try:
            found = parse_json(line, where)
        except DataError as error:
            if line.endswith(b"\n"):
                raise
            raise DataError(f"{error.message} (the file ends in the middle of it)") from None
        if not isinstance(found, dict):
            raise DataError(f"{where}: a record must be an object, not {brief(found)}")
        if isinstance(found.get(ERROR), str):
            raise DataError(found[ERROR])
        if type(found.get("image")) is int and "image_id" not in found:
            found["image_id"] = found.pop("image")
        if self.names is not None or "image_id" in found:
            (self.names or _NONE).complete(found, where)
        if "predicted_iou" in found and not any(key in found for key in IMAGE_KEYS):
            found["image"] = _stem(self.path)  # SAM's amg.py: one file an image
        found["annotation"] = id_text(found.get("id"))
        for key, keys in (("id", _ID_KEYS), ("image", IMAGE_KEYS), ("expression", TEXT_KEYS)):
            given = next((found[k] for k in keys if found.get(k) is not None), None)
            found[key] = given
        if found["id"] == "":  # as exports write it of a record without one
            found["id"] = None
        elif found["id"] is not None:
            found["id"] = _id(found["id"], where)
        if "score" not in found and "predicted_iou" in found:
            found["score"] = found["predicted_iou"]
        if "instance" in found:
            found["instance"] = whole(found["instance"])
        return found

    # --- opening --------------------------------------------------------------------------------

    def _open(self) -> BinaryIO:
        if self._labelme:
            return self._of_labelme()
        if self._files:
            return self._spooled(self._of_folder(), "result", None)
        if str(self.path) == "-":
            require_open("stdin")
            stream = copied(sys.stdin.buffer, "<stdin>")
        else:
            stream = open_plain(self.path)
        name = self.path.name.lower().removesuffix(".gz")
        if name.endswith((".csv", ".tsv")):
            return self._spooled(self._of_table(stream), "line", stream)
        start = stream.read(_HEAD)
        stream.seek(0)
        if start.startswith(b"PK\3\4") and (inner := open_zip(stream, self.path)) is not None:
            start, stream = b"<", inner
        if b"\0" in start[: 1 << 10] or start.startswith(_PICKLE):
            stream.close()
            raise DataError(
                f"{self.path} is a binary file, which is neither run nor read",
                "write its masks as COCO results or as JSON Lines",
            )
        head = start.decode("utf-8-sig", "replace").lstrip()
        if head.startswith("<"):
            self.reviewed = True
            rows = cvat_records(stream, self.path, self._image_root)
            return self._spooled(rows, "image", stream)
        if is_labelme(stream):
            stream.close()
            return self._of_labelme()
        if name.endswith(".json") or head[:1] == "[":
            return self._spooled(self._of_json(self.path, stream), "result", None)
        return stream

    def _spooled(
        self, rows: Iterator[tuple[int, Record]], kind: str, source: BinaryIO | None
    ) -> BinaryIO:
        """The rows as JSON Lines in a temporary file; remembers the place of each."""
        places = array("q")

        def lines() -> Iterator[bytes]:
            for place, row in rows:
                places.append(place)
                yield json.dumps(row).encode() + b"\n"

        stream = spooled(lines(), source)
        self._kind, self._places = kind, places
        return stream

    def _of_labelme(self) -> BinaryIO:
        self.reviewed = True
        rows = labelme_records(
            self.path,
            self._image_root,
            lambda name: self.note("JSON files are not labelme's; skipped", name),
        )
        return self._spooled(rows, "image", None)

    def _of_table(self, stream: BinaryIO) -> Iterator[tuple[int, Record]]:
        table = Table(stream, str(self.path), _COLUMNS)
        if not {"mask", "segmentation"} & {*table.columns}:
            absent = [column for column in ("expression", "mask") if column not in table.columns]
            raise DataError(
                f"manifest {self.path} has no column {', '.join(absent)}",
                "its first line names the columns image, expression, mask, optionally id and score",
            )
        for row in table:
            if row.error is not None:
                raise row.error
            # Names of files are bytes and may be anything; what is written out as text may not.
            odd = [k for k in _TEXTS if not is_utf8(row.cells.get(k, ""))]
            if odd:
                where = row.where(str(self.path))
                yield row.first, {ERROR: f"{where}: the {odd[0]} is not UTF-8; save it as UTF-8"}
            else:
                yield row.first, {k: cell(k, v) for k, v in row.cells.items() if k and v}

    def _of_folder(self) -> Iterator[tuple[int, Record]]:
        """The records of a folder's files; those without an image's name are of their file's."""
        for number, path in enumerate(self._files):
            names, self.names = self.names, None
            lines = path.name.removesuffix(".gz").endswith(".jsonl")
            rows = list(_of_lines(path) if lines else self._of_json(path, None))
            own, self.names = self.names, names
            for place, row in rows:
                if own is not None and names is None:
                    own.complete(row, f"{path}, result {place}")
                if not any(row.get(key) is not None for key in (*IMAGE_KEYS, "image_id")):
                    row["image"] = _stem(path)
                self._file_of.append(number)
                yield place, row
        if not self._file_of:
            raise DataError(f"{self.path}: its {len(self._files)} JSON files hold no record")

    def _of_json(self, path: Path, stream: BinaryIO | None) -> Iterator[tuple[int, Record]]:
        """The records of a JSON file: of its array, or of the lists that a COCO file has."""
        table: dict[str, list[Any]] = {"images": [], "categories": [], "expressions": []}
        image: Record = {}
        number, is_empty = 0, True
        told: set[str] = set()  # annotations that the list has an expression for
        instances: dict[str | None, Any] = {}  # annotations, each with the expression that it is of
        for key, item in iter_json(path, stream):
            is_empty = is_empty and key == "image"
            if key in table:
                table[key].append(item)
            if key == "expressions":
                self._note_unsaid(item, told, instances)
                item = _without_target(item)
                if item is not None:  # those with a target are on their annotations
                    yield number, item
                    number += 1
            elif key == "image" and isinstance(item, Mapping):  # of SA-1B: one file an image
                image = {k: item[k] for k in ("file_name", "height", "width") if k in item}
            elif key in _LISTS:
                if not isinstance(item, Mapping):
                    raise DataError(f"{path}: result {number} is {brief(item)}", "give objects")
                if "instance" in item:
                    instances[id_text(item.get("id"))] = item.get("expression")
                yield number, {**image, **self._with_text(item)}
                number += 1
        if not number and str(path) != "-":
            single = _single(path)
            if single or (is_empty and self._files):  # nothing was found in the image
                yield from enumerate(single)
                return
        if not number:
            raise DataError(
                f"{path} is not a COCO results file, nor an array of records",
                "that is a JSON array of objects with a segmentation",
            )
        if table["images"] and self.names is None:
            self.names = Names(path, table)

    def _note_unsaid(
        self, listed: Any, told: set[str], instances: Mapping[str | None, Any]
    ) -> None:
        """Note an expression of the list that is no record, since an annotation makes one alone.

        That of several is one where each of them is its instance.
        """
        text, ann_ids = spoken(listed)
        names = [name for name in map(id_text, ann_ids) if name not in (None, "-1")]
        if text is None or not names or all(instances.get(name) == text for name in names):
            return
        if len(names) > 1 or names[0] in told:
            self.note(_UNSAID, brief(text))
        told.update(name for name in names if len(names) == 1 and name is not None)

    def _with_text(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        """An annotation with the first of its own expressions, where that stands in a list."""
        listed = item.get("expressions")
        listed = listed if isinstance(listed, list) else []
        texts = [text for text in listed if isinstance(text, str)]
        if texts and not any(item.get(key) for key in TEXT_KEYS):
            item = {**item, "expression": texts.pop(0)}
        for text in texts:
            self.note(_UNSAID, brief(text))
        return item


_NONE = Names(None)
_UNSAID = (
    "expressions of the COCO file are left out, as they are further ones of an annotation, or of "
    "several annotations together; each annotation is one record"
)


def _without_target(expression: Any) -> Record | None:
    """The record of an expression that nothing fits; None for others."""
    text, ann_ids = spoken(expression)
    if text is None or ann_ids not in ([], [-1]):
        return None
    kept = {key: expression.get(key) for key in ("image_id", "record_id")}
    return {**kept, "expression": text, "no_target": True}


def _id(value: Any, where: str) -> str:
    found = id_text(value)
    if found is None:
        raise DataError(f"{where}: 'id' is {brief(value)}", "give a string or a number")
    return found


def _single(path: Path) -> list[Record]:
    """The one record that a small JSON file is; nothing where it is none."""
    if path.stat().st_size > _LONGEST_SINGLE:
        return []
    with open_plain(path) as stream:
        found = parse_json(stream.read(), str(path))
    is_record = isinstance(found, dict) and ("segmentation" in found or "mask" in found)
    return [found] if is_record else []


def _of_lines(path: Path) -> Iterator[tuple[int, Record]]:
    with open_plain(path) as stream:
        for number, _, line in read_lines_at(stream, MAX_LINE):
            row = None if line is None else parse_json(line, f"{path}, line {number}")
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is no record")
            yield number, row


def _dense(found: Any, size: tuple[int, int] | None) -> Rle | None:
    """The mask that an array of H rows of W zeros and ones is; None where it is none."""
    if size is None or len(found) != size[0]:
        return None
    for row in found:
        if not isinstance(row, list) or len(row) != size[1] or any(v not in (0, 1) for v in row):
            return None
    return masks.encode(np.array(found, np.bool_))


def _from_list(found: Any, size: tuple[int, int] | None, where: str) -> Rle:
    if not isinstance(found, (list, tuple)):
        raise DataError(f"{where}: the segmentation is {brief(found)}", "give an RLE or polygons")
    if not found:
        raise DataError(
            f"{where}: the segmentation is an empty list; a box alone has no mask",
            "give a mask, or no_target: true where nothing fits",
        )
    if size is None:
        if all(isinstance(part, Mapping) for part in found):
            size = masks.parse_size(found[0].get("size"), where)
        else:
            raise DataError(
                f"{where}: polygons, but the image's height and width are not known",
                "give height and width, or the COCO file of the images",
            )
    dense = _dense(found, size)
    if dense is not None:
        return dense
    if all(_is_point(part) for part in found):  # points of one polygon
        found = [found]
    found = [
        [v for point in part for v in point]
        if isinstance(part, list) and part and all(_is_point(point) for point in part)
        else part
        for part in found
    ]
    rle = segmentation_to_rle(found, size, where)
    flat = [v for part in found for v in (part if isinstance(part, list) else [part])]
    if min(size) > 1 and all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in flat):
        raise DataError(
            f"{where}: the polygons' coordinates are all from 0 to 1",
            "give them in pixels: x times the width, y times the height",
        )
    return rle


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    )


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".json")


def _json_files(folder: Path) -> list[Path]:
    """A folder's own JSON files, by name; none where it is no folder."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name.endswith(_JSON))
    return sorted(path for path in found if path.name[0] != "." and path.is_file())


def _find(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    if str(path) != "-" and os.path.lexists(folder / PRIVATE / SPLICE):
        raise DataError(
            f"the results in {folder} are being replaced, or this was interrupted",
            "run the command that wrote them again, with the options that continue it",
        )
    if str(path) == "-" or not path.is_dir():
        return path
    names = [PREDICTIONS, *MANIFESTS, "instances.json", "results.json"]
    for name in (*names, *(f"{name}.gz" for name in names), CVAT):
        if (path / name).is_file():
            return path / name
    if holds_labelme(path / LABELME):
        return path / LABELME
    if (_json_files(path) and not makers_of(path)) or holds_labelme(path):
        return path
    raise DataError(
        f"{path} holds neither {PREDICTIONS} nor {', '.join(MANIFESTS)} nor results as .json",
        "name a folder of `risam predict`, a predictions file, a folder of masks with a manifest "
        "(image, expression, mask), or what CVAT or labelme saved",
    )
