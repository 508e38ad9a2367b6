"""Exports as other tools find them, and results of other tools as sources."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
import pytest
import supervision as sv
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support.export_cases import (
    SIZE,
    export,
    failures,
    record,
    shapes,
    write_image,
    write_jsonl,
)

from risam_cli.export.registry import formats
from risam_cli.masks import rle as masks

SHAPES = shapes()
BLOCK, RING = SHAPES["block"], SHAPES["ring"]


def instances(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
    return found


def ultralytics_label(image: Path) -> Path:
    """Where Ultralytics looks for an image's labels: the last /images/ becomes /labels/."""
    before, _, after = str(image).rpartition("/images/")
    return Path(f"{before}/labels/{after}").with_suffix(".txt")


@pytest.mark.parametrize("to", [kind for kind in formats() if kind != "webdataset"])
def test_no_target_counts_whatever_mask_is_beside_it(to, tmp_path, monkeypatch, capsys):
    """As in types.Prediction, and as `risam eval` scores it: the mask is then empty."""
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.png")
    written = []
    for mask in (BLOCK, np.zeros_like(BLOCK)):
        rows = [record("a.png", "ring", RING), record("a.png", "dog", mask, no_target=True)]
        out = tmp_path / "out"
        assert export(write_jsonl(tmp_path / "p.jsonl", rows), "--to", to, "-o", out) == 0
        told = capsys.readouterr().err
        assert ("although no_target is true" in told) == bool(mask.any())
        files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        written.append({k: v for k, v in files.items() if k.name != "export.json"})
        shutil.rmtree(out)
    assert written[0] == written[1]


# --- YOLO -----------------------------------------------------------------------------------------

LAYOUTS = [
    ("images/x.png", "images/y.png"),
    ("sample_data/images/x.png", "sample_data/images/deep/y.png"),
    ("set/images/train/x.png", "set/images/val/x.png"),
    ("a/images/x.png", "b/images/x.png"),
    ("images/images/x.png", "images/x.png"),
    ("x.png", "deep/y.png"),
    ("images.png", "images/images.png"),
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_ultralytics_finds_every_label_beside_the_copied_images(tmp_path, names):
    for k, name in enumerate(names):
        write_image(tmp_path / "in" / name, seed=k)
    rows = [record(name, "thing", (BLOCK, RING)[k]) for k, name in enumerate(names)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out"
    options = ["--copy-images", "--image-root", tmp_path / "in"]
    assert export(source, "--to", "yolo", "-o", out, *options) == 0
    copied = sorted(path for path in (out / "images").rglob("*") if path.is_file())
    assert len(copied) == len(names)
    for path in copied:
        assert ultralytics_label(path).is_file(), path
    rows = [json.loads(line) for line in (out / "mapping.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == list(names)
    for row in rows:
        assert ultralytics_label(out / row["copy"]) == out / row["label"]
        same = (tmp_path / "in" / row["image"]).read_bytes() == (out / row["copy"]).read_bytes()
        assert same


@pytest.mark.parametrize("names", LAYOUTS[:3])
def test_labels_in_place_lie_where_ultralytics_looks_in_the_users_own_set(tmp_path, names):
    rows = [record(name, "thing", BLOCK) for name in names]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    common = PurePosixPath(names[0].partition("images/")[0])
    assert export(source, "--to", "yolo", "-o", tmp_path / "in" / common) == 0
    for name in names:
        assert ultralytics_label(tmp_path / "in" / name).is_file()


def test_supervision_reads_what_lay_under_images(tmp_path):
    for k, name in enumerate(("sample_data/images/x.png", "sample_data/images/y.png")):
        write_image(tmp_path / name, seed=k)
    rows = [record(f"sample_data/images/{n}.png", "thing", BLOCK) for n in "xy"]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out"
    assert export(source, "--to", "yolo", "-o", out, "--copy-images", "--image-root", tmp_path) == 0
    data = sv.DetectionDataset.from_yolo(
        str(out / "images"), str(out / "labels"), str(out / "data.yaml"), force_masks=True
    )
    assert len(data) == 2
    for _, _, found in data:
        assert np.array_equal(found.mask[0], BLOCK)


ODD = ["a.jpg", "a.png", "B.jpg", "b.jpg", "what?.jpg", "c:d.jpg", f"{'n' * 200}.jpg", "end .jpg"]


def test_labels_that_cannot_be_called_as_their_image_are_told_and_mapped(tmp_path, capsys):
    source = write_jsonl(tmp_path / "p.jsonl", [record(name, "thing", BLOCK) for name in ODD])
    out = tmp_path / "out"
    assert export(source, "--to", "yolo", "-o", out) == 0
    told = capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "mapping.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ODD
    renamed = [
        row for row in rows if row["label"] != f"labels/{row['image'].removesuffix('.jpg')}.txt"
    ]
    renamed = [row for row in renamed if row["label"] != "labels/a.txt"]
    assert f"{len(renamed)} labels are not named like their image" in told
    assert all((out / row["label"]).is_file() for row in rows)
    assert len({row["label"] for row in rows}) == len(ODD)


# --- categories -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "csv", "yaml"])
def test_a_map_decides_class_numbers_whatever_the_order_of_records(tmp_path, form):
    table = tmp_path / f"map.{form}"
    if form == "json":
        table.write_text(json.dumps({"the dog": "dog", "a cat": "cat", "the bird": "bird"}))
    elif form == "csv":
        table.write_text("Expression;Category\nthe dog;dog\na cat;cat\nthe bird;bird\n")
    else:
        table.write_text("the dog: dog\na cat: cat\nthe bird: bird\n")
    found = []
    for k, order in enumerate((["a cat", "the dog"], ["the dog", "a cat"], ["a cat"])):
        rows = [record(f"{text}.jpg", text, BLOCK) for text in order]
        source = write_jsonl(tmp_path / f"{k}.jsonl", rows)
        for to in (["yolo"], ["coco"], ["png", "--style", "semantic"]):
            out = tmp_path / f"{k}-{to[0]}"
            assert export(source, "--to", *to, "-o", out, "--category-map", table) == 0
        names = yaml.safe_load((tmp_path / f"{k}-yolo/data.yaml").read_text())["names"]
        coco = {c["name"]: c["id"] for c in instances(tmp_path / f"{k}-coco")["categories"]}
        label = (tmp_path / f"{k}-yolo/labels/a cat.txt").read_text().split()[0]
        value = cv2.imread(str(tmp_path / f"{k}-png/masks/a cat.png"), cv2.IMREAD_UNCHANGED)
        legend = json.loads((tmp_path / f"{k}-png/categories.json").read_text())
        values = {row["name"]: row["value"] for row in legend}
        found.append((names, coco, label, values))
        with Image.open(tmp_path / f"{k}-png/masks/a cat.png") as image:
            assert np.unique(np.asarray(image)).tolist() == [0, 2]
        assert value is not None
    assert found[0] == found[1] == found[2]
    assert found[0][0] == {0: "dog", 1: "cat", 2: "bird"}
    assert found[0][1] == {"dog": 1, "cat": 2, "bird": 3}
    assert found[0][2] == "1"


def test_a_maps_own_numbers_decide(tmp_path):
    table = tmp_path / "map.json"
    dog, cat = {"name": "dog", "number": 3}, {"name": "cat", "number": 1}
    table.write_text(json.dumps({"the dog": dog, "a cat": cat}))
    source = write_jsonl(tmp_path / "p.jsonl", [record("a.jpg", "the dog", BLOCK)])
    for to in (["yolo"], ["coco"], ["png", "--style", "semantic"]):
        assert export(source, "--to", *to, "-o", tmp_path / to[0], "--category-map", table) == 0
    names = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"]
    assert (names[3], names[1], list(names)) == ("dog", "cat", [0, 1, 2, 3])
    assert (tmp_path / "yolo/labels/a.txt").read_text().startswith("3 ")
    assert instances(tmp_path / "coco")["annotations"][0]["category_id"] == 3
    with Image.open(tmp_path / "png/masks/a.png") as image:
        assert np.unique(np.asarray(image)).tolist() == [0, 3]
    table.write_text(json.dumps({"the dog": dog, "a cat": {**cat, "number": 3}}))
    assert export(source, "--to", "coco", "-o", tmp_path / "no", "--category-map", table) == 1


@pytest.mark.parametrize("to", ["coco", "coco-polygons", "yolo", "labelme", "cvat"])
def test_a_record_with_an_id_only_has_a_class_with_a_name(tmp_path, to, capsys):
    row = record("a.jpg", "", BLOCK, id="7")
    del row["expression"]
    source = write_jsonl(tmp_path / "p.jsonl", [row])
    assert export(source, "--to", to, "-o", tmp_path / "out") == 0
    assert "1 records have no expression; their class is 'object'" in capsys.readouterr().err
    written = {
        "coco": "instances.json",
        "coco-polygons": "instances.json",
        "yolo": "data.yaml",
        "labelme": "labelme/a.json",
        "cvat": "annotations.xml",
    }
    assert "object" in (tmp_path / "out" / written[to]).read_text()


@pytest.mark.parametrize("to", ["coco-polygons", "labelme", "cvat", "yolo"])
@pytest.mark.parametrize("vertices", ["edge", "center"])
def test_polygons_are_measured_by_the_reader_that_they_are_for(tmp_path, to, vertices, capsys):
    source = write_jsonl(tmp_path / "p.jsonl", [record("a.jpg", n, m) for n, m in SHAPES.items()])
    assert export(source, "--to", to, "--vertices", vertices, "-o", tmp_path / "out") == 0
    assert "mean IoU 1.0000" in capsys.readouterr().err


# --- COCO results and their ids -------------------------------------------------------------------

TABLE = {
    "images": [
        {"id": 42, "file_name": "x/a.jpg", "height": 48, "width": 64, "license": 3},
        {"id": 7, "file_name": "b.jpg", "height": 48, "width": 64},
        {"id": 99, "file_name": "none.jpg", "height": 48, "width": 64},
    ],
    "annotations": [],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "cup"}],
}


def truth(tmp_path: Path) -> Path:
    table = dict(TABLE)
    table["annotations"] = [
        {
            "id": k + 1,
            "image_id": image,
            "category_id": category,
            "iscrowd": 0,
            "segmentation": masks.encode(mask),
            "area": int(mask.sum()),
            "bbox": list(masks.bbox(masks.encode(mask))),
        }
        for k, (image, category, mask) in enumerate([(42, 18, BLOCK), (7, 3, RING), (7, 90, BLOCK)])
    ]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(table))
    return path


def average_precision(truth: Path, results: Path) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        score = COCOeval(coco, coco.loadRes(str(results)), "segm")
        score.evaluate()
        score.accumulate()
        score.summarize()
    return float(score.stats[0])


def test_coco_results_keep_their_ids_and_their_score(tmp_path):
    path = truth(tmp_path)
    results = [
        {key: one[key] for key in ("image_id", "category_id", "segmentation")} | {"score": 0.9}
        for one in json.loads(path.read_text())["annotations"]
    ]
    given = tmp_path / "r.json"
    given.write_text(json.dumps(results))
    assert average_precision(path, given) == pytest.approx(1)
    for to in ("coco", "coco-polygons"):
        out = tmp_path / to
        assert export(given, "--to", to, "-o", out, "--annotations", path) == 0
        found = instances(out)
        by_id = {image["id"]: image for image in found["images"]}
        assert by_id == {image["id"]: image for image in TABLE["images"]}
        assert found["categories"] == TABLE["categories"]
    assert average_precision(path, tmp_path / "coco/results.json") == pytest.approx(1)
    # Its own instances.json and results.json belong together, too.
    own = tmp_path / "coco/instances.json"
    assert average_precision(own, tmp_path / "coco/results.json") == pytest.approx(1)


@pytest.mark.parametrize("to", ["coco", "coco-polygons"])
def test_records_that_name_images_of_a_coco_file_are_of_those(tmp_path, to):
    """By name, without an id; an image that the file does not list gets an id that none has."""
    rows = [record(name, "dog", BLOCK) for name in ("new.jpg", "b.jpg", "./x/a.jpg")]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out"
    assert export(source, "--to", to, "-o", out, "--annotations", truth(tmp_path)) == 0
    found = instances(out)
    by_id = {image["id"]: image for image in found["images"]}
    assert len(by_id) == len(found["images"]) == 4
    assert [by_id.pop(image["id"]) for image in TABLE["images"]] == TABLE["images"]
    assert [image["file_name"] for image in by_id.values()] == ["new.jpg"]
    assert [a["image_id"] for a in found["annotations"]] == [*by_id, 7, 42]


@pytest.mark.parametrize("to", ["coco", "coco-polygons"])
def test_the_images_of_a_coco_file_are_copied_and_named_as_others(tmp_path, to):
    for seed, image in enumerate(TABLE["images"]):
        write_image(tmp_path / image["file_name"], seed=seed)
    path = truth(tmp_path)
    call = [path, "--to", to, "--image-root", tmp_path]
    assert export(*call, "-o", tmp_path / "base", "--names", "base") == 0
    names = {image["id"]: image["file_name"] for image in instances(tmp_path / "base")["images"]}
    assert names == {42: "a.jpg", 7: "b.jpg", 99: "none.jpg"}
    out = tmp_path / "out"
    assert export(*call, "-o", out, "--copy-images") == 0
    assert instances(out)["images"] == TABLE["images"]
    for image in TABLE["images"]:  # that without a record, too
        name = image["file_name"]
        assert (out / "images" / name).read_bytes() == (tmp_path / name).read_bytes()
    (tmp_path / "none.jpg").unlink()
    (tmp_path / "x/a.jpg").rename(tmp_path / "b.png")
    table = json.loads(path.read_text())
    table["images"][0]["file_name"] = "b.png"
    path.write_text(json.dumps(table))
    assert export(*call, "-o", out, "--copy-images", "--overwrite") == 3
    assert [row["image"] for row in failures(out)] == ["none.jpg"]
    found = instances(out)["images"]
    assert [image["id"] for image in found] == [42, 7]
    for image in found:  # b.png and b.jpg would meet
        assert image["file_name"] not in {"b.png", "b.jpg"}
        assert (out / "images" / image["file_name"]).is_file()


def test_annotations_of_a_coco_file_keep_their_ids_and_may_be_named_by_text_or_float(tmp_path):
    table = json.loads(truth(tmp_path).read_text())
    for annotation, odd in zip(table["annotations"], ("42", 7.0, 7), strict=True):
        annotation |= {"image_id": odd, "id": annotation["id"] * 1000}
    table["annotations"][1]["iscrowd"] = 1
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(table))
    assert export(path, "--to", "coco", "-o", tmp_path / "out") == 0
    assert [a["id"] for a in instances(tmp_path / "out")["annotations"]] == [1000, 2000, 3000]
    assert [a["image_id"] for a in instances(tmp_path / "out")["annotations"]] == [42, 7, 7]
    assert [a["iscrowd"] for a in instances(tmp_path / "out")["annotations"]] == [0, 1, 0]


@pytest.mark.parametrize("to", ["coco", "png"])
def test_records_without_ids_come_back(to, tmp_path):
    rows = [record("a.png", "ring", RING), record("a.png", "dog", np.zeros_like(RING))]
    bare = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    assert (
        export(write_jsonl(tmp_path / "p.jsonl", bare), "--to", "coco", "-o", tmp_path / "1") == 0
    )
    for source, target, kind in (("1", "2", to), ("2", "3", "coco")):
        assert export(tmp_path / source, "--to", kind, "-o", tmp_path / target) == 0
    first, last = instances(tmp_path / "1"), instances(tmp_path / "3")
    assert {one["record_id"] for one in first["expressions"]} == {""}
    assert last == first


def test_what_is_wrong_with_a_result_is_said_with_its_place(tmp_path):
    box = {"image_id": 42, "category_id": 18, "bbox": [1, 1, 5, 5], "score": 1}
    bad = {
        "an empty list; a box alone has no mask": {"segmentation": []},
        "no polygon has three points": {"segmentation": [[1, 2, 3, 4]]},
        "7 coordinates": {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]},
        "not a finite number": {"segmentation": [[1, 2, 3, 4, 5, float("nan")]]},
        "a record without a mask": {},
        "the image_id 4711 is not among the 3 images": {"image_id": 4711, "segmentation": []},
        "[width, height]": {"segmentation": masks.encode(BLOCK.T)},
    }
    good = {**box, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    flat = {**box, "segmentation": [1, 1, 9, 1, 9, 9], "score": 7}
    path = tmp_path / "r.json"
    path.write_text(json.dumps([good, *({**box, **change} for change in bad.values()), flat]))
    out = tmp_path / "out"
    assert export(path, "--to", "coco", "-o", out, "--annotations", truth(tmp_path)) == 3
    messages = sorted(row["message"] for row in failures(out))
    assert len(messages) == len(bad)
    for number, words in enumerate(bad, start=1):
        (found,) = [text for text in messages if words in text]
        assert f"r.json, result {number}" in found
    assert len(instances(out)["annotations"]) == 2


def test_polygons_without_a_known_size_say_so(tmp_path):
    row = {"image": "a.jpg", "expression": "x", "segmentation": [[1, 1, 9, 1, 9, 9]]}
    source = write_jsonl(tmp_path / "p.jsonl", [row, {**row, "height": 48, "width": 64}])
    assert export(source, "--to", "coco", "-o", tmp_path / "out") == 3
    (failure,) = failures(tmp_path / "out")
    assert "polygons, but the image's height and width are not known" in failure["message"]


def test_sams_own_output_has_an_image_and_keeps_its_masks(tmp_path, capsys):
    found = [
        {"segmentation": masks.encode(mask), "area": int(mask.sum()), "predicted_iou": iou}
        for mask, iou in ((BLOCK, 0.98), (RING, 1.004))
    ]
    (tmp_path / "dog.json").write_text(json.dumps(found))
    assert export(tmp_path / "dog.json", "--to", "coco", "-o", tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "1 records have a score that is not a number in 0..1; it is left out" in told
    assert [i["file_name"] for i in instances(tmp_path / "out")["images"]] == ["dog"]
    assert len(instances(tmp_path / "out")["annotations"]) == 2


def test_a_turned_size_is_noticed_by_the_image(tmp_path):
    write_image(tmp_path / "a.png")  # 48 rows, 64 columns
    turned = {"size": [64, 48], "counts": masks.encode(BLOCK)["counts"]}
    row = {"image": "a.png", "expression": "x", "segmentation": turned}
    source = write_jsonl(tmp_path / "p.jsonl", [row])
    out = tmp_path / "out"
    assert export(source, "--to", "coco", "-o", out, "--image-root", tmp_path) == 3
    (failure,) = failures(out)
    assert "the RLE's size is [width, height]; COCO has [height, width]" in failure["message"]


# --- wrappings ------------------------------------------------------------------------------------


def wrapped(tmp_path: Path, how: str) -> Path:
    rows = [record("a.jpg", "the block", BLOCK), record("b.jpg", "the ring", RING)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / ("p.jsonl.gz" if how == "gzip" else "p.jsonl")
    if how == "gzip":
        path.write_bytes(gzip.compress(text.encode()))
    elif how == "mark":
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif how == "utf-16":
        path.write_text(text, encoding="utf-16")
    elif how == "array":
        path = tmp_path / "p.json"
        path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    elif how == "csv":
        path = tmp_path / "p.csv"
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter=";")
            table.writerow([" ID", "Image", "Expression ", "segmentation", "Score", "no target"])
            for row in rows:
                rle = str(row["segmentation"])  # as pandas writes it: a dict of Python
                table.writerow([row["id"], row["image"], row["expression"], rle, "0.75", "False"])
    return path


@pytest.mark.parametrize("how", ["gzip", "mark", "utf-16", "array", "csv"])
def test_records_come_in_every_wrapping(tmp_path, how):
    path = wrapped(tmp_path, how)
    assert export(path, "--to", "coco", "-o", tmp_path / "out") == 0
    found = {a["expression"]: a for a in instances(tmp_path / "out")["annotations"]}
    for name, mask in (("the block", BLOCK), ("the ring", RING)):
        assert np.array_equal(masks.decode(found[name]["segmentation"]), mask)
        assert found[name]["score"] == 0.75


def test_two_spellings_of_one_image_are_one_image(tmp_path):
    names = ["d/a.jpg", "./d/a.jpg", "d//a.jpg", "d\\a.jpg", "d/../d/a.jpg"]
    rows = [record(name, f"thing {k}", BLOCK) for k, name in enumerate(names)]
    rows += [record("caf\u00e9.jpg", "one", BLOCK), record("cafe\u0301.jpg", "two", RING)]
    assert (
        export(write_jsonl(tmp_path / "p.jsonl", rows), "--to", "coco", "-o", tmp_path / "o") == 0
    )
    found = instances(tmp_path / "o")
    assert [image["file_name"] for image in found["images"]] == ["d/a.jpg", "caf\u00e9.jpg"]


# --- mask files -----------------------------------------------------------------------------------


def mask_file(tmp_path: Path, kind: str) -> Path:
    """A file of RING."""
    gray = RING.astype(np.uint8) * 255
    path = tmp_path / f"m.{'jpg' if kind == 'jpeg' else 'png'}"
    if kind == "jpeg":
        Image.fromarray(gray).save(path, quality=60)
        assert (np.asarray(Image.open(path)) != 0).sum() > RING.sum()
    elif kind == "palette":
        image = Image.fromarray(RING.astype(np.uint8)).convert("P")
        image.putpalette([255, 255, 255, 0, 0, 0])  # white is 0, the background
        image.save(path)
    elif kind == "alpha":
        Image.fromarray(np.dstack([np.full_like(gray, 0)] * 3 + [gray])).save(path)
    elif kind == "white alpha":
        Image.fromarray(np.dstack([np.full_like(gray, 255)] * 3 + [gray])).save(path)
    elif kind == "soft":
        Image.fromarray(cv2.GaussianBlur(gray, (3, 3), 0)).save(path)
    elif kind == "ones":
        Image.fromarray(RING.astype(np.uint8)).save(path)
    elif kind == "bilevel":
        Image.fromarray(RING).save(path)
    elif kind == "16 bit":
        Image.fromarray(RING.astype(np.uint16) * 65535).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "doubt"),
    [
        *(("jpeg", ""), ("palette", "index 0 was taken for background"), ("alpha", "")),
        *(("white alpha", ""), ("soft", "gray levels between"), ("ones", "")),
        *(("bilevel", ""), ("16 bit", "")),
    ],
)
def test_mask_files_are_judged_by_what_is_in_them(tmp_path, kind, doubt, capsys):
    path = mask_file(tmp_path, kind)
    row = {"image": "a.jpg", "expression": "ring", "mask": path.name}
    write_jsonl(tmp_path / "manifest.jsonl", [row])
    assert export(tmp_path, "--to", "coco", "-o", tmp_path / "out") == 0
    (found,) = instances(tmp_path / "out")["annotations"]
    mask = masks.decode(found["segmentation"])
    if kind == "jpeg":
        assert (mask != RING).sum() < 0.03 * RING.sum()
    elif kind == "soft":
        assert (mask != RING).sum() < 0.06 * RING.sum()
    else:
        assert np.array_equal(mask, RING)
    told = capsys.readouterr().err
    assert (doubt in told) if doubt else ("mask files" not in told)
    assert mask.shape == SIZE
