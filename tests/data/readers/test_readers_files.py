"""Pickles that must not run, JSON that is cut or odd, and the index over predictions."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.eval_files import REFS, box_mask, compressed, record, write_records

from risam_cli.data.readers import jsonstream
from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.data.readers.pickle import load_plain_pickle
from risam_cli.data.readers.predictions import Answer, PredictionIndex
from risam_cli.errors import DataError
from risam_cli.masks import rle as masks
from risam_cli.types import Expression, Failure, Sample

MARKER = "marker-that-must-not-appear"


class Runs:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def _written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    value = [*REFS, {"a": (1, 2.5, None, True), "b": -(2**70), "c": "größe"}]
    path = _written(tmp_path, pickle.dumps(value, protocol=protocol))
    assert load_plain_pickle(path) == value


def test_strings_of_python_2_are_latin_1(tmp_path: Path) -> None:
    # What cPickle of Python 2 writes for [{'sent': 'caf\xe9'}] under protocol 0.
    data = b"(lp1\n(dp2\nS'sent'\np3\nS'caf\\xe9'\np4\nsa."
    assert load_plain_pickle(_written(tmp_path, data)) == [{"sent": "café"}]


def _hostile(target: Path) -> dict[str, bytes]:
    touch = f"__import__('pathlib').Path({str(target)!r}).touch()"
    by_call = {
        f"eval-{p}": pickle.dumps([{"split": "val"}, Runs(eval, touch)], protocol=p)
        for p in range(pickle.HIGHEST_PROTOCOL + 1)
    }
    system = f"cos\nsystem\n(S'touch {target}'\ntR.".encode()
    return {
        **by_call,
        "system": pickle.dumps(Runs(os.system, f"touch {target}")),
        "global": b"c__builtin__\neval\n.",
        "reduce": system,
        "inst": f"(S'touch {target}'\nios\nsystem\n.".encode(),
        "obj": b"(" + b"cos\nsystem\n" + f"S'touch {target}'\no.".encode(),
        "persistent": b"Psomething\n.",
        "extension": b"\x82\x01.",
        "build": b"}}b.",
        "late": pickle.dumps(list(range(1000)))[:-1] + b"0" + system,
    }


@pytest.mark.parametrize("kind", sorted(_hostile(Path("x"))))
def test_a_pickle_that_does_more_than_hold_data_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / MARKER
    data = _hostile(target)[kind]
    with pytest.raises(DataError, match="is refused: at byte"):
        load_plain_pickle(_written(tmp_path, data))
    assert not target.exists()


@pytest.mark.parametrize("kind", ["tower", "long tuple", "long integer"])
def test_a_small_pickle_does_not_hang(tmp_path: Path, kind: str) -> None:
    """Keys are hashed item by item: sixty pairs of pairs make 2^60 items of 120 bytes."""
    key = {
        "tower": b"K\x01" + b"2\x86" * 60,
        "long tuple": b"(" + b"K\x01" * 5000 + b"t",
        "long integer": b"\x8b" + (1 << 20).to_bytes(4, "little") + b"\x01" * (1 << 20),
    }[kind]
    path = _written(tmp_path, b"\x80\x04}" + key + b"K\x01s.")
    with pytest.raises(DataError, match=r"tuples within tuples|absurd size"):
        load_plain_pickle(path)


def test_the_hostile_pickles_would_have_run(tmp_path: Path) -> None:
    """The test above means something only if an ordinary unpickler does run them."""
    target = tmp_path / MARKER
    for kind in ("eval-0", "eval-4", "reduce", "inst", "obj", "late"):
        pickle.loads(_hostile(target)[kind])
        assert target.exists(), kind
        target.unlink()


def test_the_unpickler_itself_imports_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """The second lock holds where the first is taken away."""
    monkeypatch.setattr("risam_cli.data.readers.pickle._scan", lambda data, path: None)
    target = tmp_path / MARKER
    for kind, data in _hostile(target).items():
        with pytest.raises(DataError):
            load_plain_pickle(_written(tmp_path, data))
        assert not target.exists(), kind


def test_a_wild_memo_index_is_no_memory_bomb(tmp_path: Path) -> None:
    data = b"]r" + struct.pack("<I", 0x7FFFFFFF) + b"."
    tracemalloc.start()
    with pytest.raises(DataError, match="memo index"):
        load_plain_pickle(_written(tmp_path, data))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02]", b"(lp0", b"\x80\x04\x95", b"."])
def test_what_is_no_pickle_is_said_so(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match="pickle"):
        load_plain_pickle(_written(tmp_path, data))


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, data: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "refs.p"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        load_plain_pickle(path)


# --- JSON -----------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=10,
)


def _events(value: Any) -> list[tuple[str, Any]]:
    """What iter_json gives for a value, from json.loads."""
    if isinstance(value, list):
        return [("", item) for item in value]
    events = []
    for key, member in value.items():
        events += [(key, item) for item in member] if isinstance(member, list) else [(key, member)]
    return events


@given(
    st.dictionaries(st.text(max_size=4), VALUES, max_size=4) | st.lists(VALUES, max_size=4),
    st.integers(1, 30),
    st.sampled_from([None, 2]),
)
def test_reading_in_chunks_gives_what_json_gives(
    tmp_path_factory: Any, value: Any, chunk: int, indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonstream, "CHUNK", chunk)
        assert list(iter_json(path)) == _events(value)


def test_a_number_may_be_cut_at_every_place(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "a.json"
    value = [0.5, -1.25e-05, 1e30, -0.0, 12, {"n": 1.5e300}]
    path.write_text(json.dumps(value))
    for chunk in range(1, len(path.read_text())):
        monkeypatch.setattr(jsonstream, "CHUNK", chunk)
        assert [record for _, record in iter_json(path)] == value, chunk


def test_json_cut_at_every_place_is_said_so(tmp_path: Path) -> None:
    text = json.dumps({"images": [{"id": 12, "n": "aé"}], "n": 3.25, "x": [True, None]})
    path = tmp_path / "instances.json"
    for end in range(len(text)):
        path.write_text(text[:end], encoding="utf-8")
        with pytest.raises(DataError, match="damaged at character"):
            list(iter_json(path))
    path.write_text(text + " \n", encoding="utf-8")
    assert len(list(iter_json(path))) == 4


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1} x', "more text"),
        ('{"a": 1, }', "expecting value"),
        ('{"a" 1}', "':' was expected"),
        ("[1 2]", "',' or ']'"),
        ("3", "begins with '3'"),
        ('{"a": nope}', "expecting value"),
        ("[" * 100_000, "nests too deeply"),
        ("\ufffe", "not an annotation file"),
    ],
)
def test_odd_json_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=complaint):
        list(iter_json(path))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(DataError, match="not UTF-8"):
        list(iter_json(path))
    with pytest.raises(DataError, match="cannot read"):
        list(iter_json(tmp_path / "missing.json"))


def test_a_long_file_is_not_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    with path.open("w") as stream:
        stream.write('{"annotations": [')
        stream.write(",".join(json.dumps({"id": k, "pad": "x" * 1000}) for k in range(20_000)))
        stream.write("]}")
    tracemalloc.start()
    assert sum(1 for _ in iter_json(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20e6
    assert peak < 8e6


# --- predictions ----------------------------------------------------------------------------------

MASK = box_mask((2, 3, 12, 20))


def _sample(*expressions: tuple[str, str], image: str = "a/1.jpg") -> Sample:
    made = tuple(Expression(name, text) for name, text in expressions)
    return Sample(image, Path(image), made, MASK.shape)


def _find(path: Path, sample: Sample) -> tuple[list[Any], list[Failure], PredictionIndex]:
    failures: list[Failure] = []
    with PredictionIndex(path, failures.append) as index:
        answers = [index.find(sample, expression) for expression in sample.expressions]
        index.rest = list(index.surplus())  # type: ignore[attr-defined]
    return answers, failures, index


def test_records_are_found_by_id_or_by_image_and_expression(tmp_path: Path) -> None:
    records = [
        record("7", "a/1.jpg", "cat", MASK),
        record("x#0", "data/a/1.jpg", "the dog", ~MASK),
        {**record("", "1.jpg", "KITE", MASK), "id": None},
        record("99", "a/1.jpg", "nobody asked", MASK),
    ]
    path = write_records(tmp_path / "p.jsonl", records)
    sample = _sample(("7", "cat"), ("8", "the dog"), ("9", "kite"), ("10", "none"))
    kite = replace(sample.expressions[2], attributes={"raw": "KITE"})
    sample = replace(sample, expressions=(*sample.expressions[:2], kite, sample.expressions[3]))
    answers, failures, index = _find(path, sample)
    assert [a is not None for a in answers] == [True, True, True, False]
    np.testing.assert_array_equal(masks.decode(answers[1].segmentation), ~MASK)
    assert not failures
    assert index.rest == [("99", "a/1.jpg", "nobody asked")]  # type: ignore[attr-defined]


def test_an_id_of_another_image_does_not_count(tmp_path: Path) -> None:
    path = write_records(tmp_path / "p.jsonl", [record("7", "b/1.jpg", "cat", MASK)])
    sample = _sample(("7", "cat"))
    with PredictionIndex(path, lambda failure: None) as index:
        with pytest.raises(DataError, match=r"'cat' on a/1\.jpg, the record says 'cat' on b/1"):
            index.find(sample, sample.expressions[0])
        assert index.unused == 1
    path = write_records(tmp_path / "q.jsonl", [{**record("7", "", "", MASK), "image": None}])
    answers, _, _ = _find(path, _sample(("7", "cat")))
    assert answers[0] is not None


def test_instances_of_an_answer_are_scored_as_their_union(tmp_path: Path) -> None:
    parts = [box_mask((0, 0, 9, 9)), box_mask((20, 5, 31, 30)), box_mask((5, 5, 25, 12))]

    def instances(name: str | None, text: str, *masks: Any) -> list[Any]:
        return [
            {**record(name or "", "a/1.jpg", text, mask), "instance": k, "score": 0.9 - k / 10}
            | ({} if name else {"id": None})
            for k, mask in enumerate(masks)
        ]

    records = [
        *instances("7", "cat", *parts),
        *instances(None, "dog", *parts[1:]),
        # Twice the same text: two answers of two instances each, in turn.
        *instances("x", "kite", parts[0], parts[1]),
        *instances("y", "kite", parts[1], parts[2]),
        # The same instance twice: the second is told.
        *instances("12", "hat", parts[0]),
        *instances("12", "hat", parts[1]),
    ]
    path = write_records(tmp_path / "p.jsonl", records)
    sample = _sample(("7", "cat"), ("8", "dog"), ("9", "kite"), ("10", "kite"), ("12", "hat"))
    answers, failures, index = _find(path, sample)
    wanted = [parts, parts[1:], parts[:2], parts[1:], parts[:1]]
    for answer, some in zip(answers, wanted, strict=True):
        np.testing.assert_array_equal(masks.decode(answer.segmentation), np.any(some, axis=0))
        assert answer.score == 0.9
        assert not answer.no_target
    assert (index.doubled, index.unused) == (1, 0)
    assert ["a second prediction" in failure.message for failure in failures] == [True]
    # Records without numbers are still two answers.
    path = write_records(tmp_path / "q.jsonl", [record("7", "1.jpg", "cat", m) for m in parts])
    _, failures, index = _find(path, _sample(("7", "cat"), image="1.jpg"))
    assert index.doubled == 2


def test_doubled_records_are_told_and_the_first_counts(tmp_path: Path) -> None:
    records = [record("7", "1.jpg", "cat", MASK), record("7", "1.jpg", "cat", ~MASK)]
    path = write_records(tmp_path / "p.jsonl", records)
    answers, failures, index = _find(path, _sample(("7", "cat"), image="1.jpg"))
    np.testing.assert_array_equal(masks.decode(answers[0].segmentation), MASK)
    assert index.doubled == 1
    assert index.unused == 0
    assert ["second prediction" in f.message for f in failures] == [True]


def test_lines_that_are_no_records_are_told_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = json.dumps(record("7", "1.jpg", "cat", MASK))
    lines = [good, "nonsense", "[1]", '{"segmentation": {}}', '{"id": [1]}', "", good[:-20]]
    path.write_text("\n".join(lines))
    answers, failures, index = _find(path, _sample(("7", "cat"), image="1.jpg"))
    assert answers[0] is not None
    assert index.broken == 5
    assert [f.id for f in failures] == [f"line {n}" for n in (2, 3, 4, 5, 7)]
    assert "ends in the middle" in failures[-1].message
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match="holds no prediction that can be read"):
        PredictionIndex(path, lambda failure: None)
    path.write_text("")
    with pytest.raises(DataError, match="holds no prediction;"):
        PredictionIndex(path, lambda failure: None)
    with pytest.raises(DataError, match="cannot read the predictions"):
        PredictionIndex(tmp_path / "missing.jsonl", lambda failure: None)


def test_a_folder_or_stdin_may_hold_the_records(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_records(tmp_path / "predictions.jsonl", [record("7", "1.jpg", "cat", MASK)])
    with PredictionIndex(tmp_path, lambda failure: None) as index:
        assert len(index) == 1

    class Stdin:
        buffer = io.BytesIO(path.read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin())
    with PredictionIndex(Path("-"), lambda failure: None) as index:
        assert index.find(_sample(("7", "cat"), image="1.jpg"), Expression("7", "cat")) is not None


def answer_of(
    tmp_path: Path, change: dict[str, Any], canvas: int = 0
) -> tuple[Answer, PredictionIndex]:
    path = write_records(tmp_path / "p.jsonl", [{"id": "7", **change}])
    sample = _sample(("7", "cat"), image="1.jpg")
    with PredictionIndex(path, lambda failure: None, canvas=canvas) as index:
        answer = index.find(sample, sample.expressions[0])
    assert answer is not None
    return answer, index


def test_what_a_record_may_leave_out(tmp_path: Path) -> None:
    plain = {"segmentation": compressed(MASK)}
    answer, _ = answer_of(tmp_path, plain)
    assert (answer.no_target, np.isnan(answer.score)) == (False, True)
    empty = {"segmentation": compressed(np.zeros_like(MASK))}
    assert answer_of(tmp_path, empty)[0].no_target is True
    for none in ({"no_target": True}, {"no_target": True, "segmentation": []}):
        assert masks.area(answer_of(tmp_path, none)[0].segmentation) == 0
    flagged, _ = answer_of(tmp_path, {**plain, "no_target": True, "score": 1})
    assert (flagged.no_target, masks.area(flagged.segmentation)) == (True, MASK.sum())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"segmentation": None}, "no mask"),
        ({"segmentation": []}, "an empty list; a box alone has no mask"),
        ({"segmentation": compressed(np.ones((5, 6), bool))}, "5x6"),
        ({"segmentation": compressed(MASK.T)}, r"\[width, height\]"),
        ({"segmentation": {"size": [40, 60], "counts": "zz"}}, "sum|damaged"),
        ({"segmentation": [[1, 2, 3, 4]]}, "no polygon has three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "7 coordinates"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "not a finite number"),
        ({"segmentation": "abc"}, "give an RLE or polygons"),
    ],
)
def test_malformed_answers_are_named(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        answer_of(tmp_path, change)


@pytest.mark.parametrize(
    "side",
    [
        *({"score": value} for value in (1.5, 7.3, "high", "0.9", float("nan"), True, 1.004)),
        *({"no_target": value} for value in ("yes", 0, 1.0)),
        {"no_target_probability": -1},
    ],
)
def test_a_side_field_never_costs_a_mask(tmp_path: Path, side: dict[str, Any]) -> None:
    answer, index = answer_of(tmp_path, {"segmentation": compressed(MASK), **side})
    np.testing.assert_array_equal(masks.decode(answer.segmentation), MASK)
    assert (answer.no_target, np.isnan(answer.score)) == (False, True)
    (note,) = index.notes()
    assert next(iter(side)) in note
    assert "left out" in note


@pytest.mark.parametrize("polygons", [[[2, 3, 12, 3, 12, 20, 2, 20]], [2, 3, 12, 3, 12, 20, 2, 20]])
def test_polygons_are_taken_at_the_images_size(tmp_path: Path, polygons: Any) -> None:
    answer, _ = answer_of(tmp_path, {"segmentation": polygons, "bbox": [2, 3, 10, 17]})
    np.testing.assert_array_equal(masks.decode(answer.segmentation), MASK)


def test_masks_of_the_protocols_own_size_are_taken(tmp_path: Path) -> None:
    square = np.zeros((480, 480), bool)
    square[:240] = True
    answer, _ = answer_of(tmp_path, {"segmentation": compressed(square)}, canvas=480)
    np.testing.assert_array_equal(masks.decode(answer.segmentation), square)
    answer, _ = answer_of(tmp_path, {"segmentation": compressed(MASK)}, canvas=480)
    np.testing.assert_array_equal(masks.decode(answer.segmentation), MASK)
