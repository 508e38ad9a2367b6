"""Masks as single rings: what the two kinds of reader fill must be the mask."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw
from support.export_cases import Mask, iou, shapes

from risam_cli.masks import rle as masks
from risam_cli.masks.outlines import CENTER, EDGE, Ring, Vertices, outlines

SHAPES = shapes()
ANY_MASK = hnp.arrays(
    np.bool_,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
    elements=st.booleans(),
)


def by_pixel_centres(rings: tuple[Ring, ...], size: tuple[int, int]) -> Mask:
    """As pycocotools fills."""
    flat = [ring.round(2).ravel().tolist() for ring in rings]
    return masks.decode(masks.from_polygons(flat, size))


def border_included(rings: tuple[Ring, ...], size: tuple[int, int], *, cut: bool) -> Mask:
    """As readers with OpenCV fill, cutting off fractions or rounding them."""
    out = np.zeros(size, np.uint8)
    for ring in rings:
        points = ring.astype(np.float32)
        cv2.fillPoly(out, [(points if cut else np.round(points)).astype(np.int32)], 1)
    return out.view(np.bool_)


def by_pillow(rings: tuple[Ring, ...], size: tuple[int, int]) -> Mask:
    """As labelme fills."""
    image = Image.new("L", size[::-1])
    for ring in rings:
        ImageDraw.Draw(image).polygon([tuple(p) for p in ring.tolist()], outline=1, fill=1)
    return np.asarray(image).astype(np.bool_)


@pytest.mark.parametrize("name", SHAPES)
def test_every_reader_gets_the_mask_back(name):
    mask = SHAPES[name]
    edge, center = outlines(mask, EDGE), outlines(mask, CENTER)
    assert edge.bridged == edge.holes
    assert np.array_equal(by_pixel_centres(edge.rings, mask.shape), mask)
    assert np.array_equal(border_included(edge.rings, mask.shape, cut=True), mask)
    assert np.array_equal(by_pillow(edge.rings, mask.shape), mask)
    assert np.array_equal(border_included(center.rings, mask.shape, cut=True), mask)
    assert np.array_equal(border_included(center.rings, mask.shape, cut=False), mask)


@given(ANY_MASK)
def test_any_mask_comes_back(mask):
    edge, center = outlines(mask, EDGE), outlines(mask, CENTER)
    assert edge.bridged == edge.holes == center.bridged
    assert np.array_equal(by_pixel_centres(edge.rings, mask.shape), mask)
    assert np.array_equal(border_included(edge.rings, mask.shape, cut=True), mask)
    assert np.array_equal(border_included(center.rings, mask.shape, cut=False), mask)
    assert np.array_equal(by_pillow(edge.rings, mask.shape), mask)


@given(ANY_MASK)
def test_vertices_are_inside_the_image_and_parts_that_touch_are_one(mask):
    rings = outlines(mask, EDGE).rings
    count, _ = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    assert len(rings) == count - 1
    for ring in rings:
        assert len(ring) >= 4
        assert (ring > 0).all()
        assert (ring < mask.shape[::-1]).all()
        columns, rows = np.floor(ring).astype(int).T
        assert mask[rows, columns].all()


def test_holes_dropped_are_filled():
    ring = SHAPES["ring"]
    traced = outlines(ring, EDGE, bridge=False)
    assert (traced.holes, traced.bridged) == (1, 0)
    assert np.array_equal(by_pixel_centres(traced.rings, ring.shape), SHAPES["block"])


def test_joined_parts_are_one_ring_and_lose_only_the_line_between():
    mask = SHAPES["two parts"]
    traced = outlines(mask, CENTER, join=True)
    assert len(traced.rings) == 1
    back = border_included(traced.rings, mask.shape, cut=False)
    assert (back | mask).sum() == back.sum()
    # From (29, 19) to (40, 30): eleven steps, ten pixels of background.
    assert (back & ~mask).sum() == 10


def test_simplifying_shortens_and_stays_near():
    rows, columns = np.indices((200, 240))
    disc = (rows - 100) ** 2 + (columns - 120) ** 2 < 80**2
    disc &= (rows - 100) ** 2 + (columns - 120) ** 2 > 30**2
    exact, short = outlines(disc, EDGE), outlines(disc, EDGE, simplify=1.0)
    assert sum(map(len, short.rings)) * 4 < sum(map(len, exact.rings))
    assert short.bridged == 1
    back = by_pixel_centres(short.rings, disc.shape)
    assert 0.97 < iou(back, disc) < 1
    distance = cv2.distanceTransform((~(disc ^ back)).astype(np.uint8), cv2.DIST_L2, 3)
    assert distance.max() > 0
    moved = cv2.erode((disc ^ back).astype(np.uint8), np.ones((4, 4), np.uint8))
    assert not moved.any()  # nothing moved by four pixels


def test_a_hole_that_vanishes_is_counted():
    mask = np.ones((40, 40), np.bool_)
    mask[20, 20] = False
    traced = outlines(mask, EDGE, simplify=3.0)
    assert (traced.holes, traced.bridged) == (1, 0)


def test_nothing_gives_nothing():
    assert outlines(np.zeros((5, 6), np.bool_)).rings == ()


def test_whole_pixels_are_their_indices():
    mask = np.zeros((6, 7), np.bool_)
    mask[2:4, 1:5] = True
    (ring,) = outlines(mask, Vertices(0.0, 0.0)).rings
    assert sorted(map(tuple, ring.tolist())) == [(1, 2), (1, 3), (4, 2), (4, 3)]
