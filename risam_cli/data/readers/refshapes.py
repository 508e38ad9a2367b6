"""RefShapes made on the fly: scenes are drawn when asked for and written as PNG for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli import masks
from risam_cli.data.readers.source import Group, Phrase, SampleSource
from risam_cli.errors import OutputError
from risam_cli.types import Rle

if TYPE_CHECKING:
    from risam_cli.data.refshapes import RefShapes, SceneItem


def open_refshapes(
    family: str, split: str, folder: Path, *, scenes: int | None = None, seed: int = 0
) -> SampleSource:
    """The index of a split of RefShapes, nothing of it drawn yet.

    Args:
        family, split, scenes, seed: as :class:`risam_cli.data.refshapes.RefShapes`.
        folder: where a scene's PNG is written at the moment it is asked for.

    Raises:
        UsageError: no such family or split.
    """
    from risam_cli.data.refshapes import RefShapes

    made = RefShapes(family, split, scenes=scenes, seed=seed)
    counts = {"images": len(made), "expressions": len(made) * made.expressions_per_scene}
    return SampleSource(family, split, (), _Scenes(made, folder), counts)


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
        item = self.made[index]
        name = f"{self.made.split}_{index:06d}.png"
        path = self.folder / name
        return Group(
            name,
            path,
            (item.instances.shape[0], item.instances.shape[1]),
            tuple(_phrases(item, name)),
            partial(_draw, item.instances),
            partial(_write, path, item.image),
        )


def _phrases(item: SceneItem, name: str) -> list[Phrase]:
    phrases = []
    for k, referring in enumerate(item.expressions):
        shapes = [scene_object.shape for scene_object in item.objects]
        chosen = {shapes[number] for number in referring.objects}
        attributes: dict[str, object] = {"referents": len(referring.objects)}
        if len(chosen) == 1:
            shape = chosen.pop()
            attributes["category"] = shape
            attributes["distractors"] = shapes.count(shape) - len(referring.objects)
        phrases.append(Phrase(f"{name}#{k}", referring.text, referring.objects, attributes))
    return phrases


def _draw(instances: NDArray[np.uint8], number: int) -> Rle:
    return masks.encode(instances == number + 1)


def _write(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Level 1: the file lives for minutes, and a scene compresses fast and well enough.
    if not cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise OutputError(f"cannot write the scene {path}", "is the disk full?")
