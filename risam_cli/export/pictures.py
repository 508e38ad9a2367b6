"""Pictures that need the image itself: overlays, and cut-outs with transparency."""

from __future__ import annotations

import json

import cv2
import numpy as np

from risam_cli.drawing.overlay import draw_overlay
from risam_cli.drawing.png import encode_rgb
from risam_cli.errors import OutputError
from risam_cli.export.format import Context, Decoded, Format, LabeledImage
from risam_cli.export.targets import replace_suffix
from risam_cli.outputs.gallery import Gallery, Row, encode_item, outline
from risam_cli.outputs.naming import GALLERY, MASKS, mask_name
from risam_cli.outputs.records import to_json


class Overlays(Format):
    """``overlays/…png``: one picture an image with all its masks and phrases."""

    def add(self, image: LabeledImage) -> None:
        """Write one overlay. What found nothing stands in the legend."""
        rgb = self.context.image(image)
        ordered = list(image.records.values())
        drawn = draw_overlay(
            rgb,
            Decoded([p.segmentation for p in ordered]),
            [p.expression for p in ordered],
            scores=[p.score for p in ordered],
        )
        name = f"overlays/{replace_suffix(image.target, '.png')}"
        self.context.folder.write(name, encode_rgb(drawn))


class GalleryPages(Format):
    """``gallery/``: the page that a predict run writes with ``save: html``, of anyone's masks."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._gallery = Gallery(context.folder.path, {}, context.folder.write, "export-masks")

    def add(self, image: LabeledImage) -> None:
        """Write one image's small picture and outlines, and take it into the page."""
        ordered = list(image.records.values())
        if not ordered:
            return
        masks = Decoded([p.segmentation for p in ordered])
        item = encode_item(self.context.image(image), image.size, [outline(m) for m in masks])
        name = f"{GALLERY}/items/{replace_suffix(image.target, '.js')}"
        self.context.folder.write(name, item)
        answers = [{**json.loads(to_json(p)), "mask": None} for p in ordered]
        self._gallery.add(Row(image.image, answers, (), name))

    def finish(self) -> None:
        """Write the page."""
        self._gallery.finish()


class Cutouts(Format):
    """``cutouts/…png``: each mask's box, cut from the image, transparent outside the mask."""

    def add(self, image: LabeledImage) -> None:
        """Write one picture a mask that is not empty."""
        if not image.items:
            return
        rgb = self.context.image(image)
        height, width = image.size
        padding = self.context.settings.padding
        for item in image.items:
            x, y, w, h = (int(v) for v in item.prediction.bbox)
            rows = slice(max(0, y - padding), min(height, y + h + padding))
            columns = slice(max(0, x - padding), min(width, x + w + padding))
            alpha = item.mask[rows, columns].view(np.uint8) * np.uint8(255)
            bgra = cv2.merge([*cv2.split(rgb[rows, columns])[::-1], alpha])
            done, data = cv2.imencode(".png", bgra, [cv2.IMWRITE_PNG_COMPRESSION, 1])
            if not done:
                raise OutputError(f"a cut-out of {bgra.shape} could not be written as PNG")
            p = item.prediction
            name = mask_name(image.name or p.image, item.number, p.expression).removeprefix(MASKS)
            self.context.folder.write(f"cutouts{name}", data.tobytes())
