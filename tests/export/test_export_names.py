"""``risam export-masks``: what images are called, how they are split, and nothing made up."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.export_cases import SIZE, export, record, shapes, write_image, write_jsonl

from risam_cli.data.readers.results import Results
from risam_cli.export.targets import Placement

BLOCK = shapes()["block"]
EMPTY = np.zeros(SIZE, np.bool_)


@pytest.fixture
def absolute(tmp_path: Path) -> Path:
    """Records of two images by absolute paths, below one folder."""
    names = [tmp_path / "photos" / name for name in ("a/1.png", "b/2.png")]
    for name in names:
        write_image(name)
    return write_jsonl(tmp_path / "p.jsonl", [record(str(name), "the x", BLOCK) for name in names])


def _names(folder: Path, kind: str) -> list[str]:
    if kind == "cvat":
        root = ElementTree.parse(folder / "annotations.xml").getroot()
        return [image.attrib["name"] for image in root.iter("image")]
    if kind == "coco":
        found = json.loads((folder / "instances.json").read_text())["images"]
        return [image["file_name"] for image in found]
    suffix = {"yolo": "labels/**/*.txt", "png": "masks/**/*.png"}[kind]
    top = folder / suffix.partition("/")[0]
    return sorted(str(path.relative_to(top)) for path in folder.glob(suffix))


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        ("cvat", None, ["a/1.png", "b/2.png"]),
        ("coco", None, ["a/1.png", "b/2.png"]),
        ("yolo", None, ["a/1.txt", "b/2.txt"]),
        ("png", None, ["a/1.png__0-the-x.png", "b/2.png__0-the-x.png"]),
        ("cvat", "BASE", ["1.png", "2.png"]),
        ("coco", "base", ["1.png", "2.png"]),
        ("yolo", "base", ["1.txt", "2.txt"]),
        ("png", "base", ["1.png__0-the-x.png", "2.png__0-the-x.png"]),
    ],
)
def test_absolute_images_are_named_from_their_common_folder(
    absolute: Path, tmp_path: Path, kind: str, names: str | None, expected: list[str]
) -> None:
    more = () if names is None else ("--names", names)
    assert export(absolute, "--to", kind, "-o", tmp_path / "out", *more) == 0
    assert _names(tmp_path / "out", kind) == expected


def test_the_whole_path_is_kept_where_that_is_asked_for(absolute: Path, tmp_path: Path) -> None:
    assert export(absolute, "--to", "cvat", "--names", "absolute", "-o", tmp_path / "out") == 0
    whole = [str(tmp_path / "photos" / name) for name in ("a/1.png", "b/2.png")]
    assert _names(tmp_path / "out", "cvat") == whole


def test_relative_names_stay_as_they_are(tmp_path: Path) -> None:
    rows = [record("photos/1.png", "the x", BLOCK), record("photos/2.png", "the x", BLOCK)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    assert export(source, "--to", "cvat", "-o", tmp_path / "out") == 0
    assert _names(tmp_path / "out", "cvat") == ["photos/1.png", "photos/2.png"]


def test_base_names_that_meet_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [record("a/1.png", "the x", BLOCK), record("b/1.png", "the x", BLOCK)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    assert export(source, "--to", "coco", "--names", "base", "-o", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "a/1.png and b/1.png have the same name; give --names relative" in told


# --- YOLO's split ---------------------------------------------------------------------------------


def _split(tmp_path: Path, names: list[str], out: str) -> dict[str, str]:
    rows = [record(name, text, BLOCK) for name in names for text in ("the x", "the y")]
    source = write_jsonl(tmp_path / f"{out}.jsonl", rows)
    assert export(source, "--to", "YOLO", "--split", "0.8", "-o", tmp_path / out) == 0
    lines = (tmp_path / out / "mapping.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        assert (tmp_path / out / row["label"]).is_file()
        assert row["label"].startswith(f"labels/{row['split']}/")
    return {row["image"]: row["split"] for row in rows}


def test_a_split_of_labels_alone_says_where_the_images_belong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _split(tmp_path, ["a.png", "b.png"], "out")
    told = capsys.readouterr().err
    assert "labels only: data.yaml names images/train and images/val" in told
    assert "--copy-images" in told


def test_yolo_is_split_by_image_and_more_images_move_few(tmp_path: Path) -> None:
    names = [f"d/{number}.png" for number in range(120)]
    found = _split(tmp_path, names, "out")
    assert sum(part == "train" for part in found.values()) == 96
    head = yaml.safe_load((tmp_path / "out/data.yaml").read_text())
    assert (head["train"], head["val"]) == ("images/train", "images/val")
    assert _split(tmp_path, list(reversed(names)), "turned") == found
    assert _split(tmp_path, [f"elsewhere/{name}" for name in names], "moved") == {
        f"elsewhere/{name}": part for name, part in found.items()
    }
    more = _split(tmp_path, [*names, *(f"e/{number}.png" for number in range(60))], "more")
    assert sum(part == "train" for part in more.values()) == 144
    assert sum(more[name] != found[name] for name in names) <= 6
    # One image more moves one at most.
    more = _split(tmp_path, [*names, "e/new.png"], "one")
    assert sum(more[name] != found[name] for name in names) <= 1


@given(
    st.integers(1, 60), st.floats(0.01, 0.99), st.sampled_from(["{}.png", "{}/a/1.png", "x/{}.png"])
)
def test_a_split_meets_its_share_to_the_image(count: int, share: float, form: str) -> None:
    """Also where names are alike but for their first folder."""
    names = [form.format(number) for number in range(count)]
    placement = Placement()
    for name in [*names, *names[:3]]:
        placement.see(name)
    train = [name for name in names if placement.is_train(name, share)]
    assert abs(len(train) - share * count) <= 1
    assert count == 1 or 0 < len(train) < count
    again = Placement()
    for name in reversed(names):
        again.see(name)
    assert [name for name in names if again.is_train(name, share)] == train


@pytest.mark.parametrize("share", ["0", "1", "1.5", "nan", "-0.2"])
def test_a_share_that_is_none_is_refused(
    absolute: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: str
) -> None:
    assert export(absolute, "--to", "yolo", "--split", share, "-o", tmp_path / "out") == 2
    assert "is not between 0 and 1" in capsys.readouterr().err


# --- nothing is made up ---------------------------------------------------------------------------


def test_a_record_without_a_score_gets_none(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    known = record("a.png", "the known", BLOCK, score=0.25)
    unknown = record("a.png", "the unknown", BLOCK)
    del unknown["score"]
    source = write_jsonl(tmp_path / "p.jsonl", [known, unknown])
    for kind in ("coco", "cvat", "labelme", "png", "html", "overlay"):
        more = ("--image-root", tmp_path) if kind in ("html", "overlay", "labelme") else ()
        assert export(source, "--to", kind, "-o", tmp_path / kind, *more) == 0
    whole = json.loads((tmp_path / "coco/instances.json").read_text())["annotations"]
    assert [row.get("score", "none") for row in whole] == [0.25, "none"]
    results = json.loads((tmp_path / "coco/results.json").read_text())
    assert [row.get("score", "none") for row in results] == [0.25, "none"]
    root = ElementTree.parse(tmp_path / "cvat/annotations.xml").getroot()
    shown = [
        {one.attrib["name"]: one.text for one in shape.iter("attribute")}
        for shape in root.iter("polygon")
    ]
    assert [shape.get("score") for shape in shown] == ["0.2500", None]
    (made,) = (tmp_path / "labelme").rglob("a.json")
    assert [s.get("score", "none") for s in json.loads(made.read_text())["shapes"]] == [
        0.25,
        "none",
    ]
    with Results(tmp_path / "png") as back:
        rows = [row for _, _, row in back.rows() if isinstance(row, dict)]
    assert [row.get("score", "none") for row in rows] == [0.25, "none"]
    data = (tmp_path / "html/gallery/data/00000.js").read_text()
    assert '"the known",0.25,' in data
    assert '"the unknown",null,' in data
    # A mask whose score is not known is not one of a low score.
    assert export(source, "--to", "coco", "--min-score", "0.5", "-o", tmp_path / "few") == 0
    kept = json.loads((tmp_path / "few/instances.json").read_text())["annotations"]
    assert [row["expression"] for row in kept] == ["the unknown"]


def test_a_gallery_counts_masks_and_says_who_made_it(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    rows = [record("a.png", "the x", BLOCK)]
    rows += [record("a.png", f"nothing {k}", EMPTY) | {"no_target": k == 0} for k in range(3)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out"
    assert export(source, "--to", "html", "--image-root", tmp_path, "-o", out) == 0
    page = (out / "gallery/index.html").read_text()
    assert "<title>risam export-masks: gallery</title>" in page
    head: dict[str, Any] = json.loads(page.partition('"counts":')[2].partition("}")[0] + "}")
    counted = {key: head[key] for key in ("expressions", "masks", "no_target", "empty")}
    assert counted == {"expressions": 4, "masks": 1, "no_target": 1, "empty": 2}


def test_an_export_of_nothing_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [record("a.png", "the x", EMPTY)])
    assert export(source, "--to", "coco", "-o", tmp_path / "out") == 0
    assert "nothing was exported: 1 record with an empty mask" in capsys.readouterr().err


# --- annotation files -----------------------------------------------------------------------------


def test_a_folder_with_annotations_is_exported_as_results_are(tmp_path: Path) -> None:
    """What an export wrote goes in again, with what nothing fits."""
    rows = [record("a.png", "the x", BLOCK), record("a.png", "the y", EMPTY)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    assert export(source, "--to", "coco", "-o", tmp_path / "one") == 0
    assert export(tmp_path / "one", "--to", "coco", "-o", tmp_path / "two") == 0
    first, second = (
        json.loads((tmp_path / name / "instances.json").read_text()) for name in ("one", "two")
    )
    for key in ("images", "categories"):
        assert first[key] == second[key]
    for name in ("id", "image_id", "category_id", "segmentation", "expression", "score"):
        assert [row[name] for row in first["annotations"]] == [
            row[name] for row in second["annotations"]
        ]
    for whole in (first, second):
        said = {(one["text"], tuple(one["ann_ids"])) for one in whole["expressions"]}
        assert said == {("the x", (1,)), ("the y", ())}
        assert [one["record_id"] for one in whole["expressions"]] == [row["id"] for row in rows]


def test_the_words_of_an_annotation_file_are_kept(tmp_path: Path) -> None:
    """Expressions of the list go to the object that they mean; its class stays the file's."""
    rows = [record("a.png", "the x", BLOCK)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    assert export(source, "--to", "coco", "-o", tmp_path / "one", "--one-class", "cup") == 0
    whole = json.loads((tmp_path / "one/instances.json").read_text())
    for annotation in whole["annotations"]:
        del annotation["expression"]
    (tmp_path / "mine.json").write_text(json.dumps(whole))
    assert export(tmp_path / "mine.json", "--to", "cvat", "-o", tmp_path / "cvat") == 0
    (shape,) = ElementTree.parse(tmp_path / "cvat/annotations.xml").getroot().iter("polygon")
    assert shape.attrib["label"] == "cup"
    assert next(iter(shape)).text == "the x"


def test_an_annotation_file_in_which_nothing_was_found_is_exported(tmp_path: Path) -> None:
    """Images and expressions are kept where no expression has an annotation."""
    source = write_jsonl(tmp_path / "p.jsonl", [record("a.png", "the y", EMPTY)])
    assert export(source, "--to", "coco", "-o", tmp_path / "one") == 0
    assert export(tmp_path / "one", "--to", "coco", "-o", tmp_path / "two") == 0
    whole = json.loads((tmp_path / "two/instances.json").read_text())
    assert [image["file_name"] for image in whole["images"]] == ["a.png"]
    assert [(one["text"], one["ann_ids"]) for one in whole["expressions"]] == [("the y", [])]
