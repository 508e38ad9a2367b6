"""labelme: one JSON file an image, polygons (holes bridged) or masks.

A mask of several parts becomes several polygons with one ``group_id``, which is how labelme says
that shapes belong to one object. The expression stands in ``description``.
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from risam_cli.drawing.png import encode_mask
from risam_cli.export.format import Format, Labeled, LabeledImage, copy_image, read_back
from risam_cli.export.targets import replace_suffix
from risam_cli.masks import rle as masks
from risam_cli.masks.outlines import CENTER, EDGE

_VERSION = "5.5.0"  # the first whose loader knows all that is written here


class Labelme(Format):
    """Writes ``labelme/…json``; the file is complete as soon as its image is."""

    def add(self, image: LabeledImage) -> None:
        """Write one image's file."""
        name = f"labelme/{replace_suffix(image.target, '.json')}"
        copy_image(self.context, image, "labelme")
        copied = self.context.copy_images
        image_path = Path(image.target).name if copied else self._beside(name, image)
        head = {"version": _VERSION, "flags": {}}
        tail = {
            "imagePath": image_path,
            "imageData": None,
            "imageHeight": image.size[0],
            "imageWidth": image.size[1],
        }
        # One shape a line: what indents every number is ten times slower.
        shapes = ",\n".join(_dump(shape) for item in image.items for shape in self._shapes(item))
        text = f'{_dump(head)[:-1]},\n"shapes": [\n{shapes}\n],\n{_dump(tail)[1:]}\n'
        self.context.folder.write(name, text.encode("utf-8", "backslashreplace"))

    def _beside(self, name: str, image: LabeledImage) -> str:
        """The image's place as seen from the JSON file; labelme opens it from there."""
        start = (self.context.folder.path / name).parent.resolve()
        try:
            return Path(os.path.relpath(image.path.resolve(), start)).as_posix()
        except (ValueError, OSError):  # another drive; a path that cannot be
            return image.image

    def _shapes(self, item: Labeled) -> list[dict[str, Any]]:
        p = item.prediction
        mask = item.mask
        if self.context.settings.shapes == "mask":
            return [_shape(item, "mask", *_cropped(mask, p.bbox))]
        traced = self.context.settings.trace(mask, EDGE)
        rings = [ring.round(2).tolist() for ring in traced.rings]
        size = (p.height, p.width)
        if self.context.settings.vertices_of(EDGE) is EDGE:
            back = masks.encode(_filled(rings, size))
        else:
            back = read_back([np.ravel(ring).tolist() for ring in rings], size, CENTER)
        self.context.tally.measure(p.id or p.image, p.segmentation, back, traced)
        group = item.number if len(rings) > 1 else None
        return [_shape(item, "polygon", ring, None, group) for ring in rings]


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shape(
    item: Labeled, kind: str, points: list[list[float]], mask: str | None, group: int | None = None
) -> dict[str, Any]:
    return {
        "label": item.category_name,
        "points": points,
        "group_id": group,
        "description": item.prediction.expression,
        "shape_type": kind,
        "flags": {},
        "mask": mask,
        **({} if item.prediction.score is None else {"score": item.prediction.score}),
        "exported_label": item.category_name,  # by which a changed one is known again
    }


def _cropped(
    mask: NDArray[np.bool_], bbox: tuple[float, float, float, float]
) -> tuple[list[list[float]], str]:
    """The box's first and last pixel, and the mask within as a PNG in base64."""
    x, y, w, h = (int(v) for v in bbox)
    png = encode_mask(mask[y : y + h, x : x + w])
    return [[x, y], [x + w - 1, y + h - 1]], base64.b64encode(png).decode("ascii")


def _filled(rings: list[list[list[float]]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """What labelme makes of polygons: Pillow's fill, outline included."""
    canvas = Image.new("L", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    for ring in rings:
        draw.polygon([(x, y) for x, y in ring], outline=1, fill=1)
    return np.asarray(canvas).astype(np.bool_)
