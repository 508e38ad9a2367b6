"""Scenes of RefShapes, and their phrases read back from the text.

The small parser shares no code with the package.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from risam_cli.data.refshapes.dataset import FAMILIES, RefShapes, SceneItem
from risam_cli.data.refshapes.scene import SceneObject
from risam_cli.data.refshapes.vocabulary import COLORS, SHAPES

SPLITS = ("train", "val", "testA", "testB")


WIDE = (*SPLITS, "testC")


@cache
def items(
    family: str, split: str, scenes: int = 25, variety: str = "plain"
) -> tuple[SceneItem, ...]:
    return tuple(RefShapes(family, split, scenes, expressions_per_scene=8, variety=variety))


def everything() -> Iterator[tuple[str, str, SceneItem]]:
    for family, split in itertools.product(FAMILIES, SPLITS):
        for item in items(family, split):
            yield family, split, item


def everything_wide() -> Iterator[tuple[str, str, SceneItem]]:
    for family, split in itertools.product(FAMILIES, WIDE):
        for item in items(family, split, 12, "wide"):
            yield family, split, item


def fingerprint(item: SceneItem) -> str:
    digest = hashlib.sha256(item.instances.tobytes())
    for thing in item.objects:
        words = (thing.shape, thing.color, thing.size, round(thing.x, 3), round(thing.y, 3))
        digest.update(repr(words).encode())
    for referring in item.expressions:
        digest.update(repr((referring.text, referring.objects)).encode())
    return digest.hexdigest()[:16]


# What a colour looks like, said without the painter's own table.
LOOKS = {
    "red": (222, 20, 20),
    "green": (30, 160, 60),
    "blue": (30, 75, 212),
    "yellow": (245, 225, 30),
    "purple": (100, 45, 155),
    "orange": (245, 125, 15),
    "cyan": (40, 215, 232),
    "pink": (250, 140, 185),
    "brown": (112, 72, 40),
    "gray": (128, 128, 128),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}


def wrong_colors(scenes: Iterable[SceneItem]) -> tuple[int, int]:
    """How many objects look more like another colour than like their own, and of how many."""
    table = np.array(list(LOOKS.values()), float)
    wrong = total = 0
    for item in scenes:
        for number, thing in enumerate(item.objects, start=1):
            middle = np.median(item.image[item.instances == number].astype(float), axis=0)
            shown = list(LOOKS)[int(((table - middle) ** 2).sum(axis=1).argmin())]
            wrong += shown != thing.color
            total += 1
    return wrong, total


# Phrases, read back from their text


@dataclass
class Reading:
    shape: str | None = None
    color: str | None = None
    size: str | None = None
    extreme: str | None = None
    side: str | None = None
    relation: str | None = None
    anchor: Reading | None = None
    plural: bool = False
    number: int | None = None


NOUNS = {
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    *("crosses", "object", "objects", "thing", "things"),
}
WHERE = {"on", "at", "left", "right", "to", "above", "below", "next"}


def parse(text: str) -> list[Reading]:
    """Things named one after the other; what "and" adds to one thing is no thing of its own."""
    parts: list[list[str]] = []
    for part in text.split(" and "):
        words = part.split()
        own = list(itertools.takewhile(lambda word: word not in WHERE, words))
        if parts and (not NOUNS & set(own) or awaits_its_noun(parts[-1])):
            parts[-1] += words
        else:
            parts.append(words)
    return [parse_one(words) for words in parts]


def awaits_its_noun(words: Sequence[str]) -> bool:
    """Whether words end in an attribute that stands before its noun: "the red", of "the red and
    large star".
    """
    predicate = len(words) > 1 and words[-2] in ("is", "are")
    return words[-1] in {*COLORS, "small", "large"} and not predicate


def parse_one(words: Sequence[str]) -> Reading:
    reading = Reading()
    singulars = {f"{shape}s": shape for shape in SHAPES} | {"crosses": "cross"}
    at = 0
    while at < len(words):
        word = words[at]
        if word in ("on", "at"):
            article = words[at + 1] == "the"
            reading.side = words[at + 1 + article]
            at += 2 + article
            continue
        if word == "to" or (word in ("left", "right") and words[at + 1] == "of"):
            at += 2 if word == "to" else 0
            reading.relation = words[at]
            at = anchor(reading, words, at + 2)
            continue
        if word in ("above", "below", "next"):
            reading.relation = word
            at = anchor(reading, words, at + (2 if word == "next" else 1))
            continue
        if word in SHAPES:
            reading.shape = word
        elif word in singulars:
            reading.shape, reading.plural = singulars[word], True
        elif word in ("objects", "things"):
            reading.plural = True
        elif word in COLORS:
            reading.color = word
        elif word in ("small", "large"):
            reading.size = word
        elif word.endswith("most"):
            reading.extreme = word
        elif word in ("two", "both", "three", "four"):
            reading.number = {"two": 2, "both": 2, "three": 3, "four": 4}[word]
        else:
            assert word in ("the", "a", "all", "that", "is", "are", "object", "thing"), word
        at += 1
    return reading


def anchor(reading: Reading, words: Sequence[str], start: int) -> int:
    """Reads the anchor, which ends with its noun; gives the place behind it."""
    end = next(k for k in range(start, len(words)) if words[k] in NOUNS) + 1
    reading.anchor = parse_one(words[start:end])
    return end


def nouns(readings: Sequence[Reading]) -> Iterator[Reading]:
    for reading in readings:
        yield reading
        if reading.anchor is not None:
            yield reading.anchor


def refers_to(
    reading: Reading, objects: Sequence[SceneObject], height: int, width: int
) -> set[int]:
    """The plain meaning, without margins; asserts that nothing is near a border."""
    side = max(height, width)
    named = {
        k
        for k, thing in enumerate(objects)
        if reading.shape in (None, thing.shape)
        and reading.color in (None, thing.color)
        and reading.size in (None, thing.size)
    }
    x = {k: thing.cx / side for k, thing in enumerate(objects)}
    y = {k: thing.cy / side for k, thing in enumerate(objects)}
    found = set(named)
    if reading.side is not None:
        way = {
            "left": lambda k: objects[k].cx / width,
            "right": lambda k: 1 - objects[k].cx / width,
            "top": lambda k: objects[k].cy / height,
            "bottom": lambda k: 1 - objects[k].cy / height,
        }[reading.side]
        assert all(way(k) < 0.42 or way(k) > 0.50 for k in found)
        found = {k for k in found if way(k) < 0.45}
    if reading.anchor is not None:
        anchors = refers_to(reading.anchor, objects, height, width)
        assert len(anchors) <= 1
        if not anchors:
            return set()
        (start,) = anchors
        found = {k for k in found - {start} if stands(reading.relation, k, start, objects, side)}
    if reading.extreme is not None and found:
        way = {
            "leftmost": lambda k: x[k],
            "rightmost": lambda k: -x[k],
            "topmost": lambda k: y[k],
            "bottommost": lambda k: -y[k],
        }[reading.extreme]
        order = sorted(found, key=way)
        assert len(order) == 1 or way(order[1]) - way(order[0]) >= 0.07
        assert min(named, key=way) == order[0]
        found = {order[0]}
    return found


def stands(
    relation: str | None, one: int, start: int, objects: Sequence[SceneObject], side: int
) -> bool:
    a, b = objects[one], objects[start]
    dx, dy = (a.cx - b.cx) / side, (a.cy - b.cy) / side
    if relation == "next":
        gap = math.hypot(dx, dy) - (a.radius + b.radius) / side
        assert not 0.06 < gap < 0.14
        return gap < 0.1
    assert math.hypot(dx, dy) >= 0.08
    axes = {"right": 0.0, "below": 90.0, "left": 180.0, "above": 270.0}
    off = abs((math.degrees(math.atan2(dy, dx)) - axes[str(relation)] + 180) % 360 - 180)
    assert not 40.001 < off < 54.999
    return off < 47
