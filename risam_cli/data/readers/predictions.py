"""Anyone's predictions, found by id or by image and expression without holding them in memory.

A first pass over the records keeps some 50 bytes of each: two hashes and its place. A record is
read again when its expression is scored. When two names mean the same,
:mod:`risam_cli.data.identity` says; what is found by its id is held against image and expression
all the same.
"""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.identity import (
    expression_key,
    id_text,
    image_core,
    image_key,
    image_tail,
    is_tail,
)
from risam_cli.data.readers.names import Record, unnamed_category
from risam_cli.data.readers.results import Results
from risam_cli.data.readers.source import OnFailure, SampleSource
from risam_cli.errors import DataError
from risam_cli.files.hashing import hash64
from risam_cli.files.jsonlines import brief
from risam_cli.masks import rle as masks
from risam_cli.types import Expression, Failure, Rle, Sample

_COMPARED = 1000  # expressions that are looked at before a file is taken for another data set's


@dataclass(frozen=True, slots=True)
class Answer:
    """What is scored for one expression.

    Attributes:
        segmentation: RLE at the image's size, or at a protocol's canvas.
        no_target: the answer was "nothing fits".
        score, no_target_probability: in 0..1, or nan where unknown.
    """

    segmentation: Rle
    no_target: bool
    score: float = math.nan
    no_target_probability: float = math.nan


@dataclass(frozen=True, slots=True)
class _Found:
    """A record that is an expression's: its number among the records, and its place."""

    row: int
    record: Record
    number: int


class PredictionIndex:
    """Predictions by id and by image and expression. Use as a context manager.

    Args:
        path: see :class:`risam_cli.data.readers.results.Results`.
        on_failure: gets every record that is none.
        size: (H, W) of all masks, where they are not at their images' sizes.
        canvas: side of the square at which a protocol compares masks; masks of that size are taken
            as they are.
        source: the split that they are for, so that names which several images share are known.

    Attributes:
        broken: lines that are no record.
        doubled: records that came a second time for an expression.

    Raises:
        DataError: the file cannot be read, holds no record at all, or its ids belong to other
            expressions than those of ``source``.
    """

    def __init__(
        self,
        path: Path,
        on_failure: OnFailure,
        size: tuple[int, int] | None = None,
        *,
        canvas: int = 0,
        source: SampleSource | None = None,
        confine: bool = False,
    ) -> None:
        self._size = size
        self._canvas = canvas
        self._results = Results(path, confine=confine)
        self.path = self._results.path
        self._on_failure = on_failure
        self.broken = self.doubled = 0
        self._compared = self._differing = self._respelled = 0
        self._first_differing = self._first_respelled = ""
        try:
            self._read()
            if source is not None and not self._speaks:
                raise _unspoken(self.path)
            self._images = _by_stem(source)
            self._alike = _alike(source)
            if source is not None and not source.generated:
                self._require_agreement(source)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets)

    def __enter__(self) -> PredictionIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._results.close()

    def find(self, sample: Sample, expression: Expression) -> Answer | None:
        """The answer to an expression; None where there is none.

        A record with the expression's id counts, unless it names both another image and another
        expression; else one that names the image and the expression. Of several, the first in the
        file is taken and the others are told to ``on_failure``; where an image has an expression
        several times and there are as many records, they are taken in turn. Records of an answer's
        instances are one answer, their union.

        Raises:
            DataError: the record is malformed, names something else, or its mask is of another size
                than the image.
        """
        strange: list[str] = []
        found = _gathered(self._by_id(sample, expression, strange))
        if not found:
            found = self._own_turn(_gathered(self._by_pair(sample, expression)), sample, expression)
        if not found:
            if strange:
                raise DataError(strange[0])
            return None
        for other in (one for answer in found[1:] for one in answer):
            if not self._used[other.row]:
                self.doubled += 1
                told = f"a second prediction for {brief(expression.text)}; not scored"
                self._tell(other.record, told)
        self._used[[one.row for answer in found for one in answer]] = True
        where = f"{self.path}: prediction {expression.id!r}"
        size = self._size or sample.size
        for one in found[0]:
            self._results.instance(one.record, one.number)  # told of where it is left out
        return _united([self._answer(one, where, size) for one in found[0]])

    def of_pair(
        self, image: str, text: str, size: tuple[int, int], is_another: Callable[[str], bool]
    ) -> list[tuple[int | None, Answer]]:
        """Everything that is said of an image and an expression, with the instances' numbers.

        Args:
            size: (H, W) of the image.
            is_another: whether a name that is not the image's own is that of another one.

        Raises:
            DataError: a record is malformed, its mask is of another size, or several images may be
                meant.
        """
        sample, expression = Sample(image, Path(image), (), size), Expression("", text)
        by_key: defaultdict[str, list[_Found]] = defaultdict(list)
        for one in self._by_pair(sample, expression):
            by_key[image_key(one.record["image"])].append(one)
        own = image_key(image)
        if own in by_key:
            by_key = defaultdict(list, {own: by_key[own]})
        keys = [key for key in by_key if key == own or not is_another(key)]
        if len(keys) > 1:
            raise DataError(
                f"{self.path}: {image!r} may be {keys[0]} or {keys[1]}",
                "name images by their full paths",
            )
        found = []
        for one in by_key[keys[0]] if keys else ():
            answer = self._answer(one, self._results.place(one.number), size)
            found.append((self._results.instance(one.record, one.number), answer))
        return found

    def records(self, name: str) -> list[Record]:
        """All records with an id, in the file's order.

        Raises:
            DataError: one of them is not what it was any more.
        """
        found = (self._at(row).record for row in self._ids.rows(_hash(name)))
        return [record for record in found if record["id"] == name]

    def answer(self, record: Record, size: tuple[int, int] | None, where: str) -> Answer:
        """Check a record's mask; a side field that is out of range costs a note, never the mask.

        Raises:
            DataError: the mask is missing, malformed or of another size.
        """
        return self._answer(_Found(0, record, 1), where, size)

    def surplus(self) -> Iterator[tuple[str, str, str]]:
        """Id, image and expression of every record that no expression asked for."""
        for row in np.flatnonzero(~self._used):
            record = self._at(int(row)).record
            yield tuple(str(record[k] or "") for k in ("id", "image", "expression"))  # type: ignore[misc]

    @property
    def unused(self) -> int:
        """How many records no expression asked for."""
        return int((~self._used).sum())

    def notes(self) -> list[str]:
        """What the user must know of the records that were read, one line a kind."""
        lines = self._results.notes()
        if self._respelled:
            lines.append(
                f"{self._respelled} predictions do not name their image like the data set; they "
                f"are matched by their ids and expressions ({self._first_respelled})"
            )
        if self._differing:
            lines.append(
                f"{self._differing} of {self._compared} predictions with an id of this split name "
                f"another image or expression ({self._first_differing})"
            )
        return lines

    # --- reading --------------------------------------------------------------------------------

    def _read(self) -> None:
        offsets, numbers = array("q"), array("q")
        by_id, by_pair, first = array("Q"), array("Q"), ""
        self._speaks = False  # whether a record says which expression it answers
        for number, offset, record in self._results.rows():
            if isinstance(record, dict) and not (
                record["id"] or (record["image"] and record["expression"])
            ):
                record = DataError(
                    f"{self._results.place(number)}: neither id nor image and expression",
                    "name the expression that it answers",
                )
            if isinstance(record, DataError):
                self.broken += 1
                first = first or f": {record}"
                label = self._results.place(number).rpartition(", ")[2]
                self._on_failure(Failure(label, "", None, "read", "DataError", str(record)))
                continue
            self._speaks = self._speaks or bool(record["id"]) or not _is_unnamed(record)
            offsets.append(offset)
            numbers.append(number)
            by_id.append(_hash(record["id"]) if record["id"] else 0)
            by_pair.append(_pair_hash(record["image"], record["expression"]))
        if not len(offsets):
            raise DataError(
                f"{self.path} holds no prediction"
                + (f" that can be read{first}" if self.broken else ""),
                "one JSON object per line, with id (or image and expression) and segmentation",
            )
        self._offsets = np.array(offsets, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self._ids = _Lookup(np.array(by_id, np.uint64))
        self._pairs = _Lookup(np.array(by_pair, np.uint64))
        self._used = np.zeros(len(offsets), np.bool_)

    def _at(self, row: int) -> _Found:
        number = int(self._numbers[row])
        return _Found(row, self._results.read(number, int(self._offsets[row])), number)

    def _answer(self, found: _Found, where: str, size: tuple[int, int] | None) -> Answer:
        record = found.record
        flag = self._results.flag(record, "no_target", found.number)
        score = self._results.unit(record, "score", found.number)
        nothing = self._results.unit(record, "no_target_probability", found.number)
        rle = None
        if self._canvas:
            rle = self._at_canvas(record, size, where)
        if rle is None:
            rle = self._results.mask(record, size, where)
        if rle is None:
            if not flag or size is None:
                raise DataError(
                    f"{where}: it has no mask", "give segmentation, or no_target: true for none"
                )
            rle = masks.empty(size)
        return Answer(
            rle,
            flag if flag is not None else masks.area(rle) == 0,
            math.nan if score is None else score,
            math.nan if nothing is None else nothing,
        )

    def _at_canvas(self, record: Record, size: tuple[int, int] | None, where: str) -> Rle | None:
        """The mask where it is of the canvas's size; None where it is not."""
        if isinstance(record.get("segmentation"), list):
            return None
        try:
            return self._results.mask(record, (self._canvas, self._canvas), where)
        except DataError:
            return None

    # --- matching -------------------------------------------------------------------------------

    def _by_id(
        self, sample: Sample, expression: Expression, strange: list[str]
    ) -> Iterator[_Found]:
        """Records with the id; ``strange`` gets what those of another image say."""
        for row in self._ids.rows(_hash(expression.id)):
            found = self._at(row)
            record = found.record
            if record["id"] != expression.id:
                continue
            image = _names_image(record, sample.image, expression)
            text = _names_text(record, expression)
            self._compared += not (image is None and text is None)
            if image is False or text is False:
                told = _difference(record, sample, expression)
                self._differing += 1
                self._first_differing = self._first_differing or f"the first: {told}"
                if image is False:
                    strange.append(f"{self.path}: {told}")
                    continue
            elif image and not is_tail(image_key(record["image"]), image_key(sample.image)):
                self._respelled += 1
                self._first_respelled = self._first_respelled or (
                    f"the first: {record['image']} for {sample.image}"
                )
            yield found

    def _by_pair(self, sample: Sample, expression: Expression) -> Iterator[_Found]:
        seen: set[int] = set()
        for image in _image_names(sample.image, expression):
            for text in _texts(expression):
                for row in self._pairs.rows(_pair_hash(image, text)):
                    if row in seen:
                        continue
                    seen.add(row)
                    found = self._at(row)
                    if not _names_text(found.record, expression):
                        continue
                    if self._is_own(found, sample, expression):
                        yield found

    def _own_turn(
        self, found: list[list[_Found]], sample: Sample, expression: Expression
    ) -> list[list[_Found]]:
        """Of as many answers as the image has expressions of one text, the one in this place."""
        if len(found) < 2:
            return found
        key = expression_key(expression.text)
        alike = self._alike.get((sample.image, key)) or [
            one.id for one in sample.expressions if expression_key(one.text) == key
        ]
        if len(found) != len(alike):
            return found
        found.sort(key=lambda answer: answer[0].row)
        return [found[alike.index(expression.id)]]

    def _is_own(self, found: _Found, sample: Sample, expression: Expression) -> bool:
        """Whether a record's image is the sample's and no other image's of the split."""
        if not _names_image(found.record, sample.image, expression):
            return False
        named, own = image_key(str(found.record["image"])), image_key(sample.image)
        others = [key for key in self._images.get(image_core(named), ()) if key != own]
        if named == own or not others:
            return True
        if named in others:
            return False
        alike = [key for key in others if is_tail(named, key)]
        if not is_tail(named, own):
            if alike:
                return False
            alike = [key for key in others if is_tail(_bare(named), _bare(key))]
        if alike:
            raise DataError(
                f"{self.path}: {found.record['image']!r} may be {sample.image} or {alike[0]}",
                "name images by their full paths, or give ids",
            )
        return True

    def _require_agreement(self, source: SampleSource) -> None:
        """Stop where the records' ids are those of another data set.

        Raises:
            DataError: most of the records that have an id of the split name something else.
        """
        compared, differing, first = 0, 0, ""
        for group in source.chosen():
            sample = Sample(group.image, group.path, (), group.size)
            for phrase in group.phrases:
                expression = Expression(phrase.id, phrase.text, attributes=phrase.attributes)
                for row in self._ids.rows(_hash(phrase.id)):
                    record = self._at(row).record
                    text = _names_text(record, expression)
                    image = _names_image(record, group.image, expression)
                    if record["id"] != phrase.id or (text is None and image is None):
                        continue
                    compared += 1
                    if text is False or image is False:
                        differing += 1
                        first = first or _difference(record, sample, expression)
            if compared >= _COMPARED:
                break
        if 2 * differing > compared:
            raise DataError(
                f"{self.path} belongs to another data set or split: {differing} of {compared} "
                f"records with an id of {source.dataset} {source.split} name another image or "
                f"expression; {first}",
                "give the predictions of this split, or leave their ids out to match them by image "
                "and expression",
            )

    def _tell(self, record: Record, message: str) -> None:
        name, image, text = (str(record[key] or "") for key in ("id", "image", "expression"))
        self._on_failure(Failure(name, image, text, "match", "DataError", message))


def _is_unnamed(record: Record) -> bool:
    """Whether its expression is made of the number of its category."""
    category = id_text(record.get("category_id"))
    return bool(record["expression"] == unnamed_category(category))


def _unspoken(path: Path) -> DataError:
    """The error of COCO results proper, such as `risam export-masks` writes beside all else."""
    beside = path.with_name("instances.json")
    return DataError(
        f"{path}: its records name a category, not the expression that they answer",
        f"give {beside}" if beside.is_file() else "give each its expression, or the id of that",
    )


def _gathered(found: Iterable[_Found]) -> list[list[_Found]]:
    """Records by the answer that they are of: instances of one answer share its id."""
    answers: list[list[_Found]] = []
    of_id: dict[str | None, tuple[set[int], list[_Found]]] = {}
    for one in found:
        number = one.record.get("instance")
        if type(number) is int:
            numbers, answer = of_id.setdefault(one.record["id"], (set(), []))
            if number not in numbers:
                numbers.add(number)
                answer.append(one)
                if len(answer) == 1:
                    answers.append(answer)
                continue
        answers.append([one])
    return answers


def _united(parts: list[Answer]) -> Answer:
    """The answer whose instances these are."""
    if len(parts) == 1:
        return parts[0]
    size = parts[0].segmentation["size"]
    return Answer(
        masks.union([part.segmentation for part in parts], (size[0], size[1])),
        all(part.no_target for part in parts),
        max((part.score for part in parts if part.score == part.score), default=math.nan),
        parts[0].no_target_probability,
    )


def _names_image(record: Record, image: str, expression: Expression) -> bool | None:
    """Whether the record's image is ``image``; None where it names none."""
    named = record["image"]
    if not isinstance(named, str):
        return None
    own, other = image_key(image), image_key(named)
    if is_tail(own, other) or is_tail(_bare(own), _bare(other)):
        return True
    return named == id_text(expression.attributes.get("image_id"))


def _names_text(record: Record, expression: Expression) -> bool | None:
    """Whether the record's expression is this one; None where it names none."""
    named = record["expression"]
    if not isinstance(named, str) or not named:
        return None
    return expression_key(named) in map(expression_key, _texts(expression))


def _difference(record: Record, sample: Sample, expression: Expression) -> str:
    return (
        f"id {expression.id} is {brief(expression.text)} on {sample.image}, the record says "
        f"{brief(record['expression'])} on {record['image'] or 'no image'}"
    )


def _texts(expression: Expression) -> set[str]:
    return {expression.text, str(expression.attributes.get("raw", expression.text))}


def _image_names(image: str, expression: Expression) -> list[str]:
    number = id_text(expression.attributes.get("image_id"))
    return [image] if number is None else [image, number]


def _bare(key: str) -> str:
    """A key with its last part cut to its core."""
    return f"{key.rpartition('/')[0]}/{image_core(key)}"


def _by_stem(source: SampleSource | None) -> dict[str, list[str]]:
    """Keys of the split's images by core, where several share one."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    if source is not None and not source.generated:
        for group in source.groups:
            key = image_key(group.image)
            found[image_core(key)].append(key)
    return {core: keys for core, keys in found.items() if len(keys) > 1}


def _alike(source: SampleSource | None) -> dict[tuple[str, str], list[str]]:
    """Ids of each image's expressions of one text, also of those that are not scored, where there
    are several.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for group in () if source is None or source.generated else source.groups:
        own: defaultdict[str, list[str]] = defaultdict(list)
        for phrase in group.phrases:
            own[expression_key(phrase.text)].append(phrase.id)
        found.update(((group.image, text), ids) for text, ids in own.items() if len(ids) > 1)
    return found


def _pair_hash(image: object, text: object) -> int:
    if not isinstance(image, str) or not isinstance(text, str):
        return 0
    return _hash(f"{image_core(image_tail(image_key(image)))}\0{expression_key(text)}")


def _hash(text: str) -> int:
    return hash64(text) or 1  # 0 is kept for "none"


class _Lookup:
    """Rows by 64-bit hash, as two sorted arrays."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def rows(self, value: int) -> list[int]:
        """Rows with this hash, ascending."""
        key = np.uint64(value)
        first = int(np.searchsorted(self._sorted, key, "left"))
        last = int(np.searchsorted(self._sorted, key, "right"))
        return [int(row) for row in self._order[first:last]]
