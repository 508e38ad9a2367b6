"""Mutual-Aware Attention: two parallel branches over one affinity [paper, Fig. 4]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from risam_cli.model.layers import MLP
from risam_cli.model.streams import LinguisticStream, Reads, VisualStream

Identity = Literal["none", "language", "both"]


@dataclass(frozen=True)
class AttentionMaps:
    """The two maps of one block, which the paper draws in its Figure 1.

    Attributes:
        words_of_region: (E, heads, N, L), for each region its words' weights, summing to 1 over
            words (Vision-Guided Attention); None where the branch is switched off.
        regions_of_word: (E, heads, L, N), for each word its regions' weights, summing to 1 over
            regions (Language-Guided Attention); None where the branch is switched off.
    """

    words_of_region: Tensor | None
    regions_of_word: Tensor | None


class MutualAwareAttention(nn.Module):
    """One block: Vision-Guided and Language-Guided Attention in parallel.

    Paper: both branches share one affinity A and its transpose; Vision-Guided Attention finds
    for each region the informative words, Language-Guided Attention for each word the
    corresponding regions. Ours: A = (F_v W_v)(F_l W_l)ᵀ/√d per head, computed once; padding is
    masked in both directions; residual, norm and FFN on both streams; position encodings are
    added to what the affinity and the visual values see.

    The visual stream of the first block is still one per image. It is projected once per image,
    and its affinity with the words of all the image's expressions is one matrix product, so
    image features are never repeated per expression.

    Args:
        dim: width of both streams; heads: attention heads; ffn_dim: hidden width of the FFNs.
        vision_guided, language_guided: False switches a branch off (the paper's ablations);
            its stream then passes through unchanged.
        identity_start: the branches that begin as an identity: "none", "language" or "both".
        reads: what the affinity's keys and the word values come from: "words", the stream that
            Language-Guided Attention has written to in the blocks before; "text", the
            linguistic features F_l; "both", F_l for keys and values, and what the words have
            seen added to the values by a projection that starts at zero.
        own_temperature: a learned factor per head on Aᵀ before its softmax over regions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn_dim: int,
        *,
        vision_guided: bool = True,
        language_guided: bool = True,
        identity_start: Identity = "none",
        reads: Reads = "words",
        own_temperature: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.reads = reads
        self.affinity_vision = nn.Linear(dim, dim)
        self.affinity_language = nn.Linear(dim, dim)
        both, language = identity_start == "both", identity_start != "none"
        self.vision_guided = Branch(dim, ffn_dim, identity_start=both) if vision_guided else None
        self.language_guided = (
            Branch(dim, ffn_dim, identity_start=language) if language_guided else None
        )
        self.value_seen = nn.Linear(dim, dim) if vision_guided and reads == "both" else None
        if self.value_seen is not None:
            _zero(self.value_seen)
        own = language_guided and own_temperature
        self.log_temperature = nn.Parameter(torch.zeros(heads)) if own else None

    def forward(
        self, visual: VisualStream, language: LinguisticStream
    ) -> tuple[VisualStream, LinguisticStream]:
        """Runs one block on a ragged batch.

        Returns:
            language-aware visual features (or ``visual`` itself where Vision-Guided Attention is
            off) and vision-aware linguistic features.
        """
        maps = self.maps(visual, language)
        seen, read = language, visual
        if self.vision_guided is not None and maps.words_of_region is not None:
            value = self.vision_guided.value(self._read(language))
            if self.value_seen is not None:
                value = value + self.value_seen(language.words)
            value = self._split(value)  # (E, heads, L, d)
            change = self._merge(maps.words_of_region @ value)  # (E, N, C)
            read = visual.with_language(self.vision_guided(visual.of_expressions(), change))
        if self.language_guided is not None and maps.regions_of_word is not None:
            value = self._split(self.language_guided.value(visual.placed))  # (V, heads, N, d)
            change = self._merge(ragged_gather(maps.regions_of_word, value, visual.owner))
            seen = language.with_vision(self.language_guided(language.words, change))
        return read, seen

    def maps(self, visual: VisualStream, language: LinguisticStream) -> AttentionMaps:
        """The one affinity A, normalized over words and over regions."""
        query = self._split(self.affinity_vision(visual.placed)) * self.scale  # (V, heads, N, d)
        placed_words = self._read(language) + language.position  # (E, L, C)
        key = self._split(self.affinity_language(placed_words))  # (E, heads, L, d)
        affinity = ragged_product(query, key, visual.owner)  # (E, heads, N, L)
        padding = ~language.valid[:, None, None, :]
        affinity = affinity.masked_fill(padding, torch.finfo(affinity.dtype).min)
        by_word = self.warmed(affinity.transpose(-1, -2))  # (E, heads, L, N)
        return AttentionMaps(
            None if self.vision_guided is None else affinity.softmax(dim=-1),
            None if self.language_guided is None else by_word.softmax(dim=-1),
        )

    def _read(self, language: LinguisticStream) -> Tensor:
        return language.words if self.reads == "words" else language.text

    def warmed(self, logits: Tensor) -> Tensor:
        """Aᵀ (..., heads, L, N) at Language-Guided Attention's own temperature."""
        if self.log_temperature is None:
            return logits
        warmed = logits * self.log_temperature.exp()[:, None, None]
        return warmed.clamp(min=torch.finfo(warmed.dtype).min)  # padding stays finite

    def _split(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        return x.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)

    @staticmethod
    def _merge(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)  # (E, heads, n, d) -> (E, n, C)


class Branch(nn.Module):
    """Value projection, output projection, and residual + norm + FFN of one stream.

    Args:
        dim: width of the stream; ffn_dim: hidden width of the FFN.
        identity_start: what attention gathers and the FFN begin at zero, so that an untrained
            branch gives its normalized stream.
    """

    def __init__(self, dim: int, ffn_dim: int, *, identity_start: bool = False) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.ffn = MLP([dim, ffn_dim, dim])
        self.norm2 = nn.LayerNorm(dim)
        if identity_start:
            _zero(self.output)
            _zero(self.ffn.layers[-1])

    def forward(self, stream: Tensor, change: Tensor) -> Tensor:
        """Maps a stream (E, n, C) and what attention gathered for it to the same shape."""
        return self.finish(stream + self.output(change))

    def finish(self, stream: Tensor) -> Tensor:
        """Norm and FFN of a stream (E, n, C) that has its change added."""
        stream = self.norm1(stream)
        return self.norm2(stream + self.ffn(stream))


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def ragged_product(query: Tensor, key: Tensor, owner: Tensor | None) -> Tensor:
    """Products of each expression's keys with its own row of queries, queries never copied.

    Args:
        query: (V, heads, N, d); key: (E, heads, L, d); owner: (E,) rows of ``query``, or None
            where row e is expression e's own.

    Returns:
        (E, heads, N, L).
    """
    if owner is None:
        return query @ key.transpose(-1, -2)
    rows, heads, regions, _ = query.shape
    length, dim = key.shape[2:]
    slot, slots = expression_slots(owner, rows)
    if _uneven(owner, rows, slots):
        parts = []
        for row, mine in _by_image(owner):
            packed = key[mine].permute(1, 3, 0, 2).reshape(heads, dim, -1)  # (heads, d, e * L)
            product = (query[row] @ packed).view(heads, regions, len(mine), length)
            parts.append(product.permute(2, 0, 1, 3))
        return torch.cat(parts)[_back(owner)]
    # Keys of all expressions of an image stand side by side: (V, heads, slots * L, d).
    packed = key.new_zeros(rows, slots, heads, length, dim)
    packed[owner, slot] = key
    packed = packed.transpose(1, 2).reshape(rows, heads, slots * length, dim)
    product = query @ packed.transpose(-1, -2)  # (V, heads, N, slots * L)
    product = product.view(rows, heads, regions, slots, length)
    return product.permute(0, 3, 1, 2, 4)[owner, slot]


def ragged_gather(weights: Tensor, value: Tensor, owner: Tensor | None) -> Tensor:
    """Weighted sums of each expression's own row of values, values never copied.

    Args:
        weights: (E, heads, L, N); value: (V, heads, N, d); owner: (E,) rows of ``value``, or
            None where row e is expression e's own.

    Returns:
        (E, heads, L, d).
    """
    if owner is None:
        return weights @ value
    rows, heads, regions, dim = value.shape
    length = weights.shape[2]
    slot, slots = expression_slots(owner, rows)
    if _uneven(owner, rows, slots):
        parts = []
        for row, mine in _by_image(owner):
            packed = weights[mine].transpose(0, 1).reshape(heads, -1, regions)  # (heads, e * L, N)
            gathered = (packed @ value[row]).view(heads, len(mine), length, dim)
            parts.append(gathered.transpose(0, 1))
        return torch.cat(parts)[_back(owner)]
    packed = weights.new_zeros(rows, slots, heads, length, regions)
    packed[owner, slot] = weights
    packed = packed.transpose(1, 2).reshape(rows, heads, slots * length, regions)
    gathered = (packed @ value).view(rows, heads, slots, length, dim)
    return gathered.transpose(1, 2)[owner, slot]


def _uneven(owner: Tensor, rows: int, slots: int) -> bool:
    """Whether packing would multiply more padding than expressions.

    One image with fifty expressions beside seven with one would cost eight times fifty.
    """
    return rows * slots > 2 * len(owner)


def _by_image(owner: Tensor) -> list[tuple[int, Tensor]]:
    """Each image that has expressions, with their numbers."""
    return [(row, (owner == row).nonzero()[:, 0]) for row in owner.unique().tolist()]


def _back(owner: Tensor) -> Tensor:
    """Brings what was gathered image by image back into the expressions' own order."""
    return owner.argsort(stable=True).argsort()


def expression_slots(owner: Tensor, rows: int) -> tuple[Tensor, int]:
    """Numbers each row's expressions from 0.

    Returns:
        (E,) number of each expression among those of its row, and the largest count of a row.
    """
    member = torch.nn.functional.one_hot(owner, rows)  # (E, V)
    slot = member.cumsum(dim=0)[torch.arange(len(owner), device=owner.device), owner] - 1
    return slot, int(member.sum(dim=0).max())
