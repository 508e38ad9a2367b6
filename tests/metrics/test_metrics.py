"""Figures, slices, intervals, curves: against dense arrays and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from risam_cli.errors import DataError
from risam_cli.masks import rle as masks
from risam_cli.metrics.curves import fit_no_target, no_target_curve, risk_coverage
from risam_cli.metrics.figures import FIGURES, ExpressionScore, Tally, score_masks, summarize, terms
from risam_cli.metrics.intervals import compare, intervals
from risam_cli.metrics.slicer import Slicer
from risam_cli.metrics.slices import SLICES, Facts


def test_native_equals_a_dense_computation_on_500_random_pairs() -> None:
    rng = np.random.default_rng(0)
    tally = Tally()
    both, either, ious = [], [], []
    for number in range(500):
        height, width = (int(n) for n in rng.integers(1, 70, 2))
        predicted, true = (rng.random((height, width)) < rng.random() for _ in range(2))
        if number % 10 == 0:
            true[:] = False
        if number % 15 == 0:
            predicted[:] = False
        tally.add(score_masks(str(number), "i", masks.encode(predicted), masks.encode(true)))
        both.append(int((predicted & true).sum()))
        either.append(int((predicted | true).sum()))
        ious.append(both[-1] / either[-1] if either[-1] else 1.0)
    found = summarize(tally, "native")
    assert found["oiou"] == pytest.approx(sum(both) / sum(either), abs=1e-12)
    assert found["ciou"] == pytest.approx(sum(both) / sum(either), abs=1e-12)
    assert found["miou"] == pytest.approx(math.fsum(ious) / 500, abs=1e-12)
    for x in (0.5, 0.6, 0.7, 0.8, 0.9):
        assert found[f"pr@{x}"] == pytest.approx(np.mean(np.array(ious) >= x), abs=1e-12)
    assert list(found) == list(FIGURES)


def test_counts_of_a_pair_are_those_of_the_masks() -> None:
    rng = np.random.default_rng(1)
    predicted, true = rng.random((2, 30, 41)) < 0.4
    score = score_masks("a", "i", masks.encode(predicted), masks.encode(true))
    assert score.intersection == (predicted & true).sum()
    assert score.union == (predicted | true).sum()
    assert (score.pred_area, score.gt_area) == (predicted.sum(), true.sum())
    with pytest.raises(DataError, match="30x41"):
        score_masks("a", "i", masks.encode(predicted), masks.encode(true[:, 1:]))


def test_exact_thresholds_count_as_reached() -> None:
    """7 of 10 pixels is an IoU of 0.7 to the last bit."""
    for tenths in (5, 6, 7, 8, 9):
        for scale in (1, 3, 7, 41, 100_003):
            score = ExpressionScore("a", "i", tenths * scale, 10 * scale, 1, 1)
            assert summarize([score])[f"pr@0.{tenths}"] == 1.0


def test_undefined_figures_are_nan_not_zero() -> None:
    found = summarize([ExpressionScore("a", "i", 5, 10, 7, 8)])
    assert math.isnan(found["n_acc"])
    assert found["t_acc"] == 1.0
    assert all(math.isnan(v) for v in summarize([]).values())
    only_none = summarize([ExpressionScore("a", "i", 0, 0, 0, 0, True, True)])
    assert math.isnan(only_none["oiou"])
    assert only_none["giou"] == only_none["n_acc"] == 1.0


def test_metrics_load_no_torch() -> None:
    modules = "sys, risam_cli.metrics.figures, risam_cli.evaluation.report.render"
    code = f"import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- slices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "relation", "attribute"),
    [
        ("left car", 1, 0, 0),
        ("car to the left of the tree", 0, 1, 0),
        ("the left car next to the right tree", 1, 1, 0),
        ("red car", 0, 0, 1),
        ("the Blue one BEHIND him", 0, 1, 1),
        ("redwood leftovers", 0, 0, 0),
        ("a man", 0, 0, 0),
        ("top-shelf whiteboard", 0, 0, 0),
    ],
)
def test_words_decide_slices(text: str, place: int, relation: int, attribute: int) -> None:
    levels = Slicer().levels(Facts(text, 0.1, {}))
    assert (levels["place"], levels["relation"], levels["attribute"]) == (
        place,
        relation,
        attribute,
    )


@pytest.mark.parametrize(
    ("words", "level"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (7, 2), (8, 3), (11, 3), (12, 4)]
)
def test_length_slices(words: int, level: int) -> None:
    assert Slicer().levels(Facts(" ".join("w" * words), 0.1, {}))["length"] == level


def test_numbers_decide_slices() -> None:
    slicer = Slicer()

    def level(name: str, share: float = 0.1, **attributes: object) -> int:
        return slicer.levels(Facts("a", share, attributes))[name]

    assert [level("referents", referents=n) for n in (0, 1, 2, 3, 4, 9)] == [0, 1, 2, 3, 4, 4]
    assert [level("distractors", distractors=n) for n in (0, 1, 2, 3, 4, 9)] == [0, 1, 2, 2, 3, 3]
    assert [level("size", share=s) for s in (0, 0.009, 0.01, 0.05, 0.2)] == [-1, 0, 1, 2, 3]
    assert level("referents") == level("distractors") == level("category") == -1
    assert [level("category", category=c) for c in ("cat", "dog", "cat")] == [0, 1, 0]
    assert slicer.slices()[-1].levels == ("cat", "dog")
    for part in SLICES:
        assert part.definition


# --- intervals ------------------------------------------------------------------------------------


def _tally(ious: list[float], images: list[int]) -> Tally:
    tally = Tally()
    for number, (iou, image) in enumerate(zip(ious, images, strict=True)):
        tally.add(ExpressionScore(str(number), str(image), round(1000 * iou), 1000, 1000, 1000))
    return tally


def test_intervals_agree_with_theory_and_grow_with_clustering() -> None:
    rng = np.random.default_rng(3)
    means = rng.random(200)
    ious = np.repeat(means, 5)
    alone = _tally(list(ious), list(range(1000))).table()
    grouped = _tally(list(ious), list(np.repeat(range(200), 5))).table()
    width = {}
    for name, table in (("alone", alone), ("grouped", grouped)):
        low, high = intervals([terms(table)["miou"]], table.cluster)[0]
        assert low < ious.mean() < high
        width[name] = high - low
    # Normal theory: 2 * 1.96 * standard error, with 1000 or 200 independent units.
    spread = 2 * 1.96 * means.std()
    assert width["alone"] == pytest.approx(spread / 1000**0.5, rel=0.1)
    assert width["grouped"] == pytest.approx(spread / 200**0.5, rel=0.1)


def test_intervals_are_repeatable_and_do_not_depend_on_their_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = _tally(list(np.linspace(0, 1, 40)), list(np.repeat(range(20), 2))).table()
    columns = list(terms(table).values())
    first = intervals(columns, table.cluster, replicates=300)
    assert np.array_equal(first, intervals(columns, table.cluster, replicates=300), equal_nan=True)
    monkeypatch.setattr("risam_cli.metrics.intervals._CELLS", 70)
    assert np.array_equal(first, intervals(columns, table.cluster, replicates=300), equal_nan=True)
    assert np.isnan(first[list(terms(table)).index("n_acc")]).all()


@pytest.mark.parametrize("images", [1, 4, 9])
def test_few_images_have_no_interval(images: int) -> None:
    """Nor a p-value, whatever the difference; that of ten has both."""
    clusters = list(range(images)) * 2
    ious = list(np.linspace(0.2, 0.9, 2 * images))
    table = _tally(ious, clusters).table()
    assert np.isnan(intervals([terms(table)["miou"]], table.cluster)).all()
    better = _tally([iou + 0.05 for iou in ious], clusters).table()
    found = compare(terms(table), terms(better), table.cluster)["miou"]
    assert found.difference == pytest.approx(0.05)
    assert np.isnan([found.low, found.high, found.p]).all()
    # Images that a figure says nothing of do not count.
    many = _tally([*ious, *[0.5] * 20], [*clusters, *range(100, 120)]).table()
    above, below = terms(many)["miou"]
    few = above * (many.cluster < images), below * (many.cluster < images)
    assert np.isnan(intervals([few], many.cluster)).all()
    assert not np.isnan(intervals([(above, below)], many.cluster)).any()


def test_images_that_all_say_the_same_have_no_interval() -> None:
    table = _tally([1.0] * 40, list(range(40))).table()
    assert np.isnan(intervals([terms(table)["miou"]], table.cluster)).all()


def test_comparison_is_paired() -> None:
    """A small gain everywhere is certain although the runs themselves vary widely."""
    rng = np.random.default_rng(5)
    before = rng.random(300) * 0.9
    images = list(np.repeat(range(100), 3))
    first = _tally(list(before), images).table()
    second = _tally(list(before + 0.02), images).table()
    found = compare(terms(first), terms(second), second.cluster)["miou"]
    assert found.difference == pytest.approx(0.02, abs=1e-3)
    assert 0.015 < found.low <= found.high < 0.025
    assert found.p < 0.002
    width = np.diff(intervals([terms(first)["miou"]], first.cluster)[0])[0]
    assert found.high - found.low < width / 10
    same = compare(terms(first), terms(first), first.cluster)["miou"]
    assert (same.difference, same.p) == (0.0, 1.0)


def test_p_values_of_chance_are_spread_evenly() -> None:
    """Two runs that differ by chance alone: p under 0.1 about every tenth time."""
    rng = np.random.default_rng(11)
    ps = []
    for _ in range(120):
        pair = [_tally(list(rng.random(120)), list(np.repeat(range(60), 2))).table() for _ in "ab"]
        found = compare(terms(pair[0]), terms(pair[1]), pair[0].cluster, replicates=400)
        ps.append(found["miou"].p)
    assert 0.03 < np.mean(np.array(ps) < 0.1) < 0.2
    assert 0.35 < np.mean(ps) < 0.65


# --- curves ---------------------------------------------------------------------------------------


def _flagged(probabilities: list[float], nothing: list[bool]) -> Tally:
    tally = Tally()
    for number, (p, none) in enumerate(zip(probabilities, nothing, strict=True)):
        area = 0 if none else 100
        score = ExpressionScore(str(number), "i", area, 100, 100, area, none)
        tally.add(replace(score, no_target_probability=p, pred_no_target=p > 0.5))
    return tally


def test_no_target_curve_by_hand() -> None:
    table = _flagged([0.1, 0.3, 0.6, 0.8], [False, True, False, True]).table()
    points = {round(p.threshold, 3): p for p in no_target_curve(table)}
    assert {k: (p.n_acc, p.t_acc) for k, p in points.items()} == {
        0.0: (1.0, 0.0),
        0.2: (1.0, 0.5),
        0.45: (0.5, 0.5),
        0.5: (0.5, 0.5),
        0.7: (0.5, 1.0),
        1.0: (0.0, 1.0),
    }
    assert points[0.0].giou == 0.5  # everything is "no target": right for half of them
    fitted = fit_no_target(table)
    assert fitted is not None
    assert fitted.threshold in (0.2, pytest.approx(0.7))
    assert (fitted.n_acc + fitted.t_acc) / 2 == 0.75
    assert abs(fitted.threshold - 0.5) == pytest.approx(0.2)


def test_no_target_curve_needs_both_kinds_and_all_probabilities() -> None:
    assert no_target_curve(_flagged([0.1, 0.9], [False, False]).table()) == []
    assert no_target_curve(_flagged([0.1, 0.9], [True, True]).table()) == []
    assert no_target_curve(_flagged([0.1, math.nan], [True, False]).table()) == []
    assert fit_no_target(_flagged([], []).table()) is None


def test_a_fitted_threshold_is_one_that_settings_take() -> None:
    fitted = fit_no_target(_flagged([0.0, 1.0], [False, True]).table())
    assert fitted is not None
    assert fitted.threshold == 0.5
    assert (fitted.n_acc, fitted.t_acc) == (1.0, 1.0)


def test_many_probabilities_make_a_bounded_curve() -> None:
    rng = np.random.default_rng(2)
    table = _flagged(list(rng.random(5000)), list(rng.random(5000) < 0.5)).table()
    points = no_target_curve(table)
    assert 150 < len(points) <= 204
    assert all(a.n_acc >= b.n_acc for a, b in itertools.pairwise(points))
    assert all(a.t_acc <= b.t_acc for a, b in itertools.pairwise(points))


def _scored(pairs: list[tuple[float, float]]) -> Tally:
    tally = Tally()
    for number, (score, iou) in enumerate(pairs):
        row = ExpressionScore(str(number), "i", round(100 * iou), 100, 100, 100)
        tally.add(replace(row, score=score))
    return tally


def test_risk_coverage_by_hand() -> None:
    found = risk_coverage(_scored([(0.9, 1.0), (0.2, 0.0), (0.5, 0.5), (0.5, 1.0)]).table())
    assert found is not None
    assert list(found.coverage) == [0.25, 0.75, 1.0]  # equal scores go together
    assert list(found.risk) == pytest.approx([0.0, 0.5 / 3, 1.5 / 4])
    assert found.area == pytest.approx(0.25 * 0 + 0.5 * 0.5 / 3 + 0.25 * 1.5 / 4)


def test_risk_coverage_needs_scores() -> None:
    assert risk_coverage(_scored([(math.nan, 1.0), (0.5, 1.0)]).table()) is None
    assert risk_coverage(_scored([]).table()) is None
    tally = _scored([(0.5, 1.0)])
    tally.add(ExpressionScore("m", "i", 0, 100, 0, 100, missing=True))
    found = risk_coverage(tally.table())
    assert found is not None
    assert list(found.risk) == [0.0, 0.5]  # a missing answer is the least certain
