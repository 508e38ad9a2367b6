"""Curves over thresholds, and the choice of the no-target threshold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from risam_cli.metrics.figures import ScoreTable, figures, outcome, terms
from risam_cli.metrics.protocols import Protocol, get_protocol

_POINTS = 201


@dataclass(frozen=True, slots=True)
class NoTargetPoint:
    """What a no-target threshold gives; ``nan`` where there is nothing to count."""

    threshold: float
    n_acc: float
    t_acc: float
    giou: float


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Mean loss of the answers that are kept when the least certain are left out.

    Attributes:
        coverage: (P,) share that is kept, ascending to 1.
        risk: (P,) mean of 1 - IoU over what is kept.
        area: area under it; lower is better. 1 - mIoU is its value at coverage 1.
    """

    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    area: float


def no_target_curve(table: ScoreTable, protocol: str | Protocol = "native") -> list[NoTargetPoint]:
    """N-acc, T-acc and gIoU over thresholds of the no-target probability, ascending.

    An answer is "nothing fits" where its probability is above the threshold. Empty where the
    probabilities are unknown or one of the two kinds of expression does not occur.
    """
    rule = get_protocol(protocol)
    known = ~np.isnan(table.no_target_probability)
    kinds = table.gt_no_target[known]
    if not known.all() or not len(table) or kinds.all() or not kinds.any():
        return []
    points = []
    for threshold in _candidates(table.no_target_probability):
        moved = replace(table, pred_no_target=table.no_target_probability > threshold)
        found = figures(terms(moved, rule))
        points.append(NoTargetPoint(threshold, found["n_acc"], found["t_acc"], found["giou"]))
    return points


def fit_no_target(table: ScoreTable) -> NoTargetPoint | None:
    """The threshold with the best mean of N-acc and T-acc under native; None where unknown.

    The mean of the two cannot be gamed by saying "nothing fits" more or less often. Among equals
    the one nearest to 0.5 is taken.
    """
    points = [p for p in no_target_curve(table, "native") if 0 < p.threshold < 1]
    if not points:
        return None
    return max(points, key=lambda p: (round((p.n_acc + p.t_acc) / 2, 12), -abs(p.threshold - 0.5)))


def _candidates(probabilities: NDArray[np.float64]) -> list[float]:
    """Thresholds to try: between the distinct values, thinned to the quantiles, and both ends."""
    distinct = np.unique(probabilities)
    middles = (distinct[1:] + distinct[:-1]) / 2
    if len(middles) > _POINTS:
        middles = np.quantile(middles, np.linspace(0, 1, _POINTS))
    return sorted({0.0, 0.5, 1.0, *(float(round(m, 6)) for m in middles)})


def risk_coverage(table: ScoreTable, protocol: str | Protocol = "native") -> RiskCoverage | None:
    """Risk against coverage by the predicted score; None where scores are unknown.

    Equal scores are kept or left out together.
    """
    if not len(table) or np.isnan(table.score[~table.missing]).any() or table.missing.all():
        return None
    score = np.where(table.missing, -1.0, table.score)
    order = np.argsort(-score, kind="stable")
    loss = 1 - outcome(table, protocol).iou[order]
    ends = np.flatnonzero(np.append(score[order][1:] != score[order][:-1], True))
    kept = ends + 1
    risk = np.cumsum(loss)[ends] / kept
    coverage = kept / len(score)
    area = float(np.sum(risk * np.diff(coverage, prepend=0.0)))
    if len(coverage) > _POINTS:
        picks = np.unique(np.linspace(0, len(coverage) - 1, _POINTS).astype(np.int64))
        coverage, risk = coverage[picks], risk[picks]
    return RiskCoverage(coverage, risk, area)
