"""CVAT for images 1.1: one XML file, polygons (holes bridged) or exact masks.

A mask of several parts becomes several polygons with one ``group_id``. ``<mask>`` holds the runs of
the box, row by row, beginning with background, as CVAT writes it from 2.3 on. The expression, the
score and the label, by which a changed one is known again, are attributes of every shape; a record
without a score has no such attribute.
"""

from __future__ import annotations

from typing import Self
from xml.sax.saxutils import escape, quoteattr

import numpy as np
from numpy.typing import NDArray

from risam_cli.console.text import sanitize
from risam_cli.errors import setting, told
from risam_cli.export.format import (
    Format,
    Labeled,
    LabeledImage,
    copy_image,
    points_text,
    read_back,
)
from risam_cli.masks.outlines import EDGE

LONGEST_LABEL = 64
"""Characters that CVAT takes for a label's name."""

_ATTRIBUTES = """<attributes>
<attribute><name>expression</name><mutable>False</mutable><input_type>text</input_type>\
<default_value></default_value><values></values></attribute>
<attribute><name>score</name><mutable>False</mutable><input_type>text</input_type>\
<default_value></default_value><values></values></attribute>
<attribute><name>exported_label</name><mutable>False</mutable><input_type>text</input_type>\
<default_value></default_value><values></values></attribute>
</attributes>"""


class Cvat(Format):
    """Images grow on disk; the labels, which come first in the file, are known at the end."""

    def __enter__(self) -> Self:
        self._images = self.spool("images")
        return self

    def add(self, image: LabeledImage) -> None:
        """Append one ``<image>``."""
        copy_image(self.context, image, "images")
        height, width = image.size
        name = image.target if self.context.copy_images else image.name
        shapes = "".join(self._shapes(item) for item in image.items)
        self._images.add(
            f'<image id="{image.index}" name={_attribute(name)} width="{width}" '
            f'height="{height}">\n{shapes}</image>\n'
        )

    def _shapes(self, item: Labeled) -> str:
        p = item.prediction
        mask = item.mask
        label = f'label={_attribute(item.category_name)} source="auto" occluded="0"'
        inside = (
            f'<attribute name="expression">{_text(p.expression)}</attribute>'
            f'<attribute name="exported_label">{_text(item.category_name)}</attribute>'
        )
        if p.score is not None:
            inside += f'<attribute name="score">{p.score:.4f}</attribute>'
        if self.context.settings.shapes == "mask":
            x, y, w, h = (int(v) for v in p.bbox)
            runs = ", ".join(map(str, _runs(mask[y : y + h, x : x + w])))
            place = f'left="{x}" top="{y}" width="{w}" height="{h}"'
            return f'<mask {label} rle="{runs}" {place} z_order="0">{inside}</mask>\n'
        traced = self.context.settings.trace(mask, EDGE)
        group = f' group_id="{item.number + 1}"' if len(traced.rings) > 1 else ""
        rings = [list(points_text(ring)) for ring in traced.rings]
        flat = [[float(v) for point in ring for v in point] for ring in rings]
        vertices = self.context.settings.vertices_of(EDGE)
        back = read_back(flat, (p.height, p.width), vertices)
        self.context.tally.measure(p.id or p.image, p.segmentation, back, traced)
        texts = [";".join(f"{x},{y}" for x, y in ring) for ring in rings]
        return "".join(
            f'<polygon {label} points="{text}" z_order="0"{group}>{inside}</polygon>\n'
            for text in texts
        )

    def finish(self) -> None:
        """Put ``annotations.xml`` together."""
        names = self.context.categories.names
        long = sum(len(name) > LONGEST_LABEL for name in names)
        if long:
            self.context.tally.note(
                f"labels over the {LONGEST_LABEL} characters that CVAT takes; "
                + told(f"{setting('category_map')} or {setting('one_class')} gives shorter ones"),
                long,
            )
        labels = "".join(
            f"<label><name>{_text(name)}</name>{_ATTRIBUTES}</label>\n" for name in names
        )
        head = (
            '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'
            f"<meta><task><size>{self._images.count}</size><mode>annotation</mode>"
            f"<labels>\n{labels}</labels></task></meta>\n"
        )
        self.context.folder.publish("annotations.xml", [head, self._images, "</annotations>\n"])


def _runs(mask: NDArray[np.bool_]) -> list[int]:
    """Run lengths of a mask row by row, the first of background."""
    flat = np.concatenate(([False], mask.ravel()))
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(v) for v in np.diff(np.concatenate(([0], edges, [mask.size])))]


def _text(text: str) -> str:
    """Text for an element. Characters that XML cannot hold become escapes; line ends stay."""
    return escape(_legal(text)).replace("\r", "&#13;")


def _attribute(text: str) -> str:
    return quoteattr(_legal(text))


def _legal(text: str) -> str:
    return "".join(
        c
        if c in "\t\n\r" or "\x20" <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff"
        else sanitize(c)
        if sanitize(c) != c
        else f"\\u{ord(c):04x}"
        for c in text
    )
