"""Polygons with holes: filling them gives the mask back, whatever the mask."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from risam_cli.masks.polygons import Polygon, rasterize, to_polygons

any_mask = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24))


def picture(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in text.split()])


def signed_area(ring: np.ndarray) -> float:
    """Positive where the ring is clockwise on the screen (y down)."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


RINGS = picture("####### #.....# #.###.# #.#.#.# #.###.# #.....# #######")
DIAGONALS = picture("#.#.# .#.#. #.#.# .#.#.")
KNOT = picture(".##.. .#.#. .###. #....")  # closed at one corner only


@given(any_mask)
@example(np.ones((1, 1), bool))
@example(RINGS)
@example(DIAGONALS)
@example(~DIAGONALS)
@example(KNOT)
@example(~KNOT)
def test_filling_gives_the_mask_back(mask: np.ndarray) -> None:
    assert (rasterize(to_polygons(mask), mask.shape) == mask).all()


@given(st.integers(0, 2**16), st.floats(0.05, 0.95))
def test_filling_gives_larger_blobs_back(seed: int, share: float) -> None:
    noise = np.random.default_rng(seed).random((60, 80)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    mask = smooth < np.quantile(smooth, share)
    assert (rasterize(to_polygons(mask), mask.shape) == mask).all()


@given(any_mask)
@example(KNOT)
@example(DIAGONALS)
def test_polygons_are_simple_and_oriented_and_count_every_pixel(mask: np.ndarray) -> None:
    polygons = to_polygons(mask)
    parts, _ = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    assert len(polygons) == parts - 1
    total = 0.0
    for polygon in polygons:
        rings = (polygon.exterior, *polygon.holes)
        for ring in rings:
            assert len({tuple(vertex) for vertex in ring}) == len(ring)  # touches itself nowhere
            turns = np.abs(np.diff(np.vstack([ring, ring[:1]]), axis=0))
            assert (np.count_nonzero(turns, axis=1) == 1).all()  # along pixel edges
        assert signed_area(polygon.exterior) > 0
        assert all(signed_area(hole) < 0 for hole in polygon.holes)
        total += sum(signed_area(ring) for ring in rings)
    assert total == mask.sum()


def test_holes_belong_to_the_ring_around_them() -> None:
    outer, inner = to_polygons(RINGS)
    assert [len(outer.holes), len(inner.holes)] == [1, 1]
    assert outer.exterior.tolist() == [[0, 0], [7, 0], [7, 7], [0, 7]]
    assert outer.holes[0].tolist() == [[1, 1], [1, 6], [6, 6], [6, 1]]
    assert inner.exterior.tolist() == [[2, 2], [5, 2], [5, 5], [2, 5]]


def test_a_ring_closed_at_a_corner_is_an_exterior_with_a_hole() -> None:
    first, second = to_polygons(KNOT)
    assert len(first.holes) == 1
    assert second.exterior.tolist() == [[0, 3], [1, 3], [1, 4], [0, 4]]


def test_no_mask_no_polygons() -> None:
    assert to_polygons(np.zeros((4, 5), bool)) == []
    assert not rasterize([], (4, 5)).any()


@given(any_mask, st.floats(0.1, 5))
@example(np.eye(1, dtype=bool), 5.0)
def test_simplifying_loses_no_object(mask: np.ndarray, simplify: float) -> None:
    exact, simple = to_polygons(mask), to_polygons(mask, simplify)
    assert len(simple) == len(exact)
    for before, after in zip(exact, simple, strict=True):
        assert 3 <= len(after.exterior) <= len(before.exterior)
        assert len(after.holes) <= len(before.holes)


def test_simplifying_moves_an_outline_by_a_pixel_at_most() -> None:
    disk = _disk(101)
    (exact,), (simple,) = to_polygons(disk), to_polygons(disk, 1.0)
    assert len(simple.exterior) * 4 < len(exact.exterior)
    again = rasterize([simple], disk.shape)
    assert (again & disk).sum() / (again | disk).sum() > 0.97


def _disk(side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side // 2
    return x**2 + y**2 <= (side * 0.45) ** 2


def crossings(ring: np.ndarray, x: float, y: float) -> int:
    """Edges that a ray from (x, y) to the left meets, one by one."""
    count = 0
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if min(y0, y1) <= y < max(y0, y1):
            count += x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
    return count


# Eighths are exact in binary, and 30ths of slopes then seldom fall on a centre with rounding.
vertex = st.integers(-40, 120).map(lambda n: n / 8)
free_ring = st.lists(st.tuples(vertex, vertex), min_size=3, max_size=7).map(np.array)


@given(free_ring, st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_a_free_ring_is_filled_by_the_even_odd_rule_at_pixel_centres(
    ring: np.ndarray, size: tuple[int, int]
) -> None:
    height, width = size
    expected = np.array(
        [[crossings(ring, x + 0.5, y + 0.5) % 2 for x in range(width)] for y in range(height)]
    )
    assert (rasterize([Polygon(ring)], size) == expected).all()


def test_polygons_unite_and_holes_do_not_spill() -> None:
    square = np.array([[1, 1], [4, 1], [4, 4], [1, 4]], float)
    far_hole = square + 3
    filled = rasterize([Polygon(square), Polygon(square), Polygon(square, (far_hole,))], (9, 9))
    assert filled.sum() == 9
    assert filled[1:4, 1:4].all()


@pytest.mark.parametrize("ring", [[[0, 0], [1, 0], [np.nan, 1]], [0, 1, 2], [[0, 0, 0]] * 3])
def test_a_bad_ring_is_refused(ring: list[object]) -> None:
    with pytest.raises(ValueError, match="ring"):
        rasterize([Polygon(np.array(ring, float))], (4, 4))
