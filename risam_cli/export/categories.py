"""What class a mask gets: the expression itself, one class for all, or a map's word for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from risam_cli.console.text import sanitize
from risam_cli.data.identity import expression_key
from risam_cli.errors import DataError, reason_of
from risam_cli.files.jsonlines import brief, load_json, read_text, unique_pairs
from risam_cli.files.plain import open_plain
from risam_cli.files.safe_yaml import load_yaml
from risam_cli.files.tables import Table, TableRow

_LONGEST = 1 << 28  # bytes
OTHERS = "*"
"""The key of a map that stands for every expression not named in it."""
UNNAMED = "object"
"""The category of records that have an id but no expression."""


class Naming(Protocol):
    """Gives an expression's category."""

    def name(self, expression: str) -> str:
        """The category's name. Raises DataError where there is none."""

    def entries(self) -> Iterable[Entry]:
        """Categories that are known before any expression is."""


class ByExpression:
    """Each expression is its own category."""

    def name(self, expression: str) -> str:
        """The expression."""
        return expression

    def entries(self) -> Iterable[Entry]:
        """None is known beforehand."""
        return ()


class OneClass:
    """One category for all."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self, expression: str) -> str:
        """The one name."""
        return self._name

    def entries(self) -> Iterable[Entry]:
        """The one."""
        return (Entry(self._name),)


class ByMap:
    """Categories by a map; see :func:`read_map`.

    Args:
        table: categories by :func:`risam_cli.data.identity.expression_key`.
        numbers: of categories that the map numbers itself.
    """

    def __init__(
        self, table: Mapping[str, str], path: Path, numbers: Mapping[str, int] | None = None
    ) -> None:
        self._table = table
        self._path = path
        self._numbers = numbers or {}

    def name(self, expression: str) -> str:
        """What the map says for the expression, else what it says for ``*``."""
        found = self._table.get(expression_key(expression), self._table.get(OTHERS))
        if found is None:
            raise DataError(
                f"{self._path} has no category for the expression {expression!r}",
                f'add it, or add "{OTHERS}" for all that are not named',
            )
        return found

    def entries(self) -> Iterable[Entry]:
        """All, in the map's order: so their numbers depend on nothing but the map."""
        return (
            Entry(name, self._numbers.get(name)) for name in dict.fromkeys(self._table.values())
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A category.

    Attributes:
        number: of its class, its COCO id and its value in masks, where it was given; else None.
    """

    name: str
    number: int | None = None


class Categories:
    """The categories of an export: those known beforehand, then others as they first occur.

    This table is all that grows with the number of different categories.

    Args:
        given: categories of a COCO file by their ids as text, which decide where each expression is
            its own category.

    Attributes:
        names: by place, from 0.
        class_numbers: by place: the number that was given, else the next free one from 0.
        mask_values: by place: the number that was given, else the next free one from 1.
        coco_ids: by place: the COCO file's id or the given number, else the next free one from 1.
        unnamed: expressions without a word so far.
        found: places of categories that have a mask; asked: of those that a record without one is
            of.
    """

    def __init__(self, naming: Naming, given: Mapping[str, tuple[Any, str]] | None = None) -> None:
        self._naming = naming
        self._index: dict[str, int] = {}
        self._given: dict[str, int] = {}
        self.names: list[str] = []
        self.class_numbers: list[int] = []
        self.mask_values: list[int] = []
        self.coco_ids: list[Any] = []
        self.unnamed = 0
        self.found: set[int] = set()
        self.asked: set[int] = set()
        entries = tuple(naming.entries())
        rows = given if given and isinstance(naming, ByExpression) else {}
        numbers = {entry.number for entry in entries}
        ids = numbers | {own for own, _ in rows.values()}
        self._free = [
            (number for number in count(first) if number not in taken)
            for first, taken in ((0, numbers), (1, numbers), (1, ids))
        ]
        for key, (own, name) in rows.items():
            self._given[key] = len(self.names)
            self._index.setdefault(name, len(self.names))
            self._add(name, None, own)
        for entry in entries:
            self._index[entry.name] = len(self.names)
            self._add(entry.name, entry.number)

    def _add(self, name: str, number: int | None = None, coco_id: Any = None) -> None:
        self.names.append(name)
        classes, values, ids = self._free
        self.class_numbers.append(next(classes) if number is None else number)
        self.mask_values.append(next(values) if number is None else number)
        if coco_id is None:
            coco_id = next(ids) if number is None else number
        self.coco_ids.append(coco_id)

    def index(self, expression: str, category: str | None = None) -> tuple[int, str]:
        """Place of an expression's category, from 0, and its name.

        Args:
            category: the id that a COCO file gives it, as text.

        Raises:
            DataError: the naming has none for it.
        """
        place, name = self._index_of(expression, category)
        self.found.add(place)
        return place, name

    def reserve(self, expression: str, category: str | None = None) -> None:
        """Gives the category of a record without a mask its place, so that the classes are those of
        all that was asked and not of what happened to be found.
        """
        if expression.strip() or category in self._given:
            with suppress(DataError):  # a map that does not name it
                self.asked.add(self._index_of(expression, category)[0])

    def without_mask(self) -> list[str]:
        """Names of the categories that something was asked of and nothing was found for."""
        return [self.names[place] for place in sorted(self.asked - self.found)]

    def _index_of(self, expression: str, category: str | None) -> tuple[int, str]:
        if category in self._given:
            place = self._given[category or ""]
            return place, self.names[place]
        name = self._naming.name(expression)
        if not name.strip():
            self.unnamed += 1
            name = UNNAMED
        if name not in self._index:
            self._index[name] = len(self.names)
            self._add(name)
        return self._index[name], name


def read_map(path: Path) -> ByMap:
    """A map from expressions to categories.

    Args:
        path: ``.json`` or ``.yaml``: an object from expression to category; ``.csv`` or ``.tsv``:
            columns ``expression`` and ``category``, and maybe ``number``. The key ``*`` stands for
            all others. Keys that are one expression must say the same. In place of a category's
            name there may be an object with ``name`` and ``number``.

    Raises:
        DataError: the file cannot be read or is something else.
    """
    try:
        text = read_text(path, _LONGEST)
    except (OSError, ValueError) as error:
        odd = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = reason_of(error) if isinstance(error, OSError) else odd
        raise DataError(f"category map {path}: {reason}", "name a JSON, YAML or CSV file") from None
    table = _from_csv(path) if path.suffix.lower() in {".csv", ".tsv"} else _from_yaml(text, path)
    if not isinstance(table, dict) or not table:
        raise DataError(
            f"category map {path} is not a map", 'write {"expression": "category", ...}'
        )
    names: dict[str, str] = {}
    numbers: dict[str, int] = {}
    spelled: dict[str, str] = {}
    for key, value in table.items():
        name, number = value, None
        if isinstance(value, dict):
            name, number = value.get("name"), value.get("number")
        if not isinstance(key, str) or not isinstance(name, str) or not name.strip():
            raise DataError(
                f"category map {path}: {brief(key)}: {brief(value)} is not a pair of texts",
                "put both in quotes",
            )
        own = expression_key(key)
        other = spelled.setdefault(own, key)
        if names.setdefault(own, name) != name:
            raise DataError(
                f"category map {path}: {brief(other)} and {brief(key)} are one expression, with "
                f"the categories {brief(names[own])} and {brief(name)}",
                "give it one; case, white space and punctuation do not count",
            )
        if number is None:
            continue
        if type(number) is not int or number < 0 or numbers.setdefault(name, number) != number:
            raise DataError(
                f"category map {path}: the category {name!r} has the number {brief(number)}",
                "give one whole number from 0 for each category",
            )
    if len(set(numbers.values())) < len(numbers):
        raise DataError(
            f"category map {path}: two categories have one number", "give each its own number"
        )
    return ByMap(names, path, numbers)


def _from_yaml(text: str, path: Path) -> Any:
    try:
        load = load_json if path.suffix.lower() == ".json" else load_yaml
        return load(text, unique=True)
    except ValueError as error:
        reason = sanitize(" ".join(str(error).split()))
        raise DataError(f"category map {path} cannot be read: {reason}") from None


def _from_csv(path: Path) -> dict[str, Any] | None:
    with open_plain(path) as stream:
        table = Table(stream, f"category map {path}", ("expression", "category", "number"))
        if not {"expression", "category"} <= {*table.columns}:
            return None
        try:
            return unique_pairs(map(_pair, table))
        except ValueError as error:
            raise DataError(f"category map {path}: {error}", "give it one category") from None


def _pair(row: TableRow) -> tuple[str, Any]:
    """Expression and category of a row. Raises DataError."""
    if row.error is not None:
        raise row.error
    value: Any = row.cells["category"]
    if number := row.cells.get("number"):
        value = {
            "name": value,
            "number": int(number) if number.isdecimal() and len(number) < 16 else number,
        }
    return row.cells["expression"], value
