"""Masks to single closed rings that other tools fill back to the same mask (ours).

COCO, YOLO, labelme and CVAT know polygons without holes only. A hole is therefore *bridged*: the
outline runs to the hole along a line inside the mask, around the hole, and back along the same
line, so that the line itself covers nothing. Parts that meet at a corner are joined the same way.

Readers fill in two ways, and no coordinates please both (a pixel's right edge would have to be at
once at or beyond and below its centre):

- :data:`EDGE`, by pixel centres: pycocotools, and so datumaro, detectron2, CVAT. Vertices lie on
  pixel edges, drawn in by a tenth of a pixel, so that readers that cut off the fraction (not those
  that round) also fill the same pixels.
- :data:`CENTER`, by whole pixels, border included: OpenCV's ``fillPoly``, and so supervision and
  ultralytics. Vertices lie on the border pixels themselves, less than half a pixel past their
  index, so that cutting off and rounding give the same pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.masks.polygons import to_polygons
from risam_cli.masks.rle import Mask

Ring = NDArray[np.float64]
"""(N, 2) vertices x, y in pixels; open: the last is not the first again."""


@dataclass(frozen=True, slots=True)
class Vertices:
    """Where, within its pixel, a vertex lies at a left or upper and at a right or lower edge."""

    low: float
    high: float


EDGE = Vertices(0.1, 0.9)
CENTER = Vertices(0.1, 0.4)


@dataclass(frozen=True, slots=True)
class Outlines:
    """What became of one mask.

    Attributes:
        rings: one for each part; parts that meet at a corner are one.
        holes: holes of the mask.
        bridged: how many of them are in the rings; the others are filled.
    """

    rings: tuple[Ring, ...]
    holes: int
    bridged: int


def outlines(
    mask: Mask,
    vertices: Vertices = EDGE,
    *,
    simplify: float = 0.0,
    bridge: bool = True,
    join: bool = False,
) -> Outlines:
    """Closed rings of a mask (H, W); none for an empty one.

    Args:
        vertices: what kind of reader the rings are for.
        simplify: largest distance in pixels that an outline may move (Douglas-Peucker); 0 keeps it.
            An outline of which nothing would be left is kept as it is; such a hole is dropped.
        bridge: keep holes; else they are filled.
        join: put all parts into one ring, joined by lines over the background where they must be.
    """
    # Only the box of the mask is looked at: most masks are small beside their image.
    x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
    mask = mask[y : y + h, x : x + w]
    parts: list[list[Ring]] = []
    holes = 0
    for polygon in to_polygons(mask):
        holes += len(polygon.holes)
        rings = [_inset(polygon.exterior, mask, vertices)]
        if bridge:
            rings += [_inset(hole, mask, vertices) for hole in polygon.holes]
        parts.append(_simplified(rings, simplify))
    merged: list[Ring] = []
    bridged = 0
    for rings in parts:
        ring, count = _bridge(rings[0], rings[1:])
        merged.append(ring)
        bridged += count
    merged = _join_touching(merged)
    if join and len(merged) > 1:
        merged = [_join_all(merged)]
    return Outlines(tuple(ring + np.array([x, y]) for ring in merged), holes, bridged)


def _inset(ring: Ring, mask: Mask, vertices: Vertices) -> Ring:
    """A ring of pixel corners, each moved onto the mask's pixel that it bends around.

    Interiors lie to the right of the way (clockwise exteriors, counter-clockwise holes, on a screen
    whose y points down).
    """
    height, width = mask.shape
    ahead = np.sign(np.roll(ring, -1, axis=0) - ring)
    behind = np.roll(ahead, 1, axis=0)
    # The inward normals of both edges; their sum points into the mask's pixel.
    inward = np.stack([-(behind[:, 1] + ahead[:, 1]), behind[:, 0] + ahead[:, 0]], axis=1)
    pixel = (ring + (inward - 1) / 2).astype(np.int64)
    columns, rows = np.clip(pixel[:, 0], 0, width - 1), np.clip(pixel[:, 1], 0, height - 1)
    moved = pixel.astype(np.float64) + np.where(inward > 0, vertices.low, vertices.high)
    pinched = ~mask[rows, columns]
    if not pinched.any():
        return moved
    # Two pixels of the background meet here at a corner: go around by both neighbours instead.
    rows_out: list[NDArray[np.float64]] = []
    for k in range(len(ring)):
        if not pinched[k]:
            rows_out.append(moved[k])
            continue
        for edge, sign in ((behind[k], -1.0), (ahead[k], 1.0)):
            # The pixel beside the edge's end before the corner, then beside its begin after it.
            toward = np.array([-edge[1], edge[0]]) + sign * edge
            near = ring[k] + (toward - 1) / 2
            rows_out.append(near + np.where(toward > 0, vertices.low, vertices.high))
    return np.array(rows_out)


def _simplified(rings: Sequence[Ring], distance: float) -> list[Ring]:
    """Exterior first; holes that vanish are left out."""
    if distance <= 0:
        return list(rings)
    kept: list[Ring] = []
    for index, ring in enumerate(rings):
        short = cv2.approxPolyDP(ring.astype(np.float32)[:, None], distance, closed=True)[:, 0]
        if len(short) >= 3 and cv2.contourArea(short) > 0:
            # float32 is only for OpenCV: take the vertices from the exact ring again.
            kept.append(short.astype(np.float64).round(3))
        elif index == 0:
            kept.append(ring)
    return kept


# --- joining --------------------------------------------------------------------------------------


def _splice(ring: Ring, at: int, other: Ring, start: int) -> Ring:
    """``ring`` up to vertex ``at``, all of ``other`` from ``start`` on, and back the same way."""
    around = np.concatenate([other[start:], other[: start + 1]])
    return np.concatenate([ring[: at + 1], around, ring[at:]])


def _bridge(exterior: Ring, holes: Sequence[Ring]) -> tuple[Ring, int]:
    """The exterior with every hole joined to it, and how many could be.

    From left to right, each hole's leftmost vertex is joined to what lies straight to its left: the
    line runs inside the mask, because nothing comes between.
    """
    ring, count = exterior, 0
    for hole in sorted(holes, key=lambda points: float(points[:, 0].min())):
        start = int(np.lexsort((hole[:, 1], hole[:, 0]))[0])
        hit = _left_of(ring, hole[start])
        if hit is None:
            continue  # after simplifying, a hole may stick out of its outline
        edge, point = hit
        ring = np.concatenate([ring[: edge + 1], point[None], ring[edge + 1 :]])
        ring = _splice(ring, edge + 1, hole, start)
        count += 1
    return ring, count


def _left_of(ring: Ring, point: NDArray[np.float64]) -> tuple[int, NDArray[np.float64]] | None:
    """The nearest place of a ring straight to the left of a point: its edge and where on it."""
    x, y = point
    begin, end = ring, np.roll(ring, -1, axis=0)
    rise = end[:, 1] - begin[:, 1]
    level = rise == 0
    share = (y - begin[:, 1]) / np.where(level, 1, rise)
    reach = begin[:, 0] + share * (end[:, 0] - begin[:, 0])
    # A level edge in the same row is met at its right end, if that lies to the left at all.
    reach = np.where(level, np.maximum(begin[:, 0], end[:, 0]), reach)
    met = np.where(level, begin[:, 1] == y, (share >= 0) & (share <= 1)) & (reach <= x + 1e-9)
    if not met.any():
        return None
    edge = int(np.where(met, reach, -np.inf).argmax())
    return edge, np.array([reach[edge], y])


def _join_touching(rings: list[Ring]) -> list[Ring]:
    """Join rings of parts that meet at a corner: their nearest vertices lie in diagonal pixels."""
    if len(rings) < 2:
        return rings
    place: dict[tuple[int, int], tuple[int, int]] = {}
    for index, ring in enumerate(rings):
        for k, (x, y) in enumerate(np.floor(ring).astype(int).tolist()):
            place.setdefault((x, y), (index, k))
    links: list[tuple[int, int, int, int]] = []
    group = list(range(len(rings)))

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    for (x, y), (index, k) in place.items():
        for other in ((x + 1, y + 1), (x - 1, y + 1)):
            if other in place:
                neighbour, j = place[other]
                if root(neighbour) != root(index):
                    group[root(neighbour)] = root(index)
                    links.append((index, k, neighbour, j))
    if not links:
        return rings
    return _follow(rings, links)


def _follow(rings: list[Ring], links: list[tuple[int, int, int, int]]) -> list[Ring]:
    """Rings joined along the links of a forest, each tree walked from its first ring."""
    pending: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for a, i, b, j in links:
        pending.setdefault((a, i), []).append((b, j))
        pending.setdefault((b, j), []).append((a, i))
    done: set[int] = set()
    out: list[Ring] = []
    for first in range(len(rings)):
        if first in done:
            continue
        done.add(first)
        points = [rings[first][0]]
        stack = [[first, 0, 0]]  # ring, the vertex it was entered at, steps gone from there
        while stack:
            index, start, step = stack[-1]
            ring = rings[index]
            at = (start + step) % len(ring)
            fresh = [link for link in pending.get((index, at), ()) if link[0] not in done]
            if fresh:
                neighbour, k = fresh[0]
                done.add(neighbour)
                points.append(rings[neighbour][k])
                stack.append([neighbour, k, 0])
            elif step + 1 < len(ring):
                stack[-1][2] += 1
                points.append(ring[(at + 1) % len(ring)])
            else:
                stack.pop()
                if stack:  # close this ring, and go back over the link
                    outer, begin, gone = stack[-1]
                    points.append(ring[start])
                    points.append(rings[outer][(begin + gone) % len(rings[outer])])
        out.append(np.array(points))
    return out


def _join_all(rings: list[Ring]) -> Ring:
    """One ring of all, each joined by the shortest line between vertices to those joined before."""
    ring, rest = rings[0], list(rings[1:])
    while rest:
        best: tuple[float, int, int, int] | None = None
        for index, other in enumerate(rest):
            for start in range(0, len(other), 256):  # a block of distances at a time
                gaps = ring[:, None] - other[None, start : start + 256]
                squared = (gaps**2).sum(axis=2)
                flat = int(squared.argmin())
                at, k = divmod(flat, squared.shape[1])
                found = (float(squared[at, k]), index, at, start + k)
                if best is None or found < best:
                    best = found
        assert best is not None
        _, index, at, start = best
        ring = _splice(ring, at, rest.pop(index), start)
    return ring
