"""The folder of samples: made by its script, small, and readable in every form."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from support.paths import REPO

from risam_cli.data.images.images import open_rgb
from risam_cli.data.inputs.inputs import Inputs
from risam_cli.data.readers.catalog import open_dataset
from risam_cli.data.readers.pickle import load_plain_pickle
from risam_cli.data.refshapes.vocabulary import VOCABULARY
from risam_cli.masks import rle as masks

FOLDER = REPO / "sample_data"
BY_HAND = {"README.md", "make_sample_data.py"}


def names(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts
    } - BY_HAND


def test_the_script_makes_what_is_there(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("sample", FOLDER / "make_sample_data.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(tmp_path)
    assert names(tmp_path) == names(FOLDER)
    for name in names(FOLDER):
        made, kept = tmp_path / name, FOLDER / name
        if name.endswith((".png", ".jpg")):
            # Another libjpeg may round otherwise.
            change = open_rgb(made).astype(int) - open_rgb(kept)
            assert np.abs(change).mean() < 0.5, name
        elif name.endswith(".p"):
            assert load_plain_pickle(made) == load_plain_pickle(kept)
        else:
            assert made.read_text() == kept.read_text(), name


def test_it_is_small() -> None:
    assert sum((FOLDER / name).stat().st_size for name in names(FOLDER)) < 3e6


@pytest.mark.parametrize(
    ("dataset", "root", "split", "expressions"),
    [
        ("coco", "coco.json", "all", 48),
        ("refcoco", ".", "val", 24),
        ("refcoco", "refcoco", "testB", 24),
        ("grefcoco", ".", "val", 24),
        ("phrasecut", ".", "val", 24),
    ],
)
def test_eval_reads_it(dataset: str, root: str, split: str, expressions: int) -> None:
    source = open_dataset(dataset, FOLDER / root, split)
    assert source.counts["expressions"] == expressions
    for sample in source.iterate():
        image = open_rgb(sample.path)
        for expression in sample.expressions:
            assert expression.target is not None
            assert masks.decode(expression.target).shape == image.shape[:2]
            assert (masks.area(expression.target) == 0) == expression.no_target


@pytest.mark.parametrize(
    ("given", "extra", "records"),
    [
        ("images", ("the red circle",), 8),
        ("manifest.jsonl", (), 25),
        ("manifest.csv", (), 16),
        ("coco.json", (), 48),
    ],
)
def test_predict_reads_it(given: str, extra: tuple[str, ...], records: int) -> None:
    inputs = Inputs([str(FOLDER / given)], extra)
    inputs.check()
    entries = list(inputs)
    samples = [entry.sample for entry in entries if entry.sample is not None]
    assert not any(entry.failures for entry in entries)
    assert {sample.path.resolve() for sample in samples} == set(images())
    ids = [expression.id for sample in samples for expression in sample.expressions]
    assert len(ids) == len(set(ids)) == records


def test_expressions_are_in_the_vocabulary() -> None:
    words = (FOLDER / "expressions.txt").read_text().split()
    assert len(words) > 10
    assert set(words) <= set(VOCABULARY)


def images() -> list[Path]:
    found = [path.resolve() for path in (FOLDER / "images").rglob("*") if path.is_file()]
    assert len(found) == 8
    return found
