"""COCO: ``instances.json`` with RLE or polygons, and ``results.json`` for ``loadRes``.

Beside what COCO asks for, an annotation carries ``score``, ``expression`` and ``record_id``, and
the file has ``expressions``, as the project's own readers take them: what referred to nothing is
kept there, though it has no annotation. Instances of an expression are its annotations. Expressions
are marked ``pseudo`` unless a person has looked at them: their truth is a model's answer, which
training may weigh less. A record without a score has none here either; pycocotools' ``COCOeval``
asks for one, ``loadRes`` does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

from risam_cli.export.format import Context, Format, Labeled, LabeledImage, copy_image, read_back
from risam_cli.masks.outlines import EDGE
from risam_cli.types import Prediction


class _Coco(Format):
    """The sections of ``instances.json``, each growing on disk until it is put together."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._annotation = 0
        self._expression = 0

    def __enter__(self) -> Self:
        self._images = self.spool("images")
        self._annotations = self.spool("annotations")
        self._expressions = self.spool("expressions")
        return self

    def add(self, image: LabeledImage) -> None:
        """Append the image, its annotations and its expressions."""
        image_id = self._add_image(image)
        written = {}
        for item in image.items:
            self._annotation += 1
            own = self._annotation if item.annotation is None else item.annotation
            written[item.number] = (item.prediction, [own])
            self._add_item(image_id, item, own)
        empty = {number: (prediction, list[int]()) for number, prediction in image.empty}
        whole: dict[object, tuple[Prediction, list[int]]] = {}
        for number, (prediction, ids) in sorted((written | empty).items()):
            alone = prediction.instance is None
            key = number if alone else (prediction.id, prediction.expression)
            whole.setdefault(key, (prediction, []))[1].extend(ids)
        for prediction, ids in whole.values():
            self._add_expression(image_id, prediction, ids)

    def _add_image(self, image: LabeledImage) -> Any:
        """Append the image's entry, as it was given but for a new name, or a new one; its id."""
        copy_image(self.context, image, "images")
        name = image.target if self.context.copy_images else image.name
        row: Mapping[str, Any]
        if image.entry is None:
            height, width = image.size
            number = self.context.taken + image.index + 1
            row = {"id": number, "file_name": name, "height": height, "width": width}
        elif name == image.image:
            row = image.entry
        else:
            row = {**image.entry, "file_name": name}
        self._images.add(_dump(row), between=",\n")
        return row["id"]

    def _add_item(self, image_id: Any, item: Labeled, annotation: int) -> None:
        p = item.prediction
        row = {
            "id": annotation,
            "image_id": image_id,
            "category_id": self.context.categories.coco_ids[item.category],
            "segmentation": self.segmentation(item),
            "area": p.area,
            "bbox": list(p.bbox),
            "iscrowd": int(item.crowd),
            **_score(p),
            "expression": p.expression,
            "record_id": p.id,
        }
        row |= {} if p.instance is None else {"instance": p.instance}
        self._annotations.add(_dump(row), between=",\n")

    def _add_expression(self, image_id: Any, p: Prediction, ids: list[int]) -> None:
        self._expression += 1
        row = {
            "id": self._expression,
            "image_id": image_id,
            "ann_ids": ids,
            "text": p.expression,
            "record_id": p.id,
        }
        row |= {} if self.context.reviewed else {"pseudo": True}
        self._expressions.add(_dump(row), between=",\n")

    def segmentation(self, item: Labeled) -> Any:
        """The annotation's mask as this kind writes it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Put ``instances.json`` together."""
        known = self.context.categories
        categories = [
            {"id": own, "name": name} for own, name in zip(known.coco_ids, known.names, strict=True)
        ]
        self.context.folder.publish(
            "instances.json",
            [
                '{"info": {"description": "masks of risam"},\n"licenses": [],\n"images": [\n',
                self._images,
                '\n],\n"annotations": [\n',
                self._annotations,
                '\n],\n"expressions": [\n',
                self._expressions,
                '\n],\n"categories": [\n',
                ",\n".join(_dump(category) for category in categories),
                "\n]}\n",
            ],
        )


class CocoMasks(_Coco):
    """Exact: RLE, and the results file."""

    def __enter__(self) -> Self:
        self._results = self.spool("results")
        return super().__enter__()

    def segmentation(self, item: Labeled) -> Any:
        """RLE, compressed."""
        return item.prediction.segmentation

    def _add_item(self, image_id: Any, item: Labeled, annotation: int) -> None:
        super()._add_item(image_id, item, annotation)
        p = item.prediction
        row = {
            "image_id": image_id,
            "category_id": self.context.categories.coco_ids[item.category],
            "segmentation": p.segmentation,
            "bbox": list(p.bbox),
            **_score(p),
        }
        self._results.add(_dump(row), between=",\n")

    def finish(self) -> None:
        """Put both files together."""
        super().finish()
        self.context.folder.publish("results.json", ["[\n", self._results, "\n]\n"])


class CocoPolygons(_Coco):
    """Polygons, holes bridged; filled by pixel centres as pycocotools does."""

    def segmentation(self, item: Labeled) -> Any:
        """Flat lists x, y, … with two digits behind the point."""
        traced = self.context.settings.trace(item.mask, EDGE)
        rings = [ring.round(2).ravel().tolist() for ring in traced.rings]
        p = item.prediction
        vertices = self.context.settings.vertices_of(EDGE)
        back = read_back(rings, (p.height, p.width), vertices)
        self.context.tally.measure(p.id or p.image, p.segmentation, back, traced)
        return rings


def _score(p: Prediction) -> dict[str, float]:
    """The score, where the record has one: none is invented."""
    return {} if p.score is None else {"score": p.score}


def _dump(row: object) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))
