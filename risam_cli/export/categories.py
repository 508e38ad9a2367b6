"""What class a mask gets: the expression itself, one class for all, or a map's word for it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from risam_cli.console.text import sanitize
from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief, read_text
from risam_cli.files.safe_yaml import load_yaml

_LONGEST = 1 << 28  # bytes
OTHERS = "*"
"""The key of a map that stands for every expression not named in it."""


class Naming(Protocol):
    """Gives an expression's category."""

    def name(self, expression: str) -> str:
        """The category's name. Raises DataError where there is none."""


class ByExpression:
    """Each expression is its own category."""

    def name(self, expression: str) -> str:
        """The expression."""
        return expression


class OneClass:
    """One category for all."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self, expression: str) -> str:
        """The one name."""
        return self._name


class ByMap:
    """Categories by a map; see :func:`read_map`."""

    def __init__(self, table: Mapping[str, str], path: Path) -> None:
        self._table = table
        self._path = path

    def name(self, expression: str) -> str:
        """What the map says for the expression, else what it says for ``*``."""
        found = self._table.get(expression, self._table.get(OTHERS))
        if found is None:
            raise DataError(
                f"{self._path} has no category for the expression {expression!r}",
                f'add it, or add "{OTHERS}" for all that are not named',
            )
        return found


class Categories:
    """Categories in the order in which they first occur, numbered from 0.

    This table is all that grows with the number of different categories.
    """

    def __init__(self, naming: Naming) -> None:
        self._naming = naming
        self._index: dict[str, int] = {}

    def index(self, expression: str) -> tuple[int, str]:
        """Number and name of an expression's category. Raises DataError where it has none."""
        name = self._naming.name(expression)
        return self._index.setdefault(name, len(self._index)), name

    @property
    def names(self) -> list[str]:
        """All names so far, by number."""
        return list(self._index)


def read_map(path: Path) -> ByMap:
    """A map from expressions to categories.

    Args:
        path: ``.json`` or ``.yaml``: an object from expression to category; ``.csv`` or ``.tsv``:
            columns ``expression`` and ``category``. The key ``*`` stands for all others.

    Raises:
        DataError: the file cannot be read or is something else.
    """
    try:
        text = read_text(path, _LONGEST)
    except (OSError, ValueError) as error:
        odd = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = error.strerror if isinstance(error, OSError) else odd
        raise DataError(f"category map {path}: {reason}", "name a JSON, YAML or CSV file") from None
    suffix = path.suffix.lower()
    table = _from_csv(text, suffix, path) if suffix in {".csv", ".tsv"} else _from_yaml(text, path)
    if not isinstance(table, dict) or not table:
        raise DataError(
            f"category map {path} is not a map", 'write {"expression": "category", ...}'
        )
    for key, value in table.items():
        if not isinstance(key, str) or not isinstance(value, str) or not value.strip():
            raise DataError(
                f"category map {path}: {brief(key)}: {brief(value)} is not a pair of texts",
                "put both in quotes",
            )
    return ByMap(table, path)


def _from_yaml(text: str, path: Path) -> Any:
    try:
        return json.loads(text) if path.suffix.lower() == ".json" else load_yaml(text)
    except (ValueError, RecursionError) as error:
        reason = sanitize(" ".join(str(error).split()))
        raise DataError(f"category map {path} cannot be read: {reason}") from None


def _from_csv(text: str, suffix: str, path: Path) -> dict[str, str] | None:
    delimiter = "\t" if suffix == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        if not {"expression", "category"} <= set(rows.fieldnames or ()):
            return None
        return {row["expression"] or "": row["category"] or "" for row in rows}
    except csv.Error as error:
        raise DataError(f"category map {path} cannot be read: {error}") from None
