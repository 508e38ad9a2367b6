"""What the network looked at: the maps of one image and its expressions, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from risam_cli.explain.attention import Attention
from risam_cli.types import Prediction

Point = tuple[float, float]


_TELLS_LITTLE = re.compile(
    "a|an|the|of|in|on|at|to|with|and|is|are|that|this|it|its|by|from|for|as|be|who|which"
)
"""Words that are rarely what a phrase turns on."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One expression: its answer and its attention."""

    prediction: Prediction
    attention: Attention

    def telling_word(self, block: int | None = None, head: int | None = None) -> int | None:
        """The word whose attention is gathered in the fewest regions (ours).

        Special tokens never count, and articles, prepositions and words that the model does not
        know only where there are no others. None where there is no word, or the model has no map.
        """
        regions = self.attention.regions_of_words(block, head)
        words = [k for k, word in enumerate(self.attention.words) if not word.special]
        if regions is None or not words:
            return None
        full = [
            k
            for k in words
            if not self.attention.words[k].unknown
            and not _TELLS_LITTLE.fullmatch(self.attention.words[k].text.lower())
        ]
        return min(full or words, key=lambda k: spread(regions[k]))


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """All that is shown of one image.

    Attributes:
        image: its name.
        rgb: (H, W, 3) uint8, upright.
        model, model_hash, device: what computed it, in words.
        expressions: at least one.
        points: (x, y) in pixels of the image, chosen by the user; may be empty.
        grid: where no point is chosen, so many points along the longer side.
        block, head: what the picture shows, counted from 0; None is the mean over all.
    """

    image: str
    rgb: NDArray[np.uint8]
    model: str
    model_hash: str
    device: str
    expressions: tuple[Explained, ...]
    points: tuple[Point, ...] = ()
    grid: int = 5
    block: int | None = None
    head: int | None = None

    def __repr__(self) -> str:
        asked = ", ".join(repr(one.attention.expression) for one in self.expressions)
        return f"<{type(self).__name__} of {asked} in {self.image!r}>"

    @property
    def missing(self) -> tuple[str, ...]:
        """What the model has not, and so cannot be shown, a line each."""
        return self.expressions[0].attention.missing

    @property
    def shown_points(self) -> tuple[Point, ...]:
        """The chosen points, or those of the grid, row by row."""
        if self.points:
            return self.points
        height, width = self.rgb.shape[:2]
        step = max(height, width) / self.grid
        rows, columns = max(1, round(height / step)), max(1, round(width / step))
        return tuple(
            ((column + 0.5) * width / columns, (row + 0.5) * height / rows)
            for row in range(rows)
            for column in range(columns)
        )


@dataclass(frozen=True, slots=True)
class Shown:
    """What of an explanation is shown; see :class:`Explanation`."""

    points: tuple[Point, ...] = ()
    grid: int = 5
    block: int | None = None
    head: int | None = None


def chosen_words(block: int | None, head: int | None, attention: Attention) -> str:
    """What is shown, in words, such as ``mean of 3 blocks, head 2``."""
    blocks = f"mean of {attention.blocks} blocks" if block is None else f"block {block}"
    heads = f"mean of {attention.heads} heads" if head is None else f"head {head}"
    return f"{blocks}, {heads}"


def spread(weights: NDArray[np.float32]) -> float:
    """Over how many regions weights (rows, columns) are spread: 2 to the power of their entropy.

    One region with all the weight gives 1, even weights give their number.
    """
    total = float(weights.sum())
    share = weights[weights > 0].astype(np.float64) / total if total > 0 else np.ones(1)
    return float(np.exp(-(share * np.log(share)).sum()))
