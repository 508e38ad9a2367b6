"""The figures. Each is a ratio of two sums over expressions, which is what makes slices, intervals
and comparisons of them one and the same computation.

Per expression, with P the answer and G the truth: I = |P and G|, U = |P or G|. ``oiou`` = ``ciou``
= sum I / sum U. ``miou`` = mean of I / U. ``pr@X`` = share of expressions with I / U at least (or
above) X. ``giou`` = mean of I / U with a correct "no target" counting 1 and a missed one 0.
``n_acc`` = TP / (TP + FN) and ``t_acc`` = TN / (TN + FP), "no target" being positive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from risam_cli.metrics.protocols import Protocol, get_protocol
from risam_cli.metrics.table import ExpressionScore, Flags, Floats, Ints, ScoreTable, Tally

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
        total = float(below.sum())
        result[name] = float(above.sum()) / total if total else float("nan")
    return result


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
