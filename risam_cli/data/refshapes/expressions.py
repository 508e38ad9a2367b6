"""Draws the expressions of a scene, family by family, each with exactly its referents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from risam_cli.data.refshapes.phrases import (
    GRAMMARS,
    HELD_OUT_GRAMMAR,
    Noun,
    Phrase,
    View,
    bits,
    write,
)
from risam_cli.data.refshapes.scene import Dice, SceneObject
from risam_cli.data.refshapes.vocabulary import (
    COLORS,
    COUNTS,
    EXTREMES,
    HELD_OUT,
    PLACES,
    RELATIONS,
    SHAPES,
)

_LONG_WORDS = (6, 14)  # fewest and most words of a refshapesg expression
_MAX_WORDS = 18
# Share of expressions of wide scenes that refer to nothing, in families after benchmarks that
# have none.
_WIDE_NOTHING = 0.12
# Tries for one more expression; a scene that needs more has too little to say.
_TRIES = 60


@dataclass(frozen=True, slots=True)
class Referring:
    """An expression and what it refers to.

    Attributes:
        text: lower-case words of ``VOCABULARY``, one space between two.
        objects: indices into the scene's objects, ascending; empty where nothing fits.
        kind: how it refers: "attribute", "place", "relation", "place+relation", or "and" for two
            things named one after the other.
    """

    text: str
    objects: tuple[int, ...]
    kind: str


def draw_expressions(
    dice: Dice,
    family: str,
    objects: Sequence[SceneObject],
    size: tuple[int, int],
    count: int,
    held_out: bool,
    *,
    wide: bool = False,
    clauses: bool = False,
) -> tuple[Referring, ...] | None:
    """``count`` different expressions of a scene, or None where it has too little to say.

    Args:
        family: one of ``FAMILIES``.
        objects: the scene's.
        size: height and width of the picture in pixels.
        held_out: testB: referents always include an object of a held-out pair. Otherwise no
            phrase names such a pair, not even one that refers to nothing.
        wide: in several grammars, and with phrases in every family that refer to nothing.
        clauses: testC: in the grammar that no other split speaks.
    """
    speaker = _Speaker(dice, objects, size, held_out, wide=wide, clauses=clauses)
    found: list[Referring] = []
    for _ in range(count):
        made = speaker.next(family)
        if made is None:
            return None
        found.append(made)
    return tuple(found)


# A drawn phrase with its referents; two phrases for "this one and that one".
_Draw = tuple[tuple[Phrase, ...], int]


class _Speaker:
    """Draws phrases about one scene and remembers what was said."""

    def __init__(
        self,
        dice: Dice,
        objects: Sequence[SceneObject],
        size: tuple[int, int],
        held_out: bool,
        *,
        wide: bool = False,
        clauses: bool = False,
    ) -> None:
        self.dice = dice
        self.objects = objects
        self.view = View(objects, size)
        self.held_out = held_out
        self.wide = wide
        self.clauses = clauses
        self.special = [
            number for number, item in enumerate(objects) if (item.shape, item.color) in HELD_OUT
        ]
        self.nouns = [_nouns(self.view, item) for item in objects]
        self.unique = [
            [noun for noun, named in choices if named == 1 << number]
            for number, choices in enumerate(self.nouns)
        ]
        self.used = [0] * len(objects)
        self.said: set[str] = set()
        self.meant: set[tuple[Phrase, ...]] = set()

    def next(self, family: str) -> Referring | None:
        """One more expression of a family."""
        draw = self._drawer(family)
        low, high = _LONG_WORDS if family == "refshapesg" else (1, _MAX_WORDS)
        if self.wide and family == "refshapesg":
            low, high = 4, _MAX_WORDS  # a telegram is shorter, a clause longer
        for number in range(_TRIES):
            if number and number % 15 == 0:
                draw = self._drawer(family)
            made = draw()
            if made is None:
                continue
            phrases, referents = made
            # Another wording of what was said already is a last resort.
            if phrases in self.meant and number < _TRIES // 3:
                continue
            if not self._may_say(phrases, referents):
                continue
            text = self._write(phrases)
            if text in self.said or not low <= text.count(" ") + 1 <= high:
                continue
            self.said.add(text)
            self.meant.add(phrases)
            chosen = tuple(bits(referents))
            for referent in chosen:
                self.used[referent] += 1
            return Referring(text, chosen, phrases[0].kind if len(phrases) == 1 else "and")
        return None

    def _write(self, phrases: tuple[Phrase, ...]) -> str:
        grammar = "plain"
        # Of two things named one after the other, "and" in a clause could be either's.
        if self.clauses and len(phrases) == 1:
            grammar = HELD_OUT_GRAMMAR
        elif self.wide:
            grammar = self.dice.weighted(
                GRAMMARS, (5, 2, 2, 3) if len(phrases) == 1 else (6, 2, 2, 0)
            )
        return " and ".join(write(self.dice, phrase, grammar) for phrase in phrases)

    def _may_say(self, phrases: tuple[Phrase, ...], referents: int) -> bool:
        if self.held_out:
            return not referents or any(referents >> number & 1 for number in self.special)
        return not any(phrase.held_out for phrase in phrases)

    def _drawer(self, family: str) -> Callable[[], _Draw | None]:
        """What kind of expression comes next."""
        dice = self.dice
        if self.wide and family != "grefshapes" and dice.unit() < _WIDE_NOTHING:
            return {
                "refshapes": self._nothing_there,
                "refshapes+": self._nothing_like_it,
                "refshapesg": self._nothing_related,
            }[family]
        if family == "refshapes+":
            return self._by_attributes
        if family == "refshapesg":
            return self._by_relation
        if family == "refshapes":
            return dice.weighted(
                (self._by_attributes, self._by_extreme, self._by_side), (40, 25, 35)
            )
        number = dice.weighted(("several", "none", "one"), (35, 30, 35))
        if number == "several":
            return dice.weighted((self._plural, self._pair), (75, 25))
        if number == "none":
            return self._nothing
        return dice.weighted(
            (self._by_attributes, self._by_extreme, self._by_side, self._by_relation),
            (40, 15, 20, 25),
        )

    # Single referents

    def _target(self, numbers: Sequence[int] | None = None) -> int | None:
        """An object to speak of: mostly one that was spoken of least.

        Args:
            numbers: to choose from; None for all. testB chooses among the held-out ones only.
        """
        choices = range(len(self.objects)) if numbers is None else numbers
        if self.held_out:
            choices = [number for number in choices if number in self.special]
        if not choices:
            return None
        if self.dice.unit() < 0.75:
            least = min(self.used[number] for number in choices)
            choices = [number for number in choices if self.used[number] == least]
        return self.dice.pick(choices)

    def _describe(self, number: int, sparing: float) -> Noun | None:
        """Attributes that fit one object alone.

        Args:
            sparing: chance to say no more words than needed.
        """
        choices = self.unique[number]
        if not choices:
            return None
        if self.dice.unit() < sparing:
            choices = [n for n in choices if not any(_within(other, n) for other in choices)]
        return self.dice.weighted(choices, [self._weight(noun) for noun in choices])

    def _weight(self, noun: Noun) -> float:
        """How readily a noun is taken."""
        if self.held_out and noun.held_out:
            return 3.0  # testB asks for the pair itself, not for a word that happens to suffice
        return 1.0 if noun.shape else 0.35

    def _by_attributes(self) -> _Draw | None:
        target = self._target([number for number, nouns in enumerate(self.unique) if nouns])
        noun = None if target is None else self._describe(target, sparing=0.7)
        return None if noun is None or target is None else ((Phrase(noun),), 1 << target)

    def _by_extreme(self) -> _Draw | None:
        target = self._target()
        if target is None:
            return None
        phrase = Phrase(self._loose_noun(target), extreme=self.dice.pick(EXTREMES))
        return self._if_exactly(phrase, target)

    def _by_side(self) -> _Draw | None:
        target = self._target()
        if target is None:
            return None
        phrase = Phrase(self._loose_noun(target), place=self.dice.pick(tuple(PLACES)))
        return self._if_exactly(phrase, target)

    def _by_relation(self) -> _Draw | None:
        target = self._target()
        if target is None:
            return None
        bit = 1 << target
        choices = [
            (relation, anchor)
            for relation in RELATIONS
            for anchor in range(len(self.objects))
            if self.view.related(relation, anchor)[0] & bit
        ]
        if not choices:
            return None
        for _ in range(4):
            relation, start = self.dice.pick(choices)
            anchor = self._anchor(start)
            if anchor is None:
                continue
            phrase = Phrase(self._loose_noun(target), relation=relation, anchor=anchor)
            chance = self.dice.unit()
            if chance < 0.12:
                phrase = replace(phrase, extreme=self.dice.pick(EXTREMES))
            elif chance < 0.24:
                phrase = replace(phrase, place=self.dice.pick(tuple(PLACES)))
            made = self._if_exactly(phrase, target)
            if made is not None:
                return made
        return None

    def _anchor(self, number: int) -> Phrase | None:
        noun = self._describe(number, sparing=0.45)
        if noun is not None and self.dice.unit() < 0.93:
            return Phrase(noun)
        phrase = Phrase(self._loose_noun(number), extreme=self.dice.pick(EXTREMES))
        return phrase if self.view.referents(phrase) == 1 << number else None

    def _loose_noun(self, number: int) -> Noun:
        """Attributes that mostly fit others too, so that a place or a relation must decide."""
        choices = self.nouns[number]
        weights = []
        for noun, named in choices:
            weight = self._weight(noun) * (0.12 if named == 1 << number else 1.0)
            if noun == Noun():
                weight *= 0.6
            weights.append(weight)
        return self.dice.weighted(choices, weights)[0]

    def _if_exactly(self, phrase: Phrase, target: int) -> _Draw | None:
        return ((phrase,), 1 << target) if self.view.fits(phrase) == 1 << target else None

    # Several referents

    def _plural(self) -> _Draw | None:
        target = self._target()
        if target is None:
            return None
        choices = [entry for entry in self.nouns[target] if entry[1].bit_count() >= 2]
        if not choices:
            return None
        weights = [self._weight(noun) for noun, _ in choices]
        phrase = Phrase(self.dice.weighted(choices, weights)[0], number=0)
        chance = self.dice.unit()
        if phrase.noun == Noun() or chance < 0.3:
            phrase = replace(phrase, place=self.dice.pick(tuple(PLACES)))
        elif chance < 0.6:
            start = self.dice.below(len(self.objects))
            anchor = self._anchor(start)
            if anchor is None:
                return None
            phrase = replace(phrase, relation=self.dice.pick(RELATIONS), anchor=anchor)
        found = self.view.fits(phrase)
        if not found:
            return None
        number = found.bit_count()
        if number in COUNTS and self.dice.unit() < 0.5:
            phrase = replace(phrase, number=number)
        return (phrase,), found

    def _pair(self) -> _Draw | None:
        first, second = self._by_attributes(), self._by_attributes()
        if first is None or second is None or first[1] == second[1]:
            return None
        return first[0] + second[0], first[1] | second[1]

    # No referent

    def _nothing(self) -> _Draw | None:
        chance = self.dice.unit()
        number = 0 if self.dice.unit() < 0.3 else 1
        if chance < 0.5:
            phrase = Phrase(self._missing_noun(), number=number)
            if self.dice.unit() < 0.25:
                phrase = replace(phrase, place=self.dice.pick(tuple(PLACES)))
            elif number == 1 and self.dice.unit() < 0.15:
                phrase = replace(phrase, extreme=self.dice.pick(EXTREMES))
        else:
            noun = self.dice.pick(self.dice.pick(self.nouns))[0]
            if noun == Noun():
                return None
            if chance < 0.7:
                phrase = Phrase(noun, place=self.dice.pick(tuple(PLACES)), number=number)
            else:
                anchor = self._anchor(self.dice.below(len(self.objects)))
                if chance > 0.9:
                    anchor = Phrase(self._missing_noun())
                if anchor is None:
                    return None
                relation = self.dice.pick(RELATIONS)
                phrase = Phrase(noun, relation=relation, anchor=anchor, number=number)
        if number == 0 and self.dice.unit() < 0.3:
            phrase = replace(phrase, number=2 + self.dice.below(2))
        return ((phrase,), 0) if self.view.referents(phrase) == 0 else None

    def _nothing_like_it(self) -> _Draw | None:
        phrase = Phrase(self._missing_noun())
        return ((phrase,), 0) if self.view.referents(phrase) == 0 else None

    def _nothing_there(self) -> _Draw | None:
        """A thing that is not in the scene, or not on that side of it."""
        if self.dice.unit() < 0.4:
            return self._nothing_like_it()
        noun = self.dice.pick(self.dice.pick(self.nouns))[0]
        phrase = Phrase(noun, place=self.dice.pick(tuple(PLACES)))
        nothing = noun != Noun() and self.view.referents(phrase) == 0
        return ((phrase,), 0) if nothing else None

    def _nothing_related(self) -> _Draw | None:
        """A thing that is not in the scene, or not there by an anchor, or an anchor that is not."""
        noun = self.dice.pick(self.dice.pick(self.nouns))[0]
        anchor = self._anchor(self.dice.below(len(self.objects)))
        chance = self.dice.unit()
        if chance < 0.25:
            noun = self._missing_noun()
        elif chance < 0.4:
            anchor = Phrase(self._missing_noun())
        if anchor is None or noun == Noun():
            return None
        phrase = Phrase(noun, relation=self.dice.pick(RELATIONS), anchor=anchor)
        return ((phrase,), 0) if self.view.referents(phrase) == 0 else None

    def _missing_noun(self) -> Noun:
        """Attributes that fit nothing, mostly with each word true of something in the scene."""
        dice = self.dice
        for number in range(16):
            shape, color = dice.pick(self.objects).shape, dice.pick(self.objects).color
            # A scene may hold every pair of its shapes and colours: then a word must come from
            # outside.
            if number >= 10 or dice.unit() < 0.08:
                if dice.unit() < 0.5:
                    shape = dice.pick(SHAPES)
                else:
                    color = dice.pick(COLORS)
            noun = Noun(shape, color, dice.weighted((None, "small", "large"), (3, 1, 1)))
            if dice.unit() < 0.15:
                noun = replace(noun, shape=None) if dice.unit() < 0.5 else replace(noun, color=None)
            if self._fits_nothing(noun):
                return noun
        return Noun(dice.pick(SHAPES), dice.pick(COLORS))

    def _fits_nothing(self, noun: Noun) -> bool:
        """Whether no object comes near a noun that names more than a size."""
        if noun.shape is None and noun.color is None:
            return False
        unsized = bits(self.view.named(replace(noun, size=None)))
        if noun.size is None:
            return not unsized
        # A medium one fits neither size word; to deny on that alone is hard on the eye.
        return not any(self.objects[k].size in ("medium", noun.size) for k in unsized)


def _nouns(view: View, item: SceneObject) -> list[tuple[Noun, int]]:
    """Every choice of an object's attribute words, with all objects that each fits."""
    found = []
    for choice in range(8):
        if choice & 4 and item.size == "medium":
            continue
        noun = Noun(
            item.shape if choice & 1 else None,
            item.color if choice & 2 else None,
            item.size if choice & 4 else None,
        )
        found.append((noun, view.named(noun)))
    return found


def _within(less: Noun, more: Noun) -> bool:
    """Whether ``less`` says a part of what ``more`` says, and not all of it."""
    pairs = ((less.shape, more.shape), (less.color, more.color), (less.size, more.size))
    return less != more and all(word is None or word == other for word, other in pairs)
