"""PNG files: one binary mask a record, or one file an image with indices or class numbers."""

from __future__ import annotations

import io
import json
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from risam_cli.drawing.palette import color, indexed_palette
from risam_cli.drawing.png import encode_mask
from risam_cli.errors import DataError, setting
from risam_cli.export.format import Context, Format, Labeled, LabeledImage
from risam_cli.export.targets import replace_suffix
from risam_cli.outputs.naming import mask_name
from risam_cli.types import Prediction

OWNS = ("masks", "manifest.jsonl", "legend.jsonl", "categories.json")
MOST = 255
"""Values that an 8-bit PNG has beside the background."""


def open_png(context: Context) -> Format:
    """The style that the settings name."""
    kinds: dict[str, type[Format]]
    kinds = {"binary": Binary, "indexed": Indexed, "semantic": Semantic}
    return kinds[context.settings.style](context)


class _Png(Format):
    """A PNG style with one list of JSON lines, which grows on disk."""

    listing = "legend.jsonl"

    def __enter__(self) -> Self:
        self._lines = self.spool("list")
        return self

    def list(self, row: dict[str, Any]) -> None:
        """Append one line."""
        self._lines.add(json.dumps(row) + "\n")

    def finish(self) -> None:
        """Publish the list."""
        self.context.folder.publish(self.listing, [self._lines])


class Binary(_Png):
    """0 and 255, one file a record, named as ``risam predict`` names them; exact.

    ``manifest.jsonl`` beside them makes the folder an input of ``risam export-masks``.
    """

    listing = "manifest.jsonl"

    def add(self, image: LabeledImage) -> None:
        """Write every mask of the image, empty ones too."""
        for number, p in image.records.items():
            name = mask_name(image.name or p.image, number, p.expression)
            mask = Labeled(p, number, 0, "").mask
            self.context.folder.write(name, encode_mask(mask))
            self.list(
                {"id": p.id, "image": p.image, "expression": p.expression, "mask": name}
                | ({} if p.score is None else {"score": p.score})
                | {"no_target": p.no_target}
                | ({} if p.instance is None else {"instance": p.instance})
            )


class _Layered(_Png):
    """One file an image, in which a pixel has one value: small masks lie over large ones."""

    def value(self, item: Labeled, place: int) -> int:
        """The value of a mask: ``place`` is its place among the image's masks, from 0."""
        raise NotImplementedError

    def add(self, image: LabeledImage) -> None:
        """Write one image's file, and its line of the list."""
        values = {item.number: self.value(item, k) for k, item in enumerate(image.items)}
        if max(values.values(), default=0) > MOST:
            raise DataError(
                f"{image.image} needs the value {max(values.values())}, a palette has {MOST}",
                f"name fewer categories by {setting('category_map')}",
                f"write {setting('style', 'binary')}",
            )
        canvas = np.zeros(image.size, np.uint8)
        for item in sorted(image.items, key=lambda i: -i.prediction.area):
            canvas[item.mask] = values[item.number]
        name = f"masks/{replace_suffix(image.target, '.png')}"
        self.context.folder.write(name, _with_palette(canvas))
        total = sum(item.prediction.area for item in image.items)
        self.context.tally.hidden += total - int(np.count_nonzero(canvas))
        rows = [self._row(item.prediction, values[item.number]) for item in image.items]
        self.list({"image": image.image, "mask": name, "items": rows})

    @staticmethod
    def _row(p: Prediction, value: int) -> dict[str, Any]:
        row = {"value": value, "color": list(color(value - 1)), "id": p.id}
        score = {} if p.score is None else {"score": p.score}
        instance = {} if p.instance is None else {"instance": p.instance}
        return row | {"expression": p.expression, **instance, **score, "area": p.area}


class Indexed(_Layered):
    """Value k is the image's k-th mask; the palette shows it in colour."""

    def value(self, item: Labeled, place: int) -> int:
        """1, 2, … in the order of the records."""
        return place + 1


class Semantic(_Layered):
    """Value k is the k-th category of ``categories.json``, the same in every file."""

    def value(self, item: Labeled, place: int) -> int:
        """The category's number, from 1."""
        value = self.context.categories.mask_values[item.category]
        if value == 0:
            raise DataError(
                f"the category {item.category_name!r} has the number 0, which is the background's",
                "number the categories of the map from 1",
            )
        return value

    def finish(self) -> None:
        """Publish the list and the categories."""
        super().finish()
        known = self.context.categories
        rows = [
            {"value": value, "name": name, "color": list(color(value - 1))}
            for value, name in zip(known.mask_values, known.names, strict=True)
            if value
        ]
        self.context.folder.write_json(
            "categories.json", [{"value": 0, "name": "background", "color": [0, 0, 0]}, *rows]
        )


def _with_palette(values: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(values).convert("P")
    image.putpalette(indexed_palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
