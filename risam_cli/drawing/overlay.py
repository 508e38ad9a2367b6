"""One image with its masks drawn over it: colours, outlines, phrases (ours).

Few masks carry their phrases beside them. Where phrases would cover each other or a mask, and with
many masks always, each carries a number, and a legend below the image says what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.drawing.drawing import write_text
from risam_cli.drawing.palette import color, ink
from risam_cli.drawing.text import Alpha, fit_text, text_mask

Rgb = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1; the last two exclusive

MAX_PHRASES = 6
"""Masks up to which phrases are written on the image itself."""

_SMALLEST_SIDE = 480  # images are enlarged by a whole factor until the longer side has this
_FILL = 0.42  # opacity of a mask's inside
_LETTERS = 30  # letter size: the shorter side divided by this, within bounds
_LEGEND_BACKGROUND = (28, 28, 30)
_LEGEND_INK = (240, 240, 240)


@dataclass(frozen=True, slots=True)
class _Item:
    """One mask to draw: where it is, and what is written about it."""

    number: int
    tint: tuple[int, int, int]
    label: str
    box: Box | None  # of the mask; None where it is empty
    anchor: tuple[int, int]  # a pixel well inside, (x, y)


def draw_overlay(
    rgb: Rgb,
    masks: Sequence[NDArray[np.bool_]],
    labels: Sequence[str],
    *,
    scores: Sequence[float | None] | None = None,
) -> Rgb:
    """The image with its masks, their outlines and their labels.

    Args:
        rgb: (H, W, 3) uint8; not changed.
        masks: N masks (H, W); an empty one is listed in the legend as "nothing found".
        labels: N phrases; control characters are drawn as escapes.
        scores: N values in 0..1, shown in percent behind the phrases; None leaves one out.

    Returns:
        (kH + L, kW, 3) uint8: k is 1 for images of 480 pixels and more on the longer side, else the
        whole factor that brings them there; L is the legend's height, 0 without one.

    Raises:
        ValueError: lengths or sizes do not fit.
    """
    _check(rgb, masks, labels, scores)
    factor = max(1, -(-_SMALLEST_SIDE // max(rgb.shape[:2])))
    canvas = np.ascontiguousarray(_enlarge(rgb, factor))
    # Large masks first, so that small ones stay visible; one at a time is held enlarged.
    areas = [int(np.count_nonzero(mask)) for mask in masks]
    items: dict[int, _Item] = {}
    for index in sorted(range(len(masks)), key=lambda k: -areas[k]):
        score = None if scores is None else scores[index]
        label = labels[index] if score is None else f"{labels[index]}  {score:.0%}"
        items[index] = _paint(canvas, masks[index], index, label, factor)
    return _annotate(canvas, [items[index] for index in range(len(masks))])


def _check(
    rgb: Rgb,
    masks: Sequence[NDArray[np.bool_]],
    labels: Sequence[str],
    scores: Sequence[float | None] | None,
) -> None:
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"an image is (H, W, 3) uint8, not {rgb.shape} {rgb.dtype}")
    if len(labels) != len(masks) or (scores is not None and len(scores) != len(masks)):
        raise ValueError(f"{len(masks)} masks need as many labels and scores")
    for mask in masks:
        if mask.shape != rgb.shape[:2]:
            raise ValueError(f"a mask of {mask.shape} does not fit an image of {rgb.shape[:2]}")


def _enlarge(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    if factor == 1:
        return pixels.copy()
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def _paint(canvas: Rgb, mask: NDArray[np.bool_], index: int, label: str, factor: int) -> _Item:
    """Fill and outline one mask, and find where its label belongs."""
    number, tint = index + 1, color(index)
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    if w == 0 or h == 0:
        return _Item(number, tint, label, None, (0, 0))
    line = max(1, round(min(canvas.shape[:2]) / 260))
    inside = _enlarge(mask[y : y + h, x : x + w].view(np.uint8), factor)
    margin = 2 * line
    framed = np.pad(inside, margin)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * line + 1, 2 * line + 1))
    outline = framed - cv2.erode(framed, kernel)
    halo = cv2.dilate(framed, np.ones((3, 3), np.uint8)) - framed
    top, left = y * factor - margin, x * factor - margin
    cut = (slice(max(0, -top), None), slice(max(0, -left), None))
    area = canvas[max(0, top) : top + framed.shape[0], max(0, left) : left + framed.shape[1]]
    for cover, paint, share in (
        (framed, tint, _FILL),
        (halo, (0, 0, 0), 0.6),  # a dark hair line keeps yellow apart from snow
        (outline, tint, 1.0),
    ):
        part = cover[cut][: area.shape[0], : area.shape[1]].astype(np.bool_)
        area[part] = np.round((1 - share) * area[part] + share * np.array(paint)).astype(np.uint8)
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, 3)
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    box = (x * factor, y * factor, (x + w) * factor, (y + h) * factor)
    return _Item(number, tint, label, box, (left + int(column), top + int(row)))


# --- labels ---------------------------------------------------------------------------------------


def _annotate(canvas: Rgb, items: Sequence[_Item]) -> Rgb:
    size = int(np.clip(min(canvas.shape[:2]) / _LETTERS, 13, 64))
    found = [item for item in items if item.box is not None]
    empty = len(found) < len(items)
    if len(items) <= MAX_PHRASES and not empty:
        tags = [fit_text(item.label, size, canvas.shape[1] - size) for item in found]
        places = _place_phrases(canvas, found, tags, size)
        if places is not None:
            for item, tag, (x, y) in zip(found, tags, places, strict=True):
                _draw_tag(canvas, tag, x, y, item.tint, size)
            return canvas
    taken: list[Box] = []
    numbers = [text_mask(str(item.number), size) for item in found]
    for item, tag in sorted(zip(found, numbers, strict=True), key=lambda pair: _extent(pair[0])):
        width, height = _tag_size(tag, size)
        x, y = _near(item.anchor, (width, height), canvas, taken)
        taken.append((x, y, x + width, y + height))
        if not (x <= item.anchor[0] < x + width and y <= item.anchor[1] < y + height):
            _lead(canvas, item, (x + width // 2, y + height // 2), size)
        _draw_tag(canvas, tag, x, y, item.tint, size)
    return np.concatenate([canvas, _legend(items, canvas.shape[1], size)])


def _extent(item: _Item) -> int:
    """Small masks take their place first: they have the least room."""
    assert item.box is not None
    x0, y0, x1, y1 = item.box
    return (x1 - x0) * (y1 - y0)


def _tag_size(tag: Alpha, size: int) -> tuple[int, int]:
    return tag.shape[1] + 2 * _pad(size), tag.shape[0]


def _pad(size: int) -> int:
    return max(3, size // 3)


def _draw_tag(
    canvas: Rgb, tag: Alpha, x: int, y: int, tint: tuple[int, int, int], size: int
) -> None:
    """Text on a plate of the mask's colour, with a dark rim."""
    width, height = _tag_size(tag, size)
    plate = canvas[y : y + height, x : x + width]
    plate[:] = tint
    write_text(plate[:, _pad(size) :], tag, ink(tint))
    rim = max(1, size // 16)
    cv2.rectangle(canvas, (x, y), (x + width - 1, y + height - 1), (0, 0, 0), rim)


def _place_phrases(
    canvas: Rgb, items: Sequence[_Item], tags: Sequence[Alpha], size: int
) -> list[tuple[int, int]] | None:
    """Where each phrase goes, or None where one finds no place of its own."""
    height, width = canvas.shape[:2]
    taken: list[Box] = []
    places: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(items)), key=lambda k: _extent(items[k])):
        item, (w, h) = items[index], _tag_size(tags[index], size)
        assert item.box is not None
        x0, y0, x1, y1 = item.box
        ax, ay = item.anchor
        gap = max(2, size // 6)
        wanted = [
            (x0, y0 - h - gap),
            (ax - w // 2, y0 - h - gap),
            (x0, y1 + gap),
            (ax - w // 2, y1 + gap),
            (x1 + gap, ay - h // 2),
            (x0 - w - gap, ay - h // 2),
            (ax - w // 2, ay - h // 2),
            (x0 + gap, y0 + gap),
            (x0 + gap, y1 - h - gap),
        ]
        others = [other.box for k, other in enumerate(items) if k != index and other.box]
        best: tuple[float, tuple[int, int]] | None = None
        for rank, (x, y) in enumerate(wanted):
            # A phrase at the border is moved inside rather than cut.
            x, y = min(max(x, 0), width - w), min(max(y, 0), height - h)
            box = (x, y, x + w, y + h)
            if x < 0 or y < 0 or any(_overlap(box, other) for other in taken):
                continue
            # A phrase that lies on another mask would seem to belong to it.
            if any(2 * _overlap(box, other) > _area(box) for other in others):
                continue
            hidden = sum(_overlap(box, other) / _area(other) for other in others)
            hidden += 0.5 * _overlap(box, item.box) / _area(item.box)
            cost = hidden + 0.02 * rank
            if best is None or cost < best[0]:
                best = (cost, (x, y))
        if best is None or best[0] > 0.9:
            return None
        places[index] = best[1]
        x, y = best[1]
        taken.append((x, y, x + w, y + h))
    return [places[index] for index in range(len(items))]


def _overlap(a: Box, b: Box) -> int:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    return wide * high if wide > 0 and high > 0 else 0


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _near(
    anchor: tuple[int, int], size: tuple[int, int], canvas: Rgb, taken: Sequence[Box]
) -> tuple[int, int]:
    """The free place for a plate nearest to its anchor; the anchor itself in a full image."""
    w, h = size
    height, width = canvas.shape[:2]
    right, bottom = max(0, width - w), max(0, height - h)
    home = (min(max(anchor[0] - w // 2, 0), right), min(max(anchor[1] - h // 2, 0), bottom))
    step = max(1, min(w, h) // 2)
    for radius in range(0, max(width, height), step):
        ring = [
            (home[0] + round(radius * np.cos(turn)), home[1] + round(radius * np.sin(turn)))
            for turn in np.linspace(0, 2 * np.pi, 1 if radius == 0 else 16, endpoint=False)
        ]
        for x, y in ring:
            inside = 0 <= x <= right and 0 <= y <= bottom
            if inside and not any(_overlap((x, y, x + w, y + h), other) for other in taken):
                return x, y
    return home


def _lead(canvas: Rgb, item: _Item, end: tuple[int, int], size: int) -> None:
    """A line from a plate that had to move to its mask."""
    line = max(1, size // 12)
    cv2.line(canvas, item.anchor, end, (0, 0, 0), 3 * line, cv2.LINE_AA)
    cv2.line(canvas, item.anchor, end, item.tint, line, cv2.LINE_AA)
    cv2.circle(canvas, item.anchor, 2 * line, (0, 0, 0), -1, cv2.LINE_AA)


def _legend(items: Sequence[_Item], width: int, size: int) -> Rgb:
    """(L, width, 3): number and phrase of every mask, in as many columns as fit."""
    row, pad = round(1.7 * size), _pad(size)
    plate = max(text_mask(str(item.number), size).shape[1] for item in items) + 2 * pad
    texts = [item.label if item.box else f"{item.label}  (nothing found)" for item in items]
    # No phrase needs more than this; shorter ones let more columns in.
    longest = max(min(text_mask(text, size).shape[1], width) for text in texts)
    columns = max(1, min(width // (plate + longest + 4 * pad), len(items)))
    rows = -(-len(items) // columns)
    strip = np.empty((rows * row + 2 * pad, width, 3), np.uint8)
    strip[:] = _LEGEND_BACKGROUND
    across = width // columns
    for k, (item, text) in enumerate(zip(items, texts, strict=True)):
        x, y = k // rows * across + pad, k % rows * row + pad
        number = text_mask(str(item.number), size)
        top = y + (row - number.shape[0]) // 2
        strip[top : top + number.shape[0], x : x + plate] = item.tint
        start = x + (plate - number.shape[1]) // 2
        write_text(strip[top:, start:], number, ink(item.tint))
        room = max(1, across - plate - 3 * pad)
        write_text(strip[top:, x + plate + pad :], fit_text(text, size, room), _LEGEND_INK)
    return strip
