"""Masks to polygons with holes and back, exactly (ours). numpy and OpenCV only.

Polygons run along pixel *edges*: vertices are pixel corners, so pixel (row, col) covers the square
from (col, row) to (col + 1, row + 1), and filling a polygon gives its mask back. OpenCV's own
contours run through pixel centres and lose half a pixel all around.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Ring = NDArray[np.float64]
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Polygon:
    """One area with its holes; rings are open (the last vertex is not the first again).

    Attributes:
        exterior: (N, 2) vertices as (x, y) in pixels, clockwise on the screen.
        holes: rings (N, 2) inside the exterior, counter-clockwise on the screen.
    """

    exterior: Ring
    holes: tuple[Ring, ...] = ()


def to_polygons(mask: Mask, simplify: float = 0.0) -> list[Polygon]:
    """Polygons with holes of a mask (H, W), one for each 4-connected part, in reading order.

    Rings are simple: where a ring would touch itself at a pixel corner, it is split there, so that
    the polygons are valid in the sense of OGC's simple features. ``rasterize(to_polygons(mask))``
    is the mask, exactly.

    Args:
        mask: (H, W); may be empty, which gives no polygons.
        simplify: largest distance in pixels that an outline may move (Douglas-Peucker, by
            ``cv2.approxPolyDP``); 0 keeps it exact. A hole that vanishes is dropped, an exterior
            never is.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask has the shape (H, W), not {mask.shape}")
    pixels = np.ascontiguousarray(mask, dtype=np.bool_).view(np.uint8)
    # Only the box is traced; a frame of background gives every pixel a neighbour, so shapes close.
    x0, y0, width, height = cv2.boundingRect(pixels)
    framed = np.pad(pixels[y0 : y0 + height, x0 : x0 + width], 1)
    _, labels = cv2.connectedComponents(framed, connectivity=4)
    exteriors: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = {}
    for ring in _crack_rings(framed):
        x, y = ring[0]
        # ring[0] is the top-left vertex: the pixel below right of it is inside the ring.
        if framed[y + 1, x + 1]:
            exteriors[int(labels[y + 1, x + 1])] = _finish(ring, (x0, y0), simplify, keep=True)
        else:
            hole = _finish(ring[:1] + ring[:0:-1], (x0, y0), simplify, keep=False)
            if len(hole):
                holes.setdefault(int(labels[y, x + 1]), []).append(hole)
    return [Polygon(ring, tuple(holes.get(part, ()))) for part, ring in exteriors.items()]


def rasterize(polygons: Sequence[Polygon], size: Size) -> Mask:
    """Mask (H, W) of the union of polygons: pixels whose centre is in an exterior and in no hole.

    A ring's inside is by the even-odd rule; a centre on a left or upper edge is inside, one on a
    right or lower edge is not, so that neighbours share no pixel. Parts outside the image are cut.

    Raises:
        ValueError: a ring is not (N, 2) or not finite.
    """
    height, width = size
    out = np.zeros((height, width), np.bool_)
    for polygon in polygons:
        exterior = _check_ring(polygon.exterior)
        if len(exterior) < 3:
            continue
        # Only the exterior's box is filled, so that many small parts stay cheap.
        x0, y0 = np.clip(np.floor(exterior.min(axis=0)), 0, (width, height)).astype(int)
        x1, y1 = np.clip(np.ceil(exterior.max(axis=0)), 0, (width, height)).astype(int)
        if x1 <= x0 or y1 <= y0:
            continue
        window = (y0, y1, x0, x1)
        inside = _fill(exterior, window)
        for hole in polygon.holes:
            inside &= ~_fill(_check_ring(hole), window)
        out[y0:y1, x0:x1] |= inside
    return out


def _crack_rings(framed: NDArray[np.uint8]) -> list[list[tuple[int, int]]]:
    """Simple rings of pixel corners around a framed mask, each from its top-left vertex rightwards.

    Foreground is 4-connected: two pixels that meet at a corner only are two parts. The vertices are
    in the coordinates of the mask without its frame. Rings come in reading order of that vertex.
    """
    ys, xs, twin = _corners(framed)
    # In a row of corners the first is joined to the second, the third to the fourth …
    across = np.arange(len(xs)) ^ 1
    # … and likewise down a column, where a corner that occurs twice is told apart by ``twin``.
    order = np.lexsort((twin, ys, xs))
    down = np.empty_like(order)
    down[order] = order[np.arange(len(order)) ^ 1]
    crossing = np.zeros(len(xs), np.bool_)
    same = (xs[1:] == xs[:-1]) & (ys[1:] == ys[:-1])
    crossing[1:] |= same
    crossing[:-1] |= same

    links, points = (
        (across.tolist(), down.tolist()),
        list(zip(xs.tolist(), ys.tolist(), strict=True)),
    )
    meets, seen = crossing.tolist(), bytearray(len(points))
    rings: list[list[tuple[int, int]]] = []
    for start in range(len(points)):
        if seen[start]:
            continue
        path: list[tuple[int, int]] = []
        visited: dict[tuple[int, int], int] = {}
        at, turn = start, 0
        while not seen[at]:
            seen[at] = 1
            point = points[at]
            if meets[at]:
                if point in visited:  # the ring touches itself: cut the loop off
                    cut = visited[point]
                    rings.append(path[cut:])
                    for other in path[cut + 1 :]:
                        visited.pop(other, None)
                    del path[cut:]
                visited[point] = len(path)
            path.append(point)
            at, turn = links[turn][at], 1 - turn
        rings.append(path)
    return sorted((_from_top_left(ring) for ring in rings), key=lambda ring: ring[0][::-1])


def _corners(
    framed: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Vertices where the outline turns, row by row: ys, xs and an order for those that occur twice.

    A vertex between two pixels that meet diagonally is two corners: in a row the first ends the
    edge from the left, the second begins the edge to the right; in a column the first ends the edge
    from above. ``twin`` sorts them by column so that each corner bends around a pixel of the mask.
    """
    top_left, top_right = framed[:-1, :-1], framed[:-1, 1:]
    bottom_left, bottom_right = framed[1:, :-1], framed[1:, 1:]
    odd = top_left ^ top_right ^ bottom_left ^ bottom_right
    diagonal = (top_left == bottom_right) & (top_right == bottom_left) & (top_left != top_right)
    ys, xs = np.nonzero(odd | diagonal)
    twice = diagonal[ys, xs]
    ys, xs = np.repeat(ys, 1 + twice), np.repeat(xs, 1 + twice)
    second = np.zeros(len(xs), np.int64)
    second[1:] = (xs[1:] == xs[:-1]) & (ys[1:] == ys[:-1])
    falling = top_left[ys, xs] == 1
    return ys, xs, np.where(falling, second, 1 - second)


def _from_top_left(ring: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ring turned to begin at its upper left vertex and to go right from there."""
    first = min(range(len(ring)), key=lambda k: (ring[k][1], ring[k][0]))
    ring = ring[first:] + ring[:first]
    return ring if ring[1][1] == ring[0][1] else ring[:1] + ring[:0:-1]


def _finish(
    ring: list[tuple[int, int]], origin: tuple[int, int], simplify: float, *, keep: bool
) -> Ring:
    """(N, 2) vertices, simplified, moved by ``origin`` (x, y).

    An empty array where nothing is left and ``keep`` is False.
    """
    exact = np.array(ring, dtype=np.int32)
    if simplify > 0:
        simple = cv2.approxPolyDP(exact[:, None], simplify, closed=True)[:, 0]
        if len(simple) >= 3 and cv2.contourArea(simple) > 0:
            exact = simple.astype(np.int32)
        elif not keep:
            exact = exact[:0]
    return exact.astype(np.float64) + origin


def _check_ring(ring: Ring) -> Ring:
    ring = np.asarray(ring, dtype=np.float64)
    if ring.ndim != 2 or ring.shape[1] != 2 or not np.isfinite(ring).all():
        raise ValueError(f"a ring is finite (N, 2) vertices, not {ring.shape}")
    return ring


def _fill(ring: Ring, window: tuple[int, int, int, int]) -> Mask:
    """Even-odd inside of one ring over pixel centres of rows y0..y1 and columns x0..x1."""
    y0, y1, x0, x1 = window
    begin, end = ring, np.roll(ring, -1, axis=0)
    upward = begin[:, 1] > end[:, 1]
    upper = np.where(upward[:, None], end, begin)
    lower = np.where(upward[:, None], begin, end)
    # Rows whose centre line r + 0.5 is crossed: upper.y <= r + 0.5 < lower.y.
    first = np.clip(np.ceil(upper[:, 1] - 0.5), y0, y1).astype(np.int64)
    last = np.clip(np.ceil(lower[:, 1] - 0.5), y0, y1).astype(np.int64)
    spans = last - first
    edge = np.repeat(np.arange(len(ring)), spans)
    rows = np.arange(edge.size) - np.repeat(np.cumsum(spans) - spans, spans) + first[edge]
    slope = (lower[edge, 0] - upper[edge, 0]) / (lower[edge, 1] - upper[edge, 1])
    crossing = upper[edge, 0] + (rows + 0.5 - upper[edge, 1]) * slope
    columns = np.clip(np.ceil(crossing - 0.5), x0, x1).astype(np.int64)
    # Every crossing flips all pixels to its right; bytes may wrap, the parity stays.
    flips = np.zeros((y1 - y0, x1 - x0 + 1), np.uint8)
    np.add.at(flips, (rows - y0, columns - x0), 1)
    inside = np.bitwise_xor.accumulate(flips[:, :-1] & 1, axis=1)
    return np.asarray(inside, dtype=np.uint8).view(np.bool_)
