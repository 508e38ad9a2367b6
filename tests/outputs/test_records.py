"""Records to JSON and back, and what is refused on the way."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from risam_cli.errors import DataError
from risam_cli.files import jsonlines
from risam_cli.masks import rle as masks
from risam_cli.outputs.records import failure_to_json, from_json, to_json
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
    assert from_json(json.loads(line), "here") == record


def test_undecodable_names_survive() -> None:
    record = replace(RECORD, image="a\udcff.jpg")
    assert from_json(json.loads(to_json(record).encode()), "x").image == "a\udcff.jpg"


def test_anyones_records_need_a_mask_and_a_name_only() -> None:
    record = from_json({"id": 5, "segmentation": RLE, "bbox": [0, 0, 1, 1], "area": 3.5}, "x")
    assert record.id == "5"
    assert (record.area, record.bbox, record.score) == (15, (2.0, 1.0, 5.0, 3.0), None)
    assert not record.no_target
    empty = from_json({"id": "e", "segmentation": masks.empty((6, 8))}, "x")
    assert empty.no_target
    uncompressed = {"size": [2, 2], "counts": [1, 2, 1]}
    pair = from_json({"image": "a", "expression": "b", "segmentation": uncompressed}, "x")
    assert (pair.id, pair.area, pair.height) == ("", 2, 2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"segmentation": None}, "not an RLE"),
        ({"segmentation": {"size": [6, 8], "counts": [1]}}, "sum to"),
        ({"height": 7}, "6x8"),
        ({"height": "6"}, "'height' and 'width'"),
        ({"width": None}, "'height' and 'width'"),
        ({"score": 1.5}, "0..1"),
        ({"score": float("nan")}, "0..1"),
        ({"score": True}, "0..1"),
        ({"no_target": 1}, "true or false"),
        ({"mask": 3}, "'mask'"),
        ({"id": [1]}, "'id'"),
        ({"id": None, "image": None}, "neither"),
        ({"expression": 4}, "'expression'"),
        ({"notes": "cut"}, "'notes'"),
    ],
)
def test_wrong_values_are_named_with_their_place(change: dict[str, object], text: str) -> None:
    obj = {**json.loads(to_json(RECORD)), **change}
    with pytest.raises(DataError) as caught:
        from_json(obj, "p.jsonl, line 3")
    assert text in str(caught.value)
    assert str(caught.value).startswith("p.jsonl, line 3")


def test_a_record_must_be_an_object_with_a_mask() -> None:
    for obj, text in (([], "is an object"), ({"id": "1"}, "'segmentation' is missing")):
        with pytest.raises(DataError, match=text):
            from_json(obj, "x")  # type: ignore[arg-type]


def test_a_bad_line_is_named_by_its_number() -> None:
    for line, text in (
        (b"{", "not JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"id": "1", "segmentation": 5}', "not an RLE"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"id": "\xff"}', "not UTF-8"),
    ):
        with pytest.raises(DataError, match=r"^p\.jsonl, line 2") as caught:
            from_json(jsonlines.parse_json(line, "p.jsonl, line 2"), "p.jsonl, line 2")
        assert text in str(caught.value)
        assert len(str(caught.value)) < 400


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
