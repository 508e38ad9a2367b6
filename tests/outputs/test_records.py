"""Records to JSON and back, and what is refused on the way."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.records import prediction

from risam_cli.files import jsonlines
from risam_cli.masks import rle as masks
from risam_cli.outputs.records import failure_to_json, to_json
from risam_cli.types import Failure, Prediction

MASK = np.zeros((6, 8), bool)
MASK[1:4, 2:7] = True
RLE = masks.encode(MASK)
RECORD = Prediction(
    id="7#0",
    image="sub/a.jpg",
    expression="the dög",
    height=6,
    width=8,
    segmentation=RLE,
    bbox=(2.0, 1.0, 5.0, 3.0),
    area=15,
    score=0.75,
    no_target=False,
    mask="masks/sub/a.jpg/0-the-dog.png",
)
KEYS = ["id", "image", "expression", "height", "width", "segmentation", "bbox", "area"]
KEYS += ["score", "no_target", "mask"]


def test_keys_stand_in_the_order_of_the_contract() -> None:
    line = to_json(RECORD)
    assert list(json.loads(line)) == KEYS
    assert list(json.loads(to_json(replace(RECORD, notes=("cut",))))) == [*KEYS, "notes"]
    assert "\n" not in line
    assert line.isascii()


@given(
    st.text(max_size=20),
    st.text(max_size=20),
    st.floats(0, 1),
    st.booleans(),
    st.lists(st.text(max_size=9), max_size=2),
)
def test_a_record_comes_back_as_it_was(
    image: str, text: str, score: float, no_target: bool, notes: list[str]
) -> None:
    record = replace(
        RECORD,
        image=image,
        expression=text,
        score=score,
        no_target=no_target,
        notes=tuple(notes),
        mask=None,
    )
    line = to_json(record)
    assert len(line.splitlines()) == 1  # whatever else a reader takes for a line's end
    assert prediction(json.loads(line)) == record


def test_undecodable_names_survive() -> None:
    record = replace(RECORD, image="a\udcff.jpg")
    assert prediction(json.loads(to_json(record).encode())).image == "a\udcff.jpg"


def test_failures_are_one_ascii_line() -> None:
    failure = Failure("a#0", "ä.jpg", None, "decode", "ImageError", "no\x1b[31m such\u2028file")
    line = failure_to_json(failure)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == failure.message
    assert list(json.loads(line)) == ["id", "image", "expression", "stage", "error", "message"]


@given(st.lists(st.binary(max_size=30), max_size=8), st.booleans(), st.integers(1, 40))
def test_lines_are_those_of_the_bytes(lines: list[bytes], ends: bool, limit: int) -> None:
    lines = [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
    data = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    read = list(jsonlines.read_lines(io.BytesIO(data), limit))
    wanted = data.split(b"\n")
    if wanted[-1] == b"":
        wanted.pop()
    assert [number for number, _ in read] == list(range(1, len(wanted) + 1))
    assert [line for _, line in read] == [w if len(w) <= limit else None for w in wanted]


def test_a_huge_line_is_never_held(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        for _ in range(32):
            file.write(b"x" * (1 << 20))
        file.write(b"\nnext\r\n")
    tracemalloc.start()
    with path.open("rb") as file:
        assert list(jsonlines.read_lines(file, 1 << 16)) == [(1, None), (2, b"next")]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
