"""The per-expression table: what a run is scored from, in compact columns."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import nan

import numpy as np
from numpy.typing import NDArray

from risam_cli.masks import rle as masks
from risam_cli.types import Rle

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ExpressionScore:
    """What one expression contributes. Areas are in pixels, of the raw mask.

    Attributes:
        intersection: pixels in both masks.
        union: pixels in either mask.
        pred_area, gt_area: pixels of each.
        gt_no_target: nothing in the image fits.
        pred_no_target: the answer was "nothing fits" by the no-target head. The mask's own pixels
            still stand in ``intersection``, ``union`` and ``pred_area``; a protocol decides.
        score: predicted quality in 0..1, or nan.
        no_target_probability: in 0..1, or nan.
        missing: there is no answer. It scores zero everywhere.
    """

    id: str
    image: str
    intersection: int
    union: int
    pred_area: int
    gt_area: int
    gt_no_target: bool = False
    pred_no_target: bool = False
    score: float = nan
    no_target_probability: float = nan
    missing: bool = False


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Columns of N expressions.

    Attributes:
        cluster: (N,) number of the image, 0 … images - 1: the unit that intervals resample.
        slices: (N,) level numbers by slice name, -1 where the expression is in none.
    """

    intersection: Ints
    union: Ints
    pred_area: Ints
    gt_area: Ints
    gt_no_target: Flags
    pred_no_target: Flags
    missing: Flags
    score: Floats
    no_target_probability: Floats
    cluster: Ints
    slices: dict[str, Ints] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.union)

    def with_no_target(self, flags: Flags) -> ScoreTable:
        """The same table had the no-target head answered ``flags`` (N,)."""
        return replace(self, pred_no_target=flags)


class Tally:
    """Collects scores one by one; some 60 bytes each, ids and texts are not kept."""

    def __init__(self, slice_names: Iterable[str] = ()) -> None:
        self._counts = {name: array("q") for name in _COUNTS}
        self._flags = {name: array("b") for name in _FLAGS}
        self._reals = {name: array("d") for name in _REALS}
        self._cluster = array("q")
        self._slices = {name: array("h") for name in slice_names}
        self._image_numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._cluster)

    @property
    def images(self) -> int:
        """How many images there were."""
        return len(self._image_numbers)

    def add(self, score: ExpressionScore, levels: dict[str, int] | None = None) -> None:
        """Take one score in, with its level in each slice (absent: in none)."""
        for name, counts in self._counts.items():
            counts.append(int(getattr(score, name)))
        for name, flags in self._flags.items():
            flags.append(bool(getattr(score, name)))
        for name, reals in self._reals.items():
            reals.append(float(getattr(score, name)))
        number = self._image_numbers.setdefault(score.image, len(self._image_numbers))
        self._cluster.append(number)
        for name, column in self._slices.items():
            column.append((levels or {}).get(name, -1))

    def extend(self, scores: Iterable[ExpressionScore]) -> None:
        """Take several scores in."""
        for score in scores:
            self.add(score)

    def table(self) -> ScoreTable:
        """The columns so far, copied."""
        return ScoreTable(
            intersection=np.array(self._counts["intersection"], np.int64),
            union=np.array(self._counts["union"], np.int64),
            pred_area=np.array(self._counts["pred_area"], np.int64),
            gt_area=np.array(self._counts["gt_area"], np.int64),
            gt_no_target=np.array(self._flags["gt_no_target"], np.bool_),
            pred_no_target=np.array(self._flags["pred_no_target"], np.bool_),
            missing=np.array(self._flags["missing"], np.bool_),
            score=np.array(self._reals["score"], np.float64),
            no_target_probability=np.array(self._reals["no_target_probability"], np.float64),
            cluster=np.array(self._cluster, np.int64),
            slices={name: np.array(column, np.int64) for name, column in self._slices.items()},
        )


_COUNTS = ("intersection", "union", "pred_area", "gt_area")
_FLAGS = ("gt_no_target", "pred_no_target", "missing")
_REALS = ("score", "no_target_probability")


def score_masks(
    id: str,
    image: str,
    prediction: Rle,
    target: Rle,
    *,
    gt_no_target: bool | None = None,
    pred_no_target: bool = False,
    score: float = nan,
    no_target_probability: float = nan,
) -> ExpressionScore:
    """Score one answer against its ground truth, from the runs; no mask is unpacked.

    Args:
        gt_no_target: by default, whether ``target`` is empty.

    Raises:
        DataError: the masks differ in size.
    """
    intersection, union = masks.intersection_union(prediction, target)
    gt_area = masks.area(target)
    return ExpressionScore(
        id,
        image,
        intersection,
        union,
        intersection + union - gt_area,
        gt_area,
        gt_area == 0 if gt_no_target is None else gt_no_target,
        pred_no_target,
        score,
        no_target_probability,
    )
