"""Small entries of a feature store. No torch: processes import this module."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from risam_cli.inference.feature_store import Entry, FeatureStore, Stored

KEYS = [f"{number:032x}"[::-1] for number in range(1, 40)]
LARGE = 1 << 30


def entry(number: int = 0, count: int = 500) -> Entry:
    data = np.random.default_rng(number).integers(0, 256, 2 * count, np.uint8)
    return Entry({"deep": Stored("F16", (5, count // 5), data)}, {"deep": "float32"})


def open_store(folder: Path, name: str = "a", limit: int = LARGE) -> FeatureStore:
    return FeatureStore(folder, {"encoder": name}, limit)
