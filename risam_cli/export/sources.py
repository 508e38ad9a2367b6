"""The records of a source, image by image.

A first pass notes where each record lies: 24 bytes a record, whatever its size. The records of one
image may therefore be anywhere in the file; they come together, images in the order in which they
first occur. Masks are read in the second pass, one image at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from risam_cli.data.identity import id_text
from risam_cli.data.readers.cells import stated_size
from risam_cli.data.readers.names import Record
from risam_cli.data.readers.results import Results
from risam_cli.data.readers.shapes import MAX_PIXELS
from risam_cli.errors import DataError, setting
from risam_cli.export.targets import Placement, image_hash
from risam_cli.files.jsonlines import brief
from risam_cli.masks import rle as masks
from risam_cli.types import Failure, Prediction

OnFailure = Callable[[Failure], None]


@dataclass(frozen=True, slots=True)
class Given:
    """A record with the ids that a COCO file gave it.

    Attributes:
        annotation: its own, where every record of the source has one of its own; else None.
        category: its category's, as text, where the COCO file lists it; else None.
        crowd: whether it is COCO's mark of several objects in one mask.
    """

    prediction: Prediction
    annotation: int | None = None
    category: str | None = None
    crowd: bool = False


@dataclass(frozen=True, slots=True)
class ImageGroup:
    """All records of one image.

    Attributes:
        image: as the first record names it.
        size: (H, W), the same in every record.
        records: in the file's order, at least one.
        entry: the image's entry in the COCO file that was given, or None.
    """

    image: str
    size: tuple[int, int]
    records: tuple[Given, ...]
    entry: Mapping[str, Any] | None = None


class Source:
    """Records of a file, grouped by image. Use as a context manager.

    Attributes:
        broken: records that could not be used so far.
        names: what the COCO file says, or None.
        reviewed: whether a person has looked at the records.

    Args:
        path, annotations, image_root, confine: see
            :class:`risam_cli.data.readers.results.Results`.
        on_failure: gets every record that cannot be used.
        max_pixels: masks over it are not taken: a few bytes can stand for gigabytes of pixels.
        placement: shown the name of every image.

    Raises:
        DataError: the source cannot be read or holds no record.
    """

    def __init__(
        self,
        path: Path,
        on_failure: OnFailure,
        *,
        annotations: Path | None = None,
        image_root: Path | None = None,
        max_pixels: int = MAX_PIXELS,
        placement: Placement | None = None,
        confine: bool = False,
    ) -> None:
        self._max_pixels = max_pixels
        self._on_failure = on_failure
        self._results = Results(path, annotations, image_root=image_root, confine=confine)
        self.reviewed = self._results.reviewed
        self.path = self._results.path
        self.names = self._results.names
        try:
            self._index(placement or Placement())
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
        self._results.close()

    def notes(self) -> list[str]:
        """What the user must know of what was read so far."""
        return self._results.notes()

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self._starts) - 1

    def has_image(self, image: str) -> bool:
        """Whether a record names an image so."""
        place = int(np.searchsorted(self._images, key := np.uint64(image_hash(image))))
        return place < len(self._images) and bool(self._images[place] == key)

    def groups(self) -> Iterator[ImageGroup]:
        """Images with their records, in the order in which they first occur."""
        for image in range(self.images):
            rows = self._rows[self._starts[image] : self._starts[image + 1]]
            found: list[Given] = []
            entry = None
            for row in rows.tolist():
                record = self._read(row, found[0].prediction if found else None)
                if record is not None:
                    given, entry = record
                    found.append(given)
            if found:
                first = found[0].prediction
                yield ImageGroup(first.image, (first.height, first.width), tuple(found), entry)

    def _index(self, placement: Placement) -> None:
        offsets, numbers, keys, ids = array("Q"), array("Q"), array("Q"), array("q")
        self.broken, reason = 0, ""
        for number, offset, record in self._results.rows():
            try:
                if isinstance(record, DataError):
                    raise record
                image = _image(record, self._results.place(number))
                self._results.note_ids(record, number)
            except DataError as error:
                self._fail(number, "", None, error)
                reason = reason or f": {error}"
                continue
            key = image_hash(image)
            if not len(keys) or key != keys[-1]:
                placement.see(image)
            offsets.append(offset)
            numbers.append(number)
            keys.append(key)
            given = record["annotation"] or ""
            if not given and record.get("no_target") is True and "segmentation" not in record:
                continue  # it has no annotation, so it needs no number
            ids.append(int(given) if given.isdecimal() and len(given) < 16 else -1)
        self.names = self._results.names
        if not len(offsets):
            raise DataError(
                f"{self.path} holds no record"
                + (f" that can be read{reason}" if self.broken else ""),
                "give records with image, expression and segmentation, one JSON object per line",
            )
        own = np.frombuffer(ids, np.int64)
        self._keeps_ids = (
            self.names is not None and bool((own > 0).all()) and np.unique(own).size == own.size
        )
        self._offsets = np.frombuffer(offsets, np.uint64)
        self._numbers = np.frombuffer(numbers, np.uint64)
        self._images, first, which = np.unique(
            np.frombuffer(keys, np.uint64), return_index=True, return_inverse=True
        )
        # Stable: records of an image keep their order, images go by their first record.
        self._rows = np.argsort(first[which], kind="stable")
        sizes = np.bincount(which)[np.argsort(first)]
        self._starts = np.concatenate(([0], np.cumsum(sizes)))

    def _read(
        self, row: int, first: Prediction | None
    ) -> tuple[Given, Mapping[str, Any] | None] | None:
        number = int(self._numbers[row])
        where = self._results.place(number)
        record = self._results.read(number, int(self._offsets[row]))
        image, expression = _image(record, where), record["expression"]
        entry = None if self.names is None else self.names.image(record)
        try:
            prediction = self._prediction(record, image, number, where)
            size = (prediction.height, prediction.width)
            if size[0] * size[1] > self._max_pixels:
                raise DataError(
                    f"{where}: a mask of {size[0]} x {size[1]} pixels is over {self._max_pixels}",
                    f"raise {setting('max_pixels')} if you trust the file",
                )
            if first is not None and size != (first.height, first.width):
                raise DataError(
                    f"{where}: the mask is {size[0]}x{size[1]} (height x width), others of "
                    f"{image!r} are {first.height}x{first.width}",
                    "give all masks of an image at its own size",
                )
        except DataError as error:
            text = expression if isinstance(expression, str) else None
            self._fail(number, image, text, error, record["id"])
            return None
        category = id_text(record.get("category_id"))
        known = self.names is not None and category in self.names.categories
        kept = self._keeps_ids and record["annotation"]
        annotation = int(record["annotation"]) if kept else None
        crowd = record.get("iscrowd") in (1, "1")
        return Given(prediction, annotation, category if known else None, crowd), entry

    def _prediction(self, record: Record, image: str, number: int, where: str) -> Prediction:
        expression = record["expression"]
        if expression is not None and not isinstance(expression, str):
            raise DataError(f"{where}: 'expression' is {brief(expression)}", "give a string")
        size = stated_size(record, where)
        rle = self._results.mask(record, size, where)
        no_target = self._results.flag(record, "no_target", number)
        if rle is None:
            if not no_target or size is None:
                raise DataError(
                    f"{where}: a record without a mask",
                    "give segmentation (an RLE or polygons) or mask (an image file)",
                )
            rle = masks.empty(size)
        area = masks.area(rle)
        if no_target and area:
            self._results.note(
                "records have a mask although no_target is true; it is left out", where
            )
            rle, area = masks.empty((rle["size"][0], rle["size"][1])), 0
        score = self._results.unit(record, "score", number)
        counted = self._results.are_results and "record_id" not in record
        return Prediction(
            id=record["id"] or (str(number - 1) if counted else ""),
            image=image,
            expression=expression or "",
            height=rle["size"][0],
            width=rle["size"][1],
            segmentation=rle,
            bbox=masks.bbox(rle),
            area=area,
            score=score,
            no_target=area == 0 if no_target is None else no_target,
            instance=self._results.instance(record, number),
        )

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


def _image(record: Record, where: str) -> str:
    image = record["image"]
    if not isinstance(image, str) or not image:
        raise DataError(f"{where}: 'image' is {brief(image)}", "name the image of every record")
    return image
