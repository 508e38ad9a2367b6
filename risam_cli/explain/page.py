"""The attention as one page that needs nothing else: point at words, point at the image.

Maps travel as bytes, a fraction of each map's peak, and are unpacked by the page when they are
first looked at. All maps of all blocks and heads go in while the page stays small; beyond that the
means over heads, and beyond that the means over all.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from numpy.typing import NDArray

from risam_cli.drawing.drawing import no_larger, outline, webp_uri
from risam_cli.drawing.html import page_environment
from risam_cli.errors import setting, told
from risam_cli.explain.attention import Attention
from risam_cli.explain.explanation import Explained, Explanation, spread
from risam_cli.explain.picture import HEAT, word_colors

PAGE_BYTES = 6 << 20
"""Bytes of maps that a page may hold before it leaves some out."""

_SIDE = 1280  # pixels of the picture's longer side in the page
_QUALITY = 85
_CARD = 360
_RAMP = 9  # colours that the legend's gradient is made of

Key = tuple[int | None, int | None]


def to_html(explanation: Explanation) -> str:
    """The page of all expressions."""
    first = explanation.expressions[0].attention
    keys, left_out = chosen_maps(explanation)
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    picture = no_larger(explanation.rgb, _SIDE)
    height, width = picture.shape[:2]
    marks = _marks(width, height)
    padding = [e.attention.padding for e in explanation.expressions]
    page = (
        _environment()
        .get_template("explain.html.j2")
        .render(
            e=explanation,
            first=first,
            with_blocks=any(block is not None for block, _ in keys),
            with_heads=any(head is not None for _, head in keys),
            left_out=left_out,
            padded=any(one is not None and float(one.max()) > 0 for one in padding),
            picture=webp_uri(picture, _QUALITY),
            width=width,
            height=height,
            marks=marks,
            name=explanation.image.rstrip("/").rpartition("/")[2],
            # A path may go on in the next line after a slash.
            folder=Markup("/<wbr>").join(explanation.image.split("/")[:-1]),
            full_width=explanation.rgb.shape[1],
            full_height=explanation.rgb.shape[0],
            ramp=_ramp(),
            script_hash=f"sha256-{digest}",
            # Its own file, which holds nothing of anyone's; the hash above stands for exactly this.
            script=Markup(script),
            data=htmlsafe_json_dumps(_data(explanation, keys, marks)),
        )
    )
    return page.rstrip() + "\n"


@dataclass(frozen=True, slots=True)
class Card:
    """One image on the page that leads to the pages of several.

    Attributes:
        link: the address of its page from there; picture: a small one, as a ``data:`` address.
        lines: its expressions and their answers.
    """

    name: str
    link: str
    picture: str
    lines: tuple[str, ...]

    @classmethod
    def of(cls, explanation: Explanation, name: str, page: str) -> Card:
        """That of an explanation whose page lies at ``page``."""
        lines = []
        for one in explanation.expressions:
            p = one.prediction
            found = "nothing fits" if p.no_target else f"score {p.score:.2f}"
            lines.append(f"{one.attention.expression}: {found}")
        picture = webp_uri(no_larger(explanation.rgb, _CARD), _QUALITY)
        return cls(name, quote(page), picture, tuple(lines))


def index_html(cards: Sequence[Card], model: str) -> str:
    """The page that leads to those of several images."""
    page = _environment().get_template("index.html.j2").render(cards=cards, model=model)
    return page.rstrip() + "\n"


def chosen_maps(explanation: Explanation) -> tuple[list[Key], str]:
    """The blocks and heads whose maps go into the page, and a line on what stays out."""
    first = explanation.expressions[0].attention
    if not first.blocks:
        return [], ""
    start = (explanation.block, explanation.head)
    blocks: list[int | None] = [None, *range(first.blocks)]
    heads: list[int | None] = [None, *range(first.heads)]
    whole = [(block, head) for block in blocks for head in heads]
    by_block: list[Key] = [(block, None) for block in blocks]
    own = 2 * first.grid[0] * first.grid[1]
    a_key = own * sum(len(one.attention.words) for one in explanation.expressions)
    if a_key * len(whole) <= PAGE_BYTES:
        return whole, ""
    more = told(
        f"they are in explain.json ({setting('json')}), or in another run with "
        f"{setting('block')} and {setting('head')}"
    )
    if a_key * len(by_block) <= PAGE_BYTES:
        keys = list(dict.fromkeys([start, *by_block]))
        return keys, f"To keep this page small, maps of single heads are left out; {more}."
    keys = list(dict.fromkeys([start, (None, None)]))
    return keys, f"To keep this page small, maps of single blocks and heads are left out; {more}."


@cache
def _environment() -> Environment:
    return page_environment("risam_cli.explain")


@cache
def _script() -> str:
    return files("risam_cli.explain").joinpath("templates/explain.js").read_text(encoding="utf-8")


def _marks(width: int, height: int) -> tuple[int, int]:
    """Size (width, height) that outlines are drawn at: fine enough for small images too."""
    factor = max(1, -(-_SIDE // max(width, height)))
    return factor * width, factor * height


def _ramp() -> str:
    """The legend's colours as they lie over gray."""
    stops = []
    for share in np.linspace(0, 1, _RAMP):
        cover = 0.9 * share**0.5
        mixed = (1 - cover) * 80 + cover * HEAT[round(255 * share)].astype(float)
        stops.append("rgb({:.0f},{:.0f},{:.0f})".format(*mixed))
    return ", ".join(stops)


def _data(explanation: Explanation, keys: list[Key], marks: tuple[int, int]) -> dict[str, Any]:
    first = explanation.expressions[0].attention
    height, width = explanation.rgb.shape[:2]
    points = explanation.points if first.tokens_of_region is not None else ()
    return {
        "grid": list(first.grid),
        "cells": first.cells,
        "extent": list(first.extent),
        "heat": HEAT.tolist(),
        "start": {"block": _name(explanation.block), "head": _name(explanation.head)},
        "looks": first.regions_of_token is not None,
        "points": [[(x + 0.5) / width, (y + 0.5) / height] for x, y in points],
        "expressions": [
            _expression(one, (explanation.block, explanation.head), keys, marks)
            for one in explanation.expressions
        ],
    }


def _expression(
    explained: Explained, start: Key, keys: list[Key], marks: tuple[int, int]
) -> dict[str, Any]:
    attention, prediction = explained.attention, explained.prediction
    found = "The model says that nothing fits" if prediction.no_target else "Its mask is outlined"
    answer = f"{found}; score {prediction.score:.3f}."
    colors = word_colors(attention.words)
    return {
        "answer": " ".join([answer, *(f"({note})" for note in prediction.notes)]),
        "telling": explained.telling_word(*start),
        "outline": "" if prediction.no_target else outline(prediction.segmentation, marks),
        "words": [
            {
                "text": word.text,
                "special": word.special,
                "unknown": word.unknown,
                "color": list(tint),
            }
            for word, tint in zip(attention.words, colors, strict=True)
        ],
        "maps": {
            f"{_name(block)}/{_name(head)}": _maps(attention, block, head) for block, head in keys
        },
    }


def _name(number: int | None) -> str:
    return "mean" if number is None else str(number)


def _maps(attention: Attention, block: int | None, head: int | None) -> dict[str, Any]:
    """Both maps of one choice as bytes: each word's regions by its own peak, words by theirs."""
    regions = attention.regions_of_words(block, head)
    outside = attention.padding_of_words(block, head)
    heard = attention.words_of_regions(block, head)
    made: dict[str, Any] = {}
    if regions is not None and outside is not None:
        peaks = regions.max(axis=(1, 2))
        made["regions"] = {
            "data": _bytes(regions, np.maximum(peaks, 1e-30)[:, None, None]),
            "peaks": [float(peak) for peak in peaks],
            "spread": [spread(one) for one in regions],
            "padding": [float(one) for one in outside],
        }
    if heard is not None:
        peak = float(heard.max())
        made["words"] = {"data": _bytes(heard, np.float32(max(peak, 1e-30))), "peak": peak}
    return made


def _bytes(weights: NDArray[np.float32], peak: Any) -> str:
    return base64.b64encode(np.rint(255 * weights / peak).astype(np.uint8).tobytes()).decode(
        "ascii"
    )
