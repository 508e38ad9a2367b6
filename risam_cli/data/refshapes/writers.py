"""Writes RefShapes as image files with annotations in the benchmarks' own formats."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from risam_cli.data.refshapes import formats
from risam_cli.data.refshapes.dataset import VERSION, RefShapes, SceneItem
from risam_cli.errors import OutputError, UsageError, reason_of, setting
from risam_cli.files.jsonlines import load_json

FORMATS: tuple[str, ...] = ("own", "refer", "grefcoco", "phrasecut", "coco")
"""``own`` is the format of the benchmark that a family follows."""

LOADER_IMAGES: Mapping[str, str] = {
    "refer": "images/mscoco/images/train2014",
    "grefcoco": "images/train2014",
}
"""Format -> where the benchmark's own loader looks for images: below the folder that holds the
annotations' folder, so that several sets share it. Other formats keep theirs in ``images/``."""

OWN: Mapping[str, tuple[str, str]] = {
    "refshapes": ("refer", "refcoco"),
    "refshapes+": ("refer", "refcoco+"),
    "refshapesg": ("refer", "refcocog"),
    "grefshapes": ("grefcoco", "grefcoco"),
}
"""Family -> its benchmark's format, and the folder in which readers look for that benchmark."""

IMAGE_FORMATS: tuple[str, ...] = ("jpg", "png")
_JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write of one family.

    Attributes:
        family: one of ``FAMILIES``.
        splits: their names, each once.
        format: one of ``FORMATS``.
        scenes: of every split; None for each split's own number.
        expressions: of every scene.
        size: height and width of a scene in pixels.
        image_format: "jpg" (quality 95, colour not subsampled) or "png" (exact).
        polygons: write masks as polygons where these give the very mask, else as RLE.

    Raises:
        UsageError: a combination that the format has no words for.
    """

    family: str
    splits: tuple[str, ...]
    format: str = "own"
    scenes: int | None = None
    expressions: int = 6
    size: int = 256
    seed: int = 0
    image_format: str = "jpg"
    polygons: bool = False

    def __post_init__(self) -> None:
        if self.written_as == "refer" and self.family == "grefshapes":
            raise UsageError(
                f"{setting('format', 'refer')} has one object for each phrase, grefshapes has "
                "several or none",
                f"use {setting('format', 'own')}, grefcoco or coco",
            )
        if self.written_as == "refer" and "testC" in self.splits:
            raise UsageError(
                f"{setting('format', 'refer')} has one object for each phrase, testC has phrases "
                "of none",
                f"use {setting('format', 'grefcoco')} or coco",
            )
        if self.written_as == "phrasecut" and self.image_format != "jpg":
            raise UsageError(
                f"{setting('format', 'phrasecut')} names images ID.jpg, not {self.image_format}",
                f"use {setting('image_format', 'jpg')}",
            )
        if self.written_as == "phrasecut" and self.polygons:
            raise UsageError("PhraseCut's format has polygons of its own", "leave polygons out")
        limits = (
            ("scenes", self.scenes, formats.MAX_SCENES),
            ("expressions", self.expressions, formats.MAX_EXPRESSIONS),
        )
        for name, value, most in limits:
            if value is not None and value > most:
                raise UsageError(f"{setting(name, value)} is too many", f"use at most {most}")
        self.sets()

    @property
    def written_as(self) -> str:
        """The format, ``own`` being resolved."""
        return OWN[self.family][0] if self.format == "own" else self.format

    @property
    def folder(self) -> Path:
        """Where it goes below the output folder.

        In its benchmark's own format: that benchmark's name; otherwise FAMILY/FORMAT.
        """
        written_as, benchmark = OWN[self.family]
        if self.written_as == written_as:
            return Path(benchmark)
        return Path(self.family) / self.written_as

    @property
    def images(self) -> Path:
        """Where its images go below the output folder."""
        shared = LOADER_IMAGES.get(self.written_as)
        return self.folder / "images" if shared is None else self.folder.parent / shared

    def sets(self) -> list[RefShapes]:
        """The splits to draw."""
        return [
            RefShapes(self.family, split, self.scenes, self.expressions, self.size, self.seed)
            for split in self.splits
        ]

    def image_name(self, image: int, split: str) -> str:
        """File name of an image, as the format's readers expect it."""
        if self.written_as == "phrasecut":
            return f"{image}.jpg"
        if self.written_as == "coco":
            return f"{split}_{image:07d}.{self.image_format}"
        return f"COCO_train2014_{image:012d}.{self.image_format}"


def write_family(
    plan: Plan, output: Path, *, overwrite: bool = False, on_scene: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Draws and writes what a plan says; the folder appears when it is whole.

    Args:
        output: the folder above; made where it is missing.
        overwrite: replace a folder that already exists.
        on_scene: called after every scene.

    Returns:
        folder, family, format and counts: images, annotations, expressions, and of these
        no_target, several and left_out (PhraseCut has none without a target).

    Raises:
        OutputError: the folder already exists, or cannot be written.
    """
    folder = output / plan.folder
    with _staged(folder, output / plan.images, overwrite) as stage:
        sheets = _Sheets(plan)
        (stage / "images").mkdir()
        for scenes in plan.sets():
            for index in range(len(scenes)):
                item = scenes[index]
                image = formats.image_id(scenes.split, index, plan.family)
                name = plan.image_name(image, scenes.split)
                (stage / "images" / name).write_bytes(encode_image(item.image, name))
                sheets.add(item, image, name, scenes.split)
                if on_scene is not None:
                    on_scene()
        sheets.write(stage)
        about = {
            "family": plan.family,
            "format": plan.written_as,
            "splits": {scenes.split: len(scenes) for scenes in plan.sets()},
            "seed": plan.seed,
            "size": plan.size,
            "expressions_per_scene": plan.expressions,
            "refshapes_version": VERSION,
            "counts": sheets.counts,
        }
        _write_text(stage / "refshapes.json", json.dumps(about, indent=2) + "\n")
    return {"folder": str(folder), **about}


def encode_image(rgb: NDArray[np.uint8], name: str) -> bytes:
    """The file of an image (H, W, 3): PNG or JPEG, by the end of its name."""
    memory = io.BytesIO()
    if name.endswith(".png"):
        Image.fromarray(rgb).save(memory, "PNG")
    else:
        Image.fromarray(rgb).save(memory, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return memory.getvalue()


class _Sheets:
    """Annotation files in the making. Long lists are kept as JSON text, which takes less memory."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.images: dict[str, list[str]] = {split: [] for split in plan.splits}
        self.annotations: dict[str, list[str]] = {split: [] for split in plan.splits}
        self.spoken: dict[str, list[Any]] = {split: [] for split in plan.splits}
        self.counts = dict.fromkeys(
            ("images", "annotations", "expressions", "no_target", "several", "left_out"), 0
        )

    def add(self, item: SceneItem, image: int, name: str, split: str) -> None:
        """Takes one scene in."""
        how = self.plan.written_as
        counts = self.counts
        counts["images"] += 1
        counts["expressions"] += len(item.expressions)
        counts["no_target"] += sum(not referring.objects for referring in item.expressions)
        counts["several"] += sum(len(referring.objects) > 1 for referring in item.expressions)
        if how == "phrasecut":
            tasks = formats.phrasecut_tasks(item, image)
            counts["left_out"] += len(item.expressions) - len(tasks)
            self.images[split].append(_dump(formats.phrasecut_image(item, image, split)))
            self.spoken[split] += map(_dump, tasks)
            return
        made = formats.annotation_records(
            item, image, listed=how in LOADER_IMAGES, polygons=self.plan.polygons
        )
        counts["annotations"] += len(made)
        if self.plan.polygons:
            kept = sum(not isinstance(_first(one["segmentation"]), list) for one in made)
            counts["kept_as_rle"] = counts.get("kept_as_rle", 0) + kept
        self.images[split].append(_dump(formats.image_record(item, image, name)))
        self.annotations[split] += map(_dump, made)
        if how == "refer":
            self.spoken[split] += formats.refer_refs(item, image, name, split)
        elif how == "grefcoco":
            self.spoken[split] += map(_dump, formats.grefcoco_refs(item, image, name, split))
        else:
            self.spoken[split] += map(_dump, formats.coco_expressions(item, image))

    def write(self, folder: Path) -> None:
        """Writes all files of the format."""
        plan = self.plan
        if plan.written_as == "phrasecut":
            # The released file's name, and the name that PhraseCut's loader opens.
            for name in ("image_data_split3000.json", "image_data_split.json"):
                _write_text(folder / name, _array(self.images.values()))
            tasks = (json.loads(task) for spoken in self.spoken.values() for task in spoken)
            _write_text(folder / "name_att_rel_count.json", _dump(formats.phrasecut_counts(tasks)))
            for split, spoken in self.spoken.items():
                _write_text(folder / f"refer_{split}.json", _array([spoken]))
        elif plan.written_as == "coco":
            for split, spoken in self.spoken.items():
                text = self._instances([split], {"expressions": _array([spoken])})
                _write_text(folder / f"{split}.json", text)
        else:
            _write_text(folder / "instances.json", self._instances(plan.splits, {}))
            if plan.written_as == "grefcoco":
                _write_text(folder / "grefs(unc).json", _array(self.spoken.values()))
            else:
                by = "umd" if plan.family == "refshapesg" else "unc"
                refs = [ref for spoken in self.spoken.values() for ref in spoken]
                # Protocol 2 is what the published files and their Python-2 loaders use.
                (folder / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol=2))

    def _instances(self, splits: Sequence[str], more: Mapping[str, str]) -> str:
        about = f"RefShapes {self.plan.family}, drawn from seed {self.plan.seed}"
        parts = {
            "info": _dump({"description": about, "version": str(VERSION)}),
            "images": _array(self.images[split] for split in splits),
            "annotations": _array(self.annotations[split] for split in splits),
            "categories": _dump(list(formats.CATEGORIES)),
            **more,
        }
        return "{" + ",\n".join(f'"{key}": {value}' for key, value in parts.items()) + "}\n"


@contextmanager
def _staged(folder: Path, images: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside ``folder`` that takes its place when the block ends without an error.

    Its ``images/`` go to ``images``, which other sets may share: there, only an earlier set's own
    files are replaced.
    """
    if folder.exists() and not overwrite:
        raise OutputError(
            f"{folder} already exists",
            f"choose another {setting('output')} or give {setting('overwrite')}",
        )
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        stage.mkdir(parents=True)
        yield stage
        if folder.exists():
            folder.rename(old)
        if images.parent != folder:
            _replace_images(stage / "images", images, _image_names(old / "instances.json"))
        stage.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise OutputError(
            f"{error.filename or folder}: {reason_of(error)}",
            f"choose another {setting('output')}",
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _replace_images(made: Path, images: Path, earlier: set[str]) -> None:
    """Move the images in ``made`` to ``images``; those of the ``earlier`` set that are left go."""
    images.mkdir(parents=True, exist_ok=True)
    for path in made.iterdir():
        path.replace(images / path.name)
        earlier.discard(path.name)
    for name in earlier:
        (images / name).unlink(missing_ok=True)
    made.rmdir()


def _image_names(instances: Path) -> set[str]:
    """Plain file names that an earlier set's ``instances.json`` lists; none where there is none."""
    try:
        names = {image["file_name"] for image in load_json(instances.read_bytes())["images"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def _first(segmentation: object) -> object:
    return segmentation[0] if isinstance(segmentation, list) else segmentation


def _dump(obj: object) -> str:
    return json.dumps(obj, separators=(",", ":"))


def _array(groups: Iterable[Iterable[str]]) -> str:
    """JSON array of records that are JSON text already, one a line."""
    return "[" + ",\n".join(text for group in groups for text in group) + "]"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
