"""What two models agree on: masks of which another source has nearly the same (ours).

Where both sources tell instances apart, each mask needs one of the other's; else the unions of an
expression's masks are compared. Two empty masks agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from risam_cli.data.readers.predictions import PredictionIndex
from risam_cli.errors import DataError
from risam_cli.export.sources import Given, ImageGroup, OnFailure, Source
from risam_cli.masks import rle as masks


class Agreement:
    """Another source's masks, found by image and expression. Use as a context manager.

    Args:
        source: what is held against it.
        path: see :class:`risam_cli.data.readers.results.Results`.
        min_iou: from which on two masks agree, 0..1.
        on_failure: gets every record of the other source that is none.

    Raises:
        DataError: the other source cannot be read.
    """

    def __init__(self, source: Source, path: Path, min_iou: float, on_failure: OnFailure) -> None:
        self._source = source
        self._min_iou = min_iou
        self._index = PredictionIndex(path, on_failure)

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, *exception: object) -> None:
        self._index.close()

    def objections(self, group: ImageGroup) -> list[str | DataError]:
        """For each record of an image why it is left out: a note, or what the other has wrong;
        empty where both agree.
        """
        found: list[str | DataError] = [""] * len(group.records)
        answers: dict[tuple[str, str], list[int]] = {}
        for number, given in enumerate(group.records):
            p = given.prediction
            name = p.id if p.instance is not None else f"\0{number}"
            answers.setdefault((name, p.expression), []).append(number)
        for (_, text), numbers in answers.items():
            ours = [group.records[number] for number in numbers]
            try:
                said: Sequence[str | DataError] = self._compared(group, text, ours)
            except DataError as error:
                said = [error] * len(numbers)
            for number, one in zip(numbers, said, strict=True):
                found[number] = one
        return found

    def _compared(self, group: ImageGroup, text: str, ours: Sequence[Given]) -> list[str]:
        theirs = self._index.of_pair(group.image, text, group.size, self._source.has_image)
        if not theirs:
            return [f"masks have no counterpart in {self._index.path}; left out"] * len(ours)
        rles = [given.prediction.segmentation for given in ours]
        nothing = masks.empty(group.size)
        others = [nothing if one.no_target else one.segmentation for _, one in theirs]
        told_apart = all(instance is not None for instance, _ in theirs)
        if not told_apart or any(given.prediction.instance is None for given in ours):
            rles, others = [masks.union(rles, group.size)], [masks.union(others, group.size)]
        agree = [max(masks.iou(one, other) for other in others) >= self._min_iou for one in rles]
        agree *= len(ours) // len(agree)
        differ = f"masks differ from those in {self._index.path}; left out"
        return ["" if one else differ for one in agree]
