"""Results as other tools write them, through `risam export-masks` and `risam eval`."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.export_cases import SIZE, export, record, shapes, write_image, write_jsonl

from risam_cli.data.readers.cells import stated_size
from risam_cli.data.readers.results import Results
from risam_cli.errors import DataError
from risam_cli.masks import rle as masks

BLOCK = shapes()["block"]
RLE = masks.encode(BLOCK)
AMG = {"segmentation": RLE, "area": 345, "bbox": [7, 5, 23, 15], "predicted_iou": 0.9}


def written(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def exported(tmp_path: Path, source: Path, *args: str | Path) -> dict[str, Any]:
    assert export(source, "--to", "coco", "-o", tmp_path / "out", "--overwrite", *args) == 0
    found: dict[str, Any] = json.loads((tmp_path / "out" / "instances.json").read_text())
    for one in found["annotations"]:
        assert (
            masks.decode(masks.parse_rle(one["segmentation"], size=SIZE, where="")) == BLOCK
        ).all()
    return found


def names(found: dict[str, Any]) -> list[str]:
    return [image["file_name"] for image in found["images"]]


FOLDERS: dict[str, dict[str, Any]] = {
    "SAM's amg.py": {"a.json": [AMG], "b.v2.json": [AMG], "nothing found.json": []},
    "SA-1B": {
        f"sa_{n}.json": {
            "image": {"image_id": n, "height": 48, "width": 64, "file_name": f"sa_{n}.jpg"},
            "annotations": [AMG] * n,
        }
        for n in range(3)
    },
    "one record each": {f"{n}.json": record(f"{n}.png", "x", BLOCK) for n in "ab"},
    "COCO each": {
        f"{n}.json": {
            "images": [{"id": 1, "file_name": f"{n}.png", "height": 48, "width": 64}],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": RLE}],
        }
        for n in "ab"
    },
}


@pytest.mark.parametrize(
    ("kind", "images"),
    [
        ("SAM's amg.py", ["a", "b.v2"]),
        ("SA-1B", ["sa_1.jpg", "sa_2.jpg"]),
        ("one record each", ["a.png", "b.png"]),
        ("COCO each", ["a.png", "b.png"]),
    ],
)
def test_a_folder_of_json_files_is_one_source(tmp_path: Path, kind: str, images: list[str]) -> None:
    for name, content in FOLDERS[kind].items():
        written(tmp_path / "found" / name, content)
    found = exported(tmp_path, tmp_path / "found")
    assert names(found) == images
    assert len(found["annotations"]) == (3 if kind == "SA-1B" else 2)
    last = [*FOLDERS[kind]][1]
    assert len(exported(tmp_path, tmp_path / "found" / last)["annotations"]) == 1


def test_a_folder_of_json_lines_is_one_source(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in "ab":
        write_jsonl(tmp_path / "parts" / f"{name}.jsonl", [record(f"{name}.png", "x", BLOCK)])
    assert names(exported(tmp_path, tmp_path / "parts")) == ["a.png", "b.png"]
    with Results(tmp_path / "parts") as results:
        assert [results.place(n) for n, _, _ in results.rows()] == [
            f"{tmp_path}/parts/{name}.jsonl, result 1" for name in "ab"
        ]


def test_a_file_that_holds_no_results_is_named(tmp_path: Path, capsys: Any) -> None:
    written(tmp_path / "found" / "a.json", [AMG])
    labelme = {"shapes": [], "imagePath": "b.png", "imageHeight": 48, "imageWidth": 64}
    written(tmp_path / "found" / "b.json", labelme)
    assert export(tmp_path / "found", "--to", "coco", "-o", tmp_path / "out") == 1
    assert f"{tmp_path}/found/b.json is not a COCO results file" in capsys.readouterr().err


def _runs(mask: Any) -> list[int]:
    flat = mask.flatten(order="F").astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *ends, flat.size]).tolist()


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [48.0, 64.0], "counts": RLE["counts"]},
        {"counts": RLE["counts"]},
        {"size": [48, 64], "counts": _runs(BLOCK)},
        {"size": [48, 64], "counts": str(RLE["counts"].encode())},
        json.dumps(RLE),
        str({"size": [48, 64], "counts": RLE["counts"].encode()}),
        BLOCK.astype(int).tolist(),
        BLOCK.tolist(),
        [[[7, 5], [30, 5], [30, 20], [7, 20]]],
        [[7, 5], [30, 5], [30, 20], [7, 20]],
        [7, 5, 30, 5, 30, 20, 7, 20],
    ],
)  # fmt: skip
def test_a_mask_in_any_usual_writing_is_that_mask(tmp_path: Path, segmentation: Any) -> None:
    row = {**record("a.png", "x", BLOCK), "segmentation": segmentation}
    assert len(exported(tmp_path, write_jsonl(tmp_path / "p.jsonl", [row]))["annotations"]) == 1


@pytest.mark.parametrize("kind", ["csv", "text", "float"])
def test_instances_stay_together_however_their_numbers_are_written(
    tmp_path: Path, kind: str
) -> None:
    """A table's cells are text, and pandas writes whole numbers beside gaps as 0.0."""
    rows = [record("a.png", "x", BLOCK, id="7", instance=n) for n in (0, 1)]
    if kind == "csv":
        source = tmp_path / "p.csv"
        with source.open("w", newline="") as file:
            table = csv.DictWriter(file, [*rows[0]])
            table.writeheader()
            rows[1]["instance"] = "1.0"
            table.writerows({**row, "segmentation": json.dumps(RLE)} for row in rows)
    else:
        write = str if kind == "text" else float
        numbers = ("instance", "height", "width")
        rows = [row | {key: write(row[key]) for key in numbers} for row in rows]
        source = write_jsonl(tmp_path / "p.jsonl", rows)
    found = exported(tmp_path, source)
    assert [one["instance"] for one in found["annotations"]] == [0, 1]
    assert [one["ann_ids"] for one in found["expressions"]] == [[1, 2]]


@pytest.mark.parametrize("given", [(48, 64), (48.0, 64.0), ("48", "64.0")])
def test_the_size_of_an_image_is_read_however_it_is_written(given: tuple[Any, Any]) -> None:
    assert stated_size({"height": given[0], "width": given[1]}, "here") == (48, 64)


@pytest.mark.parametrize("given", [(48.5, 64), (48, 0), (48, None), ("x", 64), (True, 64)])
def test_a_size_that_is_none_is_named(given: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match=r"^here: 'height' and 'width' are .*pixels above 0"):
        stated_size({"height": given[0], "width": given[1]}, "here")


@pytest.mark.parametrize("to", ["png", "coco"])
def test_instances_that_were_exported_come_back_together(
    tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [record("a.png", "x", BLOCK, id="7", instance=n) for n in (0, 1)]
    assert export(write_jsonl(tmp_path / "p.jsonl", rows), "--to", to, "-o", tmp_path / to) == 0
    found = exported(tmp_path, tmp_path / to)
    assert "left out" not in capsys.readouterr().err
    assert [one["instance"] for one in found["annotations"]] == [0, 1]
    assert [one["ann_ids"] for one in found["expressions"]] == [[1, 2]]


def test_an_instance_that_is_no_number_is_left_out_and_told(tmp_path: Path, capsys: Any) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [record("a.png", "x", BLOCK, instance="left")])
    assert "instance" not in exported(tmp_path, source)["annotations"][0]
    assert "1 records have an instance that is not a whole number" in capsys.readouterr().err


def test_an_rle_may_stand_under_mask(tmp_path: Path) -> None:
    row = record("a.png", "x", BLOCK)
    row["mask"] = row.pop("segmentation")
    assert len(exported(tmp_path, write_jsonl(tmp_path / "p.jsonl", [row]))["annotations"]) == 1


def test_polygons_in_shares_of_the_image_are_refused(tmp_path: Path) -> None:
    row = {**record("a.png", "x", BLOCK), "segmentation": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]}
    source = write_jsonl(tmp_path / "p.jsonl", [row])
    assert export(source, "--to", "coco", "-o", tmp_path / "out") == 3
    (failure,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert "coordinates are all from 0 to 1; give them in pixels" in failure


def test_ids_that_name_nothing_are_told(tmp_path: Path, capsys: Any) -> None:
    """As Detectron2 writes them: image ids, and categories counted from 0."""
    rows = [
        {"image_id": n, "category_id": n - 1, "segmentation": RLE, "score": 0.5} for n in (1, 2)
    ]
    source = written(tmp_path / "coco_instances_results.json", rows)
    exported(tmp_path, source)
    assert "2 results name their image only by an id, which is taken" in capsys.readouterr().err
    images = [{"id": n, "file_name": f"{n}.png", "height": 48, "width": 64} for n in (1, 2)]
    file = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    exported(tmp_path, source, "--annotations", written(tmp_path / "coco.json", file))
    said = capsys.readouterr().err
    assert "1 results have a category_id that the COCO file does not list (the first: 0" in said


def test_lvis_images_are_named_by_their_address(tmp_path: Path) -> None:
    image = {"id": 1, "height": 48, "width": 64}
    image["coco_url"] = "http://images.cocodataset.org/val2017/000000000139.jpg"
    rows = [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": RLE}]
    file = {"images": [image], "categories": [{"id": 1, "name": "cat"}], "annotations": rows}
    found = exported(tmp_path, written(tmp_path / "lvis.json", file))
    assert names(found) == ["val2017/000000000139.jpg"]


@pytest.mark.parametrize("kind", ["pickle", "zip", "numpy", "png"])
def test_binary_results_are_refused_and_not_run(tmp_path: Path, capsys: Any, kind: str) -> None:
    path = tmp_path / f"results.{kind}"
    if kind == "pickle":
        path.write_bytes(pickle.dumps([{"image_id": 1}]))
    elif kind == "png":
        write_image(path.with_suffix(".png"))
        path = path.with_suffix(".png")
    else:
        with open(path, "wb") as file:
            (np.save if kind == "numpy" else np.savez)(file, BLOCK)
    assert export(path, "--to", "coco", "-o", tmp_path / "out") == 1
    assert "is a binary file, which is neither run nor read" in capsys.readouterr().err


def test_a_list_without_a_usable_record_says_why(tmp_path: Path, capsys: Any) -> None:
    """As Label Studio exports its tasks."""
    tasks = [{"id": 1, "data": {"image": "a.png"}, "annotations": [{"result": []}]}]
    assert (
        export(written(tmp_path / "tasks.json", tasks), "--to", "coco", "-o", tmp_path / "o") == 1
    )
    said = capsys.readouterr().err
    assert "holds no record that can be read" in said
    assert "result 0: 'image' is None" in said


def test_mask_files_are_found_by_any_spelling_of_their_name(tmp_path: Path) -> None:
    """As a list from Windows or macOS names them."""
    (tmp_path / "in" / "masks").mkdir(parents=True)
    for name in ("masks/1.png", "masks/caf\u00e9.png", "2.png"):
        Image.fromarray(BLOCK).save(tmp_path / "in" / name)
    Image.fromarray(BLOCK).save(tmp_path / "2.png")
    rows = [
        {"image": "a.png", "expression": name, "mask": name}
        for name in ("masks\\1.png", "masks/cafe\u0301.png", "..\\2.png")
    ]
    source = write_jsonl(tmp_path / "in" / "manifest.jsonl", rows)
    assert len(exported(tmp_path, source)["annotations"]) == 3
    assert export(source, "--to", "coco", "-o", tmp_path / "out2", "--confine") == 3
    (failure,) = (tmp_path / "out2" / "failures.jsonl").read_text().splitlines()
    assert "to which files are confined" in failure


def test_a_tables_words_must_be_utf_8_and_its_names_of_files_need_not(tmp_path: Path) -> None:
    Image.fromarray(BLOCK).save(tmp_path / "m.png")
    rows = ["image,expression,mask", "a.png,le carr\u00e9,m.png", "\u00e9.png,the square,m.png"]
    source = tmp_path / "p.csv"
    source.write_text("\n".join(rows), encoding="latin-1")
    assert export(source, "--to", "coco", "-o", tmp_path / "out") == 3
    (failure,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert "line 2: the expression is not UTF-8" in failure
    found = json.loads((tmp_path / "out" / "instances.json").read_text())
    assert [one["expression"] for one in found["annotations"]] == ["the square"]


def test_confined_results_read_no_file_elsewhere(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "a.png")
    write_image(tmp_path / "b.png")
    mask = tmp_path / "in" / "m.png"
    write_image(mask)
    (tmp_path / "m.png").write_bytes(mask.read_bytes())
    rows = [
        record("a.png", "x", BLOCK),
        record("../b.png", "y", BLOCK),
        {"image": "a.png", "expression": "m", "mask": "m.png"},
        {"image": "a.png", "expression": "z", "mask": "../m.png"},
        {"image": "a.png", "expression": "w", "mask": str(tmp_path / "m.png")},
    ]
    source = write_jsonl(tmp_path / "in" / "p.jsonl", rows)
    call = [source, "--to", "overlay", "--image-root", tmp_path / "in"]
    assert export(*call, "-o", tmp_path / "open") == 0
    assert export(*call, "-o", tmp_path / "out", "--confine") == 3
    failed = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert len(failed) == 3
    assert all("to which files are confined" in line for line in failed)


def test_a_coco_file_keeps_its_annotations_and_tells_of_expressions_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "a.png")
    shape = {"image_id": 1, "category_id": 1, "segmentation": RLE}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {**shape, "id": 7},
            {**shape, "id": 9, "expressions": ["cup one", "cup two"]},
        ],
        "expressions": [
            {"id": 1, "image_id": 1, "ann_ids": [7], "text": "the first"},
            {"id": 2, "image_id": 1, "ann_ids": [7], "text": "it again"},
            {"id": 3, "image_id": 1, "ann_ids": [7, 9], "text": "both"},
            {"id": 4, "image_id": 1, "ann_ids": [], "text": "none"},
        ],
    }
    source = tmp_path / "c.json"
    source.write_text(json.dumps(content))
    found = exported(tmp_path, source)["annotations"]
    assert [(one["id"], one["expression"]) for one in found] == [(7, "the first"), (9, "cup one")]
    assert "3 expressions of the COCO file are left out" in capsys.readouterr().err
