"""What every export format shares: what it is given, what it tells, how it is chosen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, overload

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from risam_cli.data.images.bounds import known_formats, metered
from risam_cli.data.images.files import open_regular
from risam_cli.errors import DataError, require_machine, setting
from risam_cli.export.categories import Categories
from risam_cli.export.folder import ExportFolder, Spool
from risam_cli.masks import rle as masks
from risam_cli.masks.outlines import CENTER, EDGE, Outlines, Vertices, outlines
from risam_cli.types import Prediction, Rle

OpenImage = Callable[[Path], NDArray[np.uint8]]


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """What the user chose; which of it a format uses, docs/export-masks.md says.

    Attributes:
        simplify: largest distance in pixels that an outline may move; 0 keeps it.
        holes: "bridge" or "drop".
        parts: YOLO: "split" writes one line a part, "join" one line a mask.
        shapes: labelme, CVAT: "polygon" or "mask".
        vertices: "edge", "center", or None for what the format's readers expect.
        split: YOLO: the share of images for training, 0 to 1; 0 makes no split.
        style: png: "binary", "indexed" or "semantic".
        padding: cutout: pixels around the mask's box.
    """

    simplify: float = 0.0
    holes: str = "bridge"
    parts: str = "split"
    split: float = 0.0
    shapes: str = "polygon"
    vertices: str | None = None
    style: str = "binary"
    padding: int = 0

    def vertices_of(self, usual: Vertices) -> Vertices:
        """Where vertices go; ``usual`` is the format's own choice."""
        return {"edge": EDGE, "center": CENTER, None: usual}[self.vertices]

    def trace(self, mask: NDArray[np.bool_], usual: Vertices) -> Outlines:
        """Rings of a mask as these settings want them; ``usual`` is the format's own choice."""
        return outlines(
            mask,
            self.vertices_of(usual),
            simplify=self.simplify,
            bridge=self.holes == "bridge",
            join=self.parts == "join",
        )


@dataclass(slots=True)
class ExportCounts:
    """What an export did, and what was lost on the way.

    Attributes:
        masks: written.
        iou_sum, iou_worst, worst: of polygons as their readers fill them, against the masks.
        holes, holes_lost: in masks written as polygons.
        split: masks that became several objects, because the format has no parts.
        hidden: pixels under other masks, where one file holds several.
        notes: what else the user must know, each with its number.
        remarks: lines on the source.
        split_images: how many are for training and for validation, where they are split.
        root: the folder that image names start in, where the images' own are absolute paths.
    """

    images: int = 0
    masks: int = 0
    empty: int = 0
    filtered: int = 0
    measured: int = 0
    iou_sum: float = 0.0
    iou_worst: float = 1.0
    worst: str = ""
    holes: int = 0
    holes_lost: int = 0
    split: int = 0
    hidden: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    split_images: dict[str, int] = field(default_factory=dict)
    root: str | None = None

    def measure(self, name: str, source: Rle, back: Rle, traced: Outlines) -> None:
        """Count one mask that was written as polygons and reads back as ``back``."""
        iou = masks.iou(source, back)
        self.measured += 1
        self.iou_sum += iou
        if iou < self.iou_worst or not self.worst:
            self.iou_worst, self.worst = iou, name
        self.holes += traced.holes
        self.holes_lost += traced.holes - traced.bridged

    def note(self, what: str, count: int = 1) -> None:
        """Count something that the user must know."""
        self.notes[what] = self.notes.get(what, 0) + count

    def summary(self) -> dict[str, object]:
        """For ``export.json`` and for JSON on stdout."""
        out: dict[str, object] = {
            "images": self.images,
            "masks": self.masks,
            "empty": self.empty,
            "filtered": self.filtered,
        }
        if self.split_images:
            out["split"] = self.split_images
        if self.root is not None:
            out["image_root"] = self.root
        if self.measured:
            out["polygons"] = {
                "masks": self.measured,
                "mean_iou": self.iou_sum / self.measured,
                "worst_iou": self.iou_worst,
                "worst": self.worst,
                "holes": self.holes,
                "holes_lost": self.holes_lost,
                "masks_split": self.split,
            }
        if self.hidden:
            out["pixels_hidden"] = self.hidden
        if self.notes:
            out["notes"] = self.notes
        return out | ({"remarks": self.remarks} if self.remarks else {})


@dataclass(frozen=True, slots=True)
class Labeled:
    """One mask with its category.

    Attributes:
        number: which of its image's records it is, from 0, filtered ones counted.
        category: its place among the categories, from 0.
        annotation: the id that a COCO file gave it, or None.
        crowd: whether it is COCO's mark of several objects in one mask.
    """

    prediction: Prediction
    number: int
    category: int
    category_name: str
    annotation: int | None = None
    crowd: bool = False

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(H, W), decoded anew at each use: one image's masks need not be held together."""
        return masks.decode(self.prediction.segmentation)


class Decoded(Sequence[NDArray[np.bool_]]):
    """Masks that are decoded when they are asked for, so that one at a time is in memory."""

    def __init__(self, rles: Sequence[Rle]) -> None:
        self._rles = rles

    def __len__(self) -> int:
        return len(self._rles)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.bool_]: ...

    @overload
    def __getitem__(self, index: slice) -> Decoded: ...

    def __getitem__(self, index: int | slice) -> NDArray[np.bool_] | Decoded:
        if isinstance(index, slice):
            return Decoded(self._rles[index])
        return masks.decode(self._rles[index])


@dataclass(frozen=True, slots=True)
class LabeledImage:
    """One image as formats get it.

    Attributes:
        index: of the image in this export, from 0.
        image: as the records name it.
        target: relative path for its files, safe and unique; with the image's own suffix.
        path: where the image's file would be.
        size: (H, W); zeros for an image of the COCO file that has no record.
        items: masks that are not empty; may be none.
        empty: records whose mask is empty.
        own_name: what ``target`` would be if no name had to change.
        name: what lists of images call it.
        part: "train" or "val" where the images are split, else empty.
        entry: the image's entry in the COCO file that was given, or None.
    """

    index: int
    image: str
    target: str
    path: Path
    size: tuple[int, int]
    items: tuple[Labeled, ...]
    empty: tuple[tuple[int, Prediction], ...] = ()
    own_name: str = ""
    name: str = ""
    part: str = ""
    entry: Mapping[str, Any] | None = None

    @property
    def records(self) -> dict[int, Prediction]:
        """All records by their numbers, in order, those included whose mask is empty."""
        found = {item.number: item.prediction for item in self.items} | dict(self.empty)
        return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class Context:
    """What a format works with.

    Attributes:
        reviewed: whether a person has looked at the masks.
        taken: the highest id that an image of the COCO file has; 0 where none was given.
    """

    folder: ExportFolder
    settings: ExportSettings
    categories: Categories
    tally: ExportCounts
    open_image: OpenImage
    copy_images: bool = False
    reviewed: bool = False
    taken: int = 0

    def image(self, labeled: LabeledImage) -> NDArray[np.uint8]:
        """The image itself (H, W, 3); raises DataError where it is gone or of another size."""
        rgb = self.open_image(labeled.path)
        if rgb.shape[:2] != labeled.size:
            raise DataError(
                f"image {labeled.path} is {rgb.shape[0]}x{rgb.shape[1]} (height x width), "
                f"its masks are {labeled.size[0]}x{labeled.size[1]}",
                f"give {setting('image_root')}, so that the image is the one that was predicted on",
            )
        return rgb


class Format:
    """One open export, a context manager that closes what it holds open.

    A DataError from ``add`` fails the image; others end the run.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def spool(self, name: str) -> Spool:
        """See :meth:`risam_cli.export.folder.ExportFolder.spool`."""
        return self._stack.enter_context(self.context.folder.spool(name))

    def add(self, image: LabeledImage) -> None:
        """Write one image. A file that holds several images is written by ``finish``."""
        raise NotImplementedError

    def finish(self) -> None:
        """Write what needs all images."""


def points_text(ring: NDArray[np.float64]) -> Iterator[tuple[str, str]]:
    """A ring's coordinates with two digits behind the point, no more of them than needed."""
    for x, y in ring.tolist():
        yield f"{x:.2f}".rstrip("0").rstrip("."), f"{y:.2f}".rstrip("0").rstrip(".")


def read_back(rings: list[list[float]], size: tuple[int, int], vertices: Vertices) -> Rle:
    """What the readers that ``vertices`` are for make of rings as they were written.

    By pixel centres, that is pycocotools; by whole pixels, OpenCV's ``fillPoly`` on coordinates cut
    to whole numbers, as supervision has it.
    """
    if vertices is EDGE:
        return masks.from_polygons(rings, size)
    out = np.zeros(size, np.uint8)
    for ring in rings:
        cv2.fillPoly(out, [np.array(ring).reshape(-1, 2).astype(np.int32)], 1)
    return masks.encode(out.view(np.bool_))


def copy_image(context: Context, image: LabeledImage, folder: str) -> None:
    """Put the image's file beside its labels, where the user wants that.

    Raises:
        DataError: the image is gone, or none; a label without its image would be of no use.
    """
    if not context.copy_images:
        return
    if not os.path.isfile(image.path):  # also False for a name that no file can have
        raise DataError(
            f"image {image.path} does not exist, so it cannot be copied",
            f"give {setting('image_root', 'DIR')} where it is",
        )
    try:
        # Records name what they like: only what is an image leaves its place.
        with open_regular(image.path) as file:
            with os.fdopen(os.dup(file.fileno()), "rb") as probe:  # which Pillow may close
                Image.open(metered(probe, str(image.path)), formats=known_formats()).close()
            file.seek(0)
            context.folder.copy(file, image.path, f"{folder}/{image.target}")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        require_machine(error)
        raise DataError(
            f"image {image.path} cannot be copied: {error}", "copy it yourself"
        ) from error
