"""COCO-style JSON of image and expression pairs.

Expressions stand in a top-level list ``expressions[{id, image_id, ann_ids, text}]`` or on
annotations as ``caption``, ``expression`` or ``expressions``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from risam_cli.data.readers.instances import Instances, read_instances
from risam_cli.data.readers.source import (
    Group,
    Phrase,
    SampleSource,
    make_source,
    require_some_truth,
)
from risam_cli.errors import DataError
from risam_cli.types import Sample

ALL = "all"
_TEXT_KEYS = ("text", "expression", "caption", "sent")


def read_coco(
    path: Path,
    image_root: Path | None = None,
    *,
    split: str = ALL,
    bare_images: bool = False,
) -> Iterator[Sample]:
    """The samples of a COCO-style file, one an image, in the order of its ``images``.

    Args:
        image_root: where file names start; by default the file's folder, or its ``images/``.
        split: keep the records of this split; ``all`` keeps everything.
        bare_images: also yield images without an expression.

    Raises:
        DataError: the file cannot be read or a record is malformed.
    """
    return open_coco(path, image_root, split=split, bare_images=bare_images).iterate()


def open_coco(
    path: Path,
    image_root: Path | None = None,
    *,
    split: str = ALL,
    bare_images: bool = False,
    dataset: str = "coco",
) -> SampleSource:
    """The index of a COCO-style file. Arguments and errors as :func:`read_coco`.

    Where images or expressions carry a ``split``, ``split`` chooses among them; a file without
    one has the split ``all`` only.
    """
    expressions: list[dict[str, Any]] = []

    def other(key: str, record: Any) -> None:
        if key == "expressions":
            if not isinstance(record, dict):
                raise DataError(f"{path}: expressions[{len(expressions)}] is no object")
            expressions.append(record)

    instances = read_instances(path, on_other=other)
    if not instances.images:
        raise DataError(f"{path} lists no images", "a COCO file has 'images' and 'annotations'")
    chosen, by_image = _phrases(instances, expressions, split)
    folder = image_root if image_root is not None else _image_folder(path, instances)
    groups = []
    for image_id in instances.images:
        phrases = by_image.get(image_id, [])
        if phrases or (bare_images and chosen(image_id)):
            groups.append(_group(instances, image_id, folder, phrases))
    source = make_source(dataset, split, (path,), groups)
    require_some_truth(source, instances.annotations.__contains__, str(path))
    return source


def _phrases(
    instances: Instances, expressions: list[dict[str, Any]], split: str
) -> tuple[Any, dict[Any, list[Phrase]]]:
    """A test of image ids for the split, and the split's phrases by image id."""
    seen: Counter[str] = Counter()
    by_image: dict[Any, list[Phrase]] = {}

    def split_of(image_id: Any, record: dict[str, Any]) -> str | None:
        own = record.get("split", instances.images.get(image_id, {}).get("split"))
        return None if own is None else str(own)

    def take(image_id: Any, record: dict[str, Any], phrase: Phrase) -> None:
        own = split_of(image_id, record)
        if own is not None:
            seen[own] += 1
        if split in (ALL, own):
            by_image.setdefault(image_id, []).append(phrase)

    for number, record in enumerate(expressions):
        image_id = record.get("image_id")
        instances.image(image_id)
        take(image_id, record, _listed(instances, record, number))
    for ann_id, record in instances.annotations.items():
        texts = _annotation_texts(record)
        for k, text in enumerate(texts):
            instances.image(record.get("image_id"))
            name = str(ann_id) if len(texts) == 1 else f"{ann_id}#{k}"
            take(record.get("image_id"), record, _captioned(instances, ann_id, name, text))
    if split != ALL and not by_image:
        have = ", ".join(f"{name} ({n})" for name, n in sorted(seen.items())) or "none but 'all'"
        raise DataError(f"{instances.path} has no split {split!r}", f"its splits: {have}")
    return (lambda image_id: split in (ALL, split_of(image_id, {}))), by_image


def _listed(instances: Instances, record: dict[str, Any], number: int) -> Phrase:
    """A phrase of the top-level list."""
    where = f"{instances.path}: expressions[{number}]"
    text = next((record[k] for k in _TEXT_KEYS if isinstance(record.get(k), str)), None)
    if text is None:
        raise DataError(f"{where} has no text", f"give one of {', '.join(_TEXT_KEYS)}")
    ann_ids = record.get("ann_ids", record.get("ann_id"))
    if isinstance(ann_ids, (int, str)):
        ann_ids = [ann_ids]
    if ann_ids is not None and (
        not isinstance(ann_ids, list) or not all(isinstance(a, (int, str)) for a in ann_ids)
    ):
        raise DataError(f"{where} has ann_ids {str(ann_ids)[:60]}", "give a list of ids")
    if ann_ids == [-1]:  # gRefCOCO's way of saying that nothing fits
        ann_ids = []
    parts = None if ann_ids is None else tuple(ann_ids)
    given = record.get("id")
    name = str(given) if isinstance(given, (int, str)) else ""
    return Phrase(name, text, parts, _attributes(instances, record.get("image_id"), parts))


def _captioned(instances: Instances, ann_id: Any, name: str, text: str) -> Phrase:
    """A phrase that stands on its annotation; captions without a mask have no known truth."""
    annotation = instances.annotations[ann_id]
    parts = (ann_id,) if annotation.get("segmentation") else None
    return Phrase(name, text, parts, _attributes(instances, annotation.get("image_id"), parts))


def _annotation_texts(annotation: dict[str, Any]) -> list[str]:
    found = annotation.get("expressions")
    texts = [t for t in found if isinstance(t, str)] if isinstance(found, list) else []
    single = [
        annotation[k] for k in ("expression", "caption") if isinstance(annotation.get(k), str)
    ]
    return texts + single


def _attributes(
    instances: Instances, image_id: Any, parts: tuple[Any, ...] | None
) -> dict[str, Any]:
    out: dict[str, Any] = {"image_id": image_id}
    if parts is None:
        return out
    out["referents"] = len(parts)
    category = instances.category(parts)
    if category is not None:
        out["category"] = category
    rivals = instances.rivals(image_id, parts)
    if rivals is not None:
        out["distractors"] = rivals
    return out


def _group(instances: Instances, image_id: Any, folder: Path, phrases: list[Phrase]) -> Group:
    image = instances.image(image_id)
    size = instances.size(image)
    name = image["file_name"]
    named = [
        p if p.id else Phrase(f"{name}#{k}", p.text, p.parts, p.attributes)
        for k, p in enumerate(phrases)
    ]
    draw = partial(instances.draw, image_id=image_id, size=size or (1, 1))
    return Group(name, folder / name, size, tuple(named), draw)


def _image_folder(path: Path, instances: Instances) -> Path:
    """Where the first file name is found: beside the file or in its ``images`` folder."""
    first = next(iter(instances.images))
    name = instances.image(first)["file_name"]
    for folder in (path.parent, path.parent / "images", path.parent.parent / "images"):
        if (folder / name).is_file():
            return folder
    return path.parent
