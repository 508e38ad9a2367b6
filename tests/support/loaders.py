"""What the benchmarks' own loaders do with a data set's files, told again in a few lines each.

Oracles for what `risam refshapes` writes and for what the readers read: nothing of the package is
used, only pickle, json, pycocotools and Pillow. Each yields a :class:`Loaded` for every expression.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco


@dataclass(frozen=True)
class Loaded:
    """One expression as a loader gives it to its network."""

    id: str
    text: str
    image: Path
    mask: NDArray[np.bool_]


def added_up(annotation: dict[str, Any], image: dict[str, Any]) -> NDArray[np.int64]:
    """REFER's ``getMask``: how many of the annotation's polygons (or RLEs) cover each pixel."""
    parts = annotation["segmentation"]
    if isinstance(parts[0], list):
        parts = coco.frPyObjects(parts, image["height"], image["width"])
    return np.asarray(coco.decode(parts), np.int64).sum(axis=2)


def exactly_once(count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """LAVT, LISA and EVF-SAM: ``mask == 1``; what two polygons cover is background."""
    return count == 1


def any_cover(count: NDArray[np.int64]) -> NDArray[np.bool_]:
    """CRIS: whatever is not 0."""
    return count > 0


def refer(
    data_root: Path, dataset: str, split_by: str, keep: Callable[[Any], NDArray[np.bool_]]
) -> Iterator[Loaded]:
    """REFER's ``refer.py`` with the step that each network's data set adds to it."""
    folder = data_root / dataset
    refs = pickle.loads((folder / f"refs({split_by}).p").read_bytes())
    instances = json.loads((folder / "instances.json").read_text())
    images = {record["id"]: record for record in instances["images"]}
    annotations = {record["id"]: record for record in instances["annotations"]}
    for ref in refs:
        image = images[ref["image_id"]]
        path = data_root / "images/mscoco/images/train2014" / image["file_name"]
        mask = keep(added_up(annotations[ref["ann_id"]], image))
        for sentence in ref["sentences"]:
            yield Loaded(str(sentence["sent_id"]), sentence["sent"], path, mask)


def lisa(data_root: Path, dataset: str, split_by: str) -> Iterator[Loaded]:
    """LISA's (and EVF-SAM's) own copy: it encodes the counts of RLEs itself, one by one."""
    folder = data_root / dataset
    refs = pickle.loads((folder / f"refs({split_by}).p").read_bytes())
    instances = json.loads((folder / "instances.json").read_text())
    images = {record["id"]: record for record in instances["images"]}
    annotations = {record["id"]: record for record in instances["annotations"]}
    for ref in refs:
        image, annotation = images[ref["image_id"]], annotations[ref["ann_id"]]
        if len(annotation["segmentation"]) == 0:
            mask = np.zeros((image["height"], image["width"]), np.bool_)
        else:
            parts = annotation["segmentation"]
            if isinstance(parts[0], list):
                parts = coco.frPyObjects(parts, image["height"], image["width"])
            else:
                for part in parts:
                    if not isinstance(part["counts"], bytes):
                        part["counts"] = part["counts"].encode()
            mask = exactly_once(np.asarray(coco.decode(parts), np.int64).sum(axis=2))
        path = data_root / "images/mscoco/images/train2014" / image["file_name"]
        for sentence in ref["sentences"]:
            yield Loaded(str(sentence["sent_id"]), sentence["sent"], path, mask)


def grefer(data_root: Path) -> Iterator[Loaded]:
    """gRefCOCO's ``grefer.py``: no target is ``[-1]``, crowds are left out, the rest is merged."""
    folder = data_root / "grefcoco"
    refs = json.loads((folder / "grefs(unc).json").read_text())
    instances = json.loads((folder / "instances.json").read_text())
    images = {record["id"]: record for record in instances["images"]}
    annotations: dict[int, Any] = {record["id"]: record for record in instances["annotations"]}
    for ref in refs:
        image = images[ref["image_id"]]
        total = np.zeros((image["height"], image["width"]), np.int64)
        if ref["ann_id"] != [-1]:
            for ann_id in ref["ann_id"]:
                if not annotations[ann_id]["iscrowd"]:
                    total += added_up(annotations[ann_id], image)
        path = data_root / "images/train2014" / image["file_name"]
        for sentence in ref["sentences"]:
            yield Loaded(str(sentence["sent_id"]), sentence["raw"], path, total > 0)


def rela(data_root: Path, side: int | None = None) -> Iterator[Loaded]:
    """ReLA's ``load_grefcoco_json`` and mapper: polygons of three points and more, nothing else.

    Args:
        side: rasterize anew at ``side`` x ``side``, as its mapper does after its resize.
    """
    folder = data_root / "grefcoco"
    refs = json.loads((folder / "grefs(unc).json").read_text())
    instances = json.loads((folder / "instances.json").read_text())
    images = {record["id"]: record for record in instances["images"]}
    annotations: dict[int, Any] = {record["id"]: record for record in instances["annotations"]}
    for ref in refs:
        image = images[ref["image_id"]]
        height, width = (side, side) if side else (image["height"], image["width"])
        total = np.zeros((height, width), np.bool_)
        for ann_id in ref["ann_id"]:
            if ann_id == -1 or annotations[ann_id]["iscrowd"]:
                continue
            parts = annotations[ann_id]["segmentation"]
            parts = [part for part in parts if len(part) % 2 == 0 and len(part) >= 6]
            assert parts, f"annotation {ann_id} has no polygon that ReLA takes"
            scale = np.array([width / image["width"], height / image["height"]])
            scaled = [(np.asarray(p).reshape(-1, 2) * scale).ravel().tolist() for p in parts]
            total |= np.asarray(coco.decode(coco.frPyObjects(scaled, height, width))).any(axis=2)
        path = data_root / "images/train2014" / image["file_name"]
        for sentence in ref["sentences"]:
            yield Loaded(str(sentence["sent_id"]), sentence["raw"], path, total)


def phrasecut(folder: Path, split: str) -> Iterator[Loaded]:
    """PhraseCut's ``RefVGLoader`` with its ``polygons_to_mask``; ``val_miniv`` names two files."""
    splits = split.split("_")
    json.loads((folder / "name_att_rel_count.json").read_text())["cat"]
    listed = json.loads((folder / "image_data_split.json").read_text())
    images = {record["image_id"]: record for record in listed if record["split"] in splits}
    for name in splits:
        for task in json.loads((folder / f"refer_{name}.json").read_text()):
            image = images[task["image_id"]]
            total = np.zeros((image["height"], image["width"]), np.int64)
            for polygon in [ring for rings in task["Polygons"] for ring in rings]:
                if len(polygon) < 2:
                    continue
                canvas = Image.new("L", (image["width"], image["height"]), 0)
                points = [(int(x), int(y)) for x, y in polygon]
                ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
                total += np.asarray(canvas)
            path = folder / "images" / f"{task['image_id']}.jpg"
            yield Loaded(task["task_id"], task["phrase"], path, total > 0)
