"""What a person changed in CVAT or labelme comes back: moved, deleted, drawn and renamed shapes."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.export_cases import SIZE, export, failures, record, shapes, write_image, write_jsonl

from risam_cli.cli import main
from risam_cli.data.readers.coco import open_coco
from risam_cli.data.readers.results import Results
from risam_cli.masks import rle as masks

SHAPES = shapes()
BOX = np.zeros(SIZE, np.bool_)
BOX[2:12, 4:30] = True


def coco(path: Path, output: Path, *options: object, code: int = 0) -> dict[str, Any]:
    arguments = ["export-masks", str(path), "--to", "coco", "-o", str(output), *map(str, options)]
    assert main(arguments) == code
    found: dict[str, Any] = json.loads((output / "instances.json").read_text(encoding="utf-8"))
    return found


def truth(path: Path) -> dict[tuple[str, str], Any]:
    """Masks by image and expression, as training and evaluation read a COCO-style file."""
    found = {}
    for sample in open_coco(path).iterate(lambda failure: pytest.fail(failure.message)):
        for one in sample.expressions:
            assert (Path(sample.image).name, one.text) not in found
            found[Path(sample.image).name, one.text] = one.target
    return found


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Exports two images with all shapes to a kind; gives the folder."""
    monkeypatch.chdir(tmp_path)
    records = [record("photos/a.png", f"the {name}", mask) for name, mask in SHAPES.items()]
    records.append(record("photos/deep/b.png", "the block", SHAPES["block"]))
    for name in ("a.png", "deep/b.png"):
        write_image(tmp_path / "photos" / name)
    write_jsonl(tmp_path / "asked.jsonl", records)

    def make(kind: str, *options: str) -> Path:
        options = ("--to", kind, "-o", str(tmp_path / kind), "--overwrite", *options)
        assert export(tmp_path / "asked.jsonl", *options) == 0
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", ["cvat", "labelme"])
@pytest.mark.parametrize("options", [(), ("--copy-images",), ("--shapes", "mask")])
def test_what_nobody_changed_comes_back_exactly(
    kind: str, options: tuple[str, ...], exported: Callable[..., Path], tmp_path: Path
) -> None:
    found = coco(exported(kind, *options), tmp_path / "labels", "--copy-images")
    # A labelme file names the picture that lies beside it.
    beside = kind == "labelme" and "--copy-images" in options
    names = {Path(one["file_name"]).as_posix() for one in found["images"]}
    start = "labelme/labelme/photos/" if beside else "photos/"
    assert names == {f"{start}a.png", f"{start}deep/b.png"}
    assert all(one.is_file() for one in (tmp_path / "labels" / "images" / n for n in names))
    known = truth(tmp_path / "labels" / "instances.json")
    for name, mask in SHAPES.items():
        assert np.array_equal(masks.decode(known["a.png", f"the {name}"]), mask), name
    assert len(known) == len(SHAPES) + 1
    assert {one["score"] for one in found["annotations"]} == {0.75}
    # A person has looked: none is a model's answer any more.
    assert not any("pseudo" in one for one in found["expressions"])


def edit_cvat(path: Path) -> None:
    tree = ET.parse(path)
    image = next(one for one in tree.iter("image") if "a.png" in one.attrib["name"])
    by_text: dict[str, list[ET.Element]] = {}
    for shape in image:
        by_text.setdefault(shape.findtext("attribute[@name='expression']") or "", []).append(shape)
    [moved] = by_text["the block"]
    moved.set("points", "4,2;30,2;30,12;4,12")
    for shape in by_text["the two parts"]:
        image.remove(shape)
    [renamed] = by_text["the ring"]
    renamed.set("label", "the doughnut")
    [reworded] = by_text["the one pixel"]
    for one in reworded:
        if one.get("name") == "expression":
            one.text = "the lone pixel"
    box = {"label": "the new one", "xtl": "4", "ytl": "2", "xbr": "30", "ybr": "12"}
    ET.SubElement(image, "box", {**box, "source": "manual", "occluded": "0"})
    turned = {"xtl": "12", "ytl": "-6", "xbr": "22", "ybr": "20", "rotation": "90"}
    ET.SubElement(image, "box", {**box, **turned, "label": "the turned one"})
    for x in (0, 40):
        places = {"left": str(x), "top": "3", "width": "4", "height": "2", "rle": "1, 3, 2, 2"}
        ET.SubElement(image, "mask", {"label": "two masks", **places})
    tree.write(path)


def edit_labelme(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = [one for one in found["shapes"] if one["description"] != "the two parts"]
    for one in kept:
        if one["description"] == "the block":
            one["points"] = [[4, 2], [30, 2], [30, 12], [4, 12]]
        elif one["description"] == "the ring":
            one["label"] = "the doughnut"
        elif one["description"] == "the one pixel":
            one["description"] = "the lone pixel"
    drawn = {"group_id": None, "description": "", "flags": {}, "mask": None}
    kept.append(
        {"label": "the new one", "points": [[30, 12], [4, 2]], "shape_type": "rectangle", **drawn}
    )
    corners = [[4.0, 2.0], [30.0, 2.0], [30.0, 12.0], [4.0, 12.0]]
    kept.append({"label": "the turned one", "points": corners, "shape_type": "polygon", **drawn})
    for x in (0, 40):
        points = [[x + 1, 3], [x + 4, 3], [x + 4, 4], [x + 2, 4], [x + 2, 5], [x + 1, 5]]
        kept.append({"label": "two masks", "points": points, "shape_type": "polygon", **drawn})
    found |= {"shapes": kept, "imageData": "aGVsbG8="}
    path.write_text(json.dumps(found, indent=2), encoding="utf-8")


@pytest.mark.parametrize("kind", ["cvat", "labelme"])
def test_what_a_person_changed_is_what_comes_back(
    kind: str, exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = exported(kind)
    if kind == "cvat":
        edit_cvat(folder / "annotations.xml")
        # As CVAT gives it: a zip.
        with zipfile.ZipFile(tmp_path / "task.zip", "w", zipfile.ZIP_DEFLATED) as out:
            out.write(folder / "annotations.xml", "annotations.xml")
        folder = tmp_path / "task.zip"
    else:
        # Exported from photos/, so that names in it lead there.
        [file] = (folder / "labelme").rglob("a.json")
        edit_labelme(file)
    found = coco(folder, tmp_path / "labels")
    known = truth(tmp_path / "labels" / "instances.json")
    own = {text for image, text in known if image == "a.png"}
    expected = {f"the {name}" for name in SHAPES} - {"the two parts", "the ring", "the one pixel"}
    assert own == expected | {
        *("the doughnut", "the lone pixel", "the new one", "the turned one", "two masks")
    }
    for text, mask in {
        "the block": BOX,
        "the new one": BOX,
        "the turned one": BOX,
        "the doughnut": SHAPES["ring"],
        "the lone pixel": SHAPES["one pixel"],
        "the noise": SHAPES["noise"],
    }.items():
        assert np.array_equal(masks.decode(known["a.png", text]), mask), text
    assert np.array_equal(masks.decode(known["b.png", "the block"]), SHAPES["block"])
    # Two objects of one expression: one expression that refers to both.
    two = [one for one in found["annotations"] if one["expression"] == "two masks"]
    assert [one["area"] for one in two] == [5 if kind == "cvat" else 4] * 2
    [said] = [one for one in found["expressions"] if one["text"] == "two masks"]
    assert said["ann_ids"] == [one["id"] for one in two]
    assert not (tmp_path / "labels" / "failures.jsonl").exists()


def test_a_changed_class_leaves_an_expression_that_was_not(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    folder = exported("labelme", "--one-class", "thing")
    [file] = (folder / "labelme").rglob("b.json")
    file.write_text(file.read_text().replace('"label": "thing"', '"label": "other thing"'))
    coco(folder, tmp_path / "labels")
    assert ("b.png", "the block") in truth(tmp_path / "labels" / "instances.json")


def test_a_review_is_scored_like_any_predictions(
    exported: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco(tmp_path / "asked.jsonl", tmp_path / "truth")
    for kind in ("cvat", "labelme"):
        folder = exported(kind)
        capsys.readouterr()
        arguments = [
            *("eval", "--dataset", "coco", "--root", str(tmp_path / "truth" / "instances.json")),
            *("--images", str(tmp_path), "--predictions", str(folder)),
            *("--json", "-o", str(tmp_path / f"scored-{kind}")),
        ]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["miou"] == 1.0


# --- what is wrong with a file --------------------------------------------------------------------

HEAD = '<?xml version="1.0"?>\n'
BOMB = (
    '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]>'
    '<annotations><image name="&y;" width="3" height="3"/></annotations>'
)
OUTSIDE = (
    '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotations><image name="a" width="3" height="3"/>'
    "</annotations>"
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HEAD + BOMB, "document type declaration"),
        (HEAD + OUTSIDE, "document type declaration"),
        (HEAD + "<annotations><image name='a' width='3'", "not XML, or is truncated"),
        (HEAD + "<html><body/></html>", "not a CVAT file"),
        (HEAD + "<annotations><track id='0' label='x'/></annotations>", "of a video"),
        (HEAD + "<annotations><image name='a' width='x' height='3'/></annotations>", "no height"),
        (HEAD + "<annotations><image width='3' height='3'/></annotations>", "no name"),
        (HEAD + "<annotations>" + "<a>" * 40, "nested"),
        (HEAD + "<annotations></annotations>", "not a|no record|nothing"),
    ],
)
def test_a_hostile_or_damaged_file_is_refused_in_one_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "annotations.xml"
    path.write_text(text)
    assert main(["export-masks", str(path), "--to", "coco", "-o", str(tmp_path / "out")]) == 1
    [line] = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
    assert any(part in line for part in told.split("|")), line
    assert str(path) in line
    assert not (tmp_path / "out").exists()


def test_an_image_that_does_not_end_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from risam_cli.data.readers import cvat

    monkeypatch.setattr(cvat, "_MOST", 1 << 18)
    path = tmp_path / "annotations.xml"
    path.write_text(f"<annotations><image name='{'a' * (1 << 20)}' width='3' height='3'/>")
    assert main(["export-masks", str(path), "--to", "coco", "-o", str(tmp_path / "out")]) == 1
    assert "an image of more than" in capsys.readouterr().err


GOOD = '<box label="good" xtl="0" ytl="0" xbr="3" ybr="3"/>'


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ('<polyline label="x" points="0,0;3,3"/>', "a polyline has no area"),
        ('<polygon label="x" points="0,0;3,3"/>', "at least three points"),
        ('<polygon label="x" points="0,0;3,q;4,4"/>', "cannot be read"),
        ('<polygon label="x" points="0,0;nan,3;4,4"/>', "not a finite number"),
        ('<polygon label="x" points="0,0;1e300,3;4,4"/>', "coordinates up to"),
        ('<polygon label="x"/>', "cannot be read"),
        ('<polygon label="" points="0,0;3,0;3,3"/>', "no label"),
        ('<polygon label="x" points="50,50;60,50;60,60"/>', "holds no pixel"),
        ('<mask label="x" rle="1, 3" left="0" top="0" width="2" height="3"/>', "sum to 4"),
        ('<mask label="x" rle="0, 6" left="9" top="0" width="2" height="3"/>', "leaves the image"),
        ('<mask label="x" rle="0, 6" left="-1" top="0" width="2" height="3"/>', "leaves the image"),
        ('<mask label="x" rle="9" left="0" top="0" width="999999" height="999999"/>', "do not fit"),
        (
            f'<mask label="x" rle="{"9" * 30}" left="0" top="0" width="2" height="3"/>',
            "cannot be read",
        ),
        ('<mask label="x" rle="" left="0" top="0" width="2" height="3"/>', "cannot be read"),
    ],
)
def test_a_shape_that_is_no_mask_costs_itself_alone(shape: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "annotations.xml"
    path.write_text(
        f'<annotations><image name="a.png" width="10" height="10">{shape}{GOOD}</image>'
        "</annotations>"
    )
    found = coco(path, tmp_path / "out", code=3)
    assert [one["area"] for one in found["annotations"]] == [9]
    [failure] = failures(tmp_path / "out")
    assert told in failure["message"]
    assert "a.png" in failure["message"]


@pytest.mark.parametrize(
    ("encoding", "zipped"),
    [
        *((name, False) for name in ("utf-8-sig", "utf-16", "utf-32", "iso-8859-1")),
        *((name, True) for name in ("utf-8-sig", "utf-16", "iso-8859-1")),
    ],
)
def test_xml_may_be_in_any_encoding_that_it_declares(
    encoding: str, zipped: bool, tmp_path: Path
) -> None:
    declared = encoding.removesuffix("-sig")
    box = GOOD.replace("good", "le carr\u00e9")
    text = (
        f'<?xml version="1.0" encoding="{declared}"?>\n<annotations>'
        f'<image name="a.png" width="10" height="10">{box}</image>'
        "</annotations>"
    )
    path = tmp_path / "annotations.xml"
    path.write_text(text, encoding=encoding)
    if zipped:
        with zipfile.ZipFile(tmp_path / "task.zip", "w") as out:
            out.write(path, "annotations.xml")
        path = tmp_path / "task.zip"
    found = coco(path, tmp_path / "out")
    assert [one["expression"] for one in found["annotations"]] == ["le carr\u00e9"]


def test_images_of_one_name_in_two_tasks_of_a_project_are_not_one(tmp_path: Path) -> None:
    path = tmp_path / "annotations.xml"
    images = "".join(
        f'<image name="a.png" task_id="{task}" width="10" height="10">{GOOD}</image>'
        for task in (1, 2)
    )
    path.write_text(f"<annotations>{images}</annotations>")
    found = coco(path, tmp_path / "out", code=3)
    assert [one["area"] for one in found["annotations"]] == [9]
    [failure] = failures(tmp_path / "out")
    assert "tasks 1 and 2 both have an image of this name" in failure["message"]


def test_an_image_of_absurd_size_draws_nothing(tmp_path: Path) -> None:
    path = tmp_path / "annotations.xml"
    mask = '<mask label="x" rle="0, 1" left="0" top="0" width="1" height="1"/>'
    path.write_text(
        f'<annotations><image name="b" width="30000" height="30000">{mask}</image>'
        f'<image name="a.png" width="10" height="10">{GOOD}</image></annotations>'
    )
    coco(path, tmp_path / "out", code=3)
    [failure] = failures(tmp_path / "out")
    assert "30000 x 30000 pixels" in failure["message"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"imagePath": None}, "'imagePath'"),
        ({"imageHeight": None}, "'imageHeight'"),
        ({"imageWidth": -3}, "'imageWidth'"),
        ({"shapes": [7]}, "not a shape"),
        (
            {"shapes": [{"label": "x", "shape_type": "line", "points": [[0, 0], [1, 1]]}]},
            "a 'line'",
        ),
        ({"shapes": [{"label": "x", "shape_type": "mask", "points": [[0, 0], [1, 1]]}]}, "a mask"),
        (
            {
                "shapes": [
                    {"label": "x", "shape_type": "mask", "points": [[0, 0]] * 2, "mask": "aa"}
                ]
            },
            "not a PNG",
        ),
        ({"shapes": [{"label": "x", "points": [[0, "q"], [1, 1], [2, 0]]}]}, "cannot be read"),
        ({"shapes": [{"label": 3, "points": [[0, 0], [9, 0], [9, 9]]}]}, "no label"),
    ],
)
def test_a_labelme_file_that_is_wrong_costs_itself_alone(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    good = {
        "version": "5.5.0",
        "flags": {},
        "shapes": [{"label": "good", "points": [[0, 0], [3, 0], [3, 3], [0, 3]]}],
        "imagePath": "a.png",
        "imageData": None,
        "imageHeight": 10,
        "imageWidth": 10,
    }
    (tmp_path / "a.json").write_text(json.dumps(good))
    (tmp_path / "b.json").write_text(json.dumps(good | change))
    (tmp_path / "c.json").write_text('{"shapes": [')
    (tmp_path / "package.json").write_text('{"name": "beside the point"}')
    found = coco(tmp_path, tmp_path / "out", code=3)
    assert [one["area"] for one in found["annotations"]] == [9]
    assert found["images"][0]["file_name"] == "a.png"
    wrong, damaged = failures(tmp_path / "out")
    assert told in wrong["message"]
    assert "b.json" in wrong["message"]
    assert "c.json is not JSON" in damaged["message"]


@pytest.mark.parametrize(
    ("kind", "points", "area"),
    [
        ("rectangle", [[1, 2], [5, 2], [5, 8], [1, 8]], 24),
        ("rectangle", [[5, 8], [1, 2]], 24),
        ("oriented_rectangle", [[1, 2], [5, 2], [5, 8], [1, 8]], 24),
        ("rotation", [[5, 0], [10, 5], [5, 10], [0, 5]], 50),
        ("quadrilateral", [[0, 0], [6, 0], [4, 5], [2, 5]], 20),
    ],
)
def test_boxes_may_be_given_by_their_corners(
    kind: str, points: list[list[int]], area: int, tmp_path: Path
) -> None:
    """As labelme's turned boxes are, and all boxes of X-AnyLabeling."""
    text = {
        "version": "3.3.0",
        "flags": {},
        "shapes": [{"label": "good", "shape_type": kind, "points": points, "direction": 0.0}],
        "imagePath": "a.png",
        "imageHeight": 10,
        "imageWidth": 10,
    }
    (tmp_path / "a.json").write_text(json.dumps(text))
    found = coco(tmp_path / "a.json", tmp_path / "out")
    assert [one["area"] for one in found["annotations"]] == [pytest.approx(area, abs=6)]
    x, y, width, height = found["annotations"][0]["bbox"]
    xs, ys = zip(*points, strict=True)
    sides = (x, y, x + width, y + height)
    assert sides == pytest.approx((min(xs), min(ys), max(xs), max(ys)), abs=1)


def test_a_hidden_image_comes_back_from_labelme_too(tmp_path: Path) -> None:
    names = {".a.png", "b.png"}
    write_jsonl(tmp_path / "p.jsonl", [record(n, "the block", SHAPES["block"]) for n in names])
    assert export(tmp_path / "p.jsonl", "--to", "labelme", "-o", str(tmp_path / "labels")) == 0
    (tmp_path / "labels" / "labelme" / "._b.json").write_bytes(b"\0\5\26\7 of macOS")
    found = coco(tmp_path / "labels", tmp_path / "out")
    assert {one["file_name"] for one in found["images"]} == names


@pytest.mark.parametrize("name", ["a.json", ""])
def test_a_labelme_image_may_have_many_flags(name: str, tmp_path: Path) -> None:
    text = {
        "flags": {f"a question about the whole image, number {k}": False for k in range(50)},
        "shapes": [{"label": "good", "points": [[0, 0], [3, 0], [3, 3], [0, 3]]}],
        "imagePath": "a.png",
        "imageHeight": 10,
        "imageWidth": 10,
    }
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a.json").write_text(json.dumps(text))
    found = coco(tmp_path / "given" / name, tmp_path / "out")
    assert [one["area"] for one in found["annotations"]] == [9]


def test_reviewed_records_say_so(exported: Callable[..., Path], tmp_path: Path) -> None:
    with Results(exported("cvat")) as found:
        assert found.reviewed
    with Results(tmp_path / "asked.jsonl") as found:
        assert not found.reviewed
