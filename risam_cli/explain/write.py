"""An explanation as files: a picture an expression, one page, and the raw maps as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from risam_cli.console.console import get_console
from risam_cli.drawing.png import encode_rgb
from risam_cli.errors import DataError, ModelError, UsageError
from risam_cli.explain.attention import Attention
from risam_cli.explain.explanation import Explained, Explanation
from risam_cli.explain.page import Card, index_html, to_html
from risam_cli.explain.picture import draw_explanation
from risam_cli.export.folder import EXPLANATION, ExportFolder, Spool
from risam_cli.export.targets import Placement, replace_suffix
from risam_cli.outputs.naming import slug
from risam_cli.outputs.records import FAILURES, failure_to_json, to_json
from risam_cli.types import Failure
from risam_cli.version import __version__

PAGE = "explain.html"
MAPS = "explain.json"
INDEX = "index.html"


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
    names = [*picture_names(explanation), PAGE, *([MAPS] if with_json else [])]
    with ExportFolder(output, EXPLANATION, names, overwrite=overwrite) as folder:
        _write(folder, "", explanation, with_json=with_json)
        folder.complete({"files": names})
    return names


def write_explanations(
    images: Sequence[str],
    explain: Callable[[str], Explanation],
    output: Path,
    *,
    with_json: bool,
    overwrite: bool,
    failures: Sequence[Failure] = (),
) -> int:
    """Writes the explanations of several images, and ``index.html``, which leads to them.

    Each image has a folder in ``images/``, called as the image is, with what
    :func:`write_explanation` writes. An image that cannot be read, that does not hold a
    point which is asked about, or for which the network fails is a line of ``failures.jsonl``.

    Args:
        images: their names, no two alike.
        explain: explains one, by its name.
        failures: of what was given beside them and names no image.

    Returns:
        How many failed.

    Raises:
        OutputError: as :func:`write_explanation`.
    """
    placement = Placement()
    for image in images:
        placement.see(image)
    cards: list[Card] = []
    model = ""
    owns = [INDEX, "images"]
    with (
        ExportFolder(output, EXPLANATION, owns, overwrite=overwrite) as folder,
        folder.spool("failures") as failed,
        get_console().progress("explain", len(images), "images") as progress,
    ):
        for failure in failures:
            _fail(failed, failure)
        for image in images:
            try:
                found = explain(image)
            except (DataError, UsageError, ModelError) as error:
                said = str(error) if isinstance(error, DataError) else f"{image}: {error}"
                stage = "predict" if isinstance(error, ModelError) else "decode"
                _fail(failed, Failure(image, image, None, stage, type(error).__name__, said))
            else:
                place = f"images/{replace_suffix(placement.target(image), '')}"
                _write(folder, f"{place}/", found, with_json=with_json)
                cards.append(Card.of(found, placement.name(image), f"{place}/{PAGE}"))
                model = found.model
            progress.advance(1, failures=failed.count)
        folder.write(INDEX, index_html(cards, model).encode("utf-8", "backslashreplace"))
        if failed.count:
            folder.publish(FAILURES, [failed])
        folder.complete({"images": len(cards), "failures": failed.count})
        return failed.count


def _fail(failed: Spool, failure: Failure) -> None:
    get_console().warn(failure.message)
    failed.add(failure_to_json(failure) + "\n")


def _write(folder: ExportFolder, place: str, explanation: Explanation, *, with_json: bool) -> None:
    page = to_html(explanation).encode("utf-8", "backslashreplace")
    pictures = picture_names(explanation)
    for name, explained in zip(pictures, explanation.expressions, strict=True):
        folder.write(place + name, encode_rgb(draw_explanation(explanation, explained)))
    folder.write(place + PAGE, page)
    if with_json:
        folder.publish(place + MAPS, list(json_pieces(explanation)))


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
