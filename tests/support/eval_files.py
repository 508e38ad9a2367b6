"""Benchmark files of the true shape, made small, with the masks they stand for drawn apart."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from risam_cli.evaluation.report.schema import Report

Mask = NDArray[np.bool_]
H, W = 40, 60


def box(x0: int, y0: int, x1: int, y1: int) -> list[float]:
    """A rectangle as a COCO polygon; it covers columns x0..x1-1 and rows y0..y1-1."""
    return [float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]


def box_mask(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (H, W)) -> Mask:
    """The same rectangles by slicing."""
    mask = np.zeros(size, bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def runs(mask: Mask) -> list[int]:
    """Uncompressed column-major run lengths, written without the package's own code."""
    flat = mask.flatten(order="F")
    counts, value, length = [], False, 0
    for pixel in flat:
        if bool(pixel) != value:
            counts.append(length)
            value, length = bool(pixel), 0
        length += 1
    return [*counts, length]


def compressed(mask: Mask) -> dict[str, Any]:
    """COCO's compressed RLE, by pycocotools."""
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def refer_mask(polygons: list[list[float]], size: tuple[int, int] = (H, W)) -> Mask:
    """What REFER's own ``getMask`` makes of polygons: each drawn alone, then summed."""
    single = [coco.decode(coco.frPyObjects([p], *size))[..., 0] for p in polygons]
    return np.asarray(np.sum(single, axis=0) > 0)


def phrasecut_mask(polygons: list[list[list[list[float]]]], size: tuple[int, int]) -> Mask:
    """What PhraseCut's own ``polygons_to_mask`` makes: every polygon on a canvas of its own."""
    total = np.zeros(size)
    for instance in polygons:
        for polygon in instance:
            if len(polygon) < 2:
                continue
            canvas = Image.new("L", (size[1], size[0]), 0)
            points = [(int(x), int(y)) for x, y in polygon]
            ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
            total += np.array(canvas)
    return np.asarray(total > 0)


def image_file(path: Path, size: tuple[int, int] = (H, W), seed: int = 0) -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


TRIANGLE = [5.3, 4.7, 50.2, 9.9, 20.6, 35.1]
POLYGONS: dict[int, Any] = {
    101: [box(2, 3, 12, 20)],
    102: [box(10, 5, 25, 15), box(20, 10, 40, 30)],  # overlapping: their union counts
    103: [TRIANGLE],
    104: [box(30, 20, 50, 38)],
    105: [box(1, 1, 9, 9)],
    106: [box(15, 1, 29, 9)],
}
TRUTH: dict[int, Mask] = {
    101: box_mask((2, 3, 12, 20)),
    102: box_mask((10, 5, 25, 15), (20, 10, 40, 30)),
    103: refer_mask([TRIANGLE]),
    104: box_mask((30, 20, 50, 38)),
    105: box_mask((1, 1, 9, 9)),
    106: box_mask((15, 1, 29, 9)),
}


def instances(*, images: Path | None = None) -> dict[str, Any]:
    """``instances.json``: two images, six objects (104 as RLE, 106 a crowd)."""
    names = {11: "COCO_train2014_000000000011.jpg", 12: "COCO_train2014_000000000012.jpg"}
    where = {101: 11, 102: 11, 103: 11, 104: 12, 105: 12, 106: 12}
    annotations: list[dict[str, Any]] = [
        {
            "id": ann_id,
            "image_id": where[ann_id],
            "category_id": 1 if ann_id != 103 else 2,
            "segmentation": polygons,
            "iscrowd": int(ann_id == 106),
            "area": 1.0,
            "bbox": [0, 0, 1, 1],
        }
        for ann_id, polygons in POLYGONS.items()
    ]
    annotations[3]["segmentation"] = {"size": [H, W], "counts": runs(TRUTH[104])}
    annotations[4]["segmentation"] = [compressed(TRUTH[105])]  # RefCLEF keeps RLE in a list
    if images is not None:
        for number, name in names.items():
            image_file(images / name, seed=number)
    return {
        "images": [{"id": k, "file_name": v, "height": H, "width": W} for k, v in names.items()],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "kite"}],
    }


def ref(
    ref_id: int, image_id: int, ann_id: Any, split: str, texts: list[str], **more: Any
) -> dict[str, Any]:
    """One ref; its sentences have the ids ref_id * 10 + k, its ``file_name`` is wrong."""
    sentences = [
        {"raw": t.upper(), "sent": t, "sent_id": ref_id * 10 + k, "tokens": t.split()}
        for k, t in enumerate(texts)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": 1,
        "image_id": image_id,
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
        "sent_ids": [s["sent_id"] for s in sentences],
        "sentences": sentences,
        "split": split,
        **more,
    }


REFS = [
    ref(1, 11, 101, "val", ["left cat", "the cat on the left", "red cat"]),
    ref(2, 11, 102, "val", ["right cat"]),
    ref(3, 11, 101, "val", ["cat again"]),  # a second ref of one annotation
    ref(4, 12, 104, "testA", ["low one"]),
    ref(5, 11, 103, "train", ["kite"]),
    ref(6, 12, 105, "val", ["small one"]),
]


def write_refer(root: Path, name: str = "refcoco", by: str = "unc", protocol: int = 2) -> Path:
    """A REFER data set with its images; gives its folder."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(REFS, protocol=protocol))
    content = instances(images=root / "images/mscoco/images/train2014")
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


GREFS = [
    ref(1, 11, [101, 102], "val", ["both cats", "the two cats"], category_id=[1, 1]),
    ref(2, 11, [-1], "val", ["the dog"], category_id=[-1]),
    ref(3, 11, -1, "val", ["a horse"], category_id=-1),
    ref(4, 12, 104, "val", ["low one"]),
    ref(5, 12, [105, 106], "val", ["the group"], category_id=[1, 1]),  # 106 is a crowd
    ref(6, 12, [104], "val", [], category_id=[1]),  # no sentence
    ref(7, 12, [104, 105], "testA", ["these"], category_id=[1, 1]),
]


def write_grefcoco(root: Path) -> Path:
    """A gRefCOCO data set with its images; gives its folder."""
    folder = root / "grefcoco"
    folder.mkdir(parents=True)
    (folder / "grefs(unc).json").write_text(json.dumps(GREFS))
    content = instances(images=root / "images/train2014")
    (folder / "instances.json").write_text(json.dumps(content))
    return folder


PHRASECUT_SIZE = (50, 70)
TASKS: list[dict[str, Any]] = [
    {
        "task_id": "7__1",
        "image_id": 7,
        "ann_ids": [1, 2],
        "instance_boxes": [[1, 1, 9, 9], [20, 20, 20, 20]],
        "Polygons": [
            [[[1.9, 1.2], [10.7, 1.1], [10.2, 10.9], [1.5, 10.8]]],
            [[[20, 20], [40, 22], [30, 45]], [[5, 40]], [[50, 5], [65, 12]]],
        ],
        "phrase": "two red cups",
        "phrase_structure": {
            "name": "cup",
            "attributes": ["red"],
            "relation_ids": [],
            "relation_descriptions": [],
            "type": "attribute",
        },
    },
    {
        "task_id": "7__2",
        "image_id": 7,
        "ann_ids": [3],
        "instance_boxes": [[30, 10, 20, 10]],
        "Polygons": [[[[30, 10], [49, 10], [49, 19], [30, 19]], [[40, 15], [60, 15], [50, 30]]]],
        "phrase": "table on left",
        "phrase_structure": {"name": "table", "attributes": [], "type": "relation"},
    },
    {
        "task_id": "9__1",
        "image_id": 9,
        "ann_ids": [4],
        "instance_boxes": [[0, 0, 5, 5]],
        "Polygons": [[[[0, 0], [5, 0], [5, 5], [0, 5]]]],
        "phrase": "corner",
        "phrase_structure": {"name": "corner", "attributes": [], "type": "name"},
    },
]


def write_phrasecut(root: Path) -> Path:
    """A PhraseCut data set with its images: image 9 is of miniv; gives its folder."""
    folder = root / "VGPhraseCut_v0"
    folder.mkdir(parents=True)
    height, width = PHRASECUT_SIZE
    entries = [
        {"image_id": 7, "height": height, "width": width, "split": "val"},
        {"image_id": 9, "height": height, "width": width, "split": "miniv"},
    ]
    (folder / "image_data_split3000.json").write_text(json.dumps(entries))
    (folder / "refer_val.json").write_text(json.dumps(TASKS))
    (folder / "refer_miniv.json").write_text(json.dumps(TASKS[2:]))
    for number in (7, 9):
        image_file(folder / "images" / f"{number}.jpg", PHRASECUT_SIZE, number)
    return folder


def coco_content() -> dict[str, Any]:
    """COCO-style: a list of expressions, and expressions on annotations in all three ways."""
    content = instances()
    content["annotations"][0]["caption"] = "captioned"
    content["annotations"][1]["expression"] = "expressed"
    content["annotations"][2]["expressions"] = ["first", "second"]
    content["expressions"] = [
        {"id": 900, "image_id": 11, "ann_ids": [101, 102], "text": "both cats"},
        {"id": 901, "image_id": 12, "ann_ids": [], "text": "the dog"},
        {"id": 902, "image_id": 12, "ann_ids": [104], "text": "low one"},
        {"id": 903, "image_id": 12, "text": "nobody knows"},
    ]
    return content


def record(name: str, image: str, text: str, mask: Mask, **more: Any) -> dict[str, Any]:
    """One line of ``predictions.jsonl``."""
    return {
        "id": name,
        "image": image,
        "expression": text,
        "height": mask.shape[0],
        "width": mask.shape[1],
        "segmentation": compressed(mask),
        "bbox": [0.0, 0.0, 0.0, 0.0],
        "area": int(mask.sum()),
        "score": 0.5,
        "no_target": not mask.any(),
        "mask": None,
        **more,
    }


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


class Run:
    """One evaluation: exit code, stdout, stderr, folder."""

    def __init__(self, code: int, out: str, err: str, folder: Path) -> None:
        self.code, self.out, self.err, self.folder = code, out, err, folder

    @property
    def report(self) -> Report:
        return Report.model_validate_json((self.folder / "report.json").read_bytes())

    def rows(self, name: str = "per_expression.jsonl") -> list[dict[str, Any]]:
        text = (self.folder / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]
