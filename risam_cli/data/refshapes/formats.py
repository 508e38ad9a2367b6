"""A scene in the words of each benchmark's annotation files: pure functions, nothing is written.

Ids follow from family, split and number alone: a scene keeps its ids whatever else is written
beside it, and no two scenes share one, so answers for one set are none for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from risam_cli.data.refshapes.dataset import FAMILIES, SPLIT_SCENES, SceneItem
from risam_cli.data.refshapes.expressions import Referring
from risam_cli.data.refshapes.vocabulary import (
    COLORS,
    PLURALS,
    RELATION_PHRASES,
    SHAPES,
    SIZES,
    STAND_INS,
)
from risam_cli.masks import rle as masks
from risam_cli.masks.outlines import outlines
from risam_cli.types import Rle

Record = dict[str, Any]

MAX_SCENES = 1_000_000
"""Scenes of one split that ids leave room for."""
MAX_EXPRESSIONS = 99
"""Expressions of one scene that ids leave room for."""

CATEGORIES: tuple[Record, ...] = tuple(
    {"id": number, "name": shape, "supercategory": "shape"}
    for number, shape in enumerate(SHAPES, start=1)
)


def image_id(split: str, index: int, family: str = FAMILIES[0]) -> int:
    """Id of scene ``index`` of a family's split."""
    # Four splits came first; one that came later has its blocks behind all of theirs.
    number = list(SPLIT_SCENES).index(split)
    block = FAMILIES.index(family) * 4 + number
    if number >= 4:
        block = len(FAMILIES) * number + FAMILIES.index(family)
    return block * MAX_SCENES + index + 1


def annotation_id(image: int, number: int) -> int:
    """Id of object ``number`` of an image."""
    return image * 10 + number


def image_record(item: SceneItem, image: int, file_name: str) -> Record:
    """COCO's ``images`` entry."""
    height, width = item.instances.shape
    return {"id": image, "file_name": file_name, "height": height, "width": width}


def annotation_records(
    item: SceneItem, image: int, *, listed: bool = False, polygons: bool = False
) -> list[Record]:
    """COCO's ``annotations`` entries of all objects; RLE, so that holes are exact.

    Args:
        listed: put each RLE in a list, as RefCLEF has it and REFER's loaders need it (they look at
            ``segmentation[0]``); pycocotools takes such a list for polygons.
        polygons: write polygons, holes bridged, where loaders make the very mask of them.
    """
    numbers = np.arange(1, len(item.objects) + 1, dtype=np.uint8)
    rles = masks.encode_batch(item.instances[None] == numbers[:, None, None])
    return [
        {
            "id": annotation_id(image, number),
            "image_id": image,
            "category_id": SHAPES.index(thing.shape) + 1,
            "segmentation": (polygons and exact_polygons(rle)) or ([rle] if listed else rle),
            "area": masks.area(rle),
            "bbox": list(masks.bbox(rle)),
            "iscrowd": 0,
            "attributes": {"color": thing.color, "size": thing.size},
        }
        for number, (thing, rle) in enumerate(zip(item.objects, rles, strict=True))
    ]


def exact_polygons(rle: Rle) -> list[list[float]]:
    """Polygons that pycocotools fills to the mask, each pixel by one of them; else none."""
    size = (rle["size"][0], rle["size"][1])
    found = [ring.round(2).ravel().tolist() for ring in outlines(masks.decode(rle)).rings]
    same = all(masks.from_polygons(found, size, once=once) == rle for once in (False, True))
    return found if same else []


def refer_refs(item: SceneItem, image: int, file_name: str, split: str) -> list[Record]:
    """REFER's refs: one for each object spoken of, its expressions being the sentences.

    Raises:
        ValueError: an expression refers to several objects or to none.
    """
    refs = []
    for objects, spoken in _by_referents(item).items():
        if len(objects) != 1:
            raise ValueError(f"REFER has one object a ref, not {len(objects)}")
        thing = item.objects[objects[0]]
        ref = _ref(spoken, image, file_name, split)
        ref["ann_id"] = annotation_id(image, objects[0])
        ref["category_id"] = SHAPES.index(thing.shape) + 1
        refs.append(ref)
    return refs


def grefcoco_refs(item: SceneItem, image: int, file_name: str, split: str) -> list[Record]:
    """GRefCOCO's refs: lists of annotations, ``[-1]`` where an expression refers to nothing."""
    refs = []
    for objects, spoken in _by_referents(item).items():
        ref = _ref(spoken, image, file_name, split)
        ref["ann_id"] = [annotation_id(image, number) for number in objects] or [-1]
        ref["category_id"] = [SHAPES.index(item.objects[n].shape) + 1 for n in objects] or [-1]
        ref["no_target"] = not objects
        refs.append(ref)
    return refs


def coco_expressions(item: SceneItem, image: int) -> list[Record]:
    """COCO-style expressions; ``ann_ids`` is empty where nothing fits."""
    return [
        {
            "id": image * 100 + k,
            "image_id": image,
            "ann_ids": [annotation_id(image, number) for number in referring.objects],
            "text": referring.text,
        }
        for k, referring in enumerate(item.expressions)
    ]


def phrasecut_tasks(item: SceneItem, image: int) -> list[Record]:
    """PhraseCut's tasks: expressions that refer to something; the format has no other.

    Polygons run through the centres of a mask's outermost pixels, as PhraseCut's own drawing with
    fill and outline wants it. It has no holes: a ring's is filled.
    """
    tasks = []
    for k, referring in enumerate(item.expressions):
        if not referring.objects:
            continue
        seen = [item.instances == number + 1 for number in referring.objects]
        tasks.append(
            {
                "task_id": f"{image}__{k}",
                "image_id": image,
                "ann_ids": [annotation_id(image, number) for number in referring.objects],
                "instance_boxes": [list(masks.bbox(masks.encode(mask))) for mask in seen],
                "Polygons": [_centre_polygons(mask) for mask in seen],
                "phrase": referring.text,
                "phrase_structure": phrase_structure(referring),
            }
        )
    return tasks


def phrasecut_image(item: SceneItem, image: int, split: str) -> Record:
    """PhraseCut's entry in the list of images."""
    height, width = item.instances.shape
    return {"image_id": image, "height": height, "width": width, "split": split}


def phrasecut_counts(tasks: Iterable[Record]) -> Record:
    """PhraseCut's ``name_att_rel_count.json``: [word, count] pairs, the most frequent first."""
    counts: dict[str, Counter[str]] = {"cat": Counter(), "att": Counter(), "rel": Counter()}
    for task in tasks:
        structure = task["phrase_structure"]
        counts["cat"][structure["name"]] += 1
        counts["att"].update(structure["attributes"])
        counts["rel"].update(wording for wording, _ in structure["relation_descriptions"])
    return {key: [list(pair) for pair in found.most_common()] for key, found in counts.items()}


def phrase_structure(referring: Referring) -> Record:
    """PhraseCut's reading of a phrase: what, which, and beside what."""
    head, relations = referring.text, []
    for wordings in RELATION_PHRASES.values():
        # "to the left of" first: "left of" is a part of it.
        for wording in sorted(wordings, key=len, reverse=True):
            before, found, after = head.partition(f" {wording} ")
            if found:
                head = before
                relations.append([wording, after])
    singular = {plural: name for name, plural in PLURALS.items()}
    words = [singular.get(word, word) for word in head.split()]
    name = next(word for word in words if word in SHAPES or word in STAND_INS)
    return {
        "name": name,
        "attributes": [word for word in words if word in COLORS or word in SIZES],
        "relation_ids": list(range(len(relations))),
        "relation_descriptions": relations,
        "type": referring.kind,
    }


def _by_referents(item: SceneItem) -> dict[tuple[int, ...], list[tuple[int, str]]]:
    """Number and text of the expressions, by what they refer to."""
    groups: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for k, referring in enumerate(item.expressions):
        groups.setdefault(referring.objects, []).append((k, referring.text))
    return groups


def _ref(spoken: Sequence[tuple[int, str]], image: int, file_name: str, split: str) -> Record:
    sentences = [
        {"raw": text, "sent": text, "sent_id": image * 100 + k, "tokens": text.split()}
        for k, text in spoken
    ]
    return {
        "ref_id": image * 100 + spoken[0][0],
        "image_id": image,
        "file_name": file_name,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "sentences": sentences,
        "split": split,
    }


def _centre_polygons(mask: NDArray[np.bool_]) -> list[list[list[int]]]:
    pixels = mask.astype(np.uint8)
    contours, _ = cv2.findContours(pixels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    rings: list[list[list[int]]] = [
        np.asarray(c, np.int32).reshape(-1, 2).tolist() for c in contours
    ]
    # A reader leaves out polygons of fewer than two points; a single pixel is said twice.
    return [ring if len(ring) > 1 else ring * 2 for ring in rings]
