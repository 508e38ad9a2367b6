"""Training pictures may change, what is said of them stays true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from risam_cli.data.refshapes.dataset import RefShapes
from risam_cli.data.refshapes.phrases import Noun, Phrase, View, write
from risam_cli.data.refshapes.scene import Dice
from risam_cli.settings.data import AugmentSettings
from risam_cli.training.data.augment import Augmentation, Picture, crop, flip, jittered
from risam_cli.training.data.dataset import make_example
from risam_cli.training.data.wording import flipped, speaks_of_color, survives_cutting

# --- words ----------------------------------------------------------------------------------------

TURNED = {
    "left guy": "right guy",
    "Leftmost Zebra": "Rightmost Zebra",
    "man on far RIGHT": "man on far LEFT",
    "second from left": "second from right",
    "the car that is left of the bus": "the car that is right of the bus",
    "the one on the right behind the man": "the one on the left behind the man",
    "left-hand side": "right-hand side",
    "the left handed batter": "the right handed batter",
    "lft cow": "rt cow",
    "kid with the cup in his left hand": "kid with the cup in his right hand",
    "arrow turning clockwise": "arrow turning counterclockwise",
    "arrow turning anticlockwise": "arrow turning clockwise",
    "left t-shirt": "right t-shirt",
    "3rd from right": "3rd from left",
    "second shelf from the top": "second shelf from the top",
    "bright upright copyright leftovers": "bright upright copyright leftovers",
    "leftover pizza on the left": "leftover pizza on the right",
    "the bottom-left cup": "the bottom-right cup",
    "far-right man, second-from-LEFT": "far-left man, second-from-RIGHT",
    "top-left-hand mug": "top-right-hand mug",
    "brightly-lit copyrighted lefty": "brightly-lit copyrighted righty",
    "a dog": "a dog",
}
UNTURNABLE = [
    "player number 22",
    "bus 52 on the left",
    "shirt that says Nike",
    "left r",
    'the "left" button',
    "NYC taxi on left",
    "the word stop",
    "the time on the clock",
    "the slice that is left",
    "what's left of the cake is left",
    "food left over on plate",
    "right behind the man",
    "car right next to the bus",
    "bottle right side up",
    "going the right way",
    "player in left field",
    "the one facing east",
    "port side boat",
    "lefft cow",
    "rigth cow",
    "左边的狗",
    "coca cola can",
    "left to right the second",
    "topleft cup",
    "the upperright one",
    "far-leftish dog",
    "letf cow",
    "lt guy",
    "rgt guy",
    "arrow turning counter clockwise",
    "arrow turning anti-clockwise",
    "southpaw",
    "second giraffe",
    "the 3rd man",
]


@pytest.mark.parametrize("text", TURNED)
def test_left_and_right_change_places(text: str) -> None:
    assert flipped(text) == TURNED[text]


@pytest.mark.parametrize("text", UNTURNABLE)
def test_what_a_mirror_may_make_untrue_is_not_turned(text: str) -> None:
    assert flipped(text) is None


WORDS = st.sampled_from(
    [
        "left",
        "right",
        "Left",
        "RIGHT",
        "leftmost",
        "rightmost",
        "left-hand",
        "righty",
        "clockwise",
        "counterclockwise",
        "of",
        "the",
        "man",
        "dog",
        "on",
        "to",
        "far",
        "second",
        "is",
        "red",
        "car",
        "behind",
        "next",
        "side",
        "bright",
        "leftover",
        "handed",
        "3rd",
        "t-shirt",
    ]
)


@given(st.lists(WORDS, min_size=1, max_size=9).map(" ".join))
def test_turning_twice_gives_the_words_back(text: str) -> None:
    once = flipped(text)
    if once is not None:
        assert len(once.split()) == len(text.split())
        assert flipped(once) in (text, None)


NOUNS = st.builds(
    Noun,
    st.sampled_from([None, "circle", "star"]),
    st.sampled_from([None, "red", "green"]),
    st.sampled_from([None, "small", "large"]),
)
SIDES = st.sampled_from([None, "left", "right", "top", "bottom"])
EXTREMES = st.sampled_from([None, "leftmost", "rightmost", "topmost", "bottommost"])
MIRROR = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}


def _mirrored(phrase: Phrase) -> Phrase:
    def turn(word: str | None) -> str | None:
        return MIRROR.get(word or "", word)

    anchor = None if phrase.anchor is None else _mirrored(phrase.anchor)
    return replace(
        phrase,
        extreme=turn(phrase.extreme),
        place=turn(phrase.place),
        relation=turn(phrase.relation),
        anchor=anchor,
    )


@given(
    noun=NOUNS,
    extreme=EXTREMES,
    place=SIDES,
    relation=st.sampled_from([None, "left", "right", "above", "next"]),
    anchor=st.builds(Phrase, NOUNS, EXTREMES),
    number=st.sampled_from([0, 1, 2]),
    scene=st.integers(0, 40),
)
def test_turned_words_mean_in_the_mirrored_scene_what_they_meant_before(
    noun: Noun,
    extreme: str | None,
    place: str | None,
    relation: str | None,
    anchor: Phrase,
    number: int,
    scene: int,
) -> None:
    """RefShapes knows what its phrases refer to, so the truth of a flip can be computed."""
    said = Phrase(noun, extreme, place, relation, anchor if relation else None, number)
    turned = _mirrored(said)
    key = f"wording/{scene}"
    assert flipped(write(Dice(key), said)) == write(Dice(key), turned)
    item = RefShapes("refshapes", "train", size=128).scene(scene)
    mirrored = [replace(thing, cx=128 - thing.cx) for thing in item.objects]
    assert View(mirrored, (128, 128)).referents(turned) == View(item.objects, (128, 128)).referents(
        said
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the man in a hat", True),
        ("biggest dog", True),
        ("all the bowls", True),
        ("left man", False),
        ("leftmost", False),
        ("middle donut", False),
        ("the tree nearest the edge", False),
        ("man behind the counter", False),
        ("the other one", False),
        ("half visible giraffe", False),
        ("the bottom-left cup", False),
        ("topleft cup", False),
        ("leftside man", False),
        ("rigth cow", False),
        ("a t-shirt in bright colours", True),
        ("smallest elephant", False),
        ("3rd cup", False),
        ("cup 3", False),
        ("two cups", False),
        ("背景", False),
    ],
)
def test_which_expressions_survive_cutting(text: str, expected: bool) -> None:
    assert survives_cutting(text) is expected


@pytest.mark.parametrize(
    "text",
    [
        *("red shirt", "Blonde girl", "darker horse", "reddish", "blk cat"),
        *("purplish cup", "whitest dog", "redder apple", "brightly dressed man", "redshirt"),
        *("multicolor kite", "a fuchsia dress", "rosy cheeks", "backlit bottle", "b&w cat"),
    ],
)
def test_words_of_color_are_seen(text: str) -> None:
    assert speaks_of_color(text)


@pytest.mark.parametrize(
    "text", ["the tank", "a credit card", "man on the left", "bored kid", "a reddit mug"]
)
def test_other_words_are_no_colors(text: str) -> None:
    assert not speaks_of_color(text)


# --- pictures -------------------------------------------------------------------------------------


def _picture(*texts: str, size: tuple[int, int] = (40, 60), seed: int = 0) -> Picture:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    masks = []
    for _ in texts:
        mask = np.zeros(size, np.bool_)
        y, x = rng.integers(0, size[0] - 5), rng.integers(0, size[1] - 5)
        mask[y : y + rng.integers(1, 12), x : x + rng.integers(1, 12)] = True
        masks.append(mask)
    return Picture(image, tuple(masks), texts)


def _same(a: Picture, b: Picture) -> bool:
    return (
        np.array_equal(a.image, b.image)
        and all(np.array_equal(m, n) for m, n in zip(a.masks, b.masks, strict=True))
        and (a.texts, a.scale) == (b.texts, b.scale)
    )


def test_a_flip_turns_pixels_masks_and_words_and_undoes_itself() -> None:
    picture = _picture("left dog", "a cat")
    once = flip(picture)
    np.testing.assert_array_equal(once.image, picture.image[:, ::-1])
    np.testing.assert_array_equal(once.masks[1], picture.masks[1][:, ::-1])
    assert once.texts == ("right dog", "a cat")
    assert _same(flip(once), picture)


def test_one_word_that_cannot_be_turned_keeps_the_picture() -> None:
    picture = _picture("left dog", "bus 52")
    assert flip(picture) is picture


@given(seed=st.integers(0, 10_000), least=st.floats(0.05, 1.0), texts=st.integers(1, 4))
def test_a_cut_keeps_every_referent_whole(seed: int, least: float, texts: int) -> None:
    picture = _picture(*["a dog"] * texts, seed=seed)
    part = crop(picture, least, np.random.default_rng(seed))
    height, width = part.image.shape[:2]
    assert height >= int(40 * least)
    assert width >= int(60 * least)
    for before, after in zip(picture.masks, part.masks, strict=True):
        assert after.shape == (height, width)
        assert after.sum() == before.sum()
        # The very pixels that the mask covers, and no others, are still covered.
        np.testing.assert_array_equal(part.image[after], picture.image[before])


def test_where_nothing_fits_anything_may_be_cut() -> None:
    picture = replace(_picture("a dog"), masks=(np.zeros((40, 60), np.bool_),))
    part = crop(picture, 0.5, np.random.default_rng(0))
    assert part.image.shape[0] < 40
    assert not part.masks[0].any()


@pytest.mark.parametrize("text", ["left dog", "dog next to the car", "half a dog"])
def test_a_picture_with_words_for_places_is_not_cut(text: str) -> None:
    picture = _picture("a dog", text)
    assert crop(picture, 0.3, np.random.default_rng(0)) is picture


def test_jitter_changes_colors_a_little_and_nothing_else() -> None:
    image = _picture("x").image
    changed = [jittered(image, np.random.default_rng(k)) for k in range(8)]
    assert all(c.shape == image.shape and c.dtype == np.uint8 for c in changed)
    assert all(not np.array_equal(c, image) for c in changed)
    gray = np.repeat(image[..., :1], 3, axis=2)
    after = jittered(gray, np.random.default_rng(1)).astype(int)
    # Gray has no hue: light and dark may move, but in the same order everywhere.
    assert np.abs(np.diff(after, axis=2)).max() <= 1
    order = np.argsort(gray[..., 0], axis=None, kind="stable")
    assert (np.diff(after[..., 0].ravel()[order]) >= 0).all()


ALL = Augmentation(
    AugmentSettings(flip=0.5, crop=0.5, crop_least=0.4, shrink=0.5, jitter=0.5), seed=3
)


def test_what_is_drawn_is_a_function_of_seed_epoch_and_item() -> None:
    picture = _picture("left dog", "a cat")
    plain = _picture("a dog", "a cat")
    for one in (picture, plain):
        drawn = [ALL(one, epoch, item) for epoch in range(4) for item in range(4)]
        again = [ALL(one, epoch, item) for epoch in range(4) for item in range(4)]
        assert all(_same(a, b) for a, b in zip(drawn, again, strict=True))
        assert len({(d.image.tobytes(), d.texts, d.scale) for d in drawn}) > 10
    other = replace(ALL, seed=4)
    assert any(not _same(ALL(plain, 0, k), other(plain, 0, k)) for k in range(4))


def test_colors_stay_where_one_expression_names_one() -> None:
    only = Augmentation(AugmentSettings(jitter=1.0))
    named = _picture("a dog", "red car")
    assert np.array_equal(only(named, 0, 0).image, named.image)
    unnamed = _picture("a dog", "a car")
    assert not np.array_equal(only(unnamed, 0, 0).image, unnamed.image)


def test_each_change_draws_its_own_numbers() -> None:
    """So that switching one on leaves the others as they were."""
    picture = _picture("a dog")
    with_crop = Augmentation(AugmentSettings(crop=1.0, crop_least=0.4), seed=1)
    with_both = Augmentation(AugmentSettings(flip=1.0, crop=1.0, crop_least=0.4), seed=1)
    for item in range(4):
        mirrored = with_both(picture, 0, item).image[:, ::-1]
        assert mirrored.shape == with_crop(picture, 0, item).image.shape


def test_expressions_are_drawn_anew_each_epoch_until_all_were_there() -> None:
    picture = _picture(*(f"dog {k}" for k in "abcdefg"))
    few = Augmentation(AugmentSettings(expressions_per_image=3))
    seen = [few(picture, epoch, 0).texts for epoch in range(30)]
    assert all(len(texts) == 3 and list(texts) == sorted(texts) for texts in seen)
    assert {text for texts in seen for text in texts} == set(picture.texts)


def _share(target: NDArray[np.uint8], size: int) -> float:
    return float(target.sum()) / 255 / target.size * size * size


def test_a_shrunk_picture_takes_less_of_the_square_with_its_masks() -> None:
    mask = np.zeros((40, 60), np.bool_)
    mask[10:30, 20:50] = True
    picture = Picture(np.full((40, 60, 3), 7, np.uint8), (mask,), ("dog",))
    whole = make_example(picture, 240, 60)
    half = make_example(replace(picture, scale=0.5), 240, 60)
    assert whole.image.shape == (160, 240, 3)
    assert half.image.shape == (80, 120, 3)
    assert _share(whole.targets[0], 240) == pytest.approx(600 * 16, rel=0.02)
    assert _share(half.targets[0], 240) == pytest.approx(600 * 4, rel=0.04)
    # Column 50 of 60 is pixel 100 of 120, the end of cell 24.
    assert np.flatnonzero((half.targets[0] > 127).any(axis=0)).max() == 24
