"""Masks as COCO RLE. numpy, pycocotools and OpenCV only, no torch.

Masks are boolean arrays (H, W). An :class:`~risam_cli.types.Rle` that came out of this module
(``encode``, ``from_polygons``, ``parse_rle``, ``union`` …) is valid and canonical: equal masks have
equal strings. Whatever comes from outside goes through :func:`parse_rle` first; the other functions
hand the string to pycocotools' C code, which trusts it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from risam_cli.errors import DataError
from risam_cli.types import Rle

Mask = NDArray[np.bool_]
Size = tuple[int, int]

MAX_PIXELS = 2**30
"""Largest H * W that is taken. pycocotools counts in 32 bits; this stays well below."""

# Points that pycocotools may draw for the polygons of one mask: 20 bytes each while it draws them.
# 3.3 million pixels of outline; its own counter is an int.
_MAX_BOUNDARY = 2**24
_MAX_GROUPS = 7  # characters of one run: 35 bits hold any run up to MAX_PIXELS
_MAX_TEXT = 2**27  # characters of all runs: with 35 bits each, no sum of them overflows 64 bits


def encode(mask: Mask) -> Rle:
    """RLE of one mask (H, W). Raises ValueError unless the mask has two dimensions and pixels."""
    if mask.ndim != 2:
        raise ValueError(f"a mask has the shape (H, W), not {mask.shape}")
    return encode_batch(mask[None])[0]


def encode_batch(masks: Mask) -> list[Rle]:
    """RLE of each of N masks (N, H, W), in order. N may be 0; H and W may not."""
    if masks.ndim != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"masks have the shape (N, H, W) with H, W > 0, not {masks.shape}")
    count, height, width = masks.shape
    if count == 0:
        return []
    # pycocotools reads columns. OpenCV's blocked transpose makes them several times faster than
    # numpy's copy to Fortran order does, and the rest is a view.
    columns = np.empty((count, width, height), np.uint8)
    for mask, turned in zip(masks, columns, strict=True):
        cv2.transpose(np.ascontiguousarray(mask, dtype=np.bool_).view(np.uint8), dst=turned)
    encoded = coco.encode(columns.transpose(2, 1, 0))  # (H, W, N), Fortran-contiguous
    return [_from_coco(rle) for rle in encoded]


def decode(rle: Rle) -> Mask:
    """Mask (H, W) of an RLE, C-contiguous."""
    columns = coco.decode(_to_coco(rle)).T  # (W, H) uint8 0/1, C-contiguous
    return np.asarray(cv2.transpose(columns)).view(np.bool_)


def area(rle: Rle) -> int:
    """Number of pixels in the mask, read from the runs."""
    return int(coco.area(_to_coco(rle)))


def bbox(rle: Rle) -> tuple[float, float, float, float]:
    """Tight box (x, y, w, h) in pixels; all zero for an empty mask."""
    x, y, w, h = (float(v) for v in coco.toBbox(_to_coco(rle)))
    return (x, y, w, h) if w and h else (0.0, 0.0, 0.0, 0.0)


def empty(size: Size) -> Rle:
    """RLE without a pixel of an image of ``size`` (H, W)."""
    height, width = size
    return _from_counts(np.array([height * width]), (height, width))


def union(rles: Sequence[Rle], size: Size) -> Rle:
    """RLE of all pixels that are in any mask. No masks give an empty one of ``size``.

    Raises:
        DataError: a mask is not of ``size``.
    """
    for rle in rles:
        _require_size(rle, size)
    if not rles:
        return empty(size)
    if len(rles) == 1:
        return rles[0]
    return _from_coco(coco.merge([_to_coco(rle) for rle in rles], intersect=False))


def covered_once(rles: Sequence[Rle], size: Size) -> Rle:
    """RLE of all pixels that are in exactly one mask. Arguments and errors as :func:`union`."""
    whole = union(rles, size)
    if sum(map(area, rles)) == area(whole):
        return whole
    covered = np.zeros(size, np.uint16)
    for rle in rles:
        covered += decode(rle)
    return encode(covered == 1)


def intersection_union(a: Rle, b: Rle) -> tuple[int, int]:
    """Pixels in both masks and pixels in either, counted on the runs.

    Raises:
        DataError: the masks differ in size.
    """
    _require_size(b, (a["size"][0], a["size"][1]))
    both = [_to_coco(a), _to_coco(b)]
    total = int(coco.area(both).astype(np.int64).sum())
    intersection = int(coco.area(coco.merge(both, intersect=True)))
    return intersection, total - intersection


def iou(a: Rle, b: Rle) -> float:
    """Intersection over union, 0..1, of two masks; two empty ones are alike, 1.

    Raises:
        DataError: the masks differ in size.
    """
    shared, either = intersection_union(a, b)
    return shared / either if either else 1.0


def parse_rle(obj: object, *, size: Size | None, where: str) -> Rle:
    """Check an RLE from outside and give it in canonical, compressed form.

    Args:
        obj: a mapping with ``size`` [H, W] and ``counts``: COCO's string, the same as bytes, or the
            uncompressed list of run lengths (column-major, beginning with background).
        size: the (H, W) that it must have, or None to take its own.
        where: the place to name in errors, such as ``"preds.jsonl line 3"``.

    Raises:
        DataError: anything is malformed, too large, or the runs do not sum to H * W.
    """
    if not isinstance(obj, Mapping) or "size" not in obj or "counts" not in obj:
        raise DataError(
            f"{where}: not an RLE: {_brief(obj)}",
            "write it as {'size': [height, width], 'counts': ...}",
        )
    own = parse_size(obj["size"], where)
    if size is not None and own != tuple(size):
        raise DataError(
            f"{where}: the RLE is {own[0]}x{own[1]} (height x width), the image is "
            f"{size[0]}x{size[1]}",
            "its size is [width, height]; COCO has [height, width]"
            if own == tuple(size)[::-1]
            else "give masks at the image's own size",
        )
    counts = _parse_counts(obj["counts"], where)
    if counts.size == 0 or int(counts.min()) < 0 or int(counts.max()) > MAX_PIXELS:
        raise DataError(f"{where}: the RLE has run lengths out of range")
    total = int(counts.sum())
    if total != own[0] * own[1]:
        raise DataError(
            f"{where}: the runs sum to {total} pixels, not {own[0]} x {own[1]} = {own[0] * own[1]}",
            "check that the counts and the size belong together",
        )
    return _from_counts(_canonical(counts), own)


def from_polygons(
    polygons: Sequence[Sequence[float]],
    size: Size,
    *,
    where: str = "segmentation",
    once: bool = False,
) -> Rle:
    """RLE of the union of COCO polygons, rasterized as pycocotools does it.

    Args:
        polygons: flat lists x0, y0, x1, y1, … of at least three points, in pixels.
        size: (H, W) of the image.
        where: the place to name in errors.
        once: only pixels that exactly one of them covers.

    Raises:
        DataError: fewer than three points, an odd number of coordinates, not finite or too large.
    """
    height, width = parse_size(list(size), where)
    rows = []
    left = _MAX_BOUNDARY
    for k, polygon in enumerate(polygons):
        row, steps = _parse_polygon(polygon, f"{where}, polygon {k}")
        left -= steps
        if left < 0:
            raise DataError(
                f"{where}: the outline of its polygons is longer than {_MAX_BOUNDARY // 5} pixels",
                "write coordinates in pixels of the image",
            )
        rows.append(row)
    if not rows:
        return empty((height, width))
    parts = [_from_coco(part) for part in coco.frPyObjects(rows, height, width)]
    return covered_once(parts, size) if once else union(parts, size)


def _to_coco(rle: Rle) -> dict[str, Any]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def _from_coco(rle: Mapping[str, Any]) -> Rle:
    height, width = rle["size"]
    return {"size": [int(height), int(width)], "counts": rle["counts"].decode("ascii")}


def _from_counts(counts: NDArray[np.int64], size: Size) -> Rle:
    """RLE of canonical run lengths that are known to sum to H * W."""
    height, width = size
    raw = {"size": [height, width], "counts": counts.tolist()}
    return _from_coco(coco.frPyObjects(raw, height, width))


def _require_size(rle: Rle, size: Size) -> None:
    if tuple(rle["size"]) != tuple(size):
        raise DataError(
            f"a mask is {rle['size'][0]}x{rle['size'][1]} (height x width), "
            f"not {size[0]}x{size[1]}",
            "compare masks of one image at one size",
        )


def parse_size(obj: object, where: str) -> Size:
    """(H, W) out of JSON; both at least 1, their product at most MAX_PIXELS."""
    values = list(obj) if isinstance(obj, (list, tuple)) else []
    values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]
    if len(values) != 2 or not all(type(v) is int and v > 0 for v in values):
        raise DataError(
            f"{where}: the RLE's size is {_brief(obj)}", "write it as [height, width], both above 0"
        )
    height, width = values
    if height * width > MAX_PIXELS:
        raise DataError(
            f"{where}: a mask of {height} x {width} pixels is over the limit of {MAX_PIXELS}",
            "cut the image into tiles",
        )
    return height, width


def _parse_counts(obj: object, where: str) -> NDArray[np.int64]:
    """Run lengths from any of the three forms; not yet checked for range and sum."""
    if isinstance(obj, str):
        text = obj
        if obj.startswith(("b'", 'b"')):  # what str() makes of bytes; no RLE has these quotes
            with suppress(ValueError, SyntaxError):
                text = ast.literal_eval(obj).decode("ascii")
        try:
            return _decompress(text.encode("ascii"), where)
        except UnicodeEncodeError:
            raise DataError(f"{where}: the RLE's counts are not ASCII: {_brief(obj)}") from None
    if isinstance(obj, bytes):
        return _decompress(obj, where)
    if isinstance(obj, (list, tuple)) and all(type(run) is int for run in obj):
        try:
            return np.array(obj, dtype=np.int64)
        except OverflowError:
            raise DataError(f"{where}: the RLE has run lengths out of range") from None
    raise DataError(
        f"{where}: the RLE's counts are {_brief(obj)}",
        "write COCO's compressed string or a list of whole run lengths",
    )


def _decompress(text: bytes, where: str) -> NDArray[np.int64]:
    """Run lengths of COCO's compressed string (pycocotools ``rleFrString``), bounds checked.

    Each run is groups of five bits, lowest first, as characters from 48 on; bit 5 says that more
    follow, bit 4 of the last group is the sign. From the fourth run on the difference to the run
    before the last is stored.
    """
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if groups.size == 0:
        return groups
    if groups.size > _MAX_TEXT:
        raise DataError(f"{where}: the RLE's counts are {groups.size} characters long")
    if int(groups.min()) < 0 or int(groups.max()) > 63 or groups[-1] & 0x20:
        raise DataError(f"{where}: the RLE's counts are damaged: {_brief(text)}")
    ends = np.flatnonzero((groups & 0x20) == 0)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if int(lengths.max()) > _MAX_GROUPS:
        raise DataError(f"{where}: the RLE has run lengths out of range")
    place = np.arange(groups.size) - np.repeat(starts, lengths)
    runs: NDArray[np.int64] = np.add.reduceat((groups & 0x1F) << (5 * place), starts)
    runs -= np.where(groups[ends] & 0x10, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def _canonical(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same mask without runs of length 0, but for a first one where pixel 0 is set."""
    if runs[1:].all():
        return runs
    values = np.arange(runs.size) % 2
    keep = runs > 0
    runs, values = runs[keep], values[keep]
    starts = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
    merged: NDArray[np.int64] = np.add.reduceat(runs, starts)
    return np.concatenate(([0], merged)) if values[0] else merged


def _parse_polygon(polygon: Sequence[float], where: str) -> tuple[list[float], int]:
    """The coordinates as floats, and how many points pycocotools will draw of their outline."""
    try:
        points = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: not a list of numbers: {_brief(polygon)}") from None
    if points.ndim != 1 or points.size < 6 or points.size % 2:
        raise DataError(
            f"{where}: {points.size} coordinates", "write x, y of at least three points in one list"
        )
    if not np.isfinite(points).all():
        raise DataError(f"{where}: a coordinate is not a finite number")
    # pycocotools draws the outline at five points a pixel.
    steps = np.abs(np.roll(points.reshape(-1, 2), 1, axis=0) - points.reshape(-1, 2))
    drawn = 5 * float(steps.sum()) + points.size
    if np.abs(points).max() > 1e7 or drawn > _MAX_BOUNDARY:
        raise DataError(
            f"{where}: coordinates up to {np.abs(points).max():g}", "write them in pixels"
        )
    return [float(v) for v in points], int(drawn)


def _brief(obj: object) -> str:
    text = repr(obj)
    return text if len(text) <= 60 else f"{text[:57]}..."
