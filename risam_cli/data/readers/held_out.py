"""Which images a data set holds out: those of any split but the training one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from risam_cli.data.readers.catalog import open_dataset
from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.data.readers.refer import SPLIT_BY, refer_splits
from risam_cli.data.readers.source import SampleSource

COCO_RECORDS = ("images", "expressions", "annotations")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Splits that are no training splits.

    Attributes:
        files: image files of those splits, where the reader looks for them.
        splits: the names of those splits.
        aliases: for some image files, COCO's number of the same picture: Visual Genome's photos
            are COCO's in part, under numbers of their own.
    """

    files: frozenset[Path]
    splits: tuple[str, ...]
    aliases: Mapping[Path, int] = field(default_factory=dict)


def is_held_out(split: str) -> bool:
    """Whether a split's name says that it is kept for validation or test (``val``, ``testA`` …)."""
    return split.lower().startswith(("val", "test", "miniv", "dev"))


def held_out(
    dataset: str,
    root: Path,
    source: SampleSource,
    *,
    split_by: str | None = None,
    image_root: Path | None = None,
) -> HeldOut:
    """The images of every validation and test split of a data set.

    Args:
        source: an opened split of it; the other arguments as it was opened by
            :func:`risam_cli.data.readers.catalog.open_dataset`.

    Raises:
        DataError: an annotation file is damaged.
    """
    if dataset in SPLIT_BY:
        names = [s for s in refer_splits(source.files[0]) if is_held_out(s)]
    elif dataset == "phrasecut":
        names = [s for s in ("val", "test", "miniv") if _has_phrases(source, s)]
    else:
        names = [s for s in coco_splits(source.files[0]) if is_held_out(s)]
        root = source.files[0]
    files: set[Path] = set()
    for name in names:
        other = open_dataset(dataset, root, name, split_by=split_by, image_root=image_root)
        files |= {group.path for group in other.chosen()}
    aliases = coco_numbers(source, files) if dataset == "phrasecut" else {}
    return HeldOut(frozenset(files), tuple(names), aliases)


def _has_phrases(source: SampleSource, split: str) -> bool:
    path = source.files[0].with_name(f"refer_{split}.json")
    if not path.is_file():
        return False
    own = {
        record.get("split") for _, record in iter_json(source.files[1]) if isinstance(record, dict)
    }
    return own == {None} or split in own


def coco_splits(path: Path) -> list[str]:
    """The split names that a COCO-style file's records carry, sorted."""
    found = set()
    for key, record in iter_json(path):
        if key in COCO_RECORDS and isinstance(record, dict) and record.get("split") is not None:
            found.add(str(record["split"]))
    return sorted(found)


def coco_numbers(source: SampleSource, held: Collection[Path] = ()) -> dict[Path, int]:
    """COCO's numbers of Visual Genome's photos, where PhraseCut's image list gives them."""
    places = [*(group.path for group in source.chosen()), *held]
    folder = places[0].parent if places else Path()
    numbers: dict[Path, int] = {}
    for _, record in iter_json(source.files[1]):
        number: Any = record.get("coco_id") if isinstance(record, dict) else None
        if isinstance(number, int) and not isinstance(number, bool):
            numbers[folder / f"{record.get('image_id')}.jpg"] = number
    return numbers
