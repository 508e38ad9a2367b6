"""Masks to polygons with holes, exactly (ours). numpy and OpenCV only.

Polygons run along pixel *edges*: vertices are pixel corners, so pixel (row, col) covers the square
from (col, row) to (col + 1, row + 1), and filling a polygon gives its mask back. OpenCV's own
contours run through pixel centres and lose half a pixel all around.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.masks.rle import Mask

Ring = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Polygon:
    """One area with its holes; rings are open (the last vertex is not the first again).

    Attributes:
        exterior: (N, 2) vertices as (x, y) in pixels, clockwise on the screen.
        holes: rings (N, 2) inside the exterior, counter-clockwise on the screen.
    """

    exterior: Ring
    holes: tuple[Ring, ...] = ()


def to_polygons(mask: Mask) -> list[Polygon]:
    """Polygons with holes of a mask (H, W), one for each 4-connected part, in reading order.

    Rings are simple: where a ring would touch itself at a pixel corner, it is split there, so that
    the polygons are valid in the sense of OGC's simple features. The pixels whose centre lies in an
    exterior and in no hole are the mask, exactly.

    Args:
        mask: (H, W); may be empty, which gives no polygons.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask has the shape (H, W), not {mask.shape}")
    pixels = np.ascontiguousarray(mask, dtype=np.bool_).view(np.uint8)
    # Only the box is traced; a frame of background gives every pixel a neighbour, so shapes close.
    x0, y0, width, height = cv2.boundingRect(pixels)
    framed = np.pad(pixels[y0 : y0 + height, x0 : x0 + width], 1)
    _, labels = cv2.connectedComponents(framed, connectivity=4)
    origin = np.array((x0, y0), np.float64)
    exteriors: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = {}
    for ring in _crack_rings(framed):
        x, y = ring[0]
        # ring[0] is the top-left vertex: the pixel below right of it is inside the ring.
        if framed[y + 1, x + 1]:
            exteriors[int(labels[y + 1, x + 1])] = origin + ring
        else:
            hole = origin + (ring[:1] + ring[:0:-1])
            holes.setdefault(int(labels[y, x + 1]), []).append(hole)
    return [Polygon(ring, tuple(holes.get(part, ()))) for part, ring in exteriors.items()]


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
