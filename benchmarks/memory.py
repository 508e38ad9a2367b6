"""Peak memory of ``risam predict`` over 100, 1,000 and 5,000 images: it must not grow with them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from common import Options, Row
from models import checked, draw, risam

_MB = 1 << 20


def measure(options: Options) -> list[Row]:
    """Peaks of whole runs, masks written as PNG, and the largest against the smallest set."""
    counts = (20, 60, 200) if options.quick else (100, 1000, 5000)
    peaks, rows = [], []
    with tempfile.TemporaryDirectory() as made:
        folder = draw(Path(made, "pictures"), counts[-1], 96, 128)
        for count in counts:
            words = ["predict", folder, "-e", "the red circle", "-e", "every blue shape"]
            words += ["--limit", count, "--device", options.device, "-o", Path(made, f"o{count}")]
            child = checked(risam(*words, threads=os.cpu_count()))
            peaks.append(child.peak)
            note = f"96x128 JPEG, 2 expressions each, PNG masks; {count / child.wall:.1f} images/s"
            rows.append(Row(f"{count} images: peak", child.peak / _MB, "MB", None, note))
    growth = max(peaks[1:]) / peaks[0] - 1
    rows.append(Row("growth over the smallest set", growth, "share", None, "", "<= 0.05"))
    return rows
