"""Which level of every slice an expression is in: of the built-in ones and of those that a user
defines, such as ``length:1-3,4-7``, ``size:0-1,1-100``, or a column of the data.

::

    SLICE = NAME              every value of the column is a level
          | NAME:BIN,BIN…     each bin is a level; what fits none is in "other"
    BIN   = 3 | 1-3 | 8-      numbers, both ends included; of two that share an end, the first
          | word              the column's value, in any case

A name that a built-in slice has replaces it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from risam_cli.errors import UsageError, setting
from risam_cli.metrics.slices import CATEGORY, SLICES, Facts, Slice

OTHER = "other"
COLUMNS = "columns"
"""Attribute of an expression that holds columns of the data that were asked for, by name."""
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_BIN = re.compile(rf"({_NUMBER})(?:(-)({_NUMBER})?)?")
_COUNTED = {"length": "words", "size": "% of the image"}
_REASON = "write it as NAME or NAME:BIN,BIN, such as length:1-3,4-7 or weather:sun,rain"


@dataclass(frozen=True, slots=True)
class Bin:
    """One level: a range of numbers, or a word where ``low`` is nan."""

    label: str
    low: float = math.nan
    high: float = math.nan

    @property
    def shown(self) -> str:
        """The label with the dash of a range; words are the data's own."""
        return self.label if math.isnan(self.low) else self.label.replace("-", "–")

    def holds(self, value: object) -> bool:
        """Whether a value of the column belongs here."""
        number = _number(value)
        if math.isnan(self.low) or number is None:
            return str(value).strip().lower() == self.label.lower()
        return self.low <= number <= self.high


@dataclass(frozen=True, slots=True)
class CustomSlice:
    """A slice as a user wrote it.

    Attributes:
        name: ``length`` (words), ``size`` (per cent of the image), or a key of an expression's
            attributes.
        bins: its levels; empty where every value is one.
    """

    name: str
    bins: tuple[Bin, ...] = ()

    def value(self, facts: Facts) -> Any:
        """An expression's value in it; None where it has none."""
        if self.name == "length":
            return len(facts.text.split())
        if self.name == "size":
            return 100 * facts.share if facts.share > 0 else None
        return attribute(facts, self.name)

    def level(self, facts: Facts) -> int:
        """The number of the bin; that after the last is "other", -1 is none."""
        value = self.value(facts)
        if value is None:
            return -1
        fits = (number for number, one in enumerate(self.bins) if one.holds(value))
        return next(fits, len(self.bins))

    @property
    def of_data(self) -> bool:
        """Whether its values are the data's own, not counted here."""
        return self.name not in _COUNTED

    def as_slice(self) -> Slice:
        """The slice of its bins."""
        unit = f" {_COUNTED[self.name]}" if self.name in _COUNTED else ""
        labels = tuple(f"{one.shown}{unit}" for one in self.bins)
        return Slice(
            self.name,
            _title(self.name),
            (*labels, OTHER),
            self.level,
            f"Bins of {self.name} as given to the command; what fits none is in {OTHER!r}.",
        )


def parse_slice(text: str) -> CustomSlice:
    """A slice from its notation, see above.

    Raises:
        UsageError: it is malformed, or a bin can never be reached or is called "other".
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    written = f"{setting('slice')} {text!r}"
    if not name or (colon and not rest.strip()):
        raise UsageError(f"{written} {'names no bin' if name else 'has no name'}", _REASON)
    if not colon:
        if name in _COUNTED:
            raise UsageError(f"{written} needs bins", f"such as {name}:1-3,4-7")
        return CustomSlice(name)
    bins = [_bin(part.strip(), written) for part in rest.split(",")]
    for number, one in enumerate(bins):
        if one.label.lower() == OTHER:
            raise UsageError(
                f"{written}: {OTHER!r} is the level of what fits no bin", "leave this bin out"
            )
        for before in bins[:number]:
            if one.label.lower() == before.label.lower() or _overlap(before, one):
                raise UsageError(
                    f"{written}: {before.label} and {one.label} overlap", "give bins that do not"
                )
    if name in _COUNTED and any(math.isnan(one.low) for one in bins):
        raise UsageError(f"{written}: the bins of {name} are numbers", f"such as {name}:1-3,4-7")
    return CustomSlice(name, tuple(bins))


def parse_slices(texts: tuple[str, ...]) -> tuple[CustomSlice, ...]:
    """Several; raises UsageError as :func:`parse_slice`, and where a name comes twice."""
    found = tuple(parse_slice(text) for text in texts)
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"{setting('slice')} {name} is given twice", f"put all bins in one: {name}:1-3,4-7"
            )
    return found


class Slicer:
    """Level numbers of expressions; levels by the data's own values are numbered as they come.

    Args:
        custom: slices of the user's, in place of built-in ones of the same name.
    """

    def __init__(self, custom: Sequence[CustomSlice] = ()) -> None:
        names = {one.name for one in custom}
        self._fixed = (
            *(one for one in SLICES if one.name not in names),
            *(one.as_slice() for one in custom if one.bins),
        )
        by_value = [one.name for one in custom if not one.bins]
        if CATEGORY not in names:
            by_value.append(CATEGORY)
        self._numbers: dict[str, dict[str, int]] = {name: {} for name in by_value}
        self._values: dict[str, list[str]] = {name: [] for name in by_value}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all slices, those of the data's own values last."""
        return (*(s.name for s in self._fixed), *self._values)

    def levels(self, facts: Facts) -> dict[str, int]:
        """The level in each slice, -1 where a slice does not apply."""
        levels = {s.name: s.level(facts) for s in self._fixed}
        for name, numbers in self._numbers.items():
            value = attribute(facts, name)
            levels[name] = -1 if value is None else numbers.setdefault(str(value), len(numbers))
            if len(numbers) > len(self._values[name]):
                self._values[name].append(str(value))
        return levels

    def labels(self, levels: Mapping[str, int]) -> dict[str, str]:
        """The levels of an expression in words, where a slice applies."""
        found = {s.name: s.levels[levels[s.name]] for s in self._fixed if levels[s.name] >= 0}
        for name, values in self._values.items():
            if levels[name] >= 0:
                found[name] = values[levels[name]]
        return found

    def slices(self) -> tuple[Slice, ...]:
        """The slices as they stand, with the values seen as levels of the last."""
        return (*self._fixed, *map(self._as_slice, self._values))

    def _as_slice(self, name: str) -> Slice:
        numbers = self._numbers[name]
        return Slice(
            name,
            _title(name),
            tuple(self._values[name]),
            lambda facts: numbers.get(str(attribute(facts, name)), -1),
            "The referents' category where all share one, by the annotation."
            if name == CATEGORY
            else f"The values of {name} in the data.",
            open=True,
        )


def attribute(facts: Facts, name: str) -> Any:
    """What the data says of an expression, in one of its own columns too; None where nothing."""
    found = facts.attributes.get(name)
    return facts.attributes.get(COLUMNS, {}).get(name) if found is None else found


def _title(name: str) -> str:
    known = {one.name: one.title for one in SLICES}
    return "Category" if name == CATEGORY else known.get(name, name)


def _bin(text: str, written: str) -> Bin:
    if not text:
        raise UsageError(f"{written} has an empty bin", _REASON)
    found = _BIN.fullmatch(text)
    if found is None:
        return Bin(text)
    low = float(found[1])
    high = float(found[3]) if found[3] else math.inf if found[2] else low
    if high < low:
        raise UsageError(f"{written}: the bin {text} ends before it begins", "swap the two numbers")
    return Bin(f"{found[1]} or more" if math.isinf(high) else text, low, high)


def _overlap(first: Bin, second: Bin) -> bool:
    """Whether two ranges share more than an end."""
    if math.isnan(first.low) or math.isnan(second.low):
        return False
    low, high = max(first.low, second.low), min(first.high, second.high)
    # A single number inside of a range, or at both its ends, is never reached or halves it.
    single = second.low == second.high or first.low == first.high
    return low < high or (low == high and single)


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, str) and re.fullmatch(_NUMBER, value.strip()):
        return float(value)
    return None
