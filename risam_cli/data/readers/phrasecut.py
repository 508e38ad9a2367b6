"""PhraseCut: ``refer_<split>.json`` with polygons, and the list of images of Visual Genome."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from risam_cli.data.readers.jsonstream import iter_json
from risam_cli.data.readers.layout import find_file, find_folder, find_images, missing, only_split
from risam_cli.data.readers.source import Columns, Group, Phrase, SampleSource, make_source
from risam_cli.errors import DataError
from risam_cli.files.jsonlines import brief, read_text
from risam_cli.masks import rle as masks
from risam_cli.types import Rle

SPLITS = ("train", "val", "test", "miniv")
_IMAGE_LISTS = ("image_data_split3000.json", "image_data_split.json")
_COUNTS = "name_att_rel_count.json"
_LISTS = "utils/subset.py"
_LONGEST_LISTS = 1 << 20  # bytes
_STUFF, _KIND = "stuff_names", "att_"  # what the lists are called there
_FARTHEST = 1 << 17  # pixels from the corner; Pillow draws outlines step by step, seen or not
_LONGEST = 1 << 26  # steps of all outlines of one phrase
_UNRANKED = 1 << 30
_FOLDERS = ("phrasecut", "PhraseCut", "VGPhraseCut_v0", "data/VGPhraseCut_v0")


def open_phrasecut(
    root: Path,
    split: str | None,
    *,
    image_root: Path | None = None,
    name: str = "phrasecut",
    columns: Columns | None = None,
) -> SampleSource:
    """The index of one split of PhraseCut, one entry an image.

    Args:
        root: the folder that holds ``phrasecut/`` or ``VGPhraseCut_v0/``, or that folder itself.
        split: ``train``, ``val`` (without the images of ``miniv``), ``test`` or ``miniv``; several
            are joined as the data set's own loader has it: ``val_miniv`` is the published val.
            None where there is a file of one only.
        image_root: the folder of ``<image_id>.jpg``; by default ``images`` near ``root``.
        name: what to call the data set.
        columns: which fields of tasks to carry along.

    Raises:
        DataError: files are missing or damaged, or the split does not exist.
        UsageError: no split is named, and there are several.
    """
    folder = find_folder(root, _FOLDERS, [f"refer_{s}.json" for s in SPLITS])
    present = [s for s in SPLITS if (folder / f"refer_{s}.json").is_file()]
    split = only_split(str(folder), present) if split is None else split
    parts = split.split("_")
    task_files = tuple(folder / f"refer_{part}.json" for part in parts)
    absent = [path for path in task_files if not path.is_file()]
    if absent and not set(parts) <= {*SPLITS}:
        raise DataError(f"phrasecut has no split {split!r}", f"its splits: {', '.join(present)}")
    # A file of val may hold the phrases of miniv too.
    if absent and (parts, absent) != (["val", "miniv"], [*task_files[1:]]):
        raise missing(absent, f"the phrases of {split}")
    task_files = tuple(path for path in task_files if path not in absent)
    image_file = find_file(folder, _IMAGE_LISTS, "the image sizes")
    images = _images(image_file)
    words = _Words(_ranks(folder / _COUNTS), _word_lists([root, folder, *folder.parents[:2]]))
    by_image: dict[int, list[dict[str, Any]]] = {}
    left_out: Counter[str] = Counter()
    for path in task_files:
        for image_id, tasks in _tasks(path, parts, images, left_out).items():
            known = {str(task["task_id"]) for task in by_image.get(image_id, ())}
            new = [task for task in tasks if str(task["task_id"]) not in known]
            by_image.setdefault(image_id, []).extend(new)
    if not by_image:
        raise DataError(f"{task_files[0]} holds no phrase of the split {split!r}")
    first = f"{next(iter(by_image))}.jpg"
    if image_root is None:
        places = (folder / "images", root / "images", folder.parent / "images", folder)
        image_root = find_images(places, first) or folder / "images"
    groups = []
    for image_id, tasks in by_image.items():
        polygons = [(str(task["task_id"]), task["Polygons"]) for task in tasks]
        size, _, in_coco = images[image_id]
        draw = partial(_draw, polygons=polygons, size=size, where=str(task_files[0]))
        own = columns or Columns()
        phrases = tuple(_phrase(task, k, words, in_coco, own) for k, task in enumerate(tasks))
        file_name = f"{image_id}.jpg"
        groups.append(Group(file_name, image_root / file_name, size, phrases, draw))
    notes = [f"{n} phrases of {s} images were left out" for s, n in left_out.items() if n]
    return make_source(name, split, (*task_files, image_file), groups, notes=notes)


def _images(path: Path) -> dict[int, tuple[tuple[int, int], str, bool]]:
    """Of every image, size (H, W) and split, and whether COCO has it."""
    images = {}
    for _, record in iter_json(path):
        try:
            size = (int(record["height"]), int(record["width"]))
            split, in_coco = str(record.get("split", "")), bool(record.get("coco_id"))
            images[int(record["image_id"])] = (size, split, in_coco)
        except (TypeError, KeyError, ValueError, OverflowError, AttributeError):
            raise DataError(
                f"{path}: an image lacks image_id, height or width: {brief(record)}"
            ) from None
        if min(size) < 1 or size[0] * size[1] > masks.MAX_PIXELS:
            raise DataError(f"{path}: an image is {size[0]} x {size[1]} pixels: {brief(record)}")
    return images


def _tasks(
    path: Path,
    splits: list[str],
    images: dict[int, tuple[tuple[int, int], str, bool]],
    left_out: Counter[str],
) -> dict[int, list[dict[str, Any]]]:
    """The splits' tasks by image, in the file's order; those of others are counted.

    ``refer_val.json`` may hold the phrases of ``miniv``; the image list tells them apart.
    """
    by_image: dict[int, list[dict[str, Any]]] = {}
    for number, (_, task) in enumerate(iter_json(path)):
        where = f"{path}: task {number}"
        if not isinstance(task, dict):
            raise DataError(f"{where} is not an object: {brief(task)}")
        for key in ("task_id", "image_id", "phrase", "Polygons"):
            if key not in task:
                raise DataError(f"{where} has no {key}")
        if not isinstance(task["image_id"], int) or task["image_id"] not in images:
            raise DataError(
                f"{where}: image {task['image_id']!r} is not in the image list",
                "use both files from one release",
            )
        if not isinstance(task["phrase"], str) or not isinstance(task["Polygons"], list):
            raise DataError(f"{where} is malformed: {brief(task)}")
        own = images[task["image_id"]][1]
        if own and own not in splits:
            left_out[own] += 1
            continue
        by_image.setdefault(task["image_id"], []).append(task)
    return by_image


def _ranks(path: Path) -> dict[str, dict[str, int]]:
    """Rank, from 1, of categories (``cat``) and attributes (``att``); nothing without the file."""
    if not path.is_file():
        return {}
    ranks: dict[str, dict[str, int]] = {"cat": {}, "att": {}}
    for key, pair in iter_json(path):
        if key not in ranks:
            continue
        if not isinstance(pair, list) or not pair or not isinstance(pair[0], str):
            raise DataError(f"{path}: {brief(pair)} is not a pair of a word and its count")
        ranks[key].setdefault(pair[0], len(ranks[key]) + 1)
    return ranks


@dataclass(frozen=True, slots=True)
class _Words:
    """What the data set's own files say of words; empty where they are not there.

    Attributes:
        ranks: see :func:`_ranks`.
        lists: see :func:`_word_lists`.
    """

    ranks: dict[str, dict[str, int]]
    lists: dict[str, list[str]]


def _word_lists(folders: list[Path]) -> dict[str, list[str]]:
    """Words of stuff and kinds of attributes, as the data set's own code lists them.

    They decide its subsets ``t_stuff``, ``a_color`` and so on. The file is read, not run.
    """
    path = next((folder / _LISTS for folder in folders if (folder / _LISTS).is_file()), None)
    if path is None:
        return {}
    found: dict[str, list[str]] = {}
    try:
        for one in ast.parse(read_text(path, _LONGEST_LISTS)).body:
            if isinstance(one, ast.Assign) and isinstance(one.value, ast.List):
                name = ast.unparse(one.targets[0])
                if name == _STUFF or name.startswith(_KIND):
                    found[name] = [str(word) for word in ast.literal_eval(one.value)]
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        found = {}
    if _STUFF not in found:
        raise DataError(
            f"{path} does not hold PhraseCut's lists of words",
            "take it from the data set's repository, or move it away",
        )
    return found


def _phrase(
    task: dict[str, Any], number: int, known: _Words, in_coco: bool, columns: Columns
) -> Phrase:
    ranks = known.ranks
    attributes: dict[str, Any] = {
        "image_id": task["image_id"],
        "referents": len(task["Polygons"]),
    }
    structure = task.get("phrase_structure")
    if isinstance(structure, dict):
        if structure.get("name"):
            attributes["category"] = str(structure["name"])
        if structure.get("type"):
            attributes["phrase_type"] = structure["type"]
        words, relations = structure.get("attributes"), structure.get("relation_descriptions")
        words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
        attributes["phrasecut_attributes"] = len(words)
        attributes["phrasecut_relations"] = len(relations) if isinstance(relations, list) else 0
        attributes["phrasecut_in_coco"] = int(in_coco)
        if known.lists:
            name = attributes.get("category", "")
            attributes["phrasecut_stuff"] = int(any(word in name for word in known.lists[_STUFF]))
            attributes["phrasecut_kinds"] = [
                key.removeprefix(_KIND)
                for key, listed in known.lists.items()
                if any(word in listed for word in words)
            ]
        if ranks:  # what is not listed is rarer than all that is
            found = [ranks["att"][word] for word in words if word in ranks["att"]]
            attributes["phrasecut_attribute_rank"] = min(found, default=_UNRANKED)
            rank = ranks["cat"].get(attributes.get("category", ""), _UNRANKED)
            attributes["phrasecut_category_rank"] = rank
    if own := columns.of(task):
        attributes["columns"] = own
    # Its number among the image's, as ids may be given twice.
    return Phrase(str(task["task_id"]), task["phrase"], (number,), attributes)


def _draw(
    number: int, *, polygons: list[tuple[str, Any]], size: tuple[int, int], where: str
) -> Rle:
    """Union of a task's polygons, drawn as PhraseCut's ``polygons_to_mask`` does."""
    rings = []
    task_id, instances = polygons[number]
    for instance in instances:
        for polygon in instance if isinstance(instance, list) else [None]:
            rings.append(_points(polygon, f"{where}: task {task_id}"))
    steps = sum(
        max(abs(x - u), abs(y - v))
        for ring in rings
        for (x, y), (u, v) in zip(ring, ring[1:] + ring[:1], strict=True)
    )
    if steps > _LONGEST:
        raise DataError(f"{where}: task {task_id}: its outlines are {steps} pixels long")
    return masks.encode(draw_polygons(rings, size))


def draw_polygons(rings: list[list[tuple[int, int]]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Mask (H, W): each ring filled with its outline; rings of fewer than two points are left out.

    Each ring goes onto one canvas, which gives the union that summing single masks gives.
    """
    canvas = Image.new("L", (size[1], size[0]), 0)
    pen = ImageDraw.Draw(canvas)
    for ring in rings:
        if len(ring) >= 2:
            pen.polygon(ring, fill=1, outline=1)
    return np.asarray(canvas, np.uint8).astype(np.bool_)


def _points(polygon: Any, where: str) -> list[tuple[int, int]]:
    try:
        points = [(int(x), int(y)) for x, y in polygon]
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: a polygon is not a list of points: {brief(polygon)}") from None
    if any(abs(value) > _FARTHEST for point in points for value in point):
        raise DataError(f"{where}: a polygon's coordinates are out of range")
    return points
