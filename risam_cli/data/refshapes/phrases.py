"""Structured phrases, the one checker that says what they refer to, and their wording.

A phrase is a structure first; its referents are computed from the scene and its text is written
from the same structure, so that text and referents cannot part. What is close to the border of a
word's meaning is neither true nor false: :meth:`View.referents` answers None and the phrase is
dropped. The borders are the constants below (fractions of the picture's longer side, unless said).

Sets of objects are bit masks: bit k stands for ``objects[k]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from risam_cli.data.refshapes.scene import Dice, SceneObject
from risam_cli.data.refshapes.vocabulary import (
    COUNTS,
    EXTREMES,
    HELD_OUT,
    PLACES,
    PLURALS,
    RELATION_PHRASES,
    STAND_INS,
)

EXTREME_MARGIN = 0.07
"""The leftmost object's centroid lies at least this far beyond the next one's."""
HALF_YES, HALF_NO = 0.42, 0.50
""""on the left": centroid before the first, as a fraction of the width (for "at the top", of the
height); clearly not there: beyond the second."""
CONE_YES, CONE_NO = 40.0, 55.0
""""left of" and its kin: degrees between the way from reference to object and the axis."""
LEAST_WAY = 0.08
"""Centroids nearer than this have no clear direction."""
GAP_YES, GAP_NO = 0.06, 0.14
""""next to": distance of centroids less both radii, at most the first; clearly not: at least
the second."""

_TAN_YES, _TAN_NO = math.tan(math.radians(CONE_YES)), math.tan(math.radians(CONE_NO))
# Axis and sign of each extreme, place and direction; the axis is 0 for x, 1 for y (down).
_AXES = {
    **dict(zip(EXTREMES, ((0, -1), (0, 1), (1, -1), (1, 1)), strict=True)),
    **dict(zip(PLACES, ((0, -1), (0, 1), (1, -1), (1, 1)), strict=True)),
    "above": (1, -1),
    "below": (1, 1),
}


@dataclass(frozen=True, slots=True)
class Noun:
    """Attribute words; a missing shape is said as "object" or "thing"."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether it names a pair that only testB may speak of."""
        return (self.shape, self.color) in HELD_OUT


@dataclass(frozen=True, slots=True)
class Phrase:
    """What an expression says.

    Attributes:
        noun: the attributes of what is meant.
        extreme: "leftmost" and its kin, or None.
        place: "left", "right", "top", "bottom" (a side of the picture), or None.
        relation: "left", "right", "above", "below", "next" (to the anchor), or None.
        anchor: the one object that a relation starts from; noun and extreme only.
        number: 1 for a singular; 0 for all that fit, at least two; otherwise the number said.
    """

    noun: Noun
    extreme: str | None = None
    place: str | None = None
    relation: str | None = None
    anchor: Phrase | None = None
    number: int = 1

    @property
    def kind(self) -> str:
        """How it refers: "attribute", "place", "relation" or "place+relation"."""
        placed = self.extreme or self.place
        if self.relation:
            return "place+relation" if placed else "relation"
        return "place" if placed else "attribute"

    @property
    def held_out(self) -> bool:
        """Whether it or its anchor names a pair that only testB may speak of."""
        return self.noun.held_out or (self.anchor is not None and self.anchor.held_out)


class View:
    """A scene as the checker sees it: which objects each word is clearly true of.

    Args:
        objects: at most 64.
        size: height and width of the picture in pixels.
    """

    def __init__(self, objects: Sequence[SceneObject], size: tuple[int, int]) -> None:
        height, width = size
        side = max(size)
        self.objects = objects
        self.extent = width / side, height / side
        self.count = len(objects)
        self.everything = (1 << self.count) - 1
        self.centres = [(item.cx / side, item.cy / side) for item in objects]
        self.radii = [item.radius / side for item in objects]
        self._words: dict[str, int] = {}
        for number, item in enumerate(objects):
            for word in (item.shape, item.color, item.size):
                self._words[word] = self._words.get(word, 0) | 1 << number
        self._sides = {place: self._side(*_AXES[place]) for place in PLACES}
        self._relations: dict[str, list[tuple[int, int]]] = {
            relation: [(0, 0)] * self.count for relation in RELATION_PHRASES
        }
        for anchor in range(self.count):
            self._relate(anchor)

    def named(self, noun: Noun) -> int:
        """Objects that the noun's attributes fit."""
        found = self.everything
        for word in (noun.shape, noun.color, noun.size):
            if word is not None:
                found &= self._words.get(word, 0)
        return found

    def related(self, relation: str, anchor: int) -> tuple[int, int]:
        """Objects clearly in a relation to ``objects[anchor]``, and those at its border."""
        return self._relations[relation][anchor]

    def referents(self, phrase: Phrase) -> int | None:
        """What a phrase refers to; None where that is open to doubt.

        Says nothing about number: see :meth:`fits`.
        """
        named = found = self.named(phrase.noun)
        if phrase.place is not None:
            inside, outside = self._sides[phrase.place]
            if found & ~(inside | outside):
                return None
            found &= inside
        if phrase.relation is not None and phrase.anchor is not None:
            start = self.referents(phrase.anchor)
            if start is None or start & (start - 1):
                return None  # no anchor at all is clear: then nothing is meant
            if not start:
                return 0
            sure, doubtful = self.related(phrase.relation, start.bit_length() - 1)
            if found & doubtful:
                return None
            found &= sure
        if phrase.extreme is None or not found:
            return found
        # "the leftmost circle above the star" reads as the leftmost of those above it, or as the
        # leftmost circle, which is above it: both must agree.
        first = self._first(phrase.extreme, found)
        if found != named and self._first(phrase.extreme, named) != first:
            return None
        return first

    def fits(self, phrase: Phrase) -> int | None:
        """Referents where their number suits the phrase's: none, or one, all or the count said."""
        found = self.referents(phrase)
        if not found:
            return found
        number = found.bit_count()
        wanted = number == phrase.number if phrase.number else number >= 2
        return found if wanted else None

    def _first(self, extreme: str, found: int) -> int | None:
        axis, sign = _AXES[extreme]
        ways = sorted(
            (-sign * self.centres[number][axis], number)
            for number in range(self.count)
            if found >> number & 1
        )
        if len(ways) > 1 and ways[1][0] - ways[0][0] < EXTREME_MARGIN:
            return None
        return 1 << ways[0][1]

    def _side(self, axis: int, sign: int) -> tuple[int, int]:
        inside = outside = 0
        for number, centre in enumerate(self.centres):
            way = centre[axis] / self.extent[axis]
            way = way if sign < 0 else 1 - way
            if way < HALF_YES:
                inside |= 1 << number
            elif way > HALF_NO:
                outside |= 1 << number
        return inside, outside

    def _relate(self, anchor: int) -> None:
        ax, ay = self.centres[anchor]
        sure = dict.fromkeys(RELATION_PHRASES, 0)
        doubtful = dict.fromkeys(RELATION_PHRASES, 0)
        for number in range(self.count):
            if number == anchor:
                continue
            bit = 1 << number
            dx, dy = self.centres[number][0] - ax, self.centres[number][1] - ay
            way = math.hypot(dx, dy)
            gap = way - self.radii[number] - self.radii[anchor]
            if gap <= GAP_YES:
                sure["next"] |= bit
            elif gap < GAP_NO:
                doubtful["next"] |= bit
            for relation in ("left", "right", "above", "below"):
                axis, sign = _AXES[relation]
                along, across = (dx, abs(dy)) if axis == 0 else (dy, abs(dx))
                along *= sign
                if way < LEAST_WAY:
                    doubtful[relation] |= bit
                elif across <= _TAN_YES * along:
                    sure[relation] |= bit
                elif across <= _TAN_NO * along:
                    doubtful[relation] |= bit
        for relation, entries in self._relations.items():
            entries[anchor] = (sure[relation], doubtful[relation])


def bits(mask: int) -> list[int]:
    """Numbers of the set bits, ascending."""
    return [number for number in range(mask.bit_length()) if mask >> number & 1]


GRAMMARS: tuple[str, ...] = ("plain", "telegraphic", "fronted", "joined")
"""Of wide scenes: "the small red circle left of the star", "small red circle left of star",
"left of the star the small red circle", "the red and small circle left of the star"."""
HELD_OUT_GRAMMAR = "clause"
"""The way that testC alone speaks: "the circle that is small and red"."""


def write(dice: Dice, phrase: Phrase, grammar: str = "plain") -> str:
    """A wording of a phrase.

    Args:
        grammar: one of ``GRAMMARS``, or ``HELD_OUT_GRAMMAR``.
    """
    words_of = {
        "plain": _plain,
        "telegraphic": _telegraphic,
        "fronted": _fronted,
        "joined": _joined,
        HELD_OUT_GRAMMAR: _clause,
    }
    return " ".join(words_of[grammar](dice, phrase))


def _plain(dice: Dice, phrase: Phrase) -> list[str]:
    """As most people speak: "the small red circle on the left", "both stars that are red"."""
    plural = phrase.number != 1
    noun, tail = phrase.noun, ""
    bare = phrase.place is None and phrase.relation is None and phrase.extreme is None
    if bare and noun.color is not None and dice.unit() < 0.16:
        tail = f"that {'are' if plural else 'is'} {noun.color}"
        noun = replace(noun, color=None)
    words = _determine(dice, phrase, _noun_words(dice, noun, plural)) + ([tail] if tail else [])
    link = ["that", "are" if plural else "is"]
    if phrase.place is not None:
        if dice.unit() < 0.08:
            words += link
        words.append(PLACES[phrase.place])
    # After a place the link says that the relation belongs to the head, not to the place.
    if phrase.relation is not None and (phrase.place is not None or dice.unit() < 0.2):
        words += link
    return words + _related(dice, phrase, article=True)


def _telegraphic(dice: Dice, phrase: Phrase) -> list[str]:
    """As few words as will do, no article: "leftmost red circle", "two stars above ring"."""
    words = _noun_words(dice, phrase.noun, phrase.number != 1)
    if phrase.number > 1:
        words.insert(0, COUNTS[phrase.number])
    elif phrase.number == 0:
        words.insert(0, "all")
    if phrase.extreme is not None:
        words.insert(0, phrase.extreme)
    if phrase.place is not None:
        words += [PLACES[phrase.place]] if dice.unit() < 0.4 else ["at", phrase.place]
    return words + _related(dice, phrase, article=False)


def _fronted(dice: Dice, phrase: Phrase) -> list[str]:
    """Where it is comes first: "on the left the red circle", "above the star a large ring"."""
    where = [] if phrase.place is None else [PLACES[phrase.place]]
    where += _related(dice, phrase, article=True)
    words = _noun_words(dice, phrase.noun, phrase.number != 1)
    return where + _determine(dice, phrase, words)


def _joined(dice: Dice, phrase: Phrase) -> list[str]:
    """What is said of one thing joined by "and": "the red and large star at the top and above the
    small and blue ring". So "and" does not always name a second thing.
    """
    words = _noun_words(dice, phrase.noun, phrase.number != 1, joined=True)
    words = _determine(dice, phrase, words)
    related = _related(dice, phrase, article=True, joined=True)
    if phrase.place is not None:
        words += [PLACES[phrase.place], *(["and"] if related else [])]
    return words + related


def _clause(dice: Dice, phrase: Phrase) -> list[str]:
    """All that is said of it in a clause: "the star that is large and red and at the top"."""
    plural = phrase.number != 1
    words = _noun_words(dice, Noun(phrase.noun.shape), plural)
    said = [[word] for word in (phrase.noun.size, phrase.noun.color) if word is not None]
    if phrase.place is not None:
        said.append([PLACES[phrase.place]])
    if phrase.relation is not None:
        said.append(_related(dice, phrase, article=True))
    words = _determine(dice, phrase, words)
    for number, part in enumerate(said):
        words += (["and"] if number else ["that", "are" if plural else "is"]) + part
    return words


def _related(dice: Dice, phrase: Phrase, *, article: bool, joined: bool = False) -> list[str]:
    """The relation's words with those of its anchor; none without a relation."""
    if phrase.relation is None or phrase.anchor is None:
        return []
    words = [dice.pick(RELATION_PHRASES[phrase.relation]), *(["the"] if article else [])]
    if phrase.anchor.extreme is not None:
        words.append(phrase.anchor.extreme)
    return words + _noun_words(dice, phrase.anchor.noun, plural=False, joined=joined)


def _noun_words(dice: Dice, noun: Noun, plural: bool, *, joined: bool = False) -> list[str]:
    name = noun.shape or dice.pick(STAND_INS)
    said = [word for word in (noun.size, noun.color) if word is not None]
    if joined and len(said) == 2:
        first, second = dice.sample(said, 2)
        said = [first, "and", second]
    return [*said, PLURALS[name] if plural else name]


def _determine(dice: Dice, phrase: Phrase, words: list[str]) -> list[str]:
    """Puts "the", "a", "all", a number or nothing, and a superlative before a head's words."""
    if phrase.extreme is not None:
        words = [phrase.extreme, *words]
    starts: tuple[str, ...]
    weights: tuple[int, ...]
    if phrase.number == 1:
        starts, weights = ("the", "", "a"), (6, 3, 1)
        # "a" with a superlative is no English, and no "an" is needed where vowels are left out.
        if phrase.extreme is not None or words[0][0] in "aeiou":
            weights = (6, 3, 0)
    elif phrase.number == 0:
        starts, weights = ("all the", "all", "the"), (4, 3, 3)
    elif phrase.number == 2:
        starts, weights = ("the two", "both", "two"), (5, 3, 1)
    else:
        said = COUNTS[phrase.number]
        starts, weights = (f"the {said}", f"all {said}", said), (5, 3, 1)
    start = dice.weighted(starts, weights)
    return [start, *words] if start else words
