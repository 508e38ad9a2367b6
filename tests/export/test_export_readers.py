"""Every format, read back by the software that people read it with.

datumaro and labelme need older releases of OpenCV and Pillow than the rest may use, and half a
gigabyte; their tests run in an environment that has them (``pip install datumaro labelme``). What
they read is checked without them as well, as their formats are defined.
"""

from __future__ import annotations

import contextlib
import io
import json
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from support.export_cases import SIZE, Mask, export, iou, record, shapes, write_image, write_jsonl

from risam_cli.data.readers import coco as reader
from risam_cli.masks import rle as masks

SHAPES = shapes()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Two images with all shapes between them: records, and the images."""
    folder = tmp_path_factory.mktemp("case")
    names = list(SHAPES)
    rows = []
    for k, name in enumerate(names):
        rows.append(record("a.png" if k % 2 else "b.png", name, SHAPES[name]))
    rows.append(record("a.png", "nothing", np.zeros(SIZE, np.bool_)))
    write_jsonl(folder / "predictions.jsonl", rows)
    for seed, image in enumerate(("a.png", "b.png")):
        write_image(folder / "images" / image, seed=seed)
    return folder


def of_image(image: str) -> dict[str, Mask]:
    return {n: m for k, (n, m) in enumerate(SHAPES.items()) if ("b.png", "a.png")[k % 2] == image}


def open_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def by_expression(coco: COCO) -> dict[str, Mask]:
    return {a["expression"]: coco.annToMask(a).astype(np.bool_) for a in coco.anns.values()}


@pytest.mark.parametrize("kind", ["coco", "coco-polygons"])
def test_pycocotools_reads_coco_exactly(case, tmp_path, kind):
    assert export(case, "--to", kind, "-o", tmp_path) == 0
    coco = open_coco(tmp_path / "instances.json")
    found = by_expression(coco)
    assert found.keys() == SHAPES.keys()
    for name, mask in SHAPES.items():
        assert np.array_equal(found[name], mask), name
    assert {c["name"] for c in coco.cats.values()} == {*SHAPES, "nothing"}
    for annotation in coco.anns.values():
        assert annotation["area"] == SHAPES[annotation["expression"]].sum()


def test_pycocotools_loads_the_results(case, tmp_path):
    assert export(case, "--to", "coco", "-o", tmp_path) == 0
    coco = open_coco(tmp_path / "instances.json")
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes(str(tmp_path / "results.json"))
    assert len(results.anns) == len(SHAPES)
    names = {c["id"]: c["name"] for c in coco.cats.values()}
    for annotation in results.anns.values():
        name = names[annotation["category_id"]]
        assert np.array_equal(results.annToMask(annotation), SHAPES[name]), name
        assert annotation["score"] == 0.75


def test_the_projects_own_reader_takes_the_coco_file(case, tmp_path):
    assert export(case, "--to", "coco", "-o", tmp_path) == 0
    samples = list(reader.open_coco(tmp_path / "instances.json", case / "images"))
    found = {e.text: e.target for sample in samples for e in sample.expressions}
    # Each once, though the file says it in its list and on its annotation.
    assert sum(len(sample.expressions) for sample in samples) == len(SHAPES) + 1
    assert found.keys() == {*SHAPES, "nothing"}
    assert masks.area(found["nothing"]) == 0
    for name, mask in SHAPES.items():
        assert np.array_equal(masks.decode(found[name]), mask), name


@pytest.mark.parametrize("options", [["coco"], ["coco-polygons", "--vertices", "center"]])
def test_supervision_reads_coco_exactly(case, tmp_path, options):
    assert export(case, "--to", *options, "-o", tmp_path) == 0
    data = sv.DetectionDataset.from_coco(
        str(case / "images"), str(tmp_path / "instances.json"), force_masks=True
    )
    check_supervision(data)


def test_supervision_reads_yolo_exactly(case, tmp_path):
    root = ["--image-root", case / "images", "--copy-images"]
    assert export(case, "--to", "yolo", "-o", tmp_path, *root) == 0
    data = sv.DetectionDataset.from_yolo(
        str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "data.yaml")
    )
    check_supervision(data)


def check_supervision(data: sv.DetectionDataset) -> None:
    assert sorted(data.classes) == sorted([*SHAPES, "nothing"])
    seen = set()
    for path, _, detections in data:
        found: dict[str, Mask] = defaultdict(lambda: np.zeros(SIZE, np.bool_))
        for class_id, mask in zip(detections.class_id, detections.mask, strict=True):
            found[data.classes[class_id]] |= mask
        for name, mask in of_image(Path(path).name).items():
            assert np.array_equal(found[name], mask), name
            seen.add(name)
    assert seen == set(SHAPES)


def test_yolo_joined_has_one_line_a_mask(case, tmp_path, capsys):
    assert export(case, "--to", "yolo", "--parts", "join", "-o", tmp_path, "--json") == 0
    lines = [
        line for path in (tmp_path / "labels").iterdir() for line in path.read_text().splitlines()
    ]
    assert len(lines) == len(SHAPES)
    summary = json.loads(capsys.readouterr().out)
    assert summary["polygons"]["masks_split"] == 0
    assert summary["polygons"]["worst_iou"] < 1  # the lines between parts, and it says so


def labelme_masks(path: Path) -> dict[str, Mask]:
    """As labelme's ``shapes_to_label`` draws them: Pillow's polygons, masks at their box."""
    content = json.loads(path.read_text(encoding="utf-8"))
    size = (content["imageHeight"], content["imageWidth"])
    found: dict[str, Mask] = defaultdict(lambda: np.zeros(size, np.bool_))
    for shape in content["shapes"]:
        canvas = Image.new("L", size[::-1])
        points = [tuple(point) for point in shape["points"]]
        ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
        found[shape["description"]] |= np.asarray(canvas).astype(np.bool_)
    return found


def test_labelme_polygons_are_exact_as_labelme_draws_them(case, tmp_path):
    assert export(case, "--to", "labelme", "-o", tmp_path) == 0
    for image in ("a", "b"):
        found = labelme_masks(tmp_path / "labelme" / f"{image}.json")
        for name, mask in of_image(f"{image}.png").items():
            assert np.array_equal(found[name], mask), name


@pytest.mark.parametrize("shape", ["polygon", "mask"])
@pytest.mark.parametrize("copied", [True, False])
def test_labelmes_own_loader_reads_it_exactly(case, tmp_path, shape, copied):
    labelme = pytest.importorskip("labelme")
    options = ["--image-root", case / "images", *(["--copy-images"] if copied else [])]
    assert export(case, "--to", "labelme", "--shapes", shape, "-o", tmp_path, *options) == 0
    for image in ("a", "b"):
        loaded = labelme.LabelFile(str(tmp_path / "labelme" / f"{image}.json"))
        found: dict[str, Mask] = defaultdict(lambda: np.zeros(SIZE, np.bool_))
        for one in loaded.shapes:
            _, drawn = labelme.utils.shapes_to_label(SIZE, [one], {one["label"]: 1})
            found[one["description"]] |= drawn > 0
        for name, mask in of_image(f"{image}.png").items():
            assert np.array_equal(found[name], mask), name


def cvat_masks(path: Path) -> dict[str, Mask]:
    """As CVAT's format says: polygons by pycocotools, masks as runs of the box, row by row."""
    found: dict[str, Mask] = {}
    for image in ET.parse(path).getroot().iter("image"):
        size = (int(image.get("height")), int(image.get("width")))
        for shape in image:
            name = shape.find("attribute[@name='expression']").text
            mask = found.setdefault(name, np.zeros(size, np.bool_))
            if shape.tag == "polygon":
                flat = [float(v) for p in shape.get("points").split(";") for v in p.split(",")]
                rle = coco_mask.merge(coco_mask.frPyObjects([flat], *size))
                mask |= coco_mask.decode(rle).astype(np.bool_)
            else:
                left, top, w, h = (int(shape.get(k)) for k in ("left", "top", "width", "height"))
                runs = [int(run) for run in shape.get("rle").split(",")]
                values = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w)
                mask[top : top + h, left : left + w] |= values
    return found


@pytest.mark.parametrize("shape", ["polygon", "mask"])
def test_cvat_is_exact_as_its_format_says(case, tmp_path, shape):
    assert export(case, "--to", "cvat", "--shapes", shape, "-o", tmp_path) == 0
    found = cvat_masks(tmp_path / "annotations.xml")
    assert found.keys() == SHAPES.keys()
    for name, mask in SHAPES.items():
        assert np.array_equal(found[name], mask), name
    labels = ET.parse(tmp_path / "annotations.xml").getroot().iter("label")
    assert {label.find("name").text for label in labels} == {*SHAPES, "nothing"}


@pytest.mark.parametrize("shape", ["polygon", "mask"])
def test_datumaro_reads_cvat_exactly(case, tmp_path, shape):
    datumaro = pytest.importorskip("datumaro")
    root = ["--image-root", case / "images", "--copy-images"]
    assert export(case, "--to", "cvat", "--shapes", shape, "-o", tmp_path, *root) == 0
    check_datumaro(datumaro.Dataset.import_from(str(tmp_path), "cvat"))


@pytest.mark.parametrize("kind", ["coco", "coco-polygons"])
def test_datumaro_reads_coco_exactly(case, tmp_path, kind):
    datumaro = pytest.importorskip("datumaro")
    assert export(case, "--to", kind, "-o", tmp_path / "out") == 0
    place = tmp_path / "set"
    (place / "annotations").mkdir(parents=True)
    (place / "images").mkdir()
    (tmp_path / "out" / "instances.json").rename(place / "annotations" / "instances_val.json")
    for image in ("a.png", "b.png"):
        (place / "images" / image).write_bytes((case / "images" / image).read_bytes())
    check_datumaro(datumaro.Dataset.import_from(str(place), "coco_instances"))


def check_datumaro(data) -> None:
    labels = [c.name for c in next(iter(data.categories().values())).items]
    found: dict[str, Mask] = defaultdict(lambda: np.zeros(SIZE, np.bool_))
    for item in data:
        for one in item.annotations:
            if hasattr(one, "image"):
                mask = np.asarray(one.image).astype(np.bool_)
            elif hasattr(one, "points") and one.type.name == "polygon":
                rle = coco_mask.merge(coco_mask.frPyObjects([list(one.points)], *SIZE))
                mask = coco_mask.decode(rle).astype(np.bool_)
            else:
                continue
            found[labels[one.label]] |= mask
    for name, mask in SHAPES.items():
        assert np.array_equal(found[name], mask), name


def test_pillow_reads_binary_masks_exactly(case, tmp_path):
    assert export(case, "--to", "png", "-o", tmp_path) == 0
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert {row["expression"] for row in rows} == {*SHAPES, "nothing"}
    for row in rows:
        pixels = np.asarray(Image.open(tmp_path / row["mask"]))
        wanted = SHAPES.get(row["expression"], np.zeros(SIZE, np.bool_))
        assert set(np.unique(pixels)) <= {0, 255}
        assert np.array_equal(pixels == 255, wanted)


@pytest.mark.parametrize("style", ["indexed", "semantic"])
def test_pillow_reads_masks_with_a_palette(tmp_path, style):
    large, small = SHAPES["block"], SHAPES["one pixel"]
    rows = [record("x/a.jpg", "small", small), record("x/a.jpg", "large", large)]
    rows.append(record("x/b.jpg", "large", large))
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    out = tmp_path / "out"
    assert export(source, "--to", "png", "--style", style, "-o", out) == 0
    image = Image.open(out / "masks" / "x" / "a.png")
    assert image.mode == "P"
    values = np.asarray(image)
    # The small mask lies over the large one, whatever comes first.
    assert np.array_equal(values == 1, small)
    assert np.array_equal(values == 2, large & ~small)
    legend = [json.loads(line) for line in (out / "legend.jsonl").read_text().splitlines()]
    assert [item["value"] for item in legend[0]["items"]] == [1, 2]
    palette = image.getpalette()
    for item in legend[0]["items"]:
        assert palette[3 * item["value"] : 3 * item["value"] + 3] == item["color"]
    second = np.asarray(Image.open(out / "masks" / "x" / "b.png"))
    assert set(np.unique(second)) == {0, 2 if style == "semantic" else 1}
    summary = json.loads((out / "export.json").read_text())
    assert summary["pixels_hidden"] == 1
    if style == "semantic":
        names = {c["value"]: c["name"] for c in json.loads((out / "categories.json").read_text())}
        assert names == {0: "background", 1: "small", 2: "large"}


def test_cutouts_are_the_image_within_the_mask(case, tmp_path):
    root = ["--image-root", case / "images"]
    assert export(case, "--to", "cutout", "-o", tmp_path, *root) == 0
    found = list((tmp_path / "cutouts").rglob("*ring*.png"))
    (ring,) = [path for path in found if path.stem.split("-")[1:] == ["ring"]]
    pixels = np.asarray(Image.open(ring))
    image = np.asarray(Image.open(case / "images" / "a.png"))
    assert pixels.shape == (15, 23, 4)
    assert np.array_equal(pixels[..., 3] == 255, SHAPES["ring"][5:20, 7:30])
    assert np.array_equal(pixels[..., :3], image[5:20, 7:30])


def test_overlays_are_drawn_for_every_image(case, tmp_path):
    root = ["--image-root", case / "images"]
    assert export(case, "--to", "overlay", "-o", tmp_path, *root) == 0
    for image in ("a.png", "b.png"):
        drawn = Image.open(tmp_path / "overlays" / image)
        assert drawn.size[0] == 64 * 8  # enlarged to be read
        assert drawn.size[1] >= 48 * 8


@pytest.fixture(scope="module")
def photo_records(tmp_path_factory, photos):
    """The 740 masks of the photos, each its own expression."""
    table = json.loads((photos.parent / "instances.json").read_text())
    images = {image["id"]: image for image in table["images"]}
    rows = []
    for a in sorted(table["annotations"], key=lambda a: (a["image_id"], a["id"])):
        image = images[a["image_id"]]
        rows.append(
            {
                "id": str(a["id"]),
                "image": image["file_name"],
                "expression": f"mask {a['id']}",
                "segmentation": a["segmentation"],
            }
        )
    return write_jsonl(tmp_path_factory.mktemp("photos") / "all.jsonl", rows), rows


@pytest.mark.slow
@pytest.mark.photos
@pytest.mark.parametrize("kind", ["coco-polygons", "yolo", "labelme", "cvat"])
def test_photos_come_back_within_bounds(photo_records, photos, tmp_path, kind):
    source, rows = photo_records
    copy = ["--copy-images"] if kind == "yolo" else []
    root = ["--image-root", photos]
    assert export(source, "--to", kind, "-o", tmp_path, *root, *copy) == 0
    wanted = {row["expression"]: masks.decode(row["segmentation"]) for row in rows}
    found: dict[str, Mask] = {}
    if kind == "coco-polygons":
        found = by_expression(open_coco(tmp_path / "instances.json"))
    elif kind == "labelme":
        for path in (tmp_path / "labelme").iterdir():
            found |= labelme_masks(path)
    elif kind == "cvat":
        found = cvat_masks(tmp_path / "annotations.xml")
    else:
        data = sv.DetectionDataset.from_yolo(
            str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "data.yaml")
        )
        for _, _, detections in data:
            for class_id, mask in zip(detections.class_id, detections.mask, strict=True):
                name = data.classes[class_id]
                found[name] = found[name] | mask if name in found else mask
    ious = {name: iou(found[name], mask) for name, mask in wanted.items()}
    large = [value for name, value in ious.items() if wanted[name].sum() >= 64]
    small = [value for name, value in ious.items() if wanted[name].sum() < 64]
    assert (len(large), len(small)) == (700, 40)
    assert np.mean(large) >= 0.99
    assert min(large) >= 0.95
    assert min(small) >= 0.95  # listed apart, because other tools lose these; here they are exact
