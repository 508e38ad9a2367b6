"""Scenes as lists of objects: what is in the picture and where, before anything is painted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.refshapes.shapes import PLAIN, Form, Patch, cover, reach
from risam_cli.data.refshapes.vocabulary import COLORS, HELD_OUT, SHAPES

RADII: dict[str, tuple[float, float]] = {
    "small": (14.0, 19.0),
    "medium": (23.0, 29.0),
    "large": (34.0, 44.0),
}
"""Radius range of each size class in pixels of a 256-pixel scene; scaled with the scene."""

MIN_VISIBLE_SHARE = 0.55
MIN_VISIBLE_PIXELS = 60
# How far the visible part's centroid may move from the whole's, in radii.
_MAX_CENTROID_SHIFT = 0.30
# Turn of each shape in degrees, +-; squares and diamonds must stay told apart.
_TURN = {"square": 15.0, "diamond": 10.0, "cross": 14.0, "triangle": 25.0}
_ANY_TURN = 180.0
_WIDE_TURN = {"square": 24.0, "diamond": 16.0, "cross": 20.0}
# Width over height and proportions of wide scenes, in steps, so that outlines are made once.
_ASPECTS = (0.76, 0.84, 0.92, 1.0, 1.0, 1.08, 1.18, 1.3)
# How objects shrink with a picture's shorter side: 0 not at all, 1 as much.
_LONG_PICTURES = 0.3, 0.8
_DETAILS = (-1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0)
# A circle, a square or a hexagon that is much wider than high has another name.
_ROUND = ("circle", "ring", "square", "hexagon")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape, color, size: its words; size is "small", "medium" or "large".
        x, y: centre in pixels; pixel (row i, column j) has its centre at x = j, y = i.
        radius: nominal radius in pixels.
        angle: turn in degrees, clockwise.
        cx, cy: centroid of its visible pixels.
        visible: share of its own pixels that nothing covers, 0.55..1.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    cx: float
    cy: float
    visible: float


class Dice:
    """Uniform numbers of a seeded generator, drawn in blocks because single draws are slow."""

    def __init__(self, key: str) -> None:
        digest = hashlib.sha256(key.encode()).digest()
        words = np.frombuffer(digest, np.dtype("<u4")).tolist()
        self.rng = np.random.default_rng(np.random.SeedSequence(words))
        self._block: list[float] = []

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = self.rng.random(256).tolist()
        return self._block.pop()

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def below(self, count: int) -> int:
        """An integer in 0..count-1."""
        return int(self.unit() * count)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, all alike."""
        return items[int(self.unit() * len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of the items, by weight."""
        rest = self.unit() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            rest -= weight
            if rest < 0:
                return item
        return items[-1]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(min(count, len(pool)))]


@dataclass(frozen=True, slots=True)
class Kind:
    """The words of an object that is still without a place."""

    shape: str
    color: str
    size: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Objects from back to front, the pixels of each, and the map of what is visible where.

    Attributes:
        instances: (H, W) uint8; 0 background, k + 1 where ``objects[k]`` is the topmost.
        patches: each object's own coverage, hidden parts included.
    """

    objects: tuple[SceneObject, ...]
    patches: tuple[Patch, ...]
    instances: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.instances.shape
        return height, width


def draw_kinds(dice: Dice, count: int, held_out: bool) -> list[Kind]:
    """Draws the words of ``count`` objects from a small pool, so that they share attributes.

    Args:
        held_out: with one or two objects of ``HELD_OUT`` pairs, of one pair each (testB);
            otherwise with none.
    """
    shapes = dice.sample(SHAPES, dice.weighted((1, 2, 3, 4), (1, 4, 4, 2)))
    colors = dice.sample(COLORS, dice.weighted((2, 3, 4, 5), (3, 4, 3, 1)))
    kinds: list[Kind] = []
    special: list[tuple[str, str]] = []
    if held_out:
        special = dice.sample(sorted(HELD_OUT), dice.weighted((1, 2), (2, 1)))
        shapes[0], colors[0] = special[0]
    pairs = [(s, c) for s in shapes for c in colors if (s, c) not in HELD_OUT]
    if not pairs:
        pairs = [(shapes[0], c) for c in COLORS if (shapes[0], c) not in HELD_OUT]
    weights = (4, 3, 4) if count <= 6 else (5, 3, 3)
    for number in range(count):
        pair = special[number] if number < len(special) else dice.pick(pairs)
        kinds.append(Kind(*pair, dice.weighted(("small", "medium", "large"), weights)))
    # Otherwise the held-out ones would always lie behind all others.
    return dice.sample(kinds, count) if held_out else kinds


def draw_layout(
    dice: Dice, kinds: Sequence[Kind], size: tuple[int, int], *, wide: bool = False
) -> Layout | None:
    """Finds a place for every object, or returns None where they do not fit.

    Each object lies wholly in the picture, keeps ``MIN_VISIBLE_SHARE`` of its pixels and
    ``MIN_VISIBLE_PIXELS`` of them visible, and its visible part stays centred on it.

    Args:
        size: height and width in pixels.
        wide: with tilts, aspect ratios and proportions of every shape, and with a size of its own
            for each scene, in which "small" and "large" stay as far apart; it is less in long
            pictures.
    """
    # Scenes without, with little and with much overlap.
    closeness = dice.weighted((1.04, 0.80, 0.55), (5, 3, 2))
    scale = dice.between(0.84, 1.14) if wide else 1.0
    if min(size) < max(size):
        scale *= (min(size) / max(size)) ** dice.between(*_LONG_PICTURES)
    board = _Board(size, wide=wide, scale=scale)
    for kind in kinds:
        if not board.place(dice, kind, closeness):
            return None
    return board.layout()


class _Board:
    """Places objects one on top of the other and keeps count of what stays visible."""

    def __init__(self, size: tuple[int, int], *, wide: bool = False, scale: float = 1.0) -> None:
        self.size = size
        self.wide = wide
        self.scale = scale * max(size) / 256
        self.instances = np.zeros(size, np.uint8)
        self.kinds: list[Kind] = []
        self.poses: list[tuple[float, float, float, float]] = []  # x, y, radius, angle
        self.patches: list[Patch] = []
        self.centres: list[tuple[float, float]] = []  # centroids of the whole shapes
        self.areas: list[int] = []

    def place(self, dice: Dice, kind: Kind, closeness: float) -> bool:
        """Puts one object on top where the objects below stay visible enough."""
        low, high = RADII[kind.size]
        radius = self.scale * dice.between(low, high)
        turn = (_WIDE_TURN if self.wide else _TURN).get(kind.shape, _ANY_TURN)
        angle = dice.between(-turn, turn)
        form = _draw_form(dice, kind.shape) if self.wide else PLAIN
        margin = radius * reach(kind.shape, form) + 1.5
        height, width = self.size
        spots = margin + dice.rng.random((48, 2)) * (np.array([width, height]) - 1 - 2 * margin)
        if self.poses:
            poses = np.array(self.poses)
            apart = np.hypot(*(spots[:, None, :] - poses[None, :, :2]).transpose(2, 0, 1))
            ratio = (apart / (poses[:, 2] + radius)).min(axis=1)
        else:
            ratio = np.full(len(spots), np.inf)
        for number in np.flatnonzero(ratio >= closeness)[:6].tolist():
            x, y = float(spots[number, 0]), float(spots[number, 1])
            if self._put(kind, (x, y, radius, angle), form, checked=ratio[number] < 1.3):
                return True
        return False

    def _put(
        self, kind: Kind, pose: tuple[float, float, float, float], form: Form, checked: bool
    ) -> bool:
        patch = cover(kind.shape, *pose, form)
        window = self.instances[patch.window]
        below = window.copy()
        window[patch.inside] = len(self.kinds) + 1
        if checked:
            hit = np.flatnonzero(np.bincount(below[patch.inside], minlength=1)).tolist()
            if not all(self._recognisable(number - 1) for number in hit if number):
                window[...] = below
                return False
        cx, cy = _centroid(patch.inside)
        self.kinds.append(kind)
        self.poses.append(pose)
        self.patches.append(patch)
        self.centres.append((cx + patch.x0, cy + patch.y0))
        self.areas.append(int(np.count_nonzero(patch.inside)))
        return True

    def _recognisable(self, number: int) -> bool:
        patch = self.patches[number]
        seen = self.instances[patch.window] == number + 1
        area = int(np.count_nonzero(seen))
        if area < max(MIN_VISIBLE_SHARE * self.areas[number], MIN_VISIBLE_PIXELS):
            return False
        cx, cy = _centroid(seen)
        wx, wy = self.centres[number]
        shift = math.hypot(cx + patch.x0 - wx, cy + patch.y0 - wy)
        return shift <= _MAX_CENTROID_SHIFT * self.poses[number][2]

    def layout(self) -> Layout:
        """The finished scene."""
        objects = []
        for number, (kind, pose) in enumerate(zip(self.kinds, self.poses, strict=True)):
            patch = self.patches[number]
            seen = self.instances[patch.window] == number + 1
            cx, cy = _centroid(seen)
            share = int(np.count_nonzero(seen)) / self.areas[number]
            objects.append(
                SceneObject(
                    *(kind.shape, kind.color, kind.size, *pose),
                    cx=cx + patch.x0,
                    cy=cy + patch.y0,
                    visible=share,
                )
            )
        return Layout(tuple(objects), tuple(self.patches), self.instances)


def _draw_form(dice: Dice, shape: str) -> Form:
    aspects: Sequence[float] = _ASPECTS[2:6] if shape in _ROUND else _ASPECTS
    if shape == "diamond":
        aspects = _ASPECTS[:5]  # it stays higher than wide
    return Form(dice.pick(aspects), dice.pick(_DETAILS))


def _centroid(mask: NDArray[np.bool_]) -> tuple[float, float]:
    """Mean column and row of a mask's pixels."""
    columns = np.count_nonzero(mask, axis=0)
    rows = np.count_nonzero(mask, axis=1)
    area = columns.sum()
    height, width = mask.shape
    return float(columns @ np.arange(width) / area), float(rows @ np.arange(height) / area)
