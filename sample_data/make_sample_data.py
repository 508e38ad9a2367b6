"""Make everything in this folder but README.md: ``python sample_data/make_sample_data.py [DIR]``.

The scenes come from RefShapes' val, testA and testB; no training scene is among them.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

from risam_cli.data.refshapes.dataset import RefShapes, SceneItem
from risam_cli.data.refshapes.formats import (
    CATEGORIES,
    annotation_records,
    coco_expressions,
    image_record,
)
from risam_cli.data.refshapes.writers import Plan, encode_image, write_family

# File name below images/, family, split, number of the scene, side in pixels.
SCENES = (
    ("scene_1.png", "refshapes", "val", 1, 256),
    ("scene_2.jpg", "refshapes+", "val", 5, 256),
    ("scene_3.png", "refshapesg", "val", 0, 256),
    ("scene_4.jpg", "grefshapes", "val", 3, 256),
    ("scene_5.jpg", "refshapes", "testB", 8, 384),
    ("crowded/scene_1.jpg", "refshapesg", "testA", 6, 256),
    ("crowded/scene_2.png", "grefshapes", "testA", 7, 256),
    ("crowded/scene_3.jpg", "refshapes", "testA", 2, 512),
)
EXPRESSIONS = (
    "the leftmost object",
    "all the large objects",
    "small objects on the right",
    "the red circle",
)


def main(folder: Path) -> None:
    """Write the sample data to ``folder``."""
    scenes = [
        (f"images/{name}", RefShapes(family, split, number + 1, size=size)[number])
        for name, family, split, number, size in SCENES
    ]
    for name, item in scenes:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(item.image, name))
    write(folder / "expressions.txt", "".join(f"{text}\n" for text in EXPRESSIONS))
    write(folder / "manifest.jsonl", manifest_jsonl(scenes))
    write(folder / "manifest.csv", manifest_csv(scenes))
    write(folder / "coco.json", coco_json(scenes))
    for family, how, splits, made, name in (
        ("refshapes", "own", ("val", "testB"), "refcoco", "refcoco"),
        ("grefshapes", "own", ("val",), "grefcoco", "grefcoco"),
        ("refshapes+", "phrasecut", ("val",), "refshapes+/phrasecut", "phrasecut"),
    ):
        with tempfile.TemporaryDirectory() as temporary:
            plan = Plan(family, splits, how, scenes=4)
            write_family(plan, Path(temporary))
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(Path(temporary) / made, folder / name)
            # images/ of this folder holds photos of no benchmark: each set keeps its own.
            if not (folder / name / "images").exists():
                shutil.copytree(Path(temporary) / plan.images, folder / name / "images")


def manifest_jsonl(scenes: list[tuple[str, SceneItem]]) -> str:
    """One line an image with all its expressions; every other line brings an id."""
    rows: list[dict[str, object]] = []
    for number, (name, item) in enumerate(scenes):
        row: dict[str, object] = {"id": f"sample-{number}"} if number % 2 else {}
        row["image"] = name
        row["expressions"] = [referring.text for referring in item.expressions[:3]]
        rows.append(row)
    # One expression may also stand alone.
    rows.append({"image": scenes[0][0], "expression": scenes[0][1].expressions[3].text})
    return "".join(json.dumps(row) + "\n" for row in rows)


def manifest_csv(scenes: list[tuple[str, SceneItem]]) -> str:
    """One line for each image and expression."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("image", "expression"))
    for name, item in scenes:
        table.writerows((name, referring.text) for referring in item.expressions[:2])
    return text.getvalue()


def coco_json(scenes: list[tuple[str, SceneItem]]) -> str:
    """All images with all expressions and masks."""
    data: dict[str, list[object]] = {
        "images": [],
        "annotations": [],
        "categories": list(CATEGORIES),
        "expressions": [],
    }
    for number, (name, item) in enumerate(scenes, start=1):
        data["images"].append(image_record(item, number, name))
        data["annotations"] += annotation_records(item, number)
        data["expressions"] += coco_expressions(item, number)
    return json.dumps(data, indent=1) + "\n"


def write(path: Path, text: str) -> None:
    """Write a text file with the same line ends everywhere."""
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
