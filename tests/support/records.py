"""What a run has written: its files, its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from risam_cli.masks import rle as masks
from risam_cli.outputs.records import PREDICTIONS
from risam_cli.types import Prediction


def contents(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, but for run.json, which holds times, and the tool's own folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json" and ".risam" not in path.parts
    }


def read_records(folder: Path) -> list[Prediction]:
    """The records of an output folder, checked."""
    lines = (folder / PREDICTIONS).read_bytes().splitlines()
    return [prediction(json.loads(line)) for line in lines]


def prediction(row: dict[str, Any]) -> Prediction:
    """What a record of this tool says, held against its mask."""
    size = (row["height"], row["width"])
    rle = masks.parse_rle(row["segmentation"], size=size, where=row["id"])
    assert row["area"] == masks.area(rle)
    assert tuple(row["bbox"]) == masks.bbox(rle)
    score = row.get("score")
    assert score is None or 0 <= score <= 1
    lists = {key: tuple(row.get(key, ())) for key in ("notes", "unknown_words")}
    known = {"id", "image", "expression", "mask", "no_target"}
    return Prediction(
        **{key: row[key] for key in known},
        height=size[0],
        width=size[1],
        segmentation=rle,
        bbox=masks.bbox(rle),
        area=masks.area(rle),
        score=score,
        instance=row.get("instance"),
        **lists,
    )
