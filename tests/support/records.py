"""The records that a run has written."""

from __future__ import annotations

import json
from pathlib import Path

from risam_cli.outputs.records import PREDICTIONS, from_json
from risam_cli.types import Prediction


def read_records(folder: Path) -> list[Prediction]:
    """The records of an output folder, checked."""
    lines = (folder / PREDICTIONS).read_bytes().splitlines()
    return [from_json(json.loads(line), f"line {n}") for n, line in enumerate(lines, 1)]
