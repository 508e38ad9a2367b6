"""What a person drew or left of an image's shapes, as records; see the readers of CVAT and labelme.

Shapes of one expression are instances of it, whoever drew them: one record each, numbered where
there are several. Shapes of one group are one object in several parts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.identity import expression_key
from risam_cli.errors import DataError
from risam_cli.masks import rle as masks
from risam_cli.types import Rle

ERROR = "\0error"
"""The key of a record that could not be made; its value says why."""

MAX_PIXELS = 178_956_970
"""Pixels of a mask over which it is refused: as for images. A few bytes can stand for gigabytes."""

_CORNERS = 90  # of an ellipse

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape.

    Attributes:
        label: its class; expression: what stands beside it, may be empty.
        exported: the label that it had when it left; empty for what was drawn since.
        group: its number; None for a shape of its own.
        polygons: flat lists x, y, … in pixels, or:
        mask: pixels within the image from ``corner`` (left, top) on.
        wrong: why it is no mask; empty where it is one.
    """

    label: str
    expression: str = ""
    exported: str = ""
    score: float | None = None
    group: int | None = None
    polygons: Sequence[Sequence[float]] = ()
    mask: NDArray[np.bool_] | None = None
    corner: tuple[int, int] = (0, 0)
    wrong: str = ""

    @property
    def text(self) -> str:
        """What it shows: the expression, unless the label was that and has been changed."""
        own, label = self.expression.strip(), self.label.strip()
        relabelled = self.exported and label != self.exported.strip()
        if relabelled and expression_key(own) == expression_key(self.exported):
            return label
        return own or label

    def rle(self, size: Size, where: str) -> Rle:
        """Its mask. Raises DataError where it has none, or it leaves the image."""
        if self.wrong:
            raise DataError(f"{where}: {self.wrong}")
        if not self.text:
            raise DataError(f"{where}: it has no label", "give it one")
        if self.mask is None:
            return masks.from_polygons(self.polygons, size, where=where)
        left, top = self.corner
        height, width = self.mask.shape
        if left < 0 or top < 0 or left + width > size[1] or top + height > size[0]:
            raise DataError(
                f"{where}: its mask of {width}x{height} pixels at {left}, {top} leaves the image "
                f"of {size[1]}x{size[0]}"
            )
        canvas = np.zeros(size, np.bool_)
        canvas[top : top + height, left : left + width] = self.mask
        return masks.encode(canvas)


_Object = list[tuple[int, Shape]]  # its shapes, with their numbers in the image


def records_of(
    image: str, size: Size, shapes: Iterable[Shape], where: str
) -> Iterator[dict[str, Any]]:
    """A record for each object, in the order of the shapes; or what is wrong with it, as ERROR.

    Args:
        size: (H, W).
        where: the image's place, for messages.
    """
    by_text: dict[str, dict[tuple[int, int], _Object]] = {}
    for number, shape in enumerate(shapes):
        key = (1, shape.group) if shape.group is not None else (0, number)
        objects = by_text.setdefault(shape.text, {})
        objects.setdefault(key, []).append((number, shape))
    for k, (text, objects) in enumerate(by_text.items()):
        for instance, one in enumerate(objects.values()):
            record: dict[str, Any] = {"id": f"{image}#{k}", "image": image, "expression": text}
            record |= {"height": size[0], "width": size[1]}
            record |= {"instance": instance} if len(objects) > 1 else {}
            scores = [shape.score for _, shape in one if shape.score is not None]
            record |= {"score": max(scores)} if scores else {}
            try:
                yield {**record, "segmentation": _drawn(one, size, where)}
            except DataError as error:
                yield {ERROR: str(error)}


def _drawn(one: _Object, size: Size, where: str) -> Rle:
    height, width = masks.parse_size(list(size), where)
    if height * width > MAX_PIXELS:
        raise DataError(f"{where}: {height} x {width} pixels are over {MAX_PIXELS}")
    parts = []
    for number, shape in one:
        place = f"{where}, shape {number + 1} ({shape.label!r})"
        parts.append(shape.rle(size, place))
    drawn = masks.union(parts, size)
    if not masks.area(drawn):
        number, shape = one[0]
        raise DataError(f"{where}, shape {number + 1} ({shape.label!r}): it holds no pixel")
    return drawn


def rectangle(
    left: float, top: float, right: float, bottom: float, degrees: float = 0.0
) -> list[float]:
    """The outline of a box, turned around its middle, clockwise on the screen."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return _turned(corners, ((left + right) / 2, (top + bottom) / 2), degrees)


def ellipse(x: float, y: float, across: float, down: float, degrees: float = 0.0) -> list[float]:
    """The outline of an ellipse by its middle and its half axes, turned likewise."""
    angles = [2 * math.pi * k / _CORNERS for k in range(_CORNERS)]
    points = [(x + across * math.cos(a), y + down * math.sin(a)) for a in angles]
    return _turned(points, (x, y), degrees)


def _turned(
    points: Sequence[tuple[float, float]], middle: tuple[float, float], degrees: float
) -> list[float]:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    found: list[float] = []
    for x, y in points:
        dx, dy = x - middle[0], y - middle[1]
        found += [middle[0] + cosine * dx - sine * dy, middle[1] + sine * dx + cosine * dy]
    return found


def placed(name: str, folders: Sequence[Path], start: Path) -> str | None:
    """An image's name as seen from where relative names begin; None where it is not there.

    Args:
        folders: where it may lie; the first that has it counts.
        start: see above.
    """
    for folder in folders:
        try:
            path = os.path.abspath(folder / name)
            if not os.path.isfile(path):
                continue
            from_start = os.path.relpath(path, os.path.abspath(start))
        except ValueError:  # a name that no file can have; another drive
            continue
        # Above it, the whole path says more.
        return path if from_start.startswith("..") else Path(from_start).as_posix()
    return None
