"""The figures. Each is a ratio of two sums over expressions, which is what makes slices, intervals
and comparisons of them one and the same computation.

Per expression, with P the answer and G the truth: I = |P and G|, U = |P or G|. ``oiou`` = ``ciou``
= sum I / sum U. ``miou`` = mean of I / U. ``pr@X`` = share of expressions with I / U at least (or
above) X. ``giou`` = mean of I / U with a correct "no target" counting 1 and a missed one 0.
``n_acc`` = TP / (TP + FN) and ``t_acc`` = TN / (TN + FP), "no target" being positive.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from risam_cli.masks import rle as masks
from risam_cli.metrics.protocols import Protocol, get_protocol
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


class Tally:
    """Collects scores one by one; some 60 bytes each, ids and texts are not kept."""

    def __init__(self, slice_names: Iterable[str] = ()) -> None:
        self._counts = {name: array("q") for name in _COUNTS}
        self._flags = {name: array("b") for name in _FLAGS}
        self._reals = {name: array("d") for name in _REALS}
        self._cluster = array("q")
        self._slices = {name: array("i") for name in slice_names}
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
        columns: dict[str, Any] = {
            name: np.array(column, kind)
            for kind, held in (
                (np.int64, self._counts),
                (np.bool_, self._flags),
                (np.float64, self._reals),
            )
            for name, column in held.items()
        }
        return ScoreTable(
            **columns,
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


DEGENERATE = 0.01
"""An N-acc or T-acc up to this is that of answers that are all alike."""
MOSTLY_NOTHING = 0.5
"""Below this T-acc, "nothing fits" is the answer to most expressions that have a target: what is
gained by it where nothing does fit, in gIoU and mIoU, is bought with those."""

PRECISIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
FIGURES = (
    "oiou",
    "miou",
    *(f"pr@{x}" for x in PRECISIONS),
    "giou",
    "ciou",
    "n_acc",
    "t_acc",
)
Terms = dict[str, tuple[Floats, Floats]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The table as a protocol sees it, (N,) each: what counts as I, U, IoU and "no target"."""

    intersection: Ints
    union: Ints
    iou: Floats
    giou: Floats
    answered_none: Flags


def outcome(table: ScoreTable, protocol: str | Protocol = "native") -> Outcome:
    """Apply a protocol's rules for empty masks and "no target" to raw counts."""
    rule = get_protocol(protocol)
    empty = table.pred_area == 0
    if rule.no_target == "gate":
        none = table.pred_no_target | empty
    elif rule.no_target == "head":
        none = table.pred_no_target.copy()
    else:
        none = empty
    intersection, union = table.intersection.copy(), table.union.copy()
    if rule.no_target == "gate":
        intersection[none] = 0
        union[none] = table.gt_area[none]
    elif rule.no_target == "head":
        intersection[none] = 0
        union[none & table.gt_no_target] = 0  # "none" said rightly adds nothing
    # No answer is the wrong answer: an empty mask with the opposite of the right flag.
    intersection[table.missing] = 0
    union[table.missing] = table.gt_area[table.missing]
    none = np.where(table.missing, ~table.gt_no_target, none)

    # A target may have no pixel. ReLA's IoU is then 0, whatever is answered.
    empty_iou = 0.0 if rule.no_target == "head" else rule.empty_iou
    iou = np.where(union == 0, empty_iou, intersection / np.maximum(union, 1))
    giou = np.where(table.gt_no_target, none.astype(np.float64), iou)
    if rule.no_target == "head":
        iou = giou
    iou, giou = np.where(table.missing, 0.0, iou), np.where(table.missing, 0.0, giou)
    return Outcome(intersection, union, iou, giou, none)


def terms(table: ScoreTable, protocol: str | Protocol = "native") -> Terms:
    """Numerator and denominator of every figure, (N,) each, in the order of ``FIGURES``."""
    rule = get_protocol(protocol)
    seen = outcome(table, rule)
    one = np.ones(len(table))
    counted = (~table.gt_no_target).astype(np.float64) if rule.targets_only else one
    overall = (seen.intersection.astype(np.float64), seen.union.astype(np.float64))
    result: Terms = {"oiou": overall, "miou": (seen.iou, one)}
    shrunk = seen.iou * (seen.union / (seen.union + rule.epsilon)) if rule.epsilon else seen.iou
    for x in rule.precisions:
        bound = float(np.float32(x)) if rule.single else x
        hit = shrunk > bound if rule.strict else shrunk >= bound
        result[f"pr@{x}"] = (hit * counted, counted)
    positive = table.gt_no_target.astype(np.float64)
    result["giou"] = (seen.giou, one)
    result["ciou"] = overall
    result["n_acc"] = (positive * seen.answered_none, positive)
    result["t_acc"] = ((1 - positive) * ~seen.answered_none, 1 - positive)
    return result


def figures(parts: Terms, chosen: NDArray[np.bool_] | None = None) -> dict[str, float]:
    """Each figure as a fraction in 0..1, over the ``chosen`` (N,) expressions.

    It is nan where it is undefined, as ``n_acc`` is where every expression has a target.
    """
    result = {}
    for name, (above, below) in parts.items():
        if chosen is not None:
            above, below = above[chosen], below[chosen]
        result[name] = ratio(above, below)
    return result


def ratio(above: Floats, below: Floats) -> float:
    """The sum of numerators (N,) over that of denominators; nan where that is 0."""
    total = float(below.sum())
    return float(above.sum()) / total if total else nan


def summarize(
    scores: ScoreTable | Tally | Iterable[ExpressionScore], protocol: str | Protocol = "native"
) -> dict[str, float]:
    """Every figure of ``FIGURES`` under a protocol, as fractions in 0..1; nan where undefined.

    Raises:
        UsageError: no protocol has that name.
    """
    if isinstance(scores, Tally):
        scores = scores.table()
    elif not isinstance(scores, ScoreTable):
        tally = Tally()
        tally.extend(scores)
        scores = tally.table()
    return figures(terms(scores, protocol))
