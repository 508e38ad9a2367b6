"""Polygons with holes: filling them gives the mask back, whatever the mask."""

from __future__ import annotations

import cv2
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from risam_cli.masks.polygons import Polygon, to_polygons

any_mask = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24))


def picture(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in text.split()])


def signed_area(ring: np.ndarray) -> float:
    """Positive where the ring is clockwise on the screen (y down)."""
    x, y = ring.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def filled(polygons: list[Polygon], size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre is in an exterior and in none of its holes, by the even-odd rule."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5

    def inside(ring: np.ndarray) -> np.ndarray:
        odd = np.zeros(size, bool)
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if y0 != y1:  # edges that a ray from the centre to the left meets
                crossed = (min(y0, y1) <= y) & (y < max(y0, y1))
                odd ^= crossed & (x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x)
        return odd

    out = np.zeros(size, bool)
    for polygon in polygons:
        out |= inside(polygon.exterior) & ~np.any([inside(h) for h in polygon.holes], axis=0)
    return out


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
    assert (filled(to_polygons(mask), mask.shape) == mask).all()


@given(st.integers(0, 2**16), st.floats(0.05, 0.95))
def test_filling_gives_larger_blobs_back(seed: int, share: float) -> None:
    noise = np.random.default_rng(seed).random((60, 80)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    mask = smooth < np.quantile(smooth, share)
    assert (filled(to_polygons(mask), mask.shape) == mask).all()


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
