"""What the network looked at: its two attention maps, by word and by region of the picture.

The paper draws them in its Figure 1. For each word, Language-Guided Attention weighs the regions
that correspond to it; for each region, Vision-Guided Attention weighs the words that inform it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from risam_cli.data.images.transforms import fit_size
from risam_cli.errors import UsageError
from risam_cli.inference.pipeline import Encoded, Session
from risam_cli.model.mutual_aware_attention import AttentionMaps
from risam_cli.weights.tokenizer import Piece, TextTokenizer

Weights = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Word:
    """A word of the expression, or a special token of the text encoder.

    Attributes:
        text: as it stands in the expression; a special token by its own name.
        tokens: the tokens that it is made of, by number.
        special: it is no word, but a token that the text encoder adds, such as ``[CLS]``.
        unknown: the text encoder does not know it: it sees one token for all such words.
    """

    text: str
    tokens: tuple[int, ...]
    special: bool = False
    unknown: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Attention:
    """The attention maps of one expression over one image, as the network computed them.

    Regions are the cells of the encoder's grid that hold some of the picture; T counts tokens,
    special ones included, padding left out.

    Attributes:
        size: (H, W) of the image in pixels.
        tokens: T texts, as the vocabulary writes them.
        words: the words that they make, special tokens marked, in order.
        cells: regions of the encoder's whole grid, those of the padding too.
        extent: (height, width) of the picture in cells; the last row and column may be cut.
        regions_of_token: (blocks, heads, T, rows, columns), Language-Guided Attention: each
            token's weights over regions. With ``padding`` they sum to 1. None where the model has
            no such branch.
        padding: (blocks, heads, T), the weight that fell outside of the picture; or None.
        tokens_of_region: (blocks, heads, rows, columns, T), Vision-Guided Attention: each
            region's weights over tokens, summing to 1. None where the model has no such branch.
    """

    expression: str
    tokens: tuple[str, ...]
    words: tuple[Word, ...]
    size: tuple[int, int]
    cells: int
    extent: tuple[float, float]
    regions_of_token: Weights | None
    padding: Weights | None
    tokens_of_region: Weights | None

    def __repr__(self) -> str:
        rows, columns = self.grid
        return (
            f"<Attention of {self.expression!r}: {len(self.words)} words, {rows} x {columns} "
            f"regions, {self.blocks} blocks, {self.heads} heads>"
        )

    @property
    def blocks(self) -> int:
        """Mutual-Aware Attention blocks of the model; 0 where it has none."""
        return 0 if self._any is None else self._any.shape[0]

    @property
    def heads(self) -> int:
        """Heads of each block."""
        return 0 if self._any is None else self._any.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of regions that hold some of the picture."""
        height, width = self.extent
        return int(np.ceil(height)), int(np.ceil(width))

    @property
    def _any(self) -> Weights | None:
        return self.tokens_of_region if self.regions_of_token is None else self.regions_of_token

    @property
    def missing(self) -> tuple[str, ...]:
        """What the model has not, and so cannot be shown, a line each."""
        if self._any is None:
            return (
                "this model has no Mutual-Aware Attention, so there are no attention maps: only "
                "its mask is shown",
            )
        lines = []
        if self.regions_of_token is None:
            lines.append(
                "this model has no Language-Guided Attention, so which regions a word attends to "
                "cannot be shown"
            )
        if self.tokens_of_region is None:
            lines.append(
                "this model has no Vision-Guided Attention, so which words inform a region cannot "
                "be shown"
            )
        return tuple(lines)

    def regions_of_words(self, block: int | None = None, head: int | None = None) -> Weights | None:
        """(W, rows, columns): each word's weights over regions, the mean over its tokens.

        Args:
            block, head: one of them, counted from 0; None is the mean over all.
        """
        if self.regions_of_token is None:
            return None
        chosen = _chosen(self.regions_of_token, block, head)  # (T, rows, columns)
        return np.stack([chosen[list(word.tokens)].mean(axis=0) for word in self.words])

    def padding_of_words(self, block: int | None = None, head: int | None = None) -> Weights | None:
        """(W,): the weight of each word that fell outside of the picture."""
        if self.padding is None:
            return None
        chosen = _chosen(self.padding, block, head)
        return np.array([chosen[list(word.tokens)].mean() for word in self.words], np.float32)

    def words_of_regions(self, block: int | None = None, head: int | None = None) -> Weights | None:
        """(rows, columns, W): each region's weights over words, the sum over their tokens."""
        if self.tokens_of_region is None:
            return None
        chosen = _chosen(self.tokens_of_region, block, head)  # (rows, columns, T)
        return np.stack([chosen[..., list(word.tokens)].sum(axis=-1) for word in self.words], -1)

    def region_at(self, x: float, y: float) -> tuple[int, int]:
        """Row and column of the region that a pixel of the image lies in.

        Raises:
            UsageError: the point is not in the image.
        """
        height, width = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(
                f"the point {x:g},{y:g} is not in the image of {width}x{height} pixels",
                f"give X in 0..{width - 1} and Y in 0..{height - 1}",
            )
        return int(y / height * self.extent[0]), int(x / width * self.extent[1])


def explain(session: Session, tokenizer: TextTokenizer, encoded: Encoded, text: str) -> Attention:
    """The attention maps of one expression over an encoded image.

    Raises:
        ModelError: the network failed on it.
    """
    pieces = tokenizer.pieces(text)
    size = encoded.image.size
    side = session.segmenter.frames[0].height
    grid = encoded.features.visual.shape[-2:]
    fitted = fit_size(*size, side)
    extent = fitted[0] * grid[0] / side, fitted[1] * grid[1] / side
    maps = session.attention(encoded, [text])
    regions, padding = _regions_of_token(maps, (grid[0], grid[1]), extent)
    return Attention(
        expression=text,
        tokens=tuple(piece.text for piece in pieces),
        words=words_of(text, pieces),
        size=size,
        cells=grid[0] * grid[1],
        extent=extent,
        regions_of_token=regions,
        padding=padding,
        tokens_of_region=_tokens_of_region(maps, (grid[0], grid[1]), extent),
    )


def words_of(text: str, pieces: Sequence[Piece]) -> tuple[Word, ...]:
    """The words of an expression from its tokens: neighbours of one word are put together."""
    words: list[Word] = []
    groups: list[list[int]] = []
    for number, piece in enumerate(pieces):
        before = pieces[number - 1].word if number else None
        if piece.word is not None and piece.word == before:
            groups[-1].append(number)
        else:
            groups.append([number])
    for group in groups:
        first, last = pieces[group[0]], pieces[group[-1]]
        special = first.word is None
        shown = "" if special else text[first.span[0] : last.span[1]].strip()
        unknown = any(pieces[number].unknown for number in group)
        words.append(Word(shown or first.text, tuple(group), special, unknown))
    return tuple(words)


def _regions_of_token(
    maps: Sequence[AttentionMaps], grid: tuple[int, int], extent: tuple[float, float]
) -> tuple[Weights | None, Weights | None]:
    found = [_array(one.regions_of_word) for one in maps if one.regions_of_word is not None]
    if not found:
        return None, None
    whole = np.stack(found)  # (blocks, heads, T, N)
    whole = whole.reshape(*whole.shape[:3], *grid)
    inside = whole[..., : int(np.ceil(extent[0])), : int(np.ceil(extent[1]))]
    outside = whole.sum(axis=(-1, -2)) - inside.sum(axis=(-1, -2))
    return np.ascontiguousarray(inside), np.maximum(outside, 0)


def _tokens_of_region(
    maps: Sequence[AttentionMaps], grid: tuple[int, int], extent: tuple[float, float]
) -> Weights | None:
    found = [_array(one.words_of_region) for one in maps if one.words_of_region is not None]
    if not found:
        return None
    whole = np.stack(found)  # (blocks, heads, N, T)
    whole = whole.reshape(*whole.shape[:2], *grid, whole.shape[-1])
    rows, columns = int(np.ceil(extent[0])), int(np.ceil(extent[1]))
    return np.ascontiguousarray(whole[:, :, :rows, :columns])


def _array(tensor: Tensor) -> Weights:
    """The map of the only expression, on the host."""
    return tensor[0].float().cpu().numpy()


def _chosen(weights: Weights, block: int | None, head: int | None) -> Weights:
    """Of (blocks, heads, …) one of each, or the mean."""
    by_head = weights.mean(axis=0) if block is None else weights[block]
    return np.asarray(by_head.mean(axis=0) if head is None else by_head[head], np.float32)
