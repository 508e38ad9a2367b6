"""An explanation as files: a picture an expression, one page, and the raw maps as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from risam_cli.drawing.png import encode_rgb
from risam_cli.explain.attention import Attention
from risam_cli.explain.explanation import Explained, Explanation
from risam_cli.explain.page import to_html
from risam_cli.explain.picture import draw_explanation
from risam_cli.export.folder import EXPLANATION, ExportFolder
from risam_cli.outputs.naming import slug
from risam_cli.outputs.records import to_json
from risam_cli.version import __version__

PAGE = "explain.html"
MAPS = "explain.json"


def picture_names(explanation: Explanation) -> list[str]:
    """File names of the pictures, one for each expression."""
    names = []
    for number, explained in enumerate(explanation.expressions):
        words = slug(explained.attention.expression)
        names.append(f"{number}{'-' if words else ''}{words}.png")
    return names


def write_explanation(
    explanation: Explanation, output: Path, *, with_json: bool, overwrite: bool
) -> list[str]:
    """Writes the pictures, the page and, if wished, the raw maps; each whole or not at all.

    Returns:
        Names of the files, relative to ``output``.

    Raises:
        OutputError: the folder has files and ``overwrite`` is not set, or cannot be written.
    """
    page = to_html(explanation).encode("utf-8", "backslashreplace")
    pictures = picture_names(explanation)
    names = [*pictures, PAGE, *([MAPS] if with_json else [])]
    with ExportFolder(output, EXPLANATION, names, overwrite=overwrite) as folder:
        for name, explained in zip(pictures, explanation.expressions, strict=True):
            folder.write(name, encode_rgb(draw_explanation(explanation, explained)))
        folder.write(PAGE, page)
        if with_json:
            folder.publish(MAPS, list(json_pieces(explanation)))
        folder.complete({"files": names})
    return names


# --- raw maps -------------------------------------------------------------------------------------


def json_pieces(explanation: Explanation) -> Iterator[str]:
    """``explain.json`` in pieces, an expression each; its fields are in ``docs/explain.md``."""
    first = explanation.expressions[0].attention
    height, width = explanation.rgb.shape[:2]
    head = {
        "risam": __version__,
        "image": explanation.image,
        "height": height,
        "width": width,
        "model": {"name": explanation.model, "hash": explanation.model_hash},
        "device": explanation.device,
        "blocks": first.blocks,
        "heads": first.heads,
        "grid": list(first.grid),
        "cells": first.cells,
        "extent": list(first.extent),
        "missing": list(explanation.missing),
        "shown": {"block": explanation.block, "head": explanation.head},
    }
    yield json.dumps(head)[:-1] + ', "expressions": [\n'
    for number, explained in enumerate(explanation.expressions):
        text = json.dumps(_expression(explanation, explained), allow_nan=False)
        yield ("" if number == 0 else ",\n") + text
    yield "\n]}\n"


def _expression(explanation: Explanation, explained: Explained) -> dict[str, Any]:
    attention = explained.attention
    return {
        "prediction": json.loads(to_json(explained.prediction)),
        "tokens": list(attention.tokens),
        "words": [
            {
                "text": word.text,
                "tokens": list(word.tokens),
                "special": word.special,
                "unknown": word.unknown,
            }
            for word in attention.words
        ],
        "points": _points(explanation, attention),
        "regions_of_token": _numbers(attention.regions_of_token),
        "padding": _numbers(attention.padding),
        "tokens_of_region": _numbers(attention.tokens_of_region),
    }


def _points(explanation: Explanation, attention: Attention) -> list[dict[str, Any]]:
    weights = attention.words_of_regions(explanation.block, explanation.head)
    if weights is None:
        return []
    points = []
    for x, y in explanation.shown_points:
        row, column = attention.region_at(x, y)
        own = weights[row, column]
        points.append({"x": x, "y": y, "row": row, "column": column, "words": _numbers(own)})
    return points


def _numbers(weights: NDArray[np.float32] | None) -> Any:
    """Nested lists; each number in the fewest digits that tell its float32 from all others."""
    if weights is None:
        return None
    if weights.ndim > 2:  # piece by piece: as text a number takes sixteen times its room
        return [_numbers(one) for one in weights]
    return weights.astype("U16").astype(np.float64).tolist()
