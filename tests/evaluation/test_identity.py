"""Whose answer is whose: ids, images and expressions are held against one another."""

from __future__ import annotations

import csv
import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.eval_files import Run, box, box_mask, compressed, write_records

from risam_cli.cli import main
from risam_cli.data.identity import expression_key, has_words, id_key, id_text, image_key

MASKS = {
    "red": box_mask((2, 2, 20, 20)),
    "blue": box_mask((30, 5, 50, 30)),
    "third": box_mask((5, 22, 25, 38)),
}
BOXES = {"red": (2, 2, 20, 20), "blue": (30, 5, 50, 30), "third": (5, 22, 25, 38)}


def write_set(
    folder: Path,
    spoken: list[tuple[int, str, str, str]],
    *,
    images: list[dict[str, Any]] | None = None,
    annotations: list[dict[str, Any]] | None = None,
) -> list[str]:
    """A COCO-style set; ``spoken`` is expression id, image, text, mask. Gives eval's arguments."""
    names = list(dict.fromkeys(image for _, image, _, _ in spoken))
    listed = [
        {"id": k + 1, "file_name": name, "height": 40, "width": 60} for k, name in enumerate(names)
    ]
    made, said = [], []
    for k, (number, image, text, mask) in enumerate(spoken):
        one = {"id": 100 + k, "image_id": names.index(image) + 1, "category_id": 1}
        made.append({**one, "segmentation": [box(*BOXES[mask])], "iscrowd": 0})
        said.append({"id": number, "image_id": one["image_id"], "ann_ids": [100 + k], "text": text})
    content = {
        "images": images or listed,
        "annotations": made + (annotations or []),
        "categories": [{"id": 1, "name": "thing"}],
        "expressions": said,
    }
    folder.mkdir(parents=True)
    (folder / "instances.json").write_text(json.dumps(content))
    return ["--dataset", "coco", "--root", str(folder)]


def row(mask: str, **more: Any) -> dict[str, Any]:
    return {"segmentation": compressed(MASKS[mask]), **more}


@pytest.fixture
def evaluate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    number = 0

    def run(args: list[str], predictions: Path | list[dict[str, Any]]) -> Run:
        nonlocal number
        number += 1
        if isinstance(predictions, list):
            predictions = write_records(tmp_path / f"p{number}.jsonl", predictions)
        out = tmp_path / f"out{number}"
        capfd.readouterr()
        code = main(["eval", *args, "--predictions", str(predictions), "-o", str(out)])
        told = capfd.readouterr()
        return Run(code, told.out, told.err, out)

    return run


def ious(run: Run) -> dict[str, float]:
    return {one["id"]: one["iou"] for one in run.rows()}


SPOKEN = [(5, "x/a.png", "the red one", "red"), (6, "x/a.png", "the blue one", "blue")]


# --- ids ------------------------------------------------------------------------------------------


def test_another_data_sets_predictions_are_refused(tmp_path: Path, evaluate: Any) -> None:
    args = write_set(tmp_path / "set", SPOKEN)
    strange = [row("third", id=n, image="x/a.png", expression=f"a dog {n}") for n in (5, 6)]
    run = evaluate(args, strange)
    assert run.code == 1
    assert "belongs to another data set or split: 2 of 2 records" in run.err
    assert "'the red one'" in run.err
    assert "'a dog 5'" in run.err
    assert not (run.folder / "report.json").exists()


def test_a_few_that_differ_are_told_and_scored(tmp_path: Path, evaluate: Any) -> None:
    spoken = [*SPOKEN, (7, "x/a.png", "the third", "third")]
    args = write_set(tmp_path / "set", spoken)
    rows = [row(mask, id=n, image=i, expression=text) for n, i, text, mask in spoken]
    rows[2]["expression"] = "something else"
    run = evaluate(args, rows)
    assert run.code == 0
    assert "1 of 3 predictions with an id of this split name another image or expression" in run.err
    assert ious(run) == {"5": 1.0, "6": 1.0, "7": 1.0}


def test_case_white_space_and_punctuation_are_no_difference(tmp_path: Path, evaluate: Any) -> None:
    args = write_set(tmp_path / "set", SPOKEN)
    rows = [
        row("red", id=5, expression="The  red one."),
        row("blue", id=6.0, expression="THE BLUE ONE"),
    ]
    run = evaluate(args, rows)
    assert (run.code, ious(run)) == (0, {"5": 1.0, "6": 1.0})
    assert "name another" not in run.err


@pytest.mark.parametrize("key", ["id", "sent_id"])
@pytest.mark.parametrize("number", [5, 5.0, "5"])
def test_an_id_is_one_whatever_its_type_and_key(
    key: str, number: Any, tmp_path: Path, evaluate: Any
) -> None:
    args = write_set(tmp_path / "set", SPOKEN[:1])
    assert ious(evaluate(args, [row("red", **{key: number})])) == {"5": 1.0}


def test_an_expression_without_words_counts_and_is_told(tmp_path: Path, evaluate: Any) -> None:
    spoken = [(5, "x/a.png", "", "red"), (6, "x/a.png", "blue", "blue"), (7, "x/a.png", "?", "red")]
    args = write_set(tmp_path / "set", spoken)
    run = evaluate(args, [row("red", id=5, expression=""), row("blue", id=6)])
    assert run.code == 3
    assert ious(run) == {"5": 1.0, "6": 1.0, "7": 0.0}
    assert "2 expressions without words, counted all the same (the first has the id '5')" in run.err
    assert "no prediction for '?'" in run.err


# --- images ---------------------------------------------------------------------------------------

COCO_NAME = "COCO_train2014_000000581857.jpg"


@pytest.mark.parametrize(
    "named",
    [
        *("COCO_train2014_000000581857_16913.jpg", "COCO_train2014_000000581857"),
        *("train2014/COCO_train2014_000000581857.jpg", "./COCO_train2014_000000581857.jpg"),
        *("COCO_train2014_000000581857.png", "1", "D:\\set\\COCO_train2014_000000581857.jpg"),
    ],
)
@pytest.mark.parametrize("by_id", [True, False])
def test_usual_spellings_of_an_image_are_taken(
    named: str, by_id: bool, tmp_path: Path, evaluate: Any
) -> None:
    spoken = [(5, COCO_NAME, "the red one", "red"), (6, COCO_NAME, "the blue one", "blue")]
    args = write_set(tmp_path / "set", spoken)
    rows = [row(m, id=n, image=named, expression=t) for n, _, t, m in spoken]
    if not by_id:
        for one in rows:
            del one["id"]
    run = evaluate(args, rows)
    assert (run.code, ious(run)) == (0, {"5": 1.0, "6": 1.0}), run.err


def test_an_image_that_is_another_is_said_not_just_missing(tmp_path: Path, evaluate: Any) -> None:
    spoken = [*SPOKEN, (7, "x/b.png", "the third", "third")]
    args = write_set(tmp_path / "set", spoken)
    rows = [row(m, id=n, image=i, expression=t) for n, i, t, m in spoken]
    rows[2]["image"] = "y/elsewhere.png"
    run = evaluate(args, rows)
    assert run.code == 3
    (failure,) = run.rows("failures.jsonl")
    assert (
        "id 7 is 'the third' on x/b.png, the record says 'the third' on y/elsewhere.png"
        in (failure["message"])
    )


def test_base_names_that_stand_twice_are_not_scored_twice(tmp_path: Path, evaluate: Any) -> None:
    spoken = [(5, "x/a.png", "it", "red"), (6, "y/a.png", "it", "blue")]
    args = write_set(tmp_path / "set", spoken)
    run = evaluate(args, [row("red", image="a.png", expression="it")])
    assert run.code == 3
    assert {f["id"] for f in run.rows("failures.jsonl")} == {"5", "6"}
    assert "'a.png' may be x/a.png or y/a.png" in run.rows("failures.jsonl")[0]["message"]
    whole = [
        row("red", image="x/a.png", expression="it"),
        row("blue", image="y/a.png", expression="it"),
    ]
    assert ious(evaluate(args, whole)) == {"5": 1.0, "6": 1.0}
    beside = write_set(
        tmp_path / "beside", [(5, "a.png", "it", "red"), (6, "y/a.png", "it", "blue")]
    )
    run = evaluate(beside, [row("red", image="a.png", expression="it")])
    assert ious(run) == {"5": 1.0, "6": 0.0}


def test_a_name_without_a_suffix_that_two_images_share_is_refused(
    tmp_path: Path, evaluate: Any
) -> None:
    spoken = [(1, "x.jpg", "it", "red"), (2, "x.png", "it", "blue")]
    args = write_set(tmp_path / "set", spoken)
    rows = [row("red", image="x", expression="it"), row("blue", image="x", expression="it")]
    run = evaluate(args, rows)
    assert run.code == 3
    assert "'x' may be x.jpg or x.png; name images by their full paths" in run.err
    exact = [
        row("red", image="x.jpg", expression="it"),
        row("blue", image="x.png", expression="it"),
    ]
    assert evaluate(args, exact).code == 0


@pytest.mark.parametrize("named", ["000000000007.jpg", "000000000007", 7])
def test_cocos_images_are_known_by_their_numbers(tmp_path: Path, evaluate: Any, named: Any) -> None:
    """Of 2014 and of 2017, and by the id where the record's image is a number."""
    own = "COCO_train2014_000000000007.jpg"
    images = [{"id": 7, "file_name": own, "height": 40, "width": 60}]
    said = [(1, own, "it", "red")]
    args = write_set(tmp_path / "set", said, images=images)
    content = json.loads((tmp_path / "set" / "instances.json").read_text())
    for one in (*content["annotations"], *content["expressions"]):
        one["image_id"] = 7
    (tmp_path / "set" / "instances.json").write_text(json.dumps(content))
    run = evaluate(args, [row("red", image=named, expression="it")])
    assert run.code == 0
    assert run.report.figures["miou"].value == 1.0


def test_of_several_instances_the_union_is_scored(tmp_path: Path, evaluate: Any) -> None:
    """As `risam predict --instances` writes them."""
    args = write_set(tmp_path / "set", [(1, "a.png", "both", "red")])
    content = json.loads((tmp_path / "set" / "instances.json").read_text())
    second = {**content["annotations"][0], "id": 200, "segmentation": [box(*BOXES["blue"])]}
    content["annotations"].append(second)
    content["expressions"][0]["ann_ids"] = [100, 200]
    (tmp_path / "set" / "instances.json").write_text(json.dumps(content))
    rows = [
        row(mask, id=1, image="a.png", expression="both", instance=number)
        for number, mask in enumerate(("red", "blue"))
    ]
    run = evaluate(args, rows)
    assert run.code == 0
    assert run.report.figures["miou"].value == 1.0


def test_one_sentence_twice_in_an_image_is_answered_in_turn(tmp_path: Path, evaluate: Any) -> None:
    spoken = [(5, "a.png", "the cup", "red"), (6, "a.png", "the cup", "blue")]
    args = write_set(tmp_path / "set", spoken)
    rows = [row(mask, image="a.png", expression="the cup") for mask in ("red", "blue")]
    run = evaluate(args, rows)
    assert (run.code, ious(run)) == (0, {"5": 1.0, "6": 1.0})
    assert run.report.counts.doubled == 0
    for limit in (1, 2):  # an expression that is not asked for keeps its answer
        run = evaluate([*args, "--limit", str(limit)], rows)
        assert (run.code, run.report.counts.doubled) == (0, 0)
    # One answer is the answer to both: they ask the same.
    assert ious(evaluate(args, rows[:1])) == {"5": 1.0, "6": 0.0}
    path = tmp_path / "set/instances.json"  # nor is it another's where its own cannot be scored
    content = json.loads(path.read_text())
    content["expressions"][0]["ann_ids"] = [999]
    path.write_text(json.dumps(content))
    assert ious(evaluate(args, rows)) == {"6": 1.0}


def test_composed_and_decomposed_names_are_one(tmp_path: Path, evaluate: Any) -> None:
    name = "caf\u00e9.png"
    args = write_set(tmp_path / "set", [(5, name, "it", "red")])
    decomposed = unicodedata.normalize("NFD", name)
    assert decomposed != name
    assert ious(evaluate(args, [row("red", image=decomposed, expression="it")])) == {"5": 1.0}


# --- doubled ids in annotations -------------------------------------------------------------------


def test_two_annotations_of_one_id_fail_their_expressions(tmp_path: Path, evaluate: Any) -> None:
    other = {"id": 100, "image_id": 1, "category_id": 1, "segmentation": [box(*BOXES["third"])]}
    args = write_set(tmp_path / "set", SPOKEN, annotations=[other])
    run = evaluate(args, [row("red", id=5), row("blue", id=6)])
    assert run.code == 3
    assert ious(run) == {"6": 1.0}
    (failure,) = run.rows("failures.jsonl")
    assert "two annotations of" in failure["message"]
    assert "id 100 and differ" in failure["message"]


def test_an_annotation_that_stands_twice_alike_is_one(tmp_path: Path, evaluate: Any) -> None:
    same = {"id": 100, "image_id": 1, "category_id": 1, "segmentation": [box(*BOXES["red"])]}
    args = write_set(tmp_path / "set", SPOKEN, annotations=[{**same, "iscrowd": 0}])
    assert ious(evaluate(args, [row("red", id=5), row("blue", id=6)])) == {"5": 1.0, "6": 1.0}


def test_two_images_of_one_id_are_refused_by_name(tmp_path: Path, evaluate: Any) -> None:
    images = [{"id": 1, "file_name": n, "height": 40, "width": 60} for n in ("a.png", "b.png")]
    args = write_set(tmp_path / "set", [(5, "a.png", "it", "red")], images=images)
    run = evaluate(args, [row("red", id=5)])
    assert run.code == 1
    assert "two images" in run.err
    assert "'a.png' and 'b.png'" in run.err


# --- what export-masks takes, eval takes ----------------------------------------------------------


def source(tmp_path: Path, how: str) -> Path:
    named = [("the red one", "red"), ("the blue one", "blue")]
    rows = [row(m, image="x/a.png", expression=t, score=0.5) for t, m in named]
    text = "".join(json.dumps(one) + "\n" for one in rows)
    path = tmp_path / "r.json"
    if how == "COCO results":
        results = [
            {**row(m, score=0.5), "image_id": 1, "category_id": 1, "caption": t} for t, m in named
        ]
        path.write_text(json.dumps(results))
    elif how == "COCO results of polygons":
        results = [
            {"image_id": "1", "segmentation": [box(*BOXES[m])], "caption": t} for t, m in named
        ]
        path.write_text(json.dumps(results))
    elif how == "array":
        path.write_text(json.dumps(rows, indent=1))
    elif how == "gzip":
        path = tmp_path / "p.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode()))
    elif how == "utf-16":
        path = tmp_path / "p.jsonl"
        path.write_text(text, encoding="utf-16")
    else:
        path = tmp_path / "masks"
        path.mkdir()
        for _, mask in named:
            Image.fromarray(MASKS[mask].astype(np.uint8) * 255).save(path / f"{mask}.png")
        with (path / "manifest.csv").open("w", newline="", encoding=how) as file:
            table = csv.writer(file, delimiter=";")
            table.writerow(["Image", "Expression", "Mask", "Score"])
            table.writerows(["x/a.png", text, f"{mask}.png", 0.5] for text, mask in named)
    return path


@pytest.mark.parametrize(
    "how",
    [
        "COCO results",
        "COCO results of polygons",
        "array",
        "gzip",
        "utf-16",
        "utf-8-sig",
        "utf-16-le",
    ],
)
def test_eval_takes_what_export_masks_takes(how: str, tmp_path: Path, evaluate: Any) -> None:
    args = write_set(tmp_path / "set", SPOKEN)
    if how == "utf-16-le":  # without a mark, that is no text
        assert evaluate(args, source(tmp_path, how)).code == 1
        return
    run = evaluate(args, source(tmp_path, how))
    assert (run.code, ious(run)) == (0, {"5": 1.0, "6": 1.0}), run.err


def test_results_that_name_categories_only_are_refused(tmp_path: Path, evaluate: Any) -> None:
    """As `export-masks --to coco` writes them beside what can be scored."""
    args = write_set(tmp_path / "set", SPOKEN)
    rows = [
        row("red", image="x/a.png", expression="the red one"),
        row("blue", id=6, image="x/a.png"),
    ]
    records = write_records(tmp_path / "p.jsonl", rows)
    assert main(["export-masks", str(records), "--to", "coco", "-o", str(tmp_path / "out")]) == 0
    results = tmp_path / "out" / "results.json"
    run = evaluate(args, results)
    assert run.code == 1
    assert "results.json: its records name a category, not the expression" in run.err
    assert f"give {results.with_name('instances.json')}" in run.err
    assert ious(evaluate(args, results.with_name("instances.json"))) == {"5": 1.0, "6": 1.0}
    alone = tmp_path / "r.json"
    alone.write_bytes(results.read_bytes())
    assert "give each its expression, or the id" in evaluate(args, alone).err


def test_annotations_may_be_packed(tmp_path: Path, evaluate: Any) -> None:
    args = write_set(tmp_path / "set", SPOKEN)
    plain = tmp_path / "set" / "instances.json"
    packed = tmp_path / "packed.json.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes()))
    run = evaluate([*args[:3], str(packed)], [row("red", id=5), row("blue", id=6)])
    assert (run.code, ious(run)) == (0, {"5": 1.0, "6": 1.0}), run.err
    packed.write_bytes(packed.read_bytes()[:-20])
    run = evaluate([*args[:3], str(packed)], [row("red", id=5)])
    assert run.code == 1
    assert "packed.json.gz" in run.err


# --- the rule itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        *(("./a.png", "a.png", True), ("x//a.png", "x/a.png", True), ("x/../a.png", "a.png", True)),
        *(("x\\a.png", "x/a.png", True), ("A.png", "a.png", False), ("/a.png", "a.png", False)),
        *(("../a.png", "a.png", False), ("e\u0301", "\u00e9", True)),
    ],
)
def test_the_rule_for_images(one: str, other: str, same: bool) -> None:
    assert (image_key(one) == image_key(other)) == same


@pytest.mark.parametrize("text", ["7", "\u72d7", "\U0001f415", "C++ ", "+", "\ue000"])
def test_what_has_words(text: str) -> None:
    assert has_words(text)
    assert not has_words("")
    assert not any(
        has_words(text) for text in (" \t", "???", "\u2026", "\u200b\ufeff", "\x00", "(-)")
    )


def test_the_rule_for_ids_and_expressions() -> None:
    assert id_text(7) == id_text(7.0) == id_text("7") == "7"
    assert id_text("07") == "07"
    assert [id_text(odd) for odd in (True, None, "", float("nan"), [1])] == [None] * 5
    ids = ["7", 7.0, 7, "-7", -7, "07", "7.5", 7.5, "-0", -0.0, "0", "+7", " 7", "1" * 30, "x"]
    for one in ids:
        for other in ids:
            assert (id_key(one) == id_key(other)) == (id_text(one) == id_text(other))
    assert expression_key("The  LEFT cup!") == expression_key("the left cup")
    assert expression_key("left cup") != expression_key("right cup")
    assert expression_key("...") != expression_key("?")
