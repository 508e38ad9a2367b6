"""A model at an image: asks it for masks together with its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from risam_cli.errors import ModelError, UsageError
from risam_cli.explain.attention import explain
from risam_cli.explain.explanation import Explained, Explanation, Shown
from risam_cli.inference.device import describe_device
from risam_cli.inference.pipeline import Encoded, Session
from risam_cli.types import Expression, Sample
from risam_cli.weights.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Explainer:
    """A model at an image.

    Attributes:
        name, hash: the model's.
        no_target_threshold: probability of "nothing fits" above which a mask is emptied.
        image: the image's name; rgb: (H, W, 3) uint8.
    """

    session: Session
    tokenizer: TextTokenizer
    name: str
    hash: str
    no_target_threshold: float
    encoded: Encoded
    image: str
    rgb: NDArray[np.uint8]

    def explain(self, expressions: Sequence[str], shown: Shown) -> Explanation:
        """What the network looked at for each of the expressions.

        Raises:
            UsageError: a point that is not in the image, a block or head that there is not.
            ModelError: the network failed.
        """
        explained = tuple(self._one(text, shown) for text in expressions)
        some = explained[0].attention.blocks > 0
        return Explanation(
            self.image,
            self.rgb,
            self.name,
            self.hash,
            describe_device(self.session.settings.device),
            explained,
            shown.points,
            shown.grid,
            shown.block if some else None,
            shown.head if some else None,
        )

    def _one(self, text: str, shown: Shown) -> Explained:
        attention = explain(self.session, self.tokenizer, self.encoded, text)
        blocks, heads = attention.blocks, attention.heads
        require_chosen(shown, self.name, blocks, heads)
        for x, y in shown.points:
            attention.region_at(x, y)
        sample = Sample(self.image, Path(self.image), (Expression(f"{self.image}#0", text),))
        found = self.session.ask(self.encoded, sample, self.no_target_threshold)
        if found.failures:
            raise ModelError(found.failures[0].message)
        return Explained(found.predictions[0], attention)


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
