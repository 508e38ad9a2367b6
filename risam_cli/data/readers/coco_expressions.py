"""The expressions of a COCO file that is read as results: the mask of each is its annotations'.

An annotation is a record under its own expressions, or under the first of the list that means it
alone. Every other expression of the list is a record, too, the union of its annotations; what only
such a record needs is none by itself. What no expression means goes by its category's name.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from risam_cli.data.identity import id_text
from risam_cli.data.readers.names import TEXT_KEYS, Record, spoken
from risam_cli.data.readers.shapes import ERROR
from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief

PARTS = "\0parts"
"""Where a record has the lines of the annotations whose union is its mask."""


class Spoken(NamedTuple):
    """An expression of the list, with the id of its image and its own, as text."""

    text: str
    image_id: str | None
    id: str | None


class CocoExpressions:
    """What the expressions of COCO files mean, by the lines of their records, from 1.

    Of each annotation it keeps 24 bytes and its texts.

    Attributes:
        said: of an annotation, the expression of the list that means it alone.
        parts: of an expression, the lines of its annotations.
        hidden: annotations that are no record by themselves.
        unknown: expressions without ``ann_ids``, whose mask is not known.
        unnamed: annotations that none of a list's expressions means; their ids are no expression's.
    """

    def __init__(self) -> None:
        self.said: dict[int, Spoken] = {}
        self.parts: dict[int, tuple[int, ...]] = {}
        self.hidden: set[int] = set()
        self.unnamed: set[int] = set()
        self.unknown = 0
        self.begin()

    def begin(self) -> None:
        """Go on with another file, whose ids are its own."""
        self._ids, self._lines = array("q"), array("q")
        self._categories: list[Any] = []
        self._known_categories: dict[str | None, Any] = {}
        self._texts: dict[int, tuple[str, ...]] = {}

    def annotation(self, item: Mapping[str, Any], line: int) -> Iterator[Record]:
        """The records of an annotation: one, or as many as it lists expressions."""
        listed = item.get("expressions")
        several = [t for t in listed if isinstance(t, str)] if isinstance(listed, list) else []
        single = [item[key] for key in TEXT_KEYS if isinstance(item.get(key), str)][:1]
        texts = tuple(dict.fromkeys([*several, *single]))
        name, category = id_text(item.get("id")), item.get("category_id")
        if name is not None:
            self._ids.append(hash(name))
            self._lines.append(line)
            self._categories.append(self._known_categories.setdefault(id_text(category), category))
        if texts:
            self._texts[line] = texts
        if not several:
            yield dict(item)
            return
        name = id_text(item.get("record_id")) or name
        for number, text in enumerate(texts):
            own = name if name is None or len(texts) == 1 else f"{name}#{number}"
            yield {**item, "expression": text, "record_id": own}

    def listed(self, expressions: Sequence[Any], line: int, path: Path) -> Iterator[Record]:
        """The records of the list, but for those that annotations are already.

        Args:
            line: of the first of them.
        """
        hashes = np.frombuffer(self._ids, np.int64) if self._ids else np.zeros(0, np.int64)
        order = np.argsort(hashes, kind="stable")
        meant: set[int] = set()
        for expression in expressions:
            text, ann_ids = spoken(expression)
            if text is None:
                continue
            own = id_text(expression.get("record_id")) or id_text(expression.get("id"))
            row = {"image_id": expression.get("image_id"), "expression": text, "record_id": own}
            if ann_ids in ([], [-1]):
                row["no_target"] = True
            elif ann_ids == [None]:
                self.unknown += 1
                continue
            else:
                try:
                    places = [_place(ann_id, hashes, order, path) for ann_id in ann_ids]
                except DataError as error:
                    row = {ERROR: str(error)}
                else:
                    lines = tuple(self._lines[place] for place in places)
                    meant.update(lines)
                    if self._is_said(Spoken(text, id_text(row["image_id"]), own), lines):
                        continue
                    self.parts[line] = lines
                    row |= self._category(places)
            yield row
            line += 1
        self.hidden |= {n for n in meant if n not in self.said and n not in self._texts}
        if meant:
            self.unnamed |= {*self._lines} - meant - self._texts.keys()

    def _is_said(self, one: Spoken, lines: tuple[int, ...]) -> bool:
        """Whether the records of its annotations say an expression; the first that may, will."""
        if all(one.text in self._texts.get(line, ()) for line in lines):
            return True
        if len(lines) > 1 or lines[0] in self._texts or lines[0] in self.said:
            return False
        self.said[lines[0]] = one
        return True

    def _category(self, places: Sequence[int]) -> Record:
        """The category in which annotations agree."""
        found = [self._categories[place] for place in places]
        return {"category_id": found[0]} if all(one is found[0] for one in found) else {}


def _place(ann_id: Any, hashes: Any, order: Any, path: Path) -> int:
    """Where an annotation stands among those with an id. Raises DataError."""
    key = np.int64(hash(id_text(ann_id)))
    first, last = (np.searchsorted(hashes, key, side, sorter=order) for side in ("left", "right"))
    if first == last:
        raise DataError(
            f"annotation {brief(ann_id)} does not exist in {path}", "check the expressions' ann_ids"
        )
    if last - first > 1:
        raise DataError(
            f"two annotations of {path} have the id {brief(ann_id)}",
            "give every annotation an id of its own",
        )
    return int(order[first])
