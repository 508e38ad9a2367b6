"""The data sets by name: which reader opens each, and how many of everything they should hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from risam_cli.data.readers.coco import ALL, open_coco
from risam_cli.data.readers.layout import missing, only_split
from risam_cli.data.readers.phrasecut import open_phrasecut
from risam_cli.data.readers.refer import SPLIT_BY, open_refer
from risam_cli.data.readers.source import Columns, SampleSource
from risam_cli.errors import DataError, UsageError, setting

DATASETS = ("refcoco", "refcoco+", "refcocog", "refclef", "grefcoco", "phrasecut", "coco")
"""What :func:`open_dataset` opens; RefShapes has :mod:`risam_cli.data.readers.refshapes`."""

Counts = Mapping[str, int]

KNOWN_COUNTS: Mapping[tuple[str, str], Mapping[str, Counts]] = {
    ("refcoco", "unc"): {
        "train": {"refs": 42404, "expressions": 120624, "images": 16994},
        "val": {"refs": 3811, "expressions": 10834, "images": 1500},
        "testA": {"refs": 1975, "expressions": 5657, "images": 750},
        "testB": {"refs": 1810, "expressions": 5095, "images": 750},
    },
    ("refcoco+", "unc"): {
        "train": {"refs": 42278, "expressions": 120191},
        "val": {"refs": 3805, "expressions": 10758},
        "testA": {"refs": 1975, "expressions": 5726},
        "testB": {"refs": 1798, "expressions": 4889},
    },
    ("refcocog", "umd"): {
        "train": {"refs": 42226},
        "val": {"refs": 2573},
        "test": {"refs": 5023},
    },
    ("refcocog", "google"): {"train": {"refs": 44822}, "val": {"refs": 5000}},
    ("grefcoco", "unc"): {
        "val": {"images": 1500, "no_target": 8905, "single_target": 0, "multi_target": 5324},
        "testA": {"no_target": 4448, "single_target": 5917, "multi_target": 8835},
        "testB": {"no_target": 4673, "single_target": 5646, "multi_target": 5744},
    },
    ("phrasecut", ""): {
        "train": {"expressions": 310816},
        # The published 20,316 of val are with those of miniv, which lie in a file of their own.
        "val": {"expressions": 20316 - 821, "images": 2971 - 100},
        "val_miniv": {"expressions": 20316, "images": 2971},
        "test": {"expressions": 14354, "images": 2545},
        "miniv": {"expressions": 821, "images": 100},
    },
}
"""Published sizes of the splits, by data set and who split it."""


def open_dataset(
    dataset: str,
    root: Path,
    split: str | None,
    *,
    split_by: str | None = None,
    image_root: Path | None = None,
    columns: Columns | None = None,
) -> SampleSource:
    """The index of one split of a benchmark.

    Args:
        dataset: one of ``DATASETS``.
        root: the folder that holds the data set's folder, or that folder itself; for ``coco`` the
            JSON file or the folder that holds it.
        split: for ``coco``, ``<split>.json`` or ``instances_<split>.json``, or the records of
            ``instances.json`` that carry this ``split``; ``all`` takes every record. None takes the
            only split that there is; for ``coco`` every record.
        split_by: for the REFER family, who made the splits.
        image_root: where image file names start; by default looked for near ``root``.
        columns: which columns of the data's own to carry along.

    Raises:
        DataError: files are missing or damaged, or the split does not exist.
        UsageError: the data set has no such option, or several splits and none is named.
    """
    if split_by is not None and dataset not in SPLIT_BY:
        raise UsageError(f"{setting('split_by')} is for {', '.join(SPLIT_BY)}, not for {dataset}")
    if dataset in SPLIT_BY:
        return open_refer(
            root, dataset, split, split_by=split_by, image_root=image_root, columns=columns
        )
    if dataset == "phrasecut":
        return open_phrasecut(root, split, image_root=image_root, columns=columns)
    path, within = _coco_file(root, split)
    return open_coco(path, image_root, split=within, columns=columns)


def _coco_file(root: Path, split: str | None) -> tuple[Path, str]:
    """The file of a COCO-style split, and the split to take within it."""
    if root.is_file():
        return root, ALL if split is None else split
    if split is None:
        split = _only_coco_file(root)
    own = [f"{split}.json", f"instances_{split}.json"] if split != ALL else []
    folders = (root, root / "annotations")
    for folder in folders:
        for name in own:
            if (folder / name).is_file():
                return folder / name, ALL
    for folder in folders:
        if (folder / "instances.json").is_file():
            return folder / "instances.json", split
    names = [*own, "instances.json"]
    why = missing([folder / name for folder in folders for name in names], "the annotations")
    there = sorted(path for folder in folders if folder.is_dir() for path in folder.glob("*.json"))
    such = f", such as {there[0]}" if there else ""
    raise DataError(why.message, f"name the JSON file itself with {setting('root')}{such}")


def _only_coco_file(root: Path) -> str:
    """The split of a folder with one file only; ``all`` where that is ``instances.json``."""
    folders = [folder for folder in (root, root / "annotations") if folder.is_dir()]
    if any((folder / "instances.json").is_file() for folder in folders):
        return ALL
    names = {path.stem for folder in folders for path in folder.glob("*.json")}
    if not names:
        return ALL
    return only_split(str(root), (name.removeprefix("instances_") for name in names))


def count_differences(source: SampleSource, split_by: str | None = None) -> list[str]:
    """What differs from the published counts, one line each with both numbers."""
    by = split_by or (SPLIT_BY[source.dataset][0] if source.dataset in SPLIT_BY else "")
    known = KNOWN_COUNTS.get((source.dataset, by), {}).get(source.split, {})
    return [
        f"{source.dataset} {source.split} holds {source.counts.get(what, 0)} {_spoken(what)}, "
        f"the published number is {number}"
        for what, number in known.items()
        if source.counts.get(what, 0) != number
    ]


def _spoken(what: str) -> str:
    return f"expressions with {what.replace('_target', '')} target" if "_" in what else what
