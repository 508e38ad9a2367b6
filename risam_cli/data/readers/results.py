"""Results of any tool as records, one object each, that can be read again from any place.

Taken are JSON Lines as `risam predict` writes them, a COCO results file, a JSON array of records,
a COCO file with its own annotations, SAM's ``amg.py`` output, CSV and TSV, and a folder of mask
files with a manifest; packed by gzip or in UTF-16 too. `risam export-masks` and `risam eval` both
read through here, so what one takes, the other does.
"""

from __future__ import annotations

import ast
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from risam_cli.console.streams import require_open
from risam_cli.data.identity import id_text
from risam_cli.data.readers.instances import segmentation_to_rle
from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.data.readers.mask_files import read_mask_file
from risam_cli.errors import DataError, reason_of
from risam_cli.files.jsonlines import brief, parse_json, read_lines_at
from risam_cli.files.plain import copied, open_plain, spooled
from risam_cli.files.tables import Table
from risam_cli.masks import rle as masks
from risam_cli.types import Rle

PREDICTIONS = "predictions.jsonl"
MANIFESTS = ("manifest.jsonl", "manifest.csv", "manifest.tsv")
"""What a folder of mask files calls its list, in the order in which they are looked for."""
MAX_LINE = 64 << 20
"""Bytes of a line over which it is no record: the RLE of a huge ragged mask stays far below."""

Record = dict[str, Any]

_IMAGE_KEYS = ("image", "file_name")
_TEXT_KEYS = ("expression", "caption", "sent", "phrase", "text")
_ID_KEYS = ("id", "sent_id", "task_id", "record_id")
_COLUMNS = ("image", "expression", "mask", "segmentation", "id", "score", "no_target", "file_name")
_LISTS = ("", "annotations", "predictions", "results")


class Results:
    """Records of one source. Use as a context manager.

    Args:
        path: a file, a folder that holds one, or ``-`` for stdin.
        annotations: for COCO results: the COCO file that names their images and categories.

    Attributes:
        path: the file that was found.
        base: where paths of mask files start.
        names: what the COCO file says; None where there is none.

    Raises:
        DataError: the source cannot be read.
    """

    def __init__(self, path: Path, annotations: Path | None = None) -> None:
        self.path = _find(path)
        self.base = Path() if str(path) == "-" else self.path.parent
        self.names = Names(annotations) if annotations is not None else None
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
        if self._places is not None:
            number = self._places[number - 1]
        return f"{self.path}, {self._kind} {number}"

    def mask(self, record: Record, size: tuple[int, int] | None, where: str) -> Rle | None:
        """The mask of a record, from its segmentation or its mask file; None where it has neither.

        Args:
            size: (H, W) that it must have, or None to take its own.

        Raises:
            DataError: it is malformed, of another size, or polygons of an unknown size.
        """
        found = record.get("segmentation")
        if isinstance(found, Mapping):
            return masks.parse_rle(found, size=size, where=where)
        if found is not None and not (found == [] and record.get("no_target") is True):
            return _from_list(found, size, where)
        name = record.get("mask")
        if name is None or name == "":
            return None
        if not isinstance(name, str):
            raise DataError(f"{where}: 'mask' is {brief(name)}", "name a file")
        rle = read_mask_file(
            self.base / name, where, lambda doubt: self._note(f"mask files: one {doubt}", name)
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

    def notes(self) -> list[str]:
        """What the user must know of all that was read, one line a kind, with numbers."""
        return [f"{n} {what} (the first: {self._first[what]})" for what, n in self._notes.items()]

    def _leave_out(self, key: str, value: object, wanted: str, number: int) -> None:
        self._note(
            f"records have a {key} that is not {wanted}; it is left out",
            f"{brief(value)}, {self.place(number)}",
        )

    def _note(self, what: str, first: str) -> None:
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
            raise DataError(f"{where}: a record is an object, not {brief(found)}")
        if self.names is not None or "image_id" in found:
            (self.names or _NONE).complete(found, where)
        if "predicted_iou" in found and not any(key in found for key in _IMAGE_KEYS):
            found["image"] = self.path.name.partition(".")[0]  # SAM's amg.py: one file an image
        for key, keys in (("id", _ID_KEYS), ("image", _IMAGE_KEYS), ("expression", _TEXT_KEYS)):
            given = next((found[k] for k in keys if found.get(k) is not None), None)
            found[key] = given
        if found["id"] is not None:
            found["id"] = _id(found["id"], where)
        if "score" not in found and "predicted_iou" in found:
            found["score"] = found["predicted_iou"]
        return found

    # --- opening --------------------------------------------------------------------------------

    def _open(self) -> BinaryIO:
        if str(self.path) == "-":
            require_open("stdin")
            stream = copied(sys.stdin.buffer, "<stdin>")
        else:
            stream = open_plain(self.path)
        name = self.path.name.lower().removesuffix(".gz")
        if name.endswith((".csv", ".tsv")):
            return self._spooled(self._of_table(stream), "line", stream)
        head = stream.read(1 << 10).decode("utf-8-sig", "replace").lstrip()
        stream.seek(0)
        if name.endswith(".json") or head[:1] == "[":
            return self._spooled(self._of_json(stream), "result", None)
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

    def _of_table(self, stream: BinaryIO) -> Iterator[tuple[int, Record]]:
        table = Table(stream, str(self.path), _COLUMNS)
        if not {"mask", "segmentation"} & {*table.columns}:
            raise DataError(
                f"manifest {self.path} has no column {', '.join(_absent(table.columns))}",
                "its first line names the columns image, expression, mask and, at will, id, score",
            )
        for row in table:
            if row.error is not None:
                raise row.error
            yield row.first, {k: _cell(k, v) for k, v in row.cells.items() if k and v}

    def _of_json(self, stream: BinaryIO) -> Iterator[tuple[int, Record]]:
        """The records of a JSON file: of its array, or of the lists that a COCO file has."""
        table: dict[str, list[Any]] = {"images": [], "categories": []}
        number = 0
        for key, item in iter_json(self.path, stream):
            if key in table:
                table[key].append(item)
            elif key in _LISTS:
                if not isinstance(item, Mapping):
                    raise DataError(
                        f"{self.path}: result {number} is {brief(item)}", "give objects"
                    )
                yield number, dict(item)
                number += 1
        if not number:
            raise DataError(
                f"{self.path} is not a COCO results file, nor an array of records",
                "that is a JSON array of objects with a segmentation",
            )
        if table["images"] and self.names is None:
            self.names = Names(self.path, table)


class Names:
    """What a COCO file calls its images and categories.

    Attributes:
        images: id as text -> the image's entry, in the file's order.
        categories: id as text -> (id, name), in the file's order.
    """

    def __init__(self, path: Path | None, table: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.images: dict[str, Mapping[str, Any]] = {}
        self.categories: dict[str, tuple[Any, str]] = {}
        if path is None:
            return
        read: Mapping[str, list[Any]] = {"images": [], "categories": []}
        if table is None:
            for key, item in iter_json(path):
                if key in read:
                    read[key].append(item)
        else:
            read = table
        for image in read["images"]:
            name = id_text(image.get("id")) if isinstance(image, Mapping) else None
            if name is None or not isinstance(image.get("file_name"), str):
                raise DataError(f"{path}: an image without id or file_name: {brief(image)}")
            if name in self.images and self.images[name] != image:
                raise DataError(f"{path}: two images have the id {name}", "ids must differ")
            self.images[name] = image
        for category in read["categories"]:
            name = id_text(category.get("id")) if isinstance(category, Mapping) else None
            if name is None:
                raise DataError(f"{path}: a category without id: {brief(category)}")
            self.categories[name] = (category["id"], str(category.get("name")))
        if not self.images:
            raise DataError(
                f"{path} is not a COCO file: it lists no images", "it has images and categories"
            )

    def complete(self, record: Record, where: str) -> None:
        """Give a result its image's name and size, and its category's name.

        Raises:
            DataError: its image is not among the file's.
        """
        given = record.get("image_id")
        image_id = id_text(given)
        known = self.images.get(image_id) if image_id is not None else None
        if known is not None:
            record.setdefault("image", known["file_name"])
            for key in ("height", "width"):
                if known.get(key) is not None:
                    record.setdefault(key, known[key])
        elif not any(record.get(key) for key in _IMAGE_KEYS):
            if image_id is None or self.path is not None:
                known_here = f"among the {len(self.images)} images of {self.path}"
                raise DataError(
                    f"{where}: the image_id {brief(given)} is not "
                    f"{known_here if self.path else 'an id'}",
                    "check that both files belong together",
                )
            record["image"] = image_id
        category = id_text(record.get("category_id"))
        if category is not None and not any(record.get(key) for key in _TEXT_KEYS):
            record["expression"] = self.categories.get(category, (0, f"category {category}"))[1]


_NONE = Names(None)


def _id(value: Any, where: str) -> str:
    found = id_text(value)
    if found is None:
        raise DataError(f"{where}: 'id' is {brief(value)}", "give a string or a number")
    return found


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
    return segmentation_to_rle(list(found), size, where)


def _cell(key: str, text: str) -> Any:
    """A cell as JSON would have it: numbers, truth values, and what pandas makes of an RLE."""
    if key in ("score", "no_target_probability", "predicted_iou"):
        return _number(text)
    if key in ("height", "width"):
        number = _number(text)
        whole = isinstance(number, float) and number.is_integer()
        return int(number) if whole else text
    if key == "no_target":
        return {"true": True, "false": False, "1": True, "0": False}.get(text.strip().lower(), text)
    if key in ("segmentation", "bbox", "notes"):
        try:
            return json.loads(text)
        except ValueError:
            try:
                return ast.literal_eval(text)  # values only; nothing is run
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return text
    return text


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _absent(columns: list[str]) -> list[str]:
    return [column for column in ("expression", "mask") if column not in columns]


def _find(path: Path) -> Path:
    if str(path) == "-" or not path.is_dir():
        return path
    names = [PREDICTIONS, *MANIFESTS, "results.json"]
    for name in (*names, *(f"{name}.gz" for name in names)):
        if (path / name).is_file():
            return path / name
    raise DataError(
        f"{path} holds neither {PREDICTIONS} nor {', '.join(MANIFESTS)}",
        "name a folder of `risam predict`, a predictions file, or a folder of masks with a "
        "manifest (image, expression, mask)",
    )
