"""What every reader gives: an ordered index of images and their expressions, drawn lazily.

The index holds names and ids only. Masks are drawn when a sample is asked for, once for each set
of annotations, so memory stays at the annotation file's own size however long the split is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from risam_cli.console.text import counted
from risam_cli.data.identity import has_words
from risam_cli.errors import DataError
from risam_cli.masks import rle as masks
from risam_cli.types import Expression, Failure, Rle, Sample

Draw = Callable[[Any], Rle]
Truth = Literal["once", "resized"]
Redraw = Callable[[Any, Truth, int], Rle | None]
OnFailure = Callable[[Failure], None]


class Columns:
    """Columns of the data's own records that expressions are to carry, beside what readers know.

    Attributes:
        seen: names of all columns that hold text, numbers or truth values.

    Args:
        wanted: names of those to keep.
    """

    def __init__(self, wanted: Iterable[str] = ()) -> None:
        self.wanted = frozenset(wanted)
        self.seen: dict[str, None] = {}

    def of(self, *records: Mapping[str, Any]) -> dict[str, Any]:
        """The wanted values, the first record's before others'; ``attributes`` are columns too."""
        found: dict[str, Any] = {}
        for record in records if self.wanted else ():
            inner = record.get("attributes")
            for values in (record, inner if isinstance(inner, Mapping) else {}):
                for name, value in values.items():
                    if isinstance(value, (str, int, float)):
                        self.seen[name] = None
                        if name in self.wanted:
                            found.setdefault(name, value)
        return found


@dataclass(frozen=True, slots=True)
class Phrase:
    """One expression before its mask is drawn.

    Attributes:
        parts: keys of what it refers to, each drawn by the group's ``draw``; empty where nothing
            fits; None where the truth is unknown.
        attributes: see :class:`risam_cli.types.Expression`.
    """

    id: str
    text: str
    parts: tuple[Any, ...] | None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """One image with its phrases.

    Attributes:
        draw: gives the RLE of one part at ``size``; raises DataError.
        write: writes the image to ``path`` where it is made, not found; else None.
        redraw: gives the RLE of a part that ``draw`` has drawn by another rule, or None where that
            says the same; None where the data set knows one rule only.
    """

    image: str
    path: Path
    size: tuple[int, int] | None
    phrases: tuple[Phrase, ...]
    draw: Draw
    write: Callable[[], None] | None = None
    redraw: Redraw | None = None


@dataclass(frozen=True, slots=True)
class SampleSource:
    """A split of a data set: random access, iteration, counts.

    Attributes:
        dataset: its name, such as ``refcoco+``.
        split: its name.
        files: the annotation files that were read.
        groups: one entry an image, in the annotation's order; may be made on access.
        counts: what the split holds, whatever ``limit`` says: images, expressions, refs …
        notes: what was left out on purpose, each with its number.
        order: indices of ``groups`` in the order to go through them; None for their own.
        limit: most expressions to give; the last image is cut short where it would go over.
        generated: images are made when they are asked for, so their files come and go.
        truth, side: by which rule truths are drawn a second time; see :meth:`redrawn`.
    """

    dataset: str
    split: str
    files: tuple[Path, ...]
    groups: Sequence[Group]
    counts: Mapping[str, int]
    notes: tuple[str, ...] = ()
    order: tuple[int, ...] | None = None
    limit: int | None = None
    generated: bool = False
    truth: Truth | None = None
    side: int = 0

    def __len__(self) -> int:
        """Number of images, whatever ``limit`` says."""
        return len(self.groups)

    def __getitem__(self, index: int) -> Sample:
        """Image ``index`` of the split with all its expressions."""
        return build_sample(self.groups[index], truth=self.truth, side=self.side)

    def __iter__(self) -> Iterator[Sample]:
        return self.iterate()

    @property
    def planned(self) -> int:
        """How many expressions an iteration comes to."""
        whole = self.counts["expressions"]
        return whole if self.limit is None else min(whole, self.limit)

    def iterate(self, on_failure: OnFailure | None = None) -> Iterator[Sample]:
        """Samples in order. An expression that cannot be drawn goes to ``on_failure``, and the
        rest of its image goes on; without one the first such error is raised.

        Raises:
            DataError: an annotation is damaged and no ``on_failure`` was given.
        """
        for group in self.chosen():
            sample = build_sample(group, on_failure, truth=self.truth, side=self.side)
            if sample.expressions or not group.phrases:
                yield sample

    def chosen(self) -> Iterator[Group]:
        """The groups that an iteration goes through, in order, cut to the limit."""
        left = self.limit
        for index in self.order if self.order is not None else range(len(self.groups)):
            group = self.groups[index]
            if left is not None:
                if left <= 0:
                    return
                group = replace(group, phrases=group.phrases[:left])
                left -= len(group.phrases)
            yield group

    def part(self, numbers: Sequence[int]) -> SampleSource:
        """The same split with only these images of it, by their index in ``groups``; its counts
        are those of these images.
        """
        counts = _count(self.groups[number] for number in numbers)
        return replace(self, order=tuple(numbers), counts=counts)

    def redrawn(self, truth: Truth, side: int = 0) -> SampleSource:
        """The same split, its truths drawn a second time, as ``Expression.redrawn``.

        Args:
            truth: ``once``: pixels that exactly one polygon of an annotation covers. ``resized``:
                polygons rasterized anew at ``side`` x ``side``; where there are none, nothing.
        """
        return replace(self, truth=truth, side=side)

    def limited(self, limit: int | None = None, shuffle: int | None = None) -> SampleSource:
        """The same split, its images in the order that the seed ``shuffle`` gives, cut short."""
        order = self.order
        if shuffle is not None:
            mixed = list(range(len(self.groups)) if order is None else order)
            random.Random(shuffle).shuffle(mixed)
            order = tuple(mixed)
        return replace(self, limit=limit, order=order)


def make_source(
    dataset: str,
    split: str,
    files: tuple[Path, ...],
    groups: Sequence[Group],
    *,
    counts: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
) -> SampleSource:
    """A source of finished groups: counts what they hold and makes doubled ids unique.

    A second expression with an id becomes ``id#1``, a third ``id#2``, so that records can be told
    apart; a note says how many there were.
    """
    unique, doubled = _number_doubles(groups)
    if doubled:
        notes = [*notes, f"{doubled} expressions shared an id with an earlier one (now id#k)"]
    if mute := [p.id for group in unique for p in group.phrases if not has_words(p.text)]:
        notes = [
            *notes,
            f"{counted(len(mute), 'expression')} without words, counted all the same "
            f"(the first has the id {mute[0]!r})",
        ]
    total = {**(counts or {}), **_count(unique)}
    return SampleSource(dataset, split, files, unique, total, tuple(notes))


def _count(groups: Iterable[Group]) -> dict[str, int]:
    """How many images and expressions, and of these with how many referents."""
    each = [[_referents(phrase) for phrase in group.phrases] for group in groups]
    referents = [number for numbers in each for number in numbers]
    return {
        "images": len(each),
        "expressions": len(referents),
        "no_target": referents.count(0),
        "single_target": referents.count(1),
        "multi_target": sum(number > 1 for number in referents),
    }


def _referents(phrase: Phrase) -> int:
    """How many objects it refers to; -1 where that is unknown."""
    if phrase.parts is None:
        return -1
    return int(phrase.attributes.get("referents", len(phrase.parts)))


def _number_doubles(groups: Sequence[Group]) -> tuple[list[Group], int]:
    """The groups with ids that differ, and how many ids are new."""
    seen: dict[str, int] = {}
    unique, doubled = [], 0
    for group in groups:
        phrases = []
        for phrase in group.phrases:
            name = phrase.id
            while name in seen:  # the new one may be another's own
                seen[phrase.id] += 1
                name = f"{phrase.id}#{seen[phrase.id]}"
            seen[name] = 0
            doubled += name != phrase.id
            phrases.append(phrase if name == phrase.id else replace(phrase, id=name))
        unique.append(replace(group, phrases=tuple(phrases)))
    return unique, doubled


def build_sample(
    group: Group,
    on_failure: OnFailure | None = None,
    *,
    truth: Truth | None = None,
    side: int = 0,
) -> Sample:
    """Draw the masks of one image. Equal sets of parts share one RLE.

    Args:
        truth, side: as :meth:`SampleSource.redrawn`.

    Raises:
        DataError: as :meth:`SampleSource.iterate`.
    """
    if group.write is not None:
        group.write()
    drawn: dict[tuple[Any, ...], tuple[Rle, Rle | None]] = {}
    expressions = []
    for phrase in group.phrases:
        try:
            expressions.append(_expression(group, phrase, drawn, truth, side))
        except DataError as error:
            if on_failure is None:
                raise
            on_failure(
                Failure(phrase.id, group.image, phrase.text, "read", "DataError", str(error))
            )
    return Sample(group.image, group.path, tuple(expressions), group.size)


def _expression(
    group: Group,
    phrase: Phrase,
    drawn: dict[tuple[Any, ...], tuple[Rle, Rle | None]],
    truth: Truth | None,
    side: int,
) -> Expression:
    if phrase.parts is None:
        return Expression(phrase.id, phrase.text, attributes=phrase.attributes)
    if phrase.parts not in drawn:
        target = _draw(group, phrase)
        drawn[phrase.parts] = (target, truth and _redraw(group, phrase.parts, target, truth, side))
    target, redrawn = drawn[phrase.parts]
    nothing = not phrase.parts
    return Expression(phrase.id, phrase.text, target, nothing, phrase.attributes, redrawn)


def _redraw(
    group: Group, parts: tuple[Any, ...], target: Rle, truth: Truth, side: int
) -> Rle | None:
    """The union of the parts by another rule; None where it is the target."""
    if group.redraw is None or group.size is None or not parts:
        return None
    found = [group.redraw(part, truth, side) for part in parts]
    if truth == "resized":
        whole = [rle for rle in found if rle is not None]
        return masks.union(whole, (side, side)) if len(whole) == len(parts) else None
    if not any(found):
        return None
    rles = [rle or group.draw(part) for rle, part in zip(found, parts, strict=True)]
    redrawn = masks.union(rles, group.size)
    return None if redrawn == target else redrawn


def _draw(group: Group, phrase: Phrase) -> Rle:
    if group.size is None:
        raise DataError(
            f"image {group.image} has no height and width, so expression {phrase.id} has no mask",
            "give images[].height and images[].width in the annotation file",
        )
    return masks.union([group.draw(part) for part in phrase.parts or ()], group.size)


def require_some_truth(source: SampleSource, known: Callable[[Any], bool], where: str) -> None:
    """Stop where none of the split's annotations exist: the files do not belong together.

    Raises:
        DataError: there are parts, and ``known`` says no to every one.
    """
    parts = [part for group in source.groups for p in group.phrases for part in p.parts or ()]
    if parts and not any(known(part) for part in parts):
        raise DataError(
            f"none of the {len(parts)} annotations of {source.dataset} {source.split} "
            f"(the first is {parts[0]!r}) is in {where}",
            "the two files do not belong together: take both from one release",
        )
