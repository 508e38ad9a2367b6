"""RefCOCO, RefCOCO+, G-Ref and gRefCOCO: REFER's lists of refs beside ``instances.json``.

A ref is one object (in gRefCOCO: any number) with several sentences; every sentence is an
expression of its own. ``sent``, the cleaned sentence, is what is asked; ``raw`` is kept beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from risam_cli.data.identity import id_key
from risam_cli.data.readers.instances import Instances, read_instances
from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.data.readers.layout import (
    find_file,
    find_folder,
    find_images,
    only_split,
    wrong_split,
)
from risam_cli.data.readers.pickle import load_plain_pickle
from risam_cli.data.readers.source import (
    Columns,
    Group,
    Phrase,
    SampleSource,
    make_source,
    require_some_truth,
)
from risam_cli.errors import DataError, setting
from risam_cli.files.jsonlines import brief

SPLIT_BY: dict[str, tuple[str, ...]] = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
    "refclef": ("unc", "berkeley"),
    "grefcoco": ("unc",),
}
"""Who made the splits of each data set; the first is the default."""

_IMAGE_FOLDERS = (
    "images/mscoco/images/train2014",
    "images/train2014",
    "mscoco/train2014",
    "coco/train2014",
    "train2014",
    "images/saiapr_tc-12",
    "images",
)


def open_refer(
    root: Path,
    dataset: str,
    split: str | None,
    *,
    split_by: str | None = None,
    image_root: Path | None = None,
    name: str | None = None,
    columns: Columns | None = None,
) -> SampleSource:
    """The index of one split of RefCOCO, RefCOCO+, G-Ref or gRefCOCO, one entry an image.

    Args:
        root: the folder that holds ``refcoco/`` …, or the data set's own folder.
        dataset: a key of ``SPLIT_BY``.
        split: ``train``, ``val``, ``test``, ``testA``, ``testB``, as the refs store it; None where
            they hold one only.
        split_by: who made the splits; by default the data set's first.
        image_root: the folder of the images; by default looked for near ``root``.
        name: what to call the data set; by default ``dataset``.
        columns: which fields of sentences, refs and images to carry along.

    Raises:
        DataError: files are missing or damaged, or the split does not exist.
        UsageError: no split is named, and there are several.
    """
    splits_by = SPLIT_BY[dataset]
    by = split_by or splits_by[0]
    if by not in splits_by:
        raise DataError(
            f"{dataset} has no splits by {by!r}",
            f"{setting('split_by')} takes {' or '.join(splits_by)}",
        )
    names = _ref_files(dataset, by)
    folder = find_folder(root, (dataset, f"data/{dataset}", f"refer/data/{dataset}"), names)
    ref_file = find_file(folder, names, "the refs")
    instance_file = find_file(folder, ("instances.json",), "the instances")

    columns = columns or Columns()
    if split is None:
        split = only_split(str(ref_file), refer_splits(ref_file))
    refs, splits = _split_refs(ref_file, split, columns)
    if not refs:
        raise wrong_split(f"{ref_file}", split, splits)
    images = {ref["image_id"] for ref in refs}
    annotations = {ann_id for ref in refs for ann_id in ref["ann_ids"]}
    instances = read_instances(
        instance_file, keep_image=images.__contains__, keep_annotation=annotations.__contains__
    )
    spoken = [ref for ref in refs if ref["sentences"]]
    start = _image_folder(root, folder, image_root, instances, refs)
    groups = _groups(instances, spoken, start, columns)
    notes = []
    if len(spoken) < len(refs):
        notes.append(f"{len(refs) - len(spoken)} refs without a sentence were left out")
    source = make_source(
        name or dataset,
        split,
        (ref_file, instance_file),
        groups,
        counts={"refs": len(spoken)},
        notes=notes,
    )
    require_some_truth(source, instances.annotations.__contains__, str(instance_file))
    return source


def refer_splits(ref_file: Path) -> list[str]:
    """The names of the splits that a list of refs holds, sorted. Raises DataError as above."""
    return sorted(_split_refs(ref_file, "", Columns())[1])


def _ref_files(dataset: str, by: str) -> tuple[str, ...]:
    """The list of gRefCOCO is JSON, the others are pickles; some copies are the other way round."""
    if dataset == "grefcoco":
        return (f"grefs({by}).json", f"grefs({by}).p")
    return (f"refs({by}).p", f"refs({by}).json")


def _split_refs(
    path: Path, split: str, columns: Columns
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The refs of a split, checked, and how many refs every split has."""
    if path.suffix == ".json":
        records: Iterator[Any] = (record for _, record in iter_json(path))
    else:
        loaded = load_plain_pickle(path)
        if not isinstance(loaded, list):
            raise DataError(f"{path} holds a {type(loaded).__name__}, not a list of refs")
        records = iter(loaded)
    counts: Counter[str] = Counter()
    chosen = []
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("split"), str):
            raise DataError(f"{path}: ref {number} has no split: {brief(record)}")
        counts[record["split"]] += 1
        if record["split"] == split:
            chosen.append(_checked(record, f"{path}: ref {number}", columns))
    return chosen, dict(counts)


def _checked(ref: dict[str, Any], where: str, columns: Columns) -> dict[str, Any]:
    """What is used of a ref, with ``ann_ids`` as a tuple: empty where nothing fits."""
    for key in ("ref_id", "image_id", "ann_id", "sentences"):
        if key not in ref:
            raise DataError(f"{where} has no {key}", "check that this is the benchmark's own file")
    ann_ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    ann_ids, image_id = [id_key(one) for one in ann_ids], id_key(ref["image_id"])
    if not all(isinstance(a, int) for a in ann_ids) or not isinstance(ref["sentences"], list):
        raise DataError(f"{where} is malformed: {brief(ref)}")
    if not isinstance(image_id, (int, str)):
        raise DataError(f"{where} has the image_id {brief(ref['image_id'])}")
    ann_ids = list(dict.fromkeys(ann_ids))
    if len(ann_ids) > 1 and -1 in ann_ids:
        raise DataError(f"{where} mixes 'no target' (-1) with annotations: {ann_ids}")
    sentences = []
    for sentence in ref["sentences"]:
        text = sentence.get("sent") or sentence.get("raw") if isinstance(sentence, dict) else None
        if not isinstance(text, str) or not isinstance(sentence.get("sent_id"), (int, str)):
            raise DataError(f"{where}: a sentence lacks sent_id or sent: {brief(sentence)}")
        own = columns.of(sentence, ref)
        sentences.append((str(sentence["sent_id"]), text, sentence.get("raw"), own))
    return {
        "ref_id": ref["ref_id"],
        "image_id": image_id,
        "ann_ids": () if ann_ids == [-1] else tuple(ann_ids),
        "sentences": sentences,
    }


def _image_folder(
    root: Path,
    folder: Path,
    image_root: Path | None,
    instances: Instances,
    refs: Sequence[dict[str, Any]],
) -> Path:
    """Where file names start. The ref's own ``file_name`` is wrong: it carries an annotation id."""
    if image_root is not None:
        return image_root
    first = instances.image(refs[0]["image_id"])["file_name"]
    bases = dict.fromkeys((root, folder, folder.parent, folder.parent.parent))
    candidates = (base / name for base in bases for name in (*_IMAGE_FOLDERS, "."))
    return find_images(candidates, first) or folder / "images"


def _groups(
    instances: Instances, refs: Sequence[dict[str, Any]], folder: Path, columns: Columns
) -> list[Group]:
    """One group an image, in the order in which the refs name them."""
    by_image: dict[Any, list[Phrase]] = {}
    for ref in refs:
        parts = _drawable(instances, ref["ann_ids"])
        shared: dict[str, Any] = {
            "image_id": ref["image_id"],
            "ref_id": ref["ref_id"],
            **instances.facts(ref["image_id"], parts),
        }
        phrases = by_image.setdefault(ref["image_id"], [])
        of_image = columns.of(instances.image(ref["image_id"]))
        for sent_id, text, raw, own in ref["sentences"]:
            attributes = shared if raw in (None, text) else {**shared, "raw": raw}
            if found := {**of_image, **own}:
                attributes = {**attributes, "columns": found}
            phrases.append(Phrase(sent_id, text, parts, attributes))
    return [
        instances.group(image_id, folder / instances.image(image_id)["file_name"], phrases)
        for image_id, phrases in by_image.items()
    ]


def _drawable(instances: Instances, ann_ids: tuple[Any, ...]) -> tuple[Any, ...]:
    """The annotations but crowds, which are no objects; alone, a crowd is kept."""
    known = instances.annotations
    single = tuple(a for a in ann_ids if a not in known or not known[a].crowd)
    return single or ann_ids
