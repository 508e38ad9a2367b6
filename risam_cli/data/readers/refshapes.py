"""RefShapes: made on the fly, each scene drawn and written as PNG when it is asked for; or read
from what ``risam refshapes`` wrote, in whichever benchmark's format.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.readers.coco import open_coco
from risam_cli.data.readers.layout import missing, only_split
from risam_cli.data.readers.phrasecut import open_phrasecut
from risam_cli.data.readers.refer import open_refer
from risam_cli.data.readers.source import Columns, Group, Phrase, SampleSource
from risam_cli.drawing.png import encode_rgb
from risam_cli.errors import DataError, OutputError, reason_of, setting
from risam_cli.files.jsonlines import load_json
from risam_cli.masks import rle as masks
from risam_cli.types import Rle

if TYPE_CHECKING:
    from risam_cli.data.refshapes.dataset import RefShapes, SceneItem


BENCHMARKS = {
    "refshapes": "refcoco",
    "refshapes+": "refcoco+",
    "refshapesg": "refcocog",
    "grefshapes": "grefcoco",
}
"""Family -> the benchmark whose format and folder it takes."""


def open_refshapes(
    family: str, split: str, folder: Path, *, scenes: int | None = None, seed: int = 0
) -> SampleSource:
    """The index of a split of RefShapes, nothing of it drawn yet.

    Args:
        family, split, scenes, seed: as :class:`risam_cli.data.refshapes.dataset.RefShapes`.
        folder: where a scene's PNG is written at the moment it is asked for.

    Raises:
        UsageError: no such family or split.
    """
    from risam_cli.data.refshapes.dataset import RefShapes

    made = RefShapes(family, split, scenes=scenes, seed=seed)
    counts = {"images": len(made), "expressions": len(made) * made.expressions_per_scene}
    return SampleSource(family, split, (), _Scenes(made, folder), counts, generated=True)


def open_refshapes_files(
    root: Path,
    family: str,
    split: str | None,
    image_root: Path | None = None,
    columns: Columns | None = None,
) -> SampleSource:
    """The index of a split that ``risam refshapes`` wrote.

    Args:
        root: its output folder, or the family's own folder in it.
        split: None where there is one only.
        columns: which columns of the data's own to carry along.

    Raises:
        DataError: files are missing or damaged, are of another family, or lack the split.
        UsageError: no split is named, and there are several.
    """
    own = BENCHMARKS[family]
    by = "umd" if family == "refshapesg" else "unc"
    refer = "grefs(unc).json" if own == "grefcoco" else f"refs({by}).p"
    looked = []
    places = [(root / own, refer, own), (root, refer, own), (root / family / "refer", refer, own)]
    several = (root / family / "grefcoco", root)
    places += [(folder, "grefs(unc).json", "grefcoco") for folder in several]
    for folder, name, benchmark in places:
        looked.append(folder / name)
        if looked[-1].is_file():
            _check_family(folder, family)
            return open_refer(
                folder, benchmark, split, image_root=image_root, name=family, columns=columns
            )
    if split is None:
        split = _only_file(root, family)
    for folder in (root / family / "phrasecut", root):
        looked.append(folder / f"refer_{split}.json")
        if looked[-1].is_file():
            _check_family(folder, family)
            return open_phrasecut(
                folder, split, image_root=image_root, name=family, columns=columns
            )
    for folder in (root / family / "coco", root):
        looked.append(folder / f"{split}.json")
        if looked[-1].is_file():
            _check_family(folder, family)
            source = open_coco(looked[-1], image_root, dataset=family, columns=columns)
            return replace(source, split=split)
    raise missing(looked, f"RefShapes files of {family} {split}")


def _only_file(root: Path, family: str) -> str:
    """The split of files that hold one each, where there is one only."""
    from risam_cli.data.refshapes.dataset import SPLIT_SCENES

    folders = (root, root / family / "coco", root / family / "phrasecut")
    there = (folder for folder in folders if folder.is_dir())
    stems = [path.stem for folder in there for path in folder.glob("*.json")]
    names = [stem.removeprefix("refer_") for stem in stems]
    return only_split(str(root), (name for name in names if name in SPLIT_SCENES))


def _check_family(folder: Path, family: str) -> None:
    """Refuse a folder whose own note says that it holds another family."""
    note = folder / "refshapes.json"
    try:
        own = load_json(note.read_text(encoding="utf-8")).get("family")
    except (OSError, ValueError, AttributeError):
        return
    if own != family:
        raise DataError(
            f"{folder} holds the family {own!r}, not {family!r}", f"give {setting('family', own)}"
        )


class _Scenes(Sequence[Group]):
    """The scenes of a split as groups, each drawn on access."""

    def __init__(self, made: RefShapes, folder: Path) -> None:
        self.made = made
        self.folder = folder

    def __len__(self) -> int:
        return len(self.made)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | Sequence[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        from risam_cli.data.refshapes.formats import image_id

        item = self.made[index]
        number = image_id(self.made.split, index, self.made.family)
        # Names and ids are those of `risam refshapes --format coco --image-format png`.
        name = f"{self.made.split}_{number:07d}.png"
        path = self.folder / name
        return Group(
            name,
            path,
            (item.instances.shape[0], item.instances.shape[1]),
            tuple(_phrases(item, number)),
            partial(_draw, item.instances),
            partial(_write, path, item.image),
        )


def _phrases(item: SceneItem, number: int) -> list[Phrase]:
    phrases = []
    for k, referring in enumerate(item.expressions):
        shapes = [scene_object.shape for scene_object in item.objects]
        chosen = Counter(shapes[k] for k in referring.objects)
        attributes: dict[str, object] = {"referents": len(referring.objects)}
        if len(chosen) == 1:
            attributes["category"] = next(iter(chosen))
        if chosen:
            attributes["distractors"] = sum(shapes.count(s) - n for s, n in chosen.items())
        phrases.append(Phrase(str(number * 100 + k), referring.text, referring.objects, attributes))
    return phrases


def _draw(instances: NDArray[np.uint8], number: int) -> Rle:
    return masks.encode(instances == number + 1)


def _write(path: Path, image: NDArray[np.uint8]) -> None:
    """Write a scene once, whole: another thread may be about to read it."""
    if path.exists():
        return
    part = path.with_name(f".{path.name}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(encode_rgb(image))
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write the scene {path}: {reason_of(error)}", "is the disk full?"
        ) from error
