"""Masks that two models agree on, by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.export_cases import SIZE, export, failures, record, write_jsonl

from risam_cli.masks import rle as masks


def square(left: int, width: int = 20, top: int = 4) -> Any:
    mask = np.zeros(SIZE, np.bool_)
    mask[top : top + 20, left : left + width] = True
    return mask


EMPTY = np.zeros(SIZE, np.bool_)


def kept(tmp_path: Path, ours: list[Any], theirs: list[Any], *options: str) -> list[str]:
    write_jsonl(tmp_path / "ours.jsonl", ours)
    write_jsonl(tmp_path / "theirs.jsonl", theirs)
    other = ("--agree-with", str(tmp_path / "theirs.jsonl"), *options)
    output = ("--to", "coco", "-o", str(tmp_path / "out"), "--overwrite")
    code = export(tmp_path / "ours.jsonl", *other, *output)
    assert code == (3 if (tmp_path / "out" / "failures.jsonl").exists() else 0)
    found = json.loads((tmp_path / "out" / "instances.json").read_text())
    return [f"{one['text']}:{len(one['ann_ids'])}" for one in found["expressions"]]


def test_masks_stay_where_the_other_has_nearly_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [
        record("a.png", "same", square(0)),
        record("a.png", "near", square(0)),  # IoU 18/22
        record("a.png", "far", square(0)),  # IoU 10/30
        record("a.png", "nothing", EMPTY, no_target=True),
        record("a.png", "something here", square(0)),
        record("a.png", "something there", EMPTY, no_target=True),
        record("a.png", "not asked", square(0)),
        record("b/a.png", "same", square(30)),
    ]
    theirs = [
        record("a.png", "same", square(0)),
        record("a.png", "near", square(2)),
        record("a.png", "far", square(10)),
        record("a.png", "nothing", EMPTY, no_target=True),
        record("a.png", "something here", square(0), no_target=True),  # its mask is not the answer
        record("a.png", "something there", square(0)),
        # Another image of the same name, elsewhere; ids that say nothing.
        {**record("c/a.png", "same", square(30)), "id": "b/a.png#same"},
    ]
    assert kept(tmp_path, ours, theirs) == ["same:1", "near:1", "nothing:0"]
    told = capsys.readouterr().err
    assert "5 filtered out" in told
    assert "2 masks have no counterpart" in told
    assert "3 masks differ" in told
    assert kept(tmp_path, ours, theirs, "--min-iou", "0.9") == ["same:1", "nothing:0"]
    assert kept(tmp_path, ours, theirs, "--min-iou", "0.3") == [
        *("same:1", "near:1", "far:1", "nothing:0")
    ]
    found = json.loads((tmp_path / "out" / "instances.json").read_text())
    # The masks are the first source's.
    near = next(one for one in found["annotations"] if one["expression"] == "near")
    assert near["segmentation"] == masks.encode(square(0))


def several(text: str, *lefts: int) -> list[Any]:
    return [{**record("a.png", text, square(left)), "instance": k} for k, left in enumerate(lefts)]


def test_instances_are_held_against_instances_or_all_against_one(tmp_path: Path) -> None:
    ours = [*several("two of three", 0, 21, 42), *several("all", 0, 21), *several("one", 0, 21)]
    theirs = [
        *several("two of three", 42, 1),
        record("a.png", "all", square(0) | square(21)),
        record("a.png", "one", square(0)),
    ]
    assert kept(tmp_path, ours, theirs) == ["two of three:2", "all:2"]
    # And the other way round.
    assert kept(tmp_path, theirs, ours) == ["two of three:2", "all:1"]


def test_what_is_wrong_with_the_other_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [record("a.png", "good", square(0)), record("a.png", "bad", square(0))]
    small = record("a.png", "bad", square(0)[:20, :20])
    theirs = [record("a.png", "good", square(0)), small, {"nothing": 1}]
    assert kept(tmp_path, ours, theirs) == ["good:1"]
    broken, bad = failures(tmp_path / "out")
    assert "theirs.jsonl" in broken["message"]
    assert "20x20" in bad["message"]
    assert bad["expression"] == "bad"
    capsys.readouterr()
    output = ("--to", "coco", "-o", str(tmp_path / "other"))
    source = tmp_path / "ours.jsonl"
    assert export(source, "--agree-with", tmp_path / "no.jsonl", *output) == 1
    assert "no.jsonl" in capsys.readouterr().err
    assert export(source, "--min-iou", "0.5", *output) == 2
    assert export(source, "--agree-with", source, "--min-iou", "nan", *output) == 2
