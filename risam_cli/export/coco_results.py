"""A COCO results file as records: a JSON array, read item by item, whatever its length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief
from risam_cli.masks import rle as masks
from risam_cli.outputs.records import MAX_LINE
from risam_cli.types import Rle

_CHUNK = 1 << 20


class Names:
    """What a COCO file calls its images and categories; their numbers where there is none."""

    def __init__(self, path: Path | None) -> None:
        self._images: dict[Any, Mapping[str, Any]] = {}
        self._categories: dict[Any, str] = {}
        self._path = path
        if path is None:
            return
        try:
            table = json.loads(path.read_bytes())
            self._images = {image["id"]: image for image in table["images"]}
            self._categories = {c["id"]: str(c["name"]) for c in table.get("categories", [])}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"--annotations {path} is no COCO file", "it has images and categories"
            ) from None

    def record(self, number: int, result: Mapping[str, Any]) -> dict[str, Any]:
        """One result as a record; what is wrong in it is told when it is read."""
        image_id, category_id = result.get("image_id"), result.get("category_id")
        known = self._images.get(image_id) if isinstance(image_id, (int, str)) else None
        if known is None and self._path is not None:
            image = None  # named in the failure as an image that is missing
        else:
            image = str(image_id) if known is None else known.get("file_name")
        name = self._categories.get(category_id) if isinstance(category_id, (int, str)) else None
        record = {
            "id": str(result.get("id", number)),
            "image": image,
            "expression": result.get("caption") or name or f"category {category_id}",
            "segmentation": result.get("segmentation"),
        }
        if known is not None and "height" in known and "width" in known:
            record |= {"height": known["height"], "width": known["width"]}
        if isinstance(record["segmentation"], list):
            record["segmentation"] = _from_polygons(record)
        return record | ({"score": result["score"]} if "score" in result else {})


def _from_polygons(record: Mapping[str, Any]) -> Rle | None:
    size = (record.get("height"), record.get("width"))
    if not all(type(v) is int and v > 0 for v in size):
        return None
    try:
        return masks.from_polygons(record["segmentation"], cast("tuple[int, int]", size))
    except DataError:
        return None


def spool_results(path: Path, names: Names, out: BinaryIO) -> None:
    """Write every result of the file ``path`` as a line of JSONL to ``out``.

    Raises:
        DataError: the file is no array of results, or damaged.
    """
    with open(path, encoding="utf-8") as file:
        for number, result in enumerate(_array_items(file, path)):
            if not isinstance(result, Mapping):
                raise DataError(f"{path}: result {number} is {brief(result)}", "give objects")
            out.write(json.dumps(names.record(number, result)).encode() + b"\n")


def _array_items(file: TextIO, path: Path) -> Iterator[Any]:
    """Items of a JSON array, one at a time, whatever its length."""
    decoder = json.JSONDecoder()
    buffer, at, ended = "", 0, False

    def peek() -> str:
        nonlocal buffer, at, ended
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n":
                at += 1
            if at < len(buffer) or ended:
                return buffer[at : at + 1]
            buffer, at = file.read(_CHUNK), 0
            ended = not buffer

    try:
        if peek() != "[":
            raise DataError(
                f"{path} is no COCO results file", "that is a JSON array of results with RLEs"
            )
        at += 1
        while peek() != "]":
            while True:
                try:
                    item, end = decoder.raw_decode(buffer, at)
                    break
                except json.JSONDecodeError as error:
                    # At least as much again, so that a large item is not parsed over and over.
                    held = len(buffer) - at
                    more = "" if held > MAX_LINE else file.read(max(_CHUNK, held))
                    if not more:
                        long = f"a result is longer than {MAX_LINE >> 20} MiB"
                        reason = long if held > MAX_LINE else error.msg
                        raise DataError(f"{path} is damaged or cut: {reason}") from None
                    buffer, at = buffer[at:] + more, 0
            yield item
            at = end
            if peek() == ",":
                at += 1
            elif peek() != "]":
                raise DataError(f"{path} is damaged or cut: ',' or ']' was expected")
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits
        raise DataError(f"{path} cannot be read: {error}") from None
