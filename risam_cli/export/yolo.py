"""YOLO segmentation: one label file an image, ``data.yaml``; read by OpenCV's ``fillPoly``.

Ultralytics finds an image's labels by exchanging the last ``/images/`` of its path for
``/labels/``, so below ``images/`` there is no other folder of that name.

With ``split`` images lie in ``images/train`` and ``images/val``, and their labels likewise.

A line is one object: its class and one closed ring, in shares of the width and the height. The
format has neither holes nor parts: holes are bridged, and a mask of several parts becomes one line
each, or with ``parts="join"`` one line whose parts are joined by lines over the background.
"""

from __future__ import annotations

import json
from typing import Self

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from risam_cli.errors import setting, told
from risam_cli.export.format import Context, Format, Labeled, LabeledImage, copy_image, read_back
from risam_cli.export.targets import replace_suffix
from risam_cli.masks import rle as masks
from risam_cli.masks.outlines import CENTER, EDGE


class Yolo(Format):
    """Writes ``labels/…txt`` as images come, ``data.yaml`` at the end."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._parts = {"train": 0, "val": 0}

    def __enter__(self) -> Self:
        self._mapping = self.spool("mapping")
        return self

    def add(self, image: LabeledImage) -> None:
        """Write one label file; an empty one where nothing was found."""
        part = f"/{image.part}" if image.part else ""
        copy_image(self.context, image, f"images{part}")
        lines = [line for item in image.items for line in self._lines(item)]
        name = f"labels{part}/{replace_suffix(image.target, '.txt')}"
        self.context.folder.write(name, "".join(f"{line}\n" for line in lines).encode())
        row = {"image": image.image, "label": name}
        if image.part:
            row["split"] = image.part
            self._parts[image.part] += 1
        if self.context.copy_images:
            row["copy"] = f"images{part}/{image.target}"
            if "/" in image.target:
                self.context.tally.note(
                    "images lie in folders below images/: Ultralytics reads them, supervision's "
                    "reader takes one folder at a time"
                )
        elif image.target != image.own_name:
            self.context.tally.note(
                "labels are not named like their image, so readers will not find them by name; "
                "mapping.jsonl says which belongs to which, "
                + told(f"{setting('copy_images')} names both the same")
            )
        self._mapping.add(json.dumps(row) + "\n")

    def _lines(self, item: Labeled) -> list[str]:
        p = item.prediction
        size = (p.height, p.width)
        traced = self.context.settings.trace(item.mask, CENTER)
        texts = [_shares(ring, size) for ring in traced.rings]
        tally = self.context.tally
        if self.context.settings.vertices_of(CENTER) is CENTER:
            back = masks.encode(_filled(texts, size))
        else:
            back = read_back([ring.ravel().tolist() for ring in traced.rings], size, EDGE)
        tally.measure(p.id or p.image, p.segmentation, back, traced)
        tally.split += len(texts) > 1
        number = self.context.categories.class_numbers[item.category]
        return [f"{number} {text}" for text in texts]

    def finish(self) -> None:
        """Write ``data.yaml`` and the mapping. Numbers that no class has get a name: readers want
        all from 0 on.
        """
        known = self.context.categories
        given = dict(zip(known.class_numbers, known.names, strict=True))
        names = {k: given.get(k, f"unused {k}") for k in range(max(given, default=-1) + 1)}
        places = {"train": "images", "val": "images"}
        if self.context.settings.split:
            places = {name: f"images/{name}" for name in places}
            self.context.tally.split_images = dict(self._parts)
            if not self.context.copy_images:
                self.context.tally.remarks.append(
                    "labels only: data.yaml names images/train and images/val, where the images "
                    + told(f"must be placed; {setting('copy_images')} copies them there")
                )
        head = {**places, "nc": len(names), "names": names}
        text = yaml.safe_dump(head, allow_unicode=True, sort_keys=False, width=1 << 20)
        self.context.folder.write("data.yaml", text.encode("utf-8", "backslashreplace"))
        self.context.folder.publish("mapping.jsonl", [self._mapping])


def _shares(ring: NDArray[np.float64], size: tuple[int, int]) -> str:
    """Six digits keep a place to less than a twentieth of a pixel up to 100,000 pixels."""
    relative = ring / (size[1], size[0])
    return " ".join(f"{value:.6f}" for value in relative.ravel().tolist())


def _filled(texts: list[str], size: tuple[int, int]) -> NDArray[np.bool_]:
    """What a reader makes of lines: each filled by itself, all in one mask."""
    out = np.zeros(size, np.uint8)
    for text in texts:
        shares = np.array(text.split(), np.float32).reshape(-1, 2)
        points = np.round(shares * np.array([size[1], size[0]], np.float32)).astype(np.int32)
        cv2.fillPoly(out, [points], 1)
    return out.view(np.bool_)
