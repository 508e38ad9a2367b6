"""Masks of every shape that makes exporting hard, as records, and a runner for the command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from risam_cli.cli import main
from risam_cli.masks import rle as masks

Mask = NDArray[np.bool_]
SIZE = (48, 64)


def _blank() -> Mask:
    return np.zeros(SIZE, np.bool_)


def shapes() -> dict[str, Mask]:
    """Masks (48, 64) by name; none is empty."""
    found: dict[str, Mask] = {}
    block = _blank()
    block[5:20, 7:30] = True
    found["block"] = block
    ring = block.copy()
    ring[9:15, 12:20] = False
    found["ring"] = ring
    nested = _blank()
    nested[2:40, 3:60] = True
    nested[6:36, 8:50] = False
    nested[10:30, 14:40] = True
    nested[15:20, 20:30] = False
    found["rings in rings"] = nested
    parts = block.copy()
    parts[30:44, 40:60] = True
    found["two parts"] = parts
    diagonal = _blank()
    diagonal[10:20, 10:20] = True
    diagonal[20:30, 20:30] = True
    diagonal[30:35, 15:20] = True
    found["touching at corners"] = diagonal
    pinched = block.copy()
    pinched[8, 10] = pinched[9, 11] = pinched[10, 12] = pinched[9, 13] = False
    pinched[5, 20] = pinched[6, 21] = False
    found["holes at corners"] = pinched
    dot = _blank()
    dot[7, 9] = True
    found["one pixel"] = dot
    lines = _blank()
    lines[10, 5:60] = lines[20, 5:60] = True
    lines[10:21, 5] = lines[10:21, 59] = True
    found["thin frame"] = lines
    found["everything"] = ~_blank()
    border = ~_blank()
    border[1:-1, 1:-1] = False
    found["border"] = border
    found["noise"] = np.random.default_rng(3).random(SIZE) < 0.45
    checks = np.indices(SIZE).sum(axis=0) % 2 == 0
    found["checkerboard"] = checks
    return found


def record(image: str, expression: str, mask: Mask, **more: Any) -> dict[str, Any]:
    """One record as ``risam predict`` writes it, but for what is derived."""
    return {
        "id": f"{image}#{expression}",
        "image": image,
        "expression": expression,
        "height": mask.shape[0],
        "width": mask.shape[1],
        "segmentation": masks.encode(mask),
        "score": 0.75,
        **more,
    }


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Records as a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_image(path: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    """A noisy picture (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def export(*args: str | Path) -> int:
    """``risam export-masks`` in this process; its exit code."""
    return main(["export-masks", *map(str, args)])


def failures(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``failures.jsonl``."""
    lines = (folder / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def iou(a: Mask, b: Mask) -> float:
    """Intersection over union; 1 for two empty masks."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0
