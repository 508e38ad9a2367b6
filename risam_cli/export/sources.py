"""Masks from anywhere, image by image: records, COCO results, PNG files with a manifest.

A first pass notes where each record lies: 24 bytes a record, whatever its size. The records of one
image may therefore be anywhere in the file; they come together, images in the order in which they
first occur. Masks are read in the second pass, one image at a time.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from risam_cli.drawing.png import check_header
from risam_cli.errors import DataError
from risam_cli.export.coco_results import Names, spool_results
from risam_cli.export.targets import meeting_key
from risam_cli.files.jsonlines import brief, parse_json, read_lines_at
from risam_cli.masks import rle as masks
from risam_cli.outputs.records import MAX_LINE, PREDICTIONS, from_json
from risam_cli.types import Failure, Prediction, Rle

OnFailure = Callable[[Failure], None]

MANIFESTS = ("manifest.jsonl", "manifest.csv", "manifest.tsv")
"""What a folder of PNG masks calls its list, in the order in which they are looked for."""

MAX_PIXELS = 178_956_970
"""Pixels of a mask over which a record is refused unless told otherwise: as for images."""

_CHUNK = 1 << 20
_MAX_MASK_FILE = 1 << 28  # bytes


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """All records of one image.

    Attributes:
        image: as the records name it.
        size: (H, W), the same in every record.
        predictions: in the file's order, at least one.
    """

    image: str
    size: tuple[int, int]
    predictions: tuple[Prediction, ...]


class Source:
    """Records of a file, grouped by image. Use as a context manager.

    Attributes:
        meeting: for :func:`risam_cli.export.targets.target_name`.
        broken: records that could not be used so far.

    Args:
        path: ``predictions.jsonl`` or another JSONL, a COCO results ``.json``, a manifest ``.csv``
            or ``.tsv``, a folder that holds one of them, or ``-`` for JSONL on stdin.
        on_failure: gets every record that cannot be used.
        annotations: for COCO results: the COCO file that names their images and categories.
        max_pixels: masks over it are not taken: a few bytes can stand for gigabytes of pixels.

    Raises:
        DataError: the source cannot be read or holds no record.
    """

    def __init__(
        self,
        path: Path,
        on_failure: OnFailure,
        *,
        annotations: Path | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._max_pixels = max_pixels
        self.path = _find(path)
        self.base = Path() if str(path) == "-" else self.path.parent
        self._on_failure = on_failure
        self._stream = _open(self.path, annotations)
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of records, those included that will turn out to be unusable."""
        return len(self._rows)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self._starts) - 1

    def groups(self) -> Iterator[ImageGroup]:
        """Images with their records, in the order in which they first occur."""
        for image in range(self.images):
            rows = self._rows[self._starts[image] : self._starts[image + 1]]
            found: list[Prediction] = []
            for row in rows.tolist():
                record = self._read(row, found[0] if found else None)
                if record is not None:
                    found.append(record)
            if found:
                first = found[0]
                yield ImageGroup(first.image, (first.height, first.width), tuple(found))

    def _index(self) -> None:
        offsets, numbers, keys = array("Q"), array("Q"), array("Q")
        targets = array("Q")  # pairs of an image's target and its key
        self.broken = 0
        for number, offset, line in read_lines_at(self._stream, MAX_LINE):
            where = f"{self.path}, line {number}"
            try:
                if line is None:
                    raise DataError(f"{where}: longer than {MAX_LINE >> 20} MiB")
                image = _image(parse_json(line, where), where)
            except DataError as error:
                self._fail(number, "", None, error)
                continue
            key = _hash(image)
            if not len(keys) or key != keys[-1]:
                targets.extend((meeting_key(image), key))
            offsets.append(offset)
            numbers.append(number)
            keys.append(key)
        if not len(offsets):
            raise DataError(
                f"{self.path} holds no record" + (" that can be read" if self.broken else ""),
                "give records with image, expression and segmentation, one JSON object a line",
            )
        pairs = np.unique(np.frombuffer(targets, np.uint64).reshape(-1, 2), axis=0)
        met, times = np.unique(pairs[:, 0], return_counts=True)
        self.meeting = frozenset(met[times > 1].tolist())
        self._offsets = np.frombuffer(offsets, np.uint64)
        self._numbers = np.frombuffer(numbers, np.uint64)
        _, first, which = np.unique(
            np.frombuffer(keys, np.uint64), return_index=True, return_inverse=True
        )
        # Stable: records of an image keep their order, images go by their first record.
        self._rows = np.argsort(first[which], kind="stable")
        sizes = np.bincount(which)[np.argsort(first)]
        self._starts = np.concatenate(([0], np.cumsum(sizes)))

    def _read(self, row: int, first: Prediction | None) -> Prediction | None:
        number = int(self._numbers[row])
        where = f"{self.path}, line {number}"
        self._stream.seek(int(self._offsets[row]))
        obj = parse_json(self._stream.readline(MAX_LINE + 1), where)
        image, expression = _image(obj, where), obj.get("expression")
        try:
            record = from_json(self._with_mask(obj, where), where)
            size = (record.height, record.width)
            if size[0] * size[1] > self._max_pixels:
                raise DataError(
                    f"{where}: a mask of {size[0]} x {size[1]} pixels is over {self._max_pixels}",
                    "raise --max-pixels if you trust the file",
                )
            if first is not None and size != (first.height, first.width):
                raise DataError(
                    f"{where}: the mask is {size[0]}x{size[1]} (height x width), others of "
                    f"{image!r} are {first.height}x{first.width}",
                    "give all masks of an image at its own size",
                )
        except DataError as error:
            text = expression if isinstance(expression, str) else None
            self._fail(number, image, text, error, obj.get("id"))
            return None
        return record

    def _with_mask(self, obj: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The record itself, or with the mask that its PNG holds."""
        if obj.get("segmentation") is not None:
            return obj
        name = obj.get("mask")
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{where}: a record without a mask", "give segmentation (an RLE) or mask (a PNG)"
            )
        return {**obj, "segmentation": _read_png(self.base / name, where)}

    def _fail(
        self,
        number: int,
        image: str,
        expression: str | None,
        error: DataError,
        name: object = None,
    ) -> None:
        self.broken += 1
        label = f"line {number}" if name is None else str(name)
        self._on_failure(Failure(label, image, expression, "read", "DataError", str(error)))


def _image(obj: object, where: str) -> str:
    if not isinstance(obj, Mapping):
        raise DataError(f"{where}: a record is an object, not {brief(obj)}")
    image = obj.get("image")
    if not isinstance(image, str) or not image:
        raise DataError(f"{where}: 'image' is {brief(image)}", "name the image of every record")
    return image


def _hash(image: str) -> int:
    data = image.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _read_png(path: Path, where: str) -> Rle:
    """Every pixel that is not 0 in any colour channel is in the mask; alpha does not count."""
    try:
        status = os.stat(path)
        # A pipe would be waited on for ever.
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_MASK_FILE:
            size = f"has {status.st_size >> 20} MiB" if status.st_size else "is no regular file"
            raise DataError(f"{where}: the mask {path} {size}", "give a PNG, 0 outside the mask")
        data = np.fromfile(path, np.uint8)
        # The header first: OpenCV would take a few bytes' word for gigabytes of pixels.
        check_header(io.BytesIO(data.tobytes()))
        pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except Image.DecompressionBombError as error:
        raise DataError(f"{where}: the mask {path} is too large: {error}", "cut it up") from None
    except (UnidentifiedImageError, SyntaxError, cv2.error):
        pixels = None
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise DataError(
            f"{where}: the mask {path} cannot be read: {getattr(error, 'strerror', '') or error}",
            "paths are relative to the manifest",
        ) from None
    if pixels is None:
        raise DataError(f"{where}: the mask {path} is no image", "give a PNG, 0 outside the mask")
    inside = pixels != 0 if pixels.ndim == 2 else (pixels[..., :3] != 0).any(axis=2)
    return masks.encode(inside)


# --- finding and opening --------------------------------------------------------------------------


def _find(path: Path) -> Path:
    if str(path) == "-" or not path.is_dir():
        return path
    for name in (PREDICTIONS, *MANIFESTS):
        if (path / name).is_file():
            return path / name
    raise DataError(
        f"{path} holds neither {PREDICTIONS} nor {', '.join(MANIFESTS)}",
        "name a folder of `risam predict`, a predictions file, or a folder of masks with a "
        "manifest (image, expression, mask)",
    )


def _open(path: Path, annotations: Path | None) -> BinaryIO:
    """JSONL that can be read from any place, whatever the source is."""
    suffix = path.suffix.lower()
    if annotations is not None and suffix != ".json":
        raise DataError(
            f"--annotations goes with a COCO results .json, not with {path}", "leave it out"
        )
    try:
        if str(path) == "-":
            return _spooled(lambda out: shutil.copyfileobj(sys.stdin.buffer, out, _CHUNK))
        if suffix == ".json":
            names = Names(annotations)
            return _spooled(lambda out: spool_results(path, names, out))
        if suffix in {".csv", ".tsv"}:
            return _spooled(lambda out: _spool_table(path, out))
        return open(path, "rb")
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else path
        raise DataError(
            f"{place}: {error.strerror or error}", "name a predictions file that can be read"
        ) from None


def _spooled(fill: Callable[[BinaryIO], object]) -> BinaryIO:
    """A temporary file, gone when closed, as ``fill`` wrote it."""
    file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    try:
        fill(file)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _spool_table(path: Path, out: BinaryIO) -> None:
    """A CSV or TSV manifest as JSONL. The line numbers in messages then count rows."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            rows = csv.DictReader(iter(lambda: file.readline(MAX_LINE), ""), delimiter=delimiter)
            missing = {"image", "expression", "mask"} - set(rows.fieldnames or ())
            if missing:
                raise DataError(
                    f"manifest {path} has no column {', '.join(sorted(missing))}",
                    "its first line names the columns image, expression, mask and, at will, "
                    "id, score",
                )
            for row in rows:
                record: dict[str, Any] = {k: v for k, v in row.items() if k and v}
                if "score" in record:
                    record["score"] = _number(record["score"])
                out.write(json.dumps(record).encode() + b"\n")
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"manifest {path} cannot be read: {error}") from None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
