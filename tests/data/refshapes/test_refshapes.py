"""RefShapes: scenes, masks and phrases, checked by means of their own.

The phrases are read back from their text by a small parser that shares no code with the package.
"""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.scenes import (
    LOOKS,
    SPLITS,
    WIDE,
    everything,
    fingerprint,
    items,
    nouns,
    parse,
    refers_to,
    wrong_colors,
)

from risam_cli.data.refshapes.dataset import FAMILIES, RefShapes, SceneItem
from risam_cli.data.refshapes.scene import RADII, SceneObject
from risam_cli.data.refshapes.shapes import outline
from risam_cli.data.refshapes.vocabulary import COLORS, HELD_OUT, SHAPES, VOCABULARY
from risam_cli.errors import UsageError

# Drawn from the seed, and from nothing else

# SHA-256 over instance map, objects and phrases. Change them only together with VERSION: a new
# value means that every figure measured on RefShapes was measured on other scenes.
GOLDEN = {
    ("refshapes", "val", 0): "ead127ef2ce778dd",
    ("refshapes+", "train", 7): "ed0a17aa418f15a2",
    ("refshapesg", "testA", 3): "05f0396628a539e3",
    ("grefshapes", "testB", 1): "66dce5bb4b83a249",
    ("mixed", "train", 123): "56d3f2e646acadc8",
}


@pytest.mark.parametrize("where", list(GOLDEN))
def test_scenes_are_the_same_on_every_machine(where: tuple[str, str, int]) -> None:
    family, split, index = where
    assert fingerprint(RefShapes(family, split, 200)[index]) == GOLDEN[where]


def test_a_scene_depends_on_its_own_number_alone() -> None:
    one = RefShapes("mixed", "train", 50)
    other = RefShapes("mixed", "train", 9)
    late = [one[k] for k in (8, 3, 3)]
    for item, again in zip(late, [other[8], other[3], other[3]], strict=True):
        assert np.array_equal(item.image, again.image)
        assert np.array_equal(item.instances, again.instances)
        assert (item.objects, item.expressions) == (again.objects, again.expressions)


def test_seeds_splits_and_families_share_no_scene() -> None:
    seen = set()
    total = 0
    for family, split, seed in itertools.product((*FAMILIES, "mixed"), SPLITS, (0, 1)):
        made = RefShapes(family, split, 6, seed=seed)
        for k in range(len(made)):
            seen.add(made.scene(k).instances.tobytes())
            total += 1
    assert len(seen) == total


def test_without_expressions_the_scene_is_mostly_the_same() -> None:
    made = RefShapes("refshapes", "val", 25, expressions_per_scene=8)
    same = 0
    for k, item in enumerate(items("refshapes", "val")):
        bare = made.scene(k)
        assert bare.expressions == ()
        same += np.array_equal(bare.image, item.image)
    assert same >= 22


def test_mixed_draws_every_family() -> None:
    made = RefShapes("mixed", "train", 60)
    assert {made.scene(k).family for k in range(60)} == set(FAMILIES)


def test_shares_of_families_are_kept_and_scenes_stay_their_own() -> None:
    mix = {"refshapesg": 1.0, "grefshapes": 3.0}
    made = RefShapes("mixed", "train", 200, mix=mix)
    families = [made.scene(k).family for k in range(200)]
    assert set(families) == set(mix)
    assert 130 <= families.count("grefshapes") <= 170
    # A scene depends on its family and number alone, so the layouts are those of any other mix.
    plain = RefShapes("mixed", "train", 200)
    for number in range(20):
        assert made.scene(number).objects == plain.scene(number).objects


@pytest.mark.parametrize(
    ("family", "mix"),
    [
        ("refshapes", {"refshapes": 1.0}),
        ("mixed", {}),
        ("mixed", {"refshapes": 0.0}),
        ("mixed", {"refshapes": -1.0, "grefshapes": 2.0}),
        ("mixed", {"refcoco": 1.0}),
    ],
)
def test_shares_that_say_nothing_are_refused(family: str, mix: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="mix"):
        RefShapes(family, "train", mix=mix)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UsageError, match="refshapes_plus"):
        RefShapes("refshapes_plus", "val")
    with pytest.raises(UsageError, match="test"):
        RefShapes("refshapes", "test")
    with pytest.raises(UsageError, match="size is 100"):
        RefShapes("refshapes", "val", size=100)
    made = RefShapes("refshapes", "val", 3)
    assert len(made) == 3
    with pytest.raises(IndexError):
        made[3]
    with pytest.raises(IndexError):
        made[-1]
    with pytest.raises(UsageError, match="500 expressions"):
        RefShapes("refshapes+", "testB", 3, expressions_per_scene=500)[0]


@pytest.mark.parametrize("size", [128, 200, 512])
def test_scenes_of_other_sizes(size: int) -> None:
    item = RefShapes("grefshapes", "val", 2, size=size)[0]
    assert item.image.shape == (size, size, 3)
    assert item.instances.shape == (size, size)
    assert len(item.expressions) == 6
    for thing in item.objects:
        low, high = RADII[thing.size]
        assert low <= thing.radius * 256 / size <= high


# Objects and their pixels


def test_number_of_objects() -> None:
    for _, split, item in everything():
        assert (6 if split == "testA" else 3) <= len(item.objects) <= 9


def test_every_object_stays_recognisable() -> None:
    for _, _, item in everything():
        assert item.image.dtype == item.instances.dtype == np.uint8
        assert int(item.instances.max()) == len(item.objects)
        for number, thing in enumerate(item.objects, start=1):
            rows, columns = np.nonzero(item.instances == number)
            assert len(rows) >= 60
            assert 0.55 <= thing.visible <= 1
            assert thing.cx == pytest.approx(columns.mean())
            assert thing.cy == pytest.approx(rows.mean())


def covers(thing: SceneObject, size: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Pixels whose centre is in the shape (even-odd rule), and those too near its edge to say."""
    x, y = np.meshgrid(np.arange(size) - thing.x, np.arange(size) - thing.y)
    turn = math.radians(-thing.angle)
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    inside = np.zeros((size, size), bool)
    near = np.zeros((size, size), bool)
    for contour in outline(thing.shape):
        points = contour * thing.radius
        for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
            if ay != by:
                crossing = (ay > y) != (by > y)
                inside ^= crossing & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
            length = (bx - ax) ** 2 + (by - ay) ** 2
            along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length, 0, 1)
            near |= np.hypot(ax + along * (bx - ax) - x, ay + along * (by - ay) - y) < 0.75
    return inside, near


def test_instance_maps_follow_the_geometry() -> None:
    shapes = set()
    for item in items("refshapes", "testA")[:12]:
        drawn = np.zeros(item.instances.shape, np.uint8)
        doubtful = np.zeros(item.instances.shape, bool)
        for number, thing in enumerate(item.objects, start=1):
            inside, near = covers(thing, len(drawn))
            drawn[inside] = number
            doubtful |= near
            shapes.add(thing.shape)
        assert np.array_equal(drawn[~doubtful], item.instances[~doubtful])
        assert doubtful.mean() < 0.12
    assert shapes == set(SHAPES)


def test_rings_show_what_lies_behind_them() -> None:
    rings = 0
    for item in items("refshapes", "val") + items("grefshapes", "train"):
        for number, thing in enumerate(item.objects, start=1):
            if thing.shape == "ring" and thing.visible == 1:
                centre = item.instances[round(thing.y), round(thing.x)]
                assert centre != number
                rings += 1
    assert rings > 5


def test_pictures_show_the_colours_that_are_named() -> None:
    assert set(LOOKS) == set(COLORS)
    wrong, total = wrong_colors(items("refshapes", "val") + items("refshapes+", "testB"))
    assert total > 200
    assert wrong <= 0.03 * total


def test_no_object_vanishes_into_the_background() -> None:
    for item in items("refshapes", "val"):
        ground = np.median(item.image[item.instances == 0].astype(float), axis=0)
        for number in range(1, len(item.objects) + 1):
            middle = np.median(item.image[item.instances == number].astype(float), axis=0)
            assert np.abs(middle - ground).max() > 18


def test_objects_of_one_color_can_be_told_apart_where_they_overlap() -> None:
    borders = []
    for family, split in itertools.product(FAMILIES, SPLITS):
        for item in items(family, split):
            for one, other in itertools.combinations(range(len(item.objects)), 2):
                if item.objects[one].color == item.objects[other].color:
                    borders += border_contrast(item, one + 1, other + 1)
    assert len(borders) > 20
    assert min(borders) > 8
    assert np.median(borders) > 25


def border_contrast(item: SceneItem, below: int, above: int) -> list[float]:
    """How far the upper object's rim differs from the lower one's inside, if the two meet."""
    lower = (item.instances == below).astype(np.uint8)
    near = cv2.dilate(lower, np.ones((3, 3), np.uint8)).view(bool)
    rim = near & (item.instances == above)
    if rim.sum() < 30:
        return []
    image = item.image.astype(float)
    change = np.median(image[rim], axis=0) - np.median(image[lower.view(bool)], axis=0)
    return [float(np.abs(change).max())]


# Held-out pairs


def test_held_out_pairs() -> None:
    assert len(HELD_OUT) == 12
    assert sorted(color for _, color in HELD_OUT) == sorted(COLORS)
    assert {shape for shape, _ in HELD_OUT} == set(SHAPES)
    for _, split, item in everything():
        special = {k for k, o in enumerate(item.objects) if (o.shape, o.color) in HELD_OUT}
        if split == "testB":
            assert special
            for referring in item.expressions:
                assert not referring.objects or special & set(referring.objects)
        else:
            assert not special
            for referring in item.expressions:
                for noun in nouns(parse(referring.text)):
                    assert (noun.shape, noun.color) not in HELD_OUT, referring.text


# Phrases


@pytest.mark.parametrize("variety", ["plain", "wide"])
@pytest.mark.parametrize(("family", "split"), list(itertools.product(FAMILIES, WIDE)))
def test_phrases_mean_exactly_their_referents(family: str, split: str, variety: str) -> None:
    for item in items(family, split, variety=variety):
        for referring in item.expressions:
            readings = parse(referring.text)
            size = item.instances.shape
            parts = [refers_to(reading, item.objects, *size) for reading in readings]
            assert tuple(sorted(set().union(*parts))) == referring.objects, referring.text
            for reading, part in zip(readings, parts, strict=True):
                if part and reading.number is not None:
                    assert len(part) == reading.number, referring.text
                elif part:
                    assert (len(part) > 1) == reading.plural, referring.text
            mask = item.mask(referring)
            expected = np.isin(item.instances, [k + 1 for k in referring.objects])
            assert np.array_equal(mask, expected)


# Families


def test_words() -> None:
    assert len(VOCABULARY) < 80
    assert tuple(sorted({word.lower() for word in VOCABULARY})) == VOCABULARY
    said = set()
    for _, _, item in everything():
        for referring in item.expressions:
            said |= set(referring.text.split(" "))
    assert said <= set(VOCABULARY)
    assert set(VOCABULARY) - said <= {"four"}


def test_no_scene_says_a_thing_twice() -> None:
    for _, _, item in everything():
        assert len(item.expressions) == 8
        assert len({referring.text for referring in item.expressions}) == 8


def test_families_keep_to_their_kind() -> None:
    place = {"left", "right", "top", "bottom", "above", "below", "next", "on", "at"}
    for family, _, item in everything():
        for referring in item.expressions:
            words = referring.text.split()
            if family != "grefshapes":
                assert len(referring.objects) == 1
            if family == "refshapes+":
                assert not place & set(words)
                assert not any(word.endswith("most") for word in words)
            if family == "refshapes":
                assert parse(referring.text)[0].relation is None
            if family == "refshapesg":
                assert 6 <= len(words) <= 14
                assert parse(referring.text)[0].relation is not None


def test_shares_of_referents_in_grefshapes() -> None:
    numbers = [
        len(referring.objects)
        for split in SPLITS
        for item in items("grefshapes", split)
        for referring in item.expressions
    ]
    none = numbers.count(0) / len(numbers)
    one = numbers.count(1) / len(numbers)
    assert 0.25 < none < 0.38
    assert 0.28 < one < 0.42


def test_phrases_that_mean_nothing_use_the_scenes_own_words() -> None:
    near = total = 0
    for split in SPLITS:
        for item in items("grefshapes", split):
            for referring in item.expressions:
                if referring.objects:
                    continue
                total += 1
                words = set(itertools.chain(*((o.shape, o.color) for o in item.objects)))
                said = {
                    word
                    for noun in nouns(parse(referring.text))
                    for word in (noun.shape, noun.color)
                    if word is not None
                }
                near += said <= words
    assert near > 0.7 * total


def test_scenes_speak_of_more_than_one_object() -> None:
    for family in FAMILIES:
        spoken = [
            len(set(itertools.chain(*(r.objects for r in item.expressions))))
            for item in items(family, "train")
        ]
        assert np.mean(spoken) > 3
