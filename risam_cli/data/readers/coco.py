"""COCO-style JSON of image and expression pairs.

Expressions stand in a top-level list ``expressions[{id, image_id, ann_ids, text}]`` or on
annotations as ``caption``, ``expression`` or ``expressions``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from risam_cli.data.identity import existing, id_key, id_text
from risam_cli.data.readers.instances import Instances, read_instances
from risam_cli.data.readers.layout import is_file
from risam_cli.data.readers.source import (
    Columns,
    Group,
    Phrase,
    SampleSource,
    make_source,
    require_some_truth,
)
from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief
from risam_cli.files.store import RemotePath

ALL = "all"
_TEXT_KEYS = ("text", "expression", "caption", "sent")


def open_coco(
    path: Path,
    image_root: Path | None = None,
    *,
    split: str = ALL,
    bare_images: bool = False,
    dataset: str = "coco",
    columns: Columns | None = None,
) -> SampleSource:
    """The index of a COCO-style file, one entry an image, in the order of its ``images``.

    Where images or expressions carry a ``split``, ``split`` chooses among them; a file without
    one has the split ``all`` only.

    Args:
        image_root: where file names start; by default the file's folder, or its ``images/``.
        split: keep the records of this split; ``all`` keeps everything.
        bare_images: also yield images without an expression.
        columns: which fields of expressions, annotations and images to carry along.

    Raises:
        DataError: the file cannot be read or a record is malformed.
    """
    listed: list[_Spoken] = []
    captioned: list[_Spoken] = []

    columns = columns or Columns()
    of_annotation: dict[Any, dict[str, Any]] = {}

    def other(key: str, record: Any) -> None:
        if key == "expressions":
            own = columns.of(record) if isinstance(record, dict) else {}
            listed.append(_listed(record, f"{path}: expressions[{len(listed)}]", own))

    def annotation(key: Any, record: dict[str, Any]) -> None:
        captioned.extend(_captioned(key, record))
        if columns.wanted:
            of_annotation[key] = columns.of(record)

    instances = read_instances(path, on_annotation=annotation, on_other=other)
    if not instances.images:
        raise DataError(f"{path} lists no images", "a COCO file has 'images' and 'annotations'")
    by_image = _of_split(instances, [*listed, *_not_listed(captioned, listed)], split)
    folder = image_root if image_root is not None else _image_folder(path, instances)
    groups = []
    for image_id, image in instances.images.items():
        spoken = by_image.get(image_id, [])
        if spoken or (bare_images and split in (ALL, image.get("split"))):
            of_image = columns.of(image)
            spoken = [
                one._replace(columns=_columns(one, of_annotation, of_image)) for one in spoken
            ]
            groups.append(_group(instances, image_id, folder, spoken))
    source = make_source(dataset, split, (path,), groups)
    require_some_truth(source, instances.annotations.__contains__, str(path))
    return source


class _Spoken(NamedTuple):
    """One expression as the file has it; ``id`` is empty where it has none.

    ``ann_id`` is the annotation that it stands on, None for one of the list. ``pseudo``: its truth
    is a model's answer.
    """

    image_id: Any
    id: str
    text: str
    parts: tuple[Any, ...] | None
    split: Any
    ann_id: Any = None
    pseudo: bool = False
    columns: tuple[tuple[str, Any], ...] = ()


def _columns(
    one: _Spoken, of_annotation: Mapping[Any, Mapping[str, Any]], of_image: Mapping[str, Any]
) -> tuple[tuple[str, Any], ...]:
    """An expression's columns: its own, those in which its annotations agree, its image's."""
    each = [of_annotation.get(part, {}) for part in one.parts or ()]
    agreed = {
        name: value
        for name, value in (each[0].items() if each else ())
        if all(other.get(name) == value for other in each)
    }
    return tuple({**of_image, **agreed, **dict(one.columns)}.items())


def _not_listed(captioned: Sequence[_Spoken], listed: Sequence[_Spoken]) -> list[_Spoken]:
    """Texts on annotations but those that the list says too, of that annotation and maybe others.

    Exports, this tool's among them, write an expression in both places.
    """
    said = {(one.image_id, part, one.text) for one in listed for part in one.parts or ()}
    return [one for one in captioned if (one.image_id, one.ann_id, one.text) not in said]


def _of_split(
    instances: Instances, spoken: Sequence[_Spoken], split: str
) -> dict[Any, list[_Spoken]]:
    """The split's expressions by image id. Raises DataError where there are none."""
    seen: Counter[str] = Counter()
    by_image: dict[Any, list[_Spoken]] = {}
    for one in spoken:
        own = one.split if one.split is not None else instances.image(one.image_id).get("split")
        if own is not None:
            seen[str(own)] += 1
        if split in (ALL, str(own)):
            by_image.setdefault(one.image_id, []).append(one)
    if split != ALL and not by_image:
        have = ", ".join(f"{name} ({n})" for name, n in sorted(seen.items())) or "none but 'all'"
        raise DataError(f"{instances.path} has no split {split!r}", f"its splits: {have}")
    return by_image


def _listed(record: Any, where: str, columns: Mapping[str, Any]) -> _Spoken:
    """An expression of the top-level list."""
    if not isinstance(record, dict):
        raise DataError(f"{where} is not an object: {brief(record)}")
    text = next((record[k] for k in _TEXT_KEYS if isinstance(record.get(k), str)), None)
    if text is None:
        raise DataError(f"{where} has no text", f"give one of {', '.join(_TEXT_KEYS)}")
    ann_ids = record.get("ann_ids", record.get("ann_id"))
    if isinstance(ann_ids, (int, str, float)):
        ann_ids = [ann_ids]
    if isinstance(ann_ids, list):
        ann_ids = [id_key(one) for one in ann_ids]
    if ann_ids is not None and (
        not isinstance(ann_ids, list) or not all(isinstance(a, (int, str)) for a in ann_ids)
    ):
        raise DataError(f"{where} has ann_ids {brief(ann_ids)}", "give a list of ids")
    if ann_ids == [-1]:  # gRefCOCO's way of saying that nothing fits
        ann_ids = []
    image_id = id_key(record.get("image_id"))
    if not isinstance(image_id, (int, str)):
        raise DataError(f"{where} has the image_id {brief(image_id)}", "give an image's id")
    name = id_text(record.get("id")) or ""
    parts = None if ann_ids is None else tuple(dict.fromkeys(ann_ids))
    pseudo = record.get("pseudo") is True
    return _Spoken(
        image_id,
        name,
        text,
        parts,
        record.get("split"),
        pseudo=pseudo,
        columns=tuple(columns.items()),
    )


def _captioned(ann_id: Any, annotation: dict[str, Any]) -> Iterator[_Spoken]:
    """Expressions that stand on an annotation; without a mask their truth is unknown."""
    texts = _annotation_texts(annotation)
    image_id = id_key(annotation.get("image_id"))
    if texts and not isinstance(image_id, (int, str)):
        raise DataError(f"annotation {ann_id!r} has the image_id {brief(image_id)}")
    parts = (ann_id,) if annotation.get("segmentation") else None
    for k, text in enumerate(texts):
        name = str(ann_id) if len(texts) == 1 else f"{ann_id}#{k}"
        yield _Spoken(image_id, name, text, parts, annotation.get("split"), ann_id)


def _annotation_texts(annotation: dict[str, Any]) -> list[str]:
    found = annotation.get("expressions")
    texts = [t for t in found if isinstance(t, str)] if isinstance(found, list) else []
    single = [
        annotation[k] for k in ("expression", "caption") if isinstance(annotation.get(k), str)
    ]
    return texts + single


def _group(instances: Instances, image_id: Any, folder: Path, spoken: Sequence[_Spoken]) -> Group:
    file_name = instances.image(image_id)["file_name"]
    known: dict[tuple[Any, ...], dict[str, Any]] = {}  # equal facts are held once
    phrases = []
    for k, one in enumerate(spoken):
        fact = one.parts, one.pseudo, one.columns
        if fact not in known:
            mark: dict[str, Any] = {"pseudo": True} if one.pseudo else {}
            if one.columns:
                mark["columns"] = dict(one.columns)
            facts = {} if one.parts is None else instances.facts(image_id, one.parts)
            known[fact] = {"image_id": image_id, **facts, **mark}
        name = one.id or f"{file_name}#{k}"
        phrases.append(Phrase(name, one.text, one.parts, known[fact]))
    return instances.group(image_id, _image_path(folder, file_name), phrases)


def _image_folder(path: Path, instances: Instances) -> Path:
    """Where the first file name is found: beside the file or in its ``images`` folder."""
    first = next(iter(instances.images))
    name = instances.image(first)["file_name"]
    for folder in (path.parent, path.parent / "images", path.parent.parent / "images"):
        if is_file(_image_path(folder, name)):
            return folder
    return path.parent


def _image_path(folder: Path, name: str) -> Path:
    """Where an image is, by whichever spelling of its name there is a file on this disk.

    Nothing is looked up for plain names, such as those of COCO's own files.
    """
    path = folder / name
    if isinstance(path, RemotePath):
        return path
    found = existing(str(path))
    return path if found == str(path) else Path(found)
