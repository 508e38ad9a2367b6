"""Words that a model does not know: in the record, once on stderr, and summed up at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.predict_runs import Run, draw_pictures
from support.records import read_records

from risam_cli.inference.unknown_words import UnknownWords
from risam_cli.types import Prediction


def prediction(*unknown: str) -> Prediction:
    rle = {"size": [1, 1], "counts": "1"}
    box = (0.0, 0.0, 0.0, 0.0)
    return Prediction("a", "a", "a", 1, 1, rle, box, 0, 0.5, False, unknown_words=unknown)  # type: ignore[arg-type]


def test_each_word_is_told_once_and_the_rest_is_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = UnknownWords("mine")
    for _ in range(3):
        seen.see([prediction("dog"), prediction(), prediction("cat", "dog")])
    seen.see([prediction(f"word{number}") for number in range(9)])
    told = capsys.readouterr().err
    assert told.count("'dog'") == told.count("'cat'") == 1
    assert told.count("does not know") == 5
    seen.tell()
    told = capsys.readouterr().err
    assert "15 of 18 expressions" in told
    assert "11 words" in told
    assert "florence2" in told


def test_an_expression_of_several_instances_is_counted_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = UnknownWords("mine")
    seen.see([replace(prediction("dog"), instance=k) for k in range(3)])
    seen.see([prediction()])
    capsys.readouterr()
    seen.tell()
    assert "1 of 2 expressions" in capsys.readouterr().err


def test_nothing_is_said_where_all_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    seen = UnknownWords("mine")
    seen.see([prediction(), prediction()])
    seen.tell()
    assert capsys.readouterr().err == ""


def test_a_run_tells_them_and_counts_its_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = draw_pictures(tmp_path / "in", 3)
    Run([pictures], tmp_path / "out", e=("bright", "an unheard-of one")).go()
    told = capsys.readouterr().err
    assert told.count("unheard-of") == 1
    assert "3 of 6 expressions" in told
    records = read_records(tmp_path / "out")
    nothing = sum(record.no_target for record in records)
    assert f"6 records in {tmp_path / 'out'}: {6 - nothing} with a mask, {nothing} where" in told
    assert {record.unknown_words for record in records} == {(), ("unheard-of",)}
