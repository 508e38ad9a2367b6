"""Masks to RLE and PNG against pycocotools and Pillow, and IoU of RLE against IoU of arrays."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import numpy as np
from common import Options, Row, in_turns, ratio
from export import blob
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from risam_cli.drawing.png import encode_mask
from risam_cli.masks import rle as masks

SIDE = 1024
Mask = NDArray[np.bool_]


def measure(options: Options) -> list[Row]:
    """Milliseconds a mask of 1024x1024, in turns."""
    rng = np.random.default_rng(0)
    count = 4 if options.quick else 40
    pool = [np.kron(blob(rng), np.ones((3, 2), np.bool_))[:SIDE, :SIDE] for _ in range(count)]
    pool = [np.pad(one, [(0, SIDE - n) for n in one.shape]) for one in pool]
    ways = {
        "RLE: risam": masks.encode,
        "RLE: pycocotools": _by_pycocotools,
        "PNG: risam": encode_mask,
        "PNG: Pillow": _by_pillow,
    }
    pairs = [(masks.encode(a), masks.encode(b)) for a, b in itertools.pairwise(pool)]
    calls: dict[str, Callable[[], object]] = {
        name: lambda way=way: [way(one) for one in pool] for name, way in ways.items()
    }
    calls["IoU: risam, of RLE"] = lambda: [masks.intersection_union(a, b) for a, b in pairs]
    calls["IoU: numpy, of arrays"] = lambda: [_dense_iou(a, b) for a, b in itertools.pairwise(pool)]
    times = in_turns(calls, max(5, options.repeats))
    rows = []
    for name, taken in times.items():
        each = [1e3 * seconds / (len(pairs) if "IoU" in name else count) for seconds in taken.cpu]
        rows.append(
            Row(f"{name}, a mask", sorted(each)[len(each) // 2], "ms", (min(each), max(each)))
        )
    for fast, slow in (
        ("RLE: risam", "RLE: pycocotools"),
        ("PNG: risam", "PNG: Pillow"),
        ("IoU: risam, of RLE", "IoU: numpy, of arrays"),
    ):
        rows.append(ratio(f"{fast} against {slow}", times[slow].cpu, times[fast].cpu))
    return rows


def _by_pycocotools(mask: Mask) -> object:
    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))


def _by_pillow(mask: Mask) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(file, "PNG")
    return file.getvalue()


def _dense_iou(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))
