"""A model at an image: asks it for masks together with its attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from risam_cli.errors import ModelError, UsageError
from risam_cli.explain.attention import explain
from risam_cli.explain.explanation import Explained, Explanation, Shown
from risam_cli.inference.device import describe_device
from risam_cli.inference.pipeline import Encoded, Session
from risam_cli.segmenters.risam import RisamSegmenter
from risam_cli.types import Expression, Sample


def explain_image(
    session: Session,
    encoded: Encoded,
    image: str,
    rgb: NDArray[np.uint8],
    expressions: Sequence[str],
    shown: Shown,
    no_target_threshold: float,
) -> Explanation:
    """What the network looked at for each of the expressions.

    Args:
        session: of a RISAM model.
        image: the image's name; rgb: (H, W, 3) uint8.
        no_target_threshold: probability of "nothing fits" above which a mask is emptied.

    Raises:
        UsageError: a point that is not in the image, a block or head that there is not.
        ModelError: the network failed.
    """
    segmenter = cast(RisamSegmenter, session.segmenter)
    explained = []
    for text in expressions:
        attention = explain(session, segmenter.loaded.tokenizer, encoded, text)
        require_chosen(shown, segmenter.name, attention.blocks, attention.heads)
        for x, y in shown.points:
            attention.region_at(x, y)
        sample = Sample(image, Path(image), (Expression(f"{image}#0", text),))
        found = session.ask(encoded, sample, no_target_threshold)
        if found.failures:
            raise ModelError(found.failures[0].message)
        explained.append(Explained(found.predictions[0], attention))
    some = explained[0].attention.blocks > 0
    return Explanation(
        image,
        rgb,
        segmenter.name,
        segmenter.hash,
        describe_device(session.settings.device),
        tuple(explained),
        shown.points,
        shown.grid,
        shown.block if some else None,
        shown.head if some else None,
    )


def require_chosen(shown: Shown, model: str, blocks: int, heads: int) -> None:
    """Refuse a block or head that a model has not; one without blocks has nothing to choose.

    Raises:
        UsageError: naming it and the model.
    """
    for name, value, count in (("block", shown.block, blocks), ("head", shown.head, heads)):
        if value is not None and count and not 0 <= value < count:
            raise UsageError(
                f"{name} {value}: the model {model!r} has {count} {name}s",
                f"give 0 to {count - 1}",
            )
