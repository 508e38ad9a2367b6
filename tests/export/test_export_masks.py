"""``risam export-masks``: what goes in, what is refused, what happens when things go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc

import cv2
import numpy as np
import pytest
import yaml
from pycocotools import mask as coco_mask
from support.export_cases import SIZE, export, failures, record, shapes, write_image, write_jsonl
from support.paths import REPO

from risam_cli.commands import export_masks
from risam_cli.data.images.images import open_rgb
from risam_cli.data.inputs.inputs import Inputs
from risam_cli.errors import OutputError
from risam_cli.export import webdataset_tars
from risam_cli.export.folder import ExportFolder
from risam_cli.export.registry import formats
from risam_cli.export.sources import Source
from risam_cli.export.targets import meeting_key, target_name
from risam_cli.masks import rle as masks

SHAPES = shapes()
BLOCK, RING = SHAPES["block"], SHAPES["ring"]
EMPTY = np.zeros(SIZE, np.bool_)


@pytest.fixture
def source(tmp_path):
    rows = [record("d/a.jpg", "the block", BLOCK), record("d/a.jpg", "the ring", RING)]
    rows.append(record("b.jpg", "the ring", RING))
    return write_jsonl(tmp_path / "predictions.jsonl", rows)


def instances(folder):
    return json.loads((folder / "instances.json").read_text(encoding="utf-8"))


def test_every_format_is_offered():
    assert tuple(formats()) == export_masks.FORMATS


# --- sources --------------------------------------------------------------------------------------


def test_a_folder_a_file_and_stdin_give_the_same(source, tmp_path, cli):
    assert export(source, "--to", "coco", "-o", tmp_path / "1") == 0
    assert export(source.parent, "--to", "coco", "-o", tmp_path / "2") == 0
    done = cli("export-masks", "-", "--to", "coco", "-o", tmp_path / "3", input=source.read_text())
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    first = (tmp_path / "1" / "instances.json").read_bytes()
    assert first == (tmp_path / "2" / "instances.json").read_bytes()
    assert first == (tmp_path / "3" / "instances.json").read_bytes()


def test_scattered_records_of_an_image_come_together(tmp_path):
    rows = [record(f"{k % 3}.jpg", f"{k}", BLOCK) for k in range(9)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    with Source(source, pytest.fail) as opened:
        assert (len(opened), opened.images) == (9, 3)
        groups = [
            (g.image, [one.prediction.expression for one in g.records]) for g in opened.groups()
        ]
    assert groups == [("0.jpg", list("036")), ("1.jpg", list("147")), ("2.jpg", list("258"))]
    assert export(source, "--to", "yolo", "-o", tmp_path / "out") == 0
    assert len((tmp_path / "out" / "labels" / "0.txt").read_text().splitlines()) == 3


def test_coco_results_with_and_without_names(tmp_path):
    results = [
        {"image_id": 7, "category_id": 3, "segmentation": masks.encode(BLOCK), "score": 0.5},
        {"image_id": 9, "category_id": 3, "segmentation": masks.encode(RING), "score": 0.25},
    ]
    (tmp_path / "r.json").write_text(json.dumps(results, indent=2))
    assert export(tmp_path / "r.json", "--to", "coco", "-o", tmp_path / "plain") == 0
    plain = instances(tmp_path / "plain")
    assert [i["file_name"] for i in plain["images"]] == ["7", "9"]
    assert [c["name"] for c in plain["categories"]] == ["category 3"]
    table = {
        "images": [{"id": k, "file_name": f"x/{k}.jpg", "height": 48, "width": 64} for k in (7, 9)],
        "categories": [{"id": 3, "name": "dog"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(table))
    named = tmp_path / "named"
    options = ["--annotations", tmp_path / "a.json"]
    assert export(tmp_path / "r.json", "--to", "coco", "-o", named, *options) == 0
    found = instances(named)
    assert [i["file_name"] for i in found["images"]] == ["x/7.jpg", "x/9.jpg"]
    assert [c["name"] for c in found["categories"]] == ["dog"]
    assert [a["score"] for a in found["annotations"]] == [0.5, 0.25]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_a_folder_of_png_masks_with_a_manifest(tmp_path, kind):
    rows = [("a.jpg", 'the "block", big', "m/1.png"), ("a.jpg", "the ring", "m/2.png")]
    (tmp_path / "m").mkdir()
    cv2.imwrite(str(tmp_path / "m" / "1.png"), BLOCK.astype(np.uint8) * 255)
    colored = np.zeros((*SIZE, 4), np.uint8)
    colored[RING, 1] = 7
    colored[..., 3] = 255
    cv2.imwrite(str(tmp_path / "m" / "2.png"), colored)
    manifest = tmp_path / f"manifest.{kind}"
    if kind == "jsonl":
        write_jsonl(
            manifest, [dict(zip(("image", "expression", "mask"), r, strict=True)) for r in rows]
        )
    else:
        tab = "\t" if kind == "tsv" else ","
        quoted = [tab.join('"' + v.replace('"', '""') + '"' for v in row) for row in rows]
        manifest.write_text("\n".join([tab.join(("image", "expression", "mask")), *quoted]))
    assert export(tmp_path, "--to", "coco", "-o", tmp_path / "out") == 0
    found = {a["expression"]: a["segmentation"] for a in instances(tmp_path / "out")["annotations"]}
    assert np.array_equal(masks.decode(found['the "block", big']), BLOCK)
    assert np.array_equal(masks.decode(found["the ring"]), RING)


def test_exported_pngs_are_a_source_again(source, tmp_path):
    assert export(source, "--to", "png", "-o", tmp_path / "png") == 0
    assert export(tmp_path / "png", "--to", "coco", "-o", tmp_path / "again") == 0
    assert export(source, "--to", "coco", "-o", tmp_path / "first") == 0
    assert instances(tmp_path / "again") == instances(tmp_path / "first")


# --- choices --------------------------------------------------------------------------------------


def test_categories_by_expression_map_and_one_class(source, tmp_path):
    assert export(source, "--to", "yolo", "-o", tmp_path / "1") == 0
    data = yaml.safe_load((tmp_path / "1" / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == {0: "the block", 1: "the ring"}
    table = tmp_path / "map.yaml"
    table.write_text('the ring: round\n"*": other\n')
    options = ["--category-map", table]
    assert export(source, "--to", "yolo", "-o", tmp_path / "2", *options) == 0
    data = yaml.safe_load((tmp_path / "2" / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == {0: "round", 1: "other"}
    assert export(source, "--to", "yolo", "-o", tmp_path / "3", "--one-class", "thing") == 0
    label = (tmp_path / "3" / "labels" / "d" / "a.txt").read_text()
    assert [line.split()[0] for line in label.splitlines()] == ["0", "0"]


def test_an_expression_without_category_fails_alone(source, tmp_path, capsys):
    table = tmp_path / "map.csv"
    table.write_text("expression,category\nthe ring,round\n")
    out = tmp_path / "out"
    assert export(source, "--to", "coco", "-o", out, "--category-map", table) == 3
    assert [row["expression"] for row in failures(out)] == ["the block"]
    assert "'the block'" in failures(out)[0]["message"]
    assert len(instances(out)["annotations"]) == 2
    assert "1 failed" in capsys.readouterr().err


def test_filters_count_what_they_leave_out(tmp_path, capsys):
    rows = [
        record("a.jpg", "low", BLOCK, score=0.2),
        record("a.jpg", "small", SHAPES["one pixel"]),
        record("a.jpg", "none", EMPTY),
        record("a.jpg", "kept", RING),
    ]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    options = ["--min-score", "0.5", "--min-area", "2", "--json"]
    assert export(source, "--to", "coco", "-o", tmp_path / "out", *options) == 0
    told = capsys.readouterr()
    summary = json.loads(told.out)
    assert (summary["masks"], summary["filtered"], summary["empty"]) == (1, 2, 1)
    found = instances(tmp_path / "out")
    assert [a["expression"] for a in found["annotations"]] == ["kept"]
    assert [(e["text"], e["ann_ids"]) for e in found["expressions"]] == [
        ("none", []),
        ("kept", [1]),
    ]
    # What was asked decides the classes, not what was found or is left of it.
    assert [c["name"] for c in found["categories"]] == ["low", "small", "none", "kept"]
    line = "categories without a mask, which keep their class: 'low', 'small', 'none'"
    assert line in told.err
    assert summary["remarks"] == [line]


@pytest.mark.parametrize("kind", ["yolo", "coco", "png"])
def test_classes_are_those_of_all_phrases_in_the_order_asked(tmp_path, capsys, kind):
    """So that class numbers do not hang on what a model happens to find on the first images."""

    def classes(name: str, found: set[tuple[str, str]]) -> list[str]:
        rows = [
            record(image, text, BLOCK if (image, text) in found else EMPTY)
            for image in ("a.jpg", "b.jpg")
            for text in ("the cat", "the dog", "the ox")
        ]
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        style = ["--style", "semantic"] if kind == "png" else []
        assert export(source, "--to", kind, "-o", tmp_path / name, *style) == 0
        if kind == "yolo":
            names = yaml.safe_load((tmp_path / name / "data.yaml").read_text())["names"]
            return [names[number] for number in sorted(names)]
        if kind == "coco":
            return [c["name"] for c in instances(tmp_path / name)["categories"]]
        known = json.loads((tmp_path / name / "categories.json").read_text())
        return [one["name"] for one in known[1:]]  # after the background

    asked = ["the cat", "the dog", "the ox"]
    assert classes("some", {("a.jpg", "the ox"), ("b.jpg", "the cat")}) == asked
    assert "categories without a mask, which keep their class: 'the dog'" in capsys.readouterr().err
    assert classes("others", {("b.jpg", "the dog")}) == asked
    capsys.readouterr()
    assert (
        classes("all", {(image, text) for image in ("a.jpg", "b.jpg") for text in asked}) == asked
    )
    assert "without a mask" not in capsys.readouterr().err


def test_a_map_names_what_it_names_and_no_more(tmp_path, capsys):
    """A phrase that the map does not know is no class for having found nothing, and no failure."""
    rows = [record("a.jpg", "the dog", EMPTY), record("a.jpg", "the ox", EMPTY)]
    rows += [record("a.jpg", "the cat", BLOCK), record("b.jpg", "", EMPTY)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    (tmp_path / "map.json").write_text(json.dumps({"the cat": "cat", "the dog": "dog", "x": "y"}))
    options = ["--category-map", tmp_path / "map.json"]
    assert export(source, "--to", "coco", "-o", tmp_path / "out", *options) == 0
    assert [c["name"] for c in instances(tmp_path / "out")["categories"]] == ["cat", "dog", "y"]
    told = capsys.readouterr().err
    assert "categories without a mask, which keep their class: 'dog'\n" in told
    assert "no expression" not in told


def test_a_map_takes_an_expression_in_any_spelling(source, tmp_path):
    table = tmp_path / "map.json"
    table.write_text(json.dumps({"The  Block!": "b", "the block": "b", "THE RING.": "r"}))
    out = tmp_path / "out"
    assert export(source, "--to", "coco", "-o", out, "--category-map", table) == 0
    assert [c["name"] for c in instances(out)["categories"]] == ["b", "r"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.json", '{"The cat.": "a", "the cat": "b"}', "'The cat.' and 'the cat' are one expr"),
        ("m.json", '{"the cat": "a", "the cat": "b"}', "'the cat' is given twice: 'a', 'b'"),
        ("m.yaml", "the cat: a\nthe cat: b\n", "'the cat' is given twice: 'a', 'b'"),
        ("m.csv", "expression,category\nthe cat,a\nthe cat,b\n", "'the cat' is given twice"),
    ],
)
def test_a_map_that_says_two_things_of_one_expression_is_refused(
    source, tmp_path, capsys, name, text, said
):
    (tmp_path / name).write_text(text)
    options = ["--category-map", tmp_path / name]
    assert export(source, "--to", "coco", "-o", tmp_path / "out", *options) == 1
    assert said in capsys.readouterr().err


def test_losses_are_told(tmp_path, capsys):
    source = write_jsonl(tmp_path / "p.jsonl", [record("a.jpg", "r", RING, id="r1")])
    options = ["--holes", "drop", "--json"]
    assert export(source, "--to", "coco-polygons", "-o", tmp_path / "out", *options) == 0
    told = capsys.readouterr()
    polygons = json.loads(told.out)["polygons"]
    wanted = RING.sum() / BLOCK.sum()
    assert polygons["mean_iou"] == polygons["worst_iou"] == pytest.approx(wanted)
    assert (polygons["holes"], polygons["holes_lost"], polygons["worst"]) == (1, 1, "r1")
    assert f"worst {wanted:.4f} (r1); 0 of 1 holes kept" in told.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["coco", "--simplify", "1"], "--simplify does not apply to --to coco"),
        (["yolo", "--shapes", "mask"], "--shapes does not apply to --to yolo"),
        (["labelme", "--parts", "join"], "--parts does not apply to --to labelme"),
        (["png", "--copy-images"], "--copy-images does not apply to --to png"),
        (["cvat", "--shapes", "mask", "--simplify", "1"], "--shapes mask is exact"),
        (["coco", "--one-class", "a", "--category-map", "b"], "contradict"),
        (["coco", "--min-score", "nan"], "0 to 1"),
        (["yolo", "--simplify", "-1"], "not a distance"),
        (["word"], "'word'"),
    ],
)
def test_wrong_usage(source, tmp_path, capsys, options, words):
    assert export(source, "-o", tmp_path / "out", "--to", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- names ----------------------------------------------------------------------------------------

NASTY = [
    "a.jpg",
    "a.png",
    "A.jpg",
    "sub/a.jpg",
    "../a.jpg",
    "/abs/a.jpg",
    "with space.jpg",
    "quo\"te's.jpg",
    "new\nline.jpg",
    "größe/日本.jpg",
    "<&>.jpg",
    "x" * 300 + ".jpg",
    "nosuffix",
]


@pytest.mark.parametrize("kind", ["coco", "yolo", "labelme", "cvat", "png"])
def test_nasty_names_and_words_survive(tmp_path, kind):
    words = "the \"big\" <one> & 'other'\nright: größte 日本 \x07"
    rows = [record(name, f"{words}{k}", BLOCK) for k, name in enumerate(NASTY)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    out = tmp_path / "deep" / "out"
    assert export(source, "--to", kind, "-o", out) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert all(out.resolve() in path.resolve().parents for path in files)
    if kind in {"yolo", "labelme", "png"}:
        written = [p for p in files if p.suffix in {".txt", ".png"} or "labelme" in p.parts]
        assert len(written) == len(NASTY)
        assert len({str(path).casefold() for path in written}) == len(NASTY)
    if kind == "coco":
        assert [i["file_name"] for i in instances(out)["images"]] == NASTY
        assert instances(out)["annotations"][0]["expression"] == f"{words}0"
    if kind == "yolo":
        data = yaml.safe_load((out / "data.yaml").read_text(encoding="utf-8"))
        assert data["names"] == {k: f"{words}{k}" for k in range(len(NASTY))}
        assert (out / "labels" / "sub" / "a.txt").is_file()
        assert (out / "labels" / "with space.txt").is_file()
    if kind == "cvat":
        import xml.etree.ElementTree as ET

        root = ET.parse(out / "annotations.xml").getroot()
        assert [image.get("name") for image in root.iter("image")] == NASTY
        text = root.find("image/polygon/attribute[@name='expression']").text
        assert text == f"{words}0".replace("\x07", "\\x07")


def test_a_name_changes_only_where_it_must():
    assert target_name("d/photo 1.jpg") == "d/photo 1.jpg"
    assert target_name("./d//x.jpg") == "d/x.jpg"
    assert target_name("../x.jpg") == "_up/x.jpg"
    both = {meeting_key("a.jpg")}
    assert meeting_key("a.jpg") == meeting_key("A.png") != meeting_key("b.jpg")
    first, second = target_name("a.jpg", both), target_name("A.png", both)
    assert first != second
    assert first.startswith("a.")
    assert first.endswith(".jpg")


# --- when things go wrong -------------------------------------------------------------------------


def with_mask(segmentation):
    return {"image": "a.jpg", "expression": "x", "segmentation": segmentation}


def bad_records():
    good = masks.encode(BLOCK)
    return {
        "not JSON": "{",
        "no object": "[1]",
        "no image": {"expression": "x", "segmentation": good},
        "no mask": {"image": "a.jpg", "expression": "x"},
        "mask that is gone": {"image": "a.jpg", "expression": "x", "mask": "gone.png"},
        "damaged RLE": with_mask({**good, "counts": "!!"}),
        "short RLE": with_mask({**good, "counts": "1"}),
        "another size": with_mask(good) | {"height": 9, "width": 9},
        "unlike others": with_mask(masks.encode(np.ones((3, 3), np.bool_))),
    }


@pytest.mark.parametrize("what", bad_records())
def test_a_bad_record_fails_alone(tmp_path, what):
    bad = bad_records()[what]
    rows = [
        json.dumps(record("a.jpg", "good", BLOCK)),
        bad if isinstance(bad, str) else json.dumps(bad),
    ]
    rows.append(json.dumps(record("a.jpg", "good too", RING)))
    source = tmp_path / "p.jsonl"
    source.write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    assert export(source, "--to", "coco", "-o", out) == 3
    (row,) = failures(out)
    assert "line 2" in row["message"]
    assert [a["expression"] for a in instances(out)["annotations"]] == ["good", "good too"]
    assert json.loads((out / "export.json").read_text())["failures"] == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.jsonl", None, "No such file"),
        ("empty.jsonl", "", "holds no record"),
        ("bad.jsonl", "{\n[\n", "holds no record that can be read"),
        ("dict.json", "{}", "not a COCO results file"),
        ("cut.json", '[{"image_id": 1, "category_id": 2', "damaged at character"),
        ("list.json", "[1, 2]", "result 0 is 1"),
        ("none.csv", "image,words\na,b\n", "has no column expression, mask"),
    ],
)
def test_a_source_that_is_none(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    assert export(path, "--to", "coco", "-o", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert words in told
    assert name in told
    assert not (tmp_path / "out" / "instances.json").exists()


@pytest.mark.parametrize("kind", ["overlay", "cutout"])
def test_an_image_that_is_gone_or_another_fails_alone(tmp_path, kind):
    rows = [record(f"{name}.png", "x", BLOCK) for name in ("gone", "other", "good")]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    write_image(tmp_path / "other.png", (10, 20))
    write_image(tmp_path / "good.png")
    out = tmp_path / "out"
    assert export(source, "--to", kind, "-o", out, "--image-root", tmp_path) == 3
    assert [row["image"] for row in failures(out)] == ["gone.png", "other.png"]
    assert "10x20" in failures(out)[1]["message"]
    assert sum(path.is_file() for path in (out / f"{kind}s").rglob("*")) == 1
    # Other formats need no image.
    assert export(source, "--to", "labelme", "-o", tmp_path / "labels") == 0


def test_a_folder_with_files_is_refused_overwriting_takes_only_its_own(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(source, "--to", "yolo", "-o", out) == 0
    (out / "mine.txt").write_text("keep me")
    assert export(source, "--to", "coco", "-o", out) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "labels").is_dir()
    assert export(source, "--to", "coco", "-o", out, "--overwrite") == 0
    assert not (out / "labels").exists()
    assert not (out / "data.yaml").exists()
    assert (out / "mine.txt").read_text() == "keep me"
    assert (out / "instances.json").is_file()


def test_overwriting_obeys_no_foreign_path(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    victim = tmp_path / "victim.txt"
    victim.write_text("keep me")
    names = ["../victim.txt", str(victim), "..", ".", "", 7]
    (out / "export.json").write_text(json.dumps({"owns": names}))
    assert export(source, "--to", "coco", "-o", out, "--overwrite") == 0
    assert victim.read_text() == "keep me"


LIMITED = """
import resource, sys
limit = int(sys.argv[1])
from risam_cli.cli import main
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX limits")
@pytest.mark.parametrize("kind", ["coco", "yolo", "cvat", "png"])
def test_a_disk_that_fills_leaves_whole_files_only(tmp_path, repo, kind):
    """Files cannot grow over a limit here, as on a disk that is full."""
    noise = np.random.default_rng(0)
    rows = [record("small.jpg", "block", BLOCK)]
    rows += [record(f"{k}.jpg", f"noise {k}", noise.random((110, 110)) < 0.5) for k in range(2)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "1200", "export-masks", source, "--to", kind, "-o", out],
        capture_output=True, encoding="utf-8", cwd=repo, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    left = [path for path in out.rglob("*") if path.is_file()]
    assert json.loads((out / "export.json").read_text())["complete"] is False
    for path in left:
        assert path.name == "export.json" or path.suffix in {".txt", ".png"}, path
        if path.suffix == ".png":
            assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is not None
    # The same folder serves again once there is room.
    assert export(source, "--to", kind, "-o", out, "--overwrite") == 0
    assert json.loads((out / "export.json").read_text())["complete"] is True


def test_an_interrupt_leaves_no_half_file(source, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ExportFolder, "publish", interrupt)
    out = tmp_path / "out"
    assert export(source, "--to", "coco", "-o", out) == 130
    assert [path.name for path in out.iterdir()] == ["export.json"]


def test_an_output_that_cannot_be_made(source, tmp_path):
    (tmp_path / "file").write_text("")
    assert export(source, "--to", "coco", "-o", tmp_path / "file" / "out") == 1


def test_more_masks_than_a_palette_fail_their_image(tmp_path):
    dot = SHAPES["one pixel"]
    rows = [record("many.jpg", f"{k}", dot) for k in range(256)] + [record("few.jpg", "x", dot)]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out"
    assert export(source, "--to", "png", "--style", "indexed", "-o", out) == 3
    assert len(failures(out)) == 256
    assert [path.name for path in out.rglob("*.png")] == ["few.png"]


@pytest.mark.filterwarnings("ignore")  # pytest would keep every warning of pycocotools
def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(count):
        path = tmp_path / f"{count}.jsonl"
        with open(path, "w") as file:
            for k in range(count):
                row = record(f"{k // 2}.jpg", f"thing {k % 5}", RING)
                file.write(json.dumps(row) + "\n")
        tracemalloc.start()
        assert export(path, "--to", "coco", "-o", tmp_path / "out", "-q", "--overwrite") == 0
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # imports
    # The lesser of two: a thread that another test left behind may allocate meanwhile.
    small, large = min(peak(200), peak(200)), min(peak(1200), peak(1200))
    # 24 bytes a record are noted, and a few arrays of that length are made on the way.
    assert large - small < 1000 * 80


def test_a_spool_is_gone_after_use(tmp_path):
    with (
        ExportFolder(tmp_path / "x", "coco", (), overwrite=False) as folder,
        folder.spool("rows") as rows,
    ):
        rows.add("a")
        rows.add("b", between=", ")
        folder.publish("all.txt", ["[", rows, "]"])
    assert (tmp_path / "x" / "all.txt").read_text() == "[a, b]"
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["all.txt", "export.json"]
    with pytest.raises(OutputError, match="interrupted export"):
        ExportFolder(tmp_path / "x", "coco", (), overwrite=False)
    (tmp_path / "x" / "export.json").unlink()
    with pytest.raises(OutputError, match="not empty"):
        ExportFolder(tmp_path / "x", "coco", (), overwrite=False)


def test_help_needs_no_torch():
    code = (
        "import sys; from risam_cli.cli import main; main(['export-masks', '--help']); "
        "main(['merge', '--help']); sys.exit('torch' in sys.modules)"
    )
    root = REPO
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=root, check=False)
    assert done.returncode == 0


def test_rle_of_others_is_kept_as_it_is(tmp_path):
    uncompressed = {"size": [4, 5], "counts": [3, 4, 13]}
    rows = [{"image": "a.jpg", "expression": "x", "segmentation": uncompressed}]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    assert export(source, "--to", "coco", "-o", tmp_path / "out") == 0
    (found,) = instances(tmp_path / "out")["annotations"]
    expected = coco_mask.decode(coco_mask.frPyObjects(uncompressed, 4, 5))
    assert np.array_equal(masks.decode(found["segmentation"]), expected)


def test_webdataset_shards_are_exact_and_inputs_again(tmp_path, monkeypatch):
    webdataset = pytest.importorskip("webdataset")
    rows = [record("d/a.jpg", "the block", BLOCK), record("d/a.jpg", "nothing", EMPTY)]
    rows.append(record("b.png", "the ring", RING, instance=0))
    source = write_jsonl(tmp_path / "predictions.jsonl", rows)
    for name in ("d/a.jpg", "b.png"):
        write_image(tmp_path / name)
    monkeypatch.setattr(webdataset_tars, "_MOST", 1)  # a shard an image
    copied = ["--to", "webdataset", "--copy-images", "--image-root", tmp_path]
    assert export(source, *copied, "-o", tmp_path / "out") == 0
    tars = sorted((tmp_path / "out" / "shards").iterdir())
    assert [tar.name for tar in tars] == ["000000.tar", "000001.tar"]
    read = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    found = list(read)
    assert [sorted(key for key in one if "_" not in key) for one in found] == [
        ["0.mask.png", "1.mask.png", "jpg", "json"],
        ["0.mask.png", "json", "png"],
    ]
    drawn = cv2.imdecode(np.frombuffer(found[0]["0.mask.png"], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert (drawn == 255 * BLOCK).all()
    (own,) = json.loads(found[1]["json"])["records"]
    assert [own[key] for key in ("segmentation", "instance")] == [rows[2]["segmentation"], 0]
    assert "instance" not in json.loads(found[0]["json"])["records"][0]
    again = list(Inputs([str(tar) for tar in tars]))
    texts = [[one.text for one in entry.sample.expressions] for entry in again if entry.sample]
    assert texts == [["the block", "nothing"], ["the ring"]]
    assert open_rgb(again[1].sample.path).shape == (*SIZE, 3)
    assert export(source, *copied, "-o", tmp_path / "twice") == 0
    for tar in tars:
        assert tar.read_bytes() == (tmp_path / "twice" / "shards" / tar.name).read_bytes()
