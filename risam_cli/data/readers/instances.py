"""COCO's ``instances.json`` as REFER, gRefCOCO and COCO-style files share it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from risam_cli.data.identity import id_key
from risam_cli.data.readers.cells import stated_size
from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.data.readers.source import Group, Phrase, Truth
from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief
from risam_cli.masks import rle as masks
from risam_cli.types import Rle


@dataclass(frozen=True, slots=True)
class Annotation:
    """What is used of an annotation. Polygons are held as arrays, which take a quarter of lists."""

    image_id: Any
    category_id: Any
    crowd: bool
    segmentation: Any


@dataclass(slots=True)
class Instances:
    """Images, annotations and categories by :func:`id_key`; only what was asked to be kept.

    Attributes:
        in_category: (image id, category id) -> its annotations, crowds left out: the
            candidates an expression must choose among.
        doubled: ids of annotations that stand twice and differ: whose mask is meant is not known.
    """

    path: Path
    images: dict[Any, dict[str, Any]] = field(default_factory=dict)
    annotations: dict[Any, Annotation] = field(default_factory=dict)
    categories: dict[Any, str] = field(default_factory=dict)
    in_category: Counter[tuple[Any, Any]] = field(default_factory=Counter)
    doubled: set[Any] = field(default_factory=set)

    def image(self, image_id: Any) -> dict[str, Any]:
        """The image's entry. Raises DataError where there is none or it names no file."""
        found = self.images.get(image_id)
        if found is None:
            raise DataError(
                f"image {image_id!r} is not among the {len(self.images)} images of {self.path}",
                "the expressions and the instances come from different releases",
            )
        if not isinstance(found.get("file_name"), str) or not found["file_name"]:
            raise DataError(f"image {image_id!r} of {self.path} has no file_name")
        return found

    def size(self, image: Mapping[str, Any]) -> tuple[int, int] | None:
        """(H, W) of an image's entry, or None where it gives none. Raises DataError on nonsense."""
        return stated_size(image, f"image {image.get('id')!r} of {self.path}")

    def draw(self, ann_id: Any, image_id: Any, size: tuple[int, int]) -> Rle:
        """RLE of one annotation at the image's size.

        Raises:
            DataError: it does not exist, belongs to another image, or its segmentation is
                missing, malformed or of another size.
        """
        annotation = self.annotations.get(ann_id)
        if annotation is None:
            raise DataError(
                f"annotation {ann_id!r} does not exist in {self.path}",
                "check the ids, or use both files from one release",
            )
        if ann_id in self.doubled:
            raise DataError(
                f"two annotations of {self.path} have the id {ann_id!r} and differ",
                "give every annotation an id of its own",
            )
        if annotation.image_id != image_id:
            raise DataError(
                f"annotation {ann_id!r} of {self.path} belongs to image "
                f"{annotation.image_id!r}, not to {image_id!r}"
            )
        return segmentation_to_rle(
            annotation.segmentation, size, f"annotation {ann_id!r} of {self.path}"
        )

    def redraw(self, ann_id: Any, truth: Truth, side: int, *, size: tuple[int, int]) -> Rle | None:
        """RLE of an annotation that :meth:`draw` has drawn, by another rule; None where the rule
        says the same, or nothing, of it.

        Args:
            truth, side: see :class:`risam_cli.data.readers.source.SampleSource`.
        """
        parts = self.annotations[ann_id].segmentation
        if not isinstance(parts, list):
            return None
        where = f"annotation {ann_id!r} of {self.path}"
        if truth == "once":
            return segmentation_to_rle(parts, size, where, once=True) if len(parts) > 1 else None
        polygons = [part for part in parts if isinstance(part, (list, array)) and len(part) >= 6]
        if not polygons:
            return None
        scale = np.array([side / size[1], side / size[0]])
        scaled = [(np.reshape(polygon, (-1, 2)) * scale).ravel() for polygon in polygons]
        return masks.from_polygons(scaled, (side, side), where=where)

    def group(self, image_id: Any, path: Path, phrases: Sequence[Phrase]) -> Group:
        """An image with its expressions, whose parts are annotations; ``path`` is of its file.

        Raises:
            DataError: as :meth:`image` and :meth:`size`.
        """
        image = self.image(image_id)
        size = self.size(image)
        draw = partial(self.draw, image_id=image_id, size=size or (1, 1))
        redraw = partial(self.redraw, size=size or (1, 1))
        return Group(image["file_name"], path, size, tuple(phrases), draw, redraw=redraw)

    def facts(self, image_id: Any, ann_ids: tuple[Any, ...]) -> dict[str, Any]:
        """Attributes of an expression by its referents: how many, their category, its rivals."""
        facts = {
            "referents": len(ann_ids),
            "category": self.category(ann_ids),
            "distractors": self.rivals(image_id, ann_ids),
        }
        return {key: value for key, value in facts.items() if value is not None}

    def rivals(self, image_id: Any, ann_ids: tuple[Any, ...]) -> int | None:
        """How many objects of the referents' categories the image holds beside the referents.

        None where no category is known.
        """
        chosen: Counter[Any] = Counter()
        for ann_id in ann_ids:
            annotation = self.annotations.get(ann_id)
            if annotation is not None and annotation.category_id is not None:
                chosen[annotation.category_id] += not annotation.crowd
        if not chosen:
            return None
        return sum(max(self.in_category[image_id, c] - n, 0) for c, n in chosen.items())

    def category(self, ann_ids: tuple[Any, ...]) -> str | None:
        """The referents' category by name; None where unknown or where they differ."""
        found = [self.annotations.get(ann_id) for ann_id in ann_ids]
        ids = {None if one is None else one.category_id for one in found}
        only = ids.pop() if len(ids) == 1 else None
        return self.categories.get(only)


def read_instances(
    path: Path,
    *,
    keep_image: Callable[[Any], bool] = lambda image_id: True,
    keep_annotation: Callable[[Any], bool] = lambda ann_id: True,
    on_annotation: Callable[[Any, dict[str, Any]], None] | None = None,
    on_other: Callable[[str, Any], None] | None = None,
) -> Instances:
    """Read a COCO file record by record and keep what is asked for.

    Args:
        keep_image: by image id; annotations of other images are not counted as rivals either.
        keep_annotation: by annotation id.
        on_annotation: gets id and whole record of every annotation that is kept.
        on_other: gets every record of the other top-level members.

    Raises:
        DataError: the file cannot be read, or a record lacks its id.
    """
    result = Instances(path)
    for key, record in iter_json(path):
        if key == "images":
            image_id = record_id(record, path, "images[]")
            if keep_image(image_id):
                if "file_name" not in record and (name := file_name_of(record)):
                    record["file_name"] = name
                known = result.images.setdefault(image_id, record)
                if known != record:
                    raise DataError(
                        f"two images of {path} have the id {image_id!r}: "
                        f"{brief(known.get('file_name'))} and {brief(record.get('file_name'))}",
                        "give every image an id of its own",
                    )
        elif key == "annotations":
            ann_id = record_id(record, path, "annotations[]")
            image_id = _reference(record, "image_id", path)
            category_id = _reference(record, "category_id", path)
            if keep_image(image_id) and not record.get("iscrowd"):
                result.in_category[image_id, category_id] += 1
            if keep_annotation(ann_id):
                annotation = Annotation(
                    image_id,
                    category_id,
                    bool(record.get("iscrowd")),
                    _compact(record.get("segmentation")),
                )
                if result.annotations.setdefault(ann_id, annotation) != annotation:
                    result.doubled.add(ann_id)
                if on_annotation is not None:
                    on_annotation(ann_id, record)
        elif key == "categories":
            category_id = record_id(record, path, "categories[]")
            result.categories[category_id] = str(record.get("name"))
        elif on_other is not None:
            on_other(key, record)
    return result


def file_name_of(image: Mapping[str, Any]) -> str | None:
    """An image's file name; of LVIS, which has none, what follows the host in its ``coco_url``."""
    name = image.get("file_name")
    if name is None and isinstance(image.get("coco_url"), str):
        name = image["coco_url"].partition("://")[2].partition("/")[2]
    return name if isinstance(name, str) and name else None


def record_id(record: Any, path: Path, where: str) -> Any:
    """:func:`id_key` of ``record["id"]``. Raises DataError where there is no record or no id."""
    found = id_key(record.get("id")) if isinstance(record, dict) else None
    if not isinstance(found, (int, str)):
        raise DataError(f"{path}: a record of {where} has no id: {brief(record)}")
    return found


def _reference(record: dict[str, Any], key: str, path: Path) -> Any:
    """:func:`id_key` of another record's id; None where it is not given."""
    found = id_key(record.get(key))
    if found is not None and not isinstance(found, (int, str, float)):
        raise DataError(
            f"{path}: annotation {record.get('id')!r} has the {key} {brief(found)}", "give an id"
        )
    return found


def segmentation_to_rle(
    segmentation: Any, size: tuple[int, int], where: str, *, once: bool = False
) -> Rle:
    """RLE of COCO's ``segmentation``: polygons (their union), or RLE of any form.

    Polygons of fewer than three points enclose nothing and are left out, as the benchmarks' own
    loaders do; where no other is left, that is an error. REFER's older sets keep their RLE in a
    list, which is taken too.

    Args:
        once: not the union, but the pixels that exactly one of several covers.

    Raises:
        DataError: it is missing, malformed or of another size than the image.
    """
    if isinstance(segmentation, dict):
        return masks.parse_rle(segmentation, size=size, where=where)
    if isinstance(segmentation, array):
        segmentation = [segmentation]
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError(f"{where} has no segmentation", "give polygons or RLE")
    if all(isinstance(part, dict) for part in segmentation):
        rles = [masks.parse_rle(part, size=size, where=where) for part in segmentation]
        return masks.covered_once(rles, size) if once else masks.union(rles, size)
    if all(isinstance(part, (int, float)) for part in segmentation):
        segmentation = [segmentation]
    areas = [p for p in segmentation if not isinstance(p, (list, array)) or len(p) >= 6]
    if not areas:
        raise DataError(f"{where}: no polygon has three points", "give polygons or RLE")
    return masks.from_polygons(areas, size, where=where, once=once)


def _compact(segmentation: Any) -> Any:
    """Polygons as arrays; anything else, and anything odd, as it is."""
    if not isinstance(segmentation, list):
        return segmentation
    try:
        return [array("d", part) if isinstance(part, list) else part for part in segmentation]
    except (TypeError, OverflowError):
        return segmentation
