"""Fusion and decoding on a CPU without gradients, the expressions of an image together (ours).

It is :class:`.mutual_aware_attention.MutualAwareAttention` and
:class:`.mask_decoder.MutualAwareMaskDecoder` with the same weights and the same results up to
rounding, in an order that suits a processor. An expression has few words and an image has many
regions, so every projection between the two is folded into the side of the words
(:mod:`risam_cli.model.fast.folding`). Expressions go together as far as their regions stay in the
caches, those of a large grid one by one; what is done region by region goes some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from risam_cli.model.fast.crew import threads_of
from risam_cli.model.fast.folding import (
    Affine,
    Chain,
    FoldedGather,
    FoldedLogits,
    FoldedScatter,
    Layout,
    Norm,
    as_linear,
)
from risam_cli.model.fast.linear import linear
from risam_cli.model.layers import sine_positions_1d
from risam_cli.model.mask_decoder import (
    CrossAttention,
    Decoded,
    DecoderLayer,
    MutualAwareMaskDecoder,
)
from risam_cli.model.mutual_aware_attention import Branch, MutualAwareAttention
from risam_cli.model.risam import ImageFeatures, Risam
from risam_cli.model.text_encoder import TextFeatures

GROUP_ROWS = 2048
"""Regions of all expressions that go together; one expression may have more."""

ROWS = 1024
"""Regions that go through a chain of layers at a time."""


@dataclass(frozen=True, slots=True)
class Regions:
    """The visual stream of an image, (1, N, C), or of G expressions about it, (G, N, C).

    Attributes:
        visual: N = h·w regions; placed: the same with positions added.
        position: (N, C).
    """

    visual: Tensor
    placed: Tensor
    position: Tensor

    @classmethod
    def of(cls, visual: Tensor, position: Tensor) -> Regions:
        """Features (1 or G, N, C) with their positions."""
        return cls(visual, visual + position, position)


@dataclass(frozen=True, slots=True)
class Group:
    """Some expressions about one image.

    Attributes:
        text: linguistic features F_l of all their words, (T, C); position: (T, C).
        sentence: (G, C).
        lengths: words of each.
    """

    text: Tensor
    position: Tensor
    sentence: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, features: TextFeatures, part: list[int] | slice, dtype: torch.dtype) -> Group:
        """Some expressions, without padding."""
        words, valid = features.words[part].to(dtype), features.valid[part]
        position = _word_sines(*words.shape[1:]).to(dtype).expand_as(words)
        sentence, lengths = features.sentence[part].to(dtype), tuple(valid.sum(dim=1).tolist())
        return cls(words[valid], position[valid], sentence, lengths)


# --- the weights, as they are used ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FastBranch:
    """Norm, FFN and norm of a stream that has its change added."""

    norm1: Norm
    ffn: Chain
    norm2: Norm

    @classmethod
    def of(cls, branch: Branch) -> FastBranch:
        """Those of a branch."""
        return cls(Norm.of(branch.norm1), Chain.of(branch.ffn), Norm.of(branch.norm2))

    def __call__(self, stream: Tensor) -> Tensor:
        """Maps (..., C) to the same shape."""
        x = self.norm1(stream)
        return self.norm2(self.ffn(x).add_(x))


@dataclass(frozen=True, slots=True)
class FastBlock:
    """A block of Mutual-Aware Attention.

    Attributes:
        affinity: its logits; reads_words: what they and the values come from, or the text.
        language: Language-Guided Attention and its branch; warmth: (heads, 1, 1), its temperature.
        vision: Vision-Guided Attention and its branch; seen: what words that have seen regions add
            to its values.
    """

    affinity: FoldedLogits
    reads_words: bool
    language: tuple[FoldedGather, FastBranch] | None = None
    warmth: Tensor | None = None
    vision: tuple[FoldedScatter, FastBranch] | None = None
    seen: Affine | None = None

    @classmethod
    def of(cls, block: MutualAwareAttention) -> FastBlock:
        """That of a block."""
        heads, language, vision = block.heads, None, None
        if (branch := block.language_guided) is not None:
            gather = FoldedGather.of(branch.value, branch.output, heads)
            language = gather, FastBranch.of(branch)
        if (branch := block.vision_guided) is not None:
            scatter = FoldedScatter.of(branch.value, branch.output, heads)
            vision = scatter, FastBranch.of(branch)
        warmth, seen = block.log_temperature, block.value_seen
        return cls(
            FoldedLogits.of(block.affinity_language, block.affinity_vision, heads, block.scale),
            block.reads == "words",
            language,
            None if warmth is None else warmth.detach().exp().view(-1, 1, 1),
            vision,
            None if seen is None else Affine.of(seen),
        )

    def __call__(
        self, words: Tensor, group: Group, layout: Layout, regions: Regions
    ) -> tuple[Tensor, Regions]:
        """The words (T, C) after Language-Guided, the regions after Vision-Guided Attention."""
        read = words if self.reads_words else group.text
        keys = self.affinity.project(read + group.position)
        logits = _products(layout.by_expression(self.affinity.rows(keys)), layout, regions.placed)
        new_words = words
        if self.language is not None:
            gather, finish = self.language
            by_word = logits
            if self.warmth is not None:
                by_word = logits * layout.by_expression(self.warmth.expand(-1, len(words), 1))
            means = _means(by_word.softmax(dim=-1), layout, regions.placed)
            new_words = finish(gather(means).add_(words))
        if self.vision is not None:
            scatter, finish = self.vision
            values = scatter.values(read)
            if self.seen is not None:
                values += self.seen(words)
            logits += layout.by_expression(self.affinity.share(keys))
            rows = layout.by_expression(scatter.rows(values))
            regions = _scatter(logits, layout, rows, finish, regions)
        return new_words, regions


@dataclass(frozen=True, slots=True)
class FastLook:
    """Tokens attend regions, whose keys know their places and whose values do not."""

    logits: FoldedLogits
    gather: FoldedGather

    @classmethod
    def of(cls, cross: CrossAttention) -> FastLook:
        """That of an attention."""
        gather = FoldedGather.of(cross.value, cross.output, cross.heads)
        return cls(FoldedLogits.of_cross(cross), gather)

    def __call__(self, tokens: Tensor, layout: Layout, regions: Regions) -> Tensor:
        """Maps tokens (T, C) to the same shape."""
        rows = layout.by_expression(self.logits.rows(self.logits.project(tokens)))
        weights = _products(rows, layout, regions.placed).softmax(dim=-1)
        return self.gather(_means(weights, layout, regions.visual))


@dataclass(frozen=True, slots=True)
class FastLayer:
    """A layer of the decoder: attention of tokens to tokens, to regions, and back."""

    heads: int
    to_self: Affine
    of_self: Affine
    norm1: Norm
    look: FastLook
    norm2: Norm
    mlp: Chain
    norm3: Norm
    back: FoldedLogits
    scatter: FoldedScatter
    norm4: Norm

    @classmethod
    def of(cls, layer: DecoderLayer) -> FastLayer:
        """That of a layer."""
        own, back = layer.self_attention, layer.pixels_to_tokens
        return cls(
            own.heads,
            Affine.of(own.query, own.key, own.value),
            Affine.of(own.output),
            Norm.of(layer.norm1),
            FastLook.of(layer.tokens_to_pixels),
            Norm.of(layer.norm2),
            Chain.of(layer.mlp),
            Norm.of(layer.norm3),
            FoldedLogits.of_cross(back, tokens_are_keys=True),
            FoldedScatter.of(back.value, back.output, back.heads),
            Norm.of(layer.norm4),
        )

    def __call__(
        self, tokens: Tensor, apart: Tensor | None, layout: Layout, regions: Regions
    ) -> tuple[Tensor, Regions]:
        """Two-way attention: the new tokens (T, C) and the new regions; apart: :func:`_apart`."""
        qkv = self.to_self(tokens).view(1, len(tokens), 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (1, heads, T, d)
        told = F.scaled_dot_product_attention(q, k, v, attn_mask=apart)
        tokens = self.norm1(self.of_self(told[0].transpose(0, 1).flatten(1)).add_(tokens))
        tokens = self.norm2(self.look(tokens, layout, regions).add_(tokens))
        tokens = self.norm3(self.mlp(tokens).add_(tokens))
        keys = self.back.project(tokens)
        logits = _products(layout.by_expression(self.back.rows(keys)), layout, regions.placed)
        logits += layout.by_expression(self.back.share(keys))
        rows = layout.by_expression(self.scatter.rows(self.scatter.values(tokens)))
        return tokens, _scatter(logits, layout, rows, self.norm4, regions)


@dataclass(frozen=True, slots=True)
class FastHeads:
    """The decoder after its layers: the last attention, and the answers' MLPs.

    Attributes:
        first: the first layers of the mask's, the IoU's and the no-target MLP.
    """

    look: FastLook
    norm: Norm
    first: Affine
    mask: Chain
    iou: Chain
    no_target: Chain

    @classmethod
    def of(cls, decoder: MutualAwareMaskDecoder) -> FastHeads:
        """Those of a decoder."""
        mlps = decoder.mask_head, decoder.iou_head, decoder.no_target_head
        return cls(
            FastLook.of(decoder.final_attention),
            Norm.of(decoder.final_norm),
            Affine.of(*(mlp.layers[0] for mlp in mlps)),
            *(Chain.of(mlp, 1) for mlp in mlps),
        )

    def __call__(self, query: Tensor, regions: Regions) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries (G, C): the mask's factors (G, mask_dim), logits of IoU and no target (G,)."""
        layout = Layout.of((1,) * len(query), self.look.logits.heads)
        query = self.norm(self.look(query, layout, regions).add_(query))
        mask, iou, no_target = self.first(query, gelu=True).chunk(3, dim=-1)
        return self.mask(mask), self.iou(iou)[:, 0], self.no_target(no_target)[:, 0]


@dataclass(frozen=True, slots=True)
class FastUpsampling:
    """Four times as many rows and columns of pixels, and their product with a query.

    A transposed convolution whose stride is its size is a linear layer of each cell.

    Attributes:
        sharpen: weight (mask_dim, mask_dim, 3, 3) and bias, or None.
    """

    up1: Affine
    norm: Norm
    up2: Affine
    sharpen: Affine | None

    @classmethod
    def of(cls, decoder: MutualAwareMaskDecoder) -> FastUpsampling:
        """That of a decoder."""
        sharpen = None if decoder.sharpen is None else Affine.of(decoder.sharpen)
        up1, up2 = (Affine(*as_linear(up)) for up in (decoder.up1, decoder.up2))
        return cls(up1, Norm.of(decoder.up1_norm), up2, sharpen)

    def __call__(
        self, visual: Tensor, fine: Tensor | None, head: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Upsamples regions (G, N, C) and takes their product with head (G, mask_dim).

        Args:
            fine: (4h, 4w, mask_dim), or None.

        Returns:
            (G, 4h, 4w) logits.
        """
        (height, width), (count, channels) = grid, head.shape
        sharpen = self.sharpen if fine is not None else None
        depth = 1 if sharpen is None else channels
        # Rows and columns of 2x2 cells of 2x2 pixels.
        pixels = visual.new_empty(count, height, 2, 2, width, 2, 2, depth)
        step = max(1, ROWS // width)
        for top in range(0, height, step):
            rows = slice(top, top + step)
            x = self.up1(visual[:, top * width : (top + step) * width])
            x = F.gelu(self.norm(x.view(-1, *self.norm.weight.shape)))
            x = self.up2(x, gelu=sharpen is None)
            if sharpen is None:
                x = x.view(count, -1, channels) @ head[:, :, None]
            x = x.view(count, -1, width, 2, 2, 2, 2, depth).permute(0, 1, 3, 5, 2, 4, 6, 7)
            if fine is None or sharpen is None:
                pixels[:, rows] = x
            else:
                beside = fine.unflatten(1, (width, 2, 2)).unflatten(0, (height, 2, 2))[rows]
                torch.add(x, beside, out=pixels[:, rows])
        size = (4 * height, 4 * width)
        if sharpen is None:
            return pixels.view(count, *size)
        spread = F.gelu(pixels).view(count, -1, channels)  # (G, 16 * N, mask_dim)
        # The product with the query after the convolution is a convolution to one channel, which is
        # taken as products at nine places, moved to where they belong and added up.
        kernel = (head @ sharpen.weight.flatten(1)).view(count, channels, 3, 3)
        kernel[:, :, 1, 1] += head
        places = torch.bmm(kernel.flip(2, 3).flatten(2).transpose(1, 2), spread.transpose(1, 2))
        return F.fold(places, size, 3, padding=1)[:, 0] + (head @ sharpen.bias)[:, None, None]


@dataclass(frozen=True, slots=True)
class FastDecoder:
    """All that decodes; positions: of the regions, (h*w, C), by their grid (h, w)."""

    blocks: tuple[FastBlock, ...]
    layers: tuple[FastLayer, ...]
    heads: FastHeads
    upsampling: FastUpsampling
    positions: dict[tuple[int, int], Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Risam) -> FastDecoder:
        """That of a network."""
        decoder = cast(MutualAwareMaskDecoder, model.mask_decoder)
        return cls(
            tuple(FastBlock.of(cast(MutualAwareAttention, block)) for block in model.attention),
            tuple(FastLayer.of(cast(DecoderLayer, layer)) for layer in decoder.layers),
            FastHeads.of(decoder),
            FastUpsampling.of(decoder),
            {},
        )


# --- the network ----------------------------------------------------------------------------------


class HostRisam(Risam):
    """The network on a CPU: any number of threads gives an image the same features, to the bit."""

    def enhance(
        self, shallow: Tensor, middle: Tensor, deep: Tensor, fine: Tensor | None
    ) -> ImageFeatures:
        """See :meth:`risam_cli.model.risam.Risam.enhance`."""
        with threads_of(1):  # convolutions add up in another order where they have more
            return super().enhance(shallow, middle, deep, fine)


class FastRisam(HostRisam):
    """The same, where it decodes as RISAM: the expressions of one image after those of another."""

    fast: FastDecoder

    def keep_weights(self) -> None:
        """To be called once the weights are final, when a plain network has become one of these."""
        with torch.autocast("cpu", enabled=False):  # In the weights' own format.
            self.fast = FastDecoder.of(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastRisam:
        """What ``to`` and ``double`` go through."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.keep_weights()
        return self

    def decode(self, image: ImageFeatures, text: TextFeatures, image_index: Tensor) -> Decoded:
        """See :meth:`risam_cli.model.risam.Risam.decode`; under autocast in the weights' format."""
        height, width = grid = image.visual.shape[2], image.visual.shape[3]
        dtype = self.project_position.weight.dtype
        mask = image.visual.new_empty((len(image_index), 4 * height, 4 * width), dtype=dtype)
        iou, no_target = (mask.new_empty(len(image_index)) for _ in range(2))
        limit = max(1, GROUP_ROWS // (height * width))
        with torch.autocast("cpu", enabled=False):
            position = self.position(grid, mask)
            for row, expressions in _by_image(image_index).items():
                visual = image.visual[row : row + 1].to(dtype).flatten(2).transpose(1, 2)
                regions = Regions.of(visual.contiguous(), position)
                fine = image.fine
                if fine is not None:
                    fine = fine[row].to(dtype).permute(1, 2, 0).contiguous()
                for part in _groups(expressions, limit):
                    group = Group.of(text, part, dtype)
                    found = self._decode(regions, group, grid, fine)
                    mask[part], iou[part] = found.mask_logits, found.iou
                    no_target[part] = found.no_target_logits
        return Decoded(mask, iou, no_target)

    def position(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """See :meth:`risam_cli.model.risam.Risam.position`."""
        known = self.fast.positions.get(grid)
        if known is None:
            known = super().position(grid, like)
            self.fast.positions.clear()  # one grid after another, where sizes change
            self.fast.positions[grid] = known
        return known

    def _decode(
        self, image: Regions, group: Group, grid: tuple[int, int], fine: Tensor | None
    ) -> Decoded:
        """The masks of G expressions about an image; fine: (4h, 4w, mask_dim) or None."""
        decoder, fast = cast(MutualAwareMaskDecoder, self.mask_decoder), self.fast
        regions, words = image, group.text
        for block in fast.blocks:
            layout = Layout.of(group.lengths, block.affinity.heads)
            words, regions = block(words, group, layout, regions)

        query = decoder.project_sentence(group.sentence)  # (G, C)
        tokens, lengths = query, (1,) * len(query)
        if decoder.query_token is not None:
            guiding = {"words": [words], "text": [group.text], "both": [group.text, words]}
            parts = [x.split_with_sizes(group.lengths) for x in guiding[self.decoder_reads]]
            queries = (query + decoder.query_token).split(1)
            tokens = torch.cat(list(chain(*zip(queries, *parts, strict=True))))
            lengths = tuple(1 + len(parts) * length for length in group.lengths)
        apart = _apart(lengths).to(tokens.dtype) if len(lengths) > 1 else None
        for layer in fast.layers:
            tokens, regions = layer(tokens, apart, Layout.of(lengths, layer.heads), regions)

        first = [0, *accumulate(lengths[:-1])]
        head, iou, no_target = fast.heads(tokens[first], regions)
        visual = regions.visual.expand(len(lengths), -1, -1)
        mask = fast.upsampling(visual, fine, head, grid)
        if decoder.evidence is not None:
            no_target = no_target + decoder.evidence(mask, visual)
        return Decoded(mask, iou.sigmoid(), no_target)


def _products(rows: Tensor, layout: Layout, regions: Tensor) -> Tensor:
    """Rows (heads*T, C) times each expression's regions (1 or G, N, C): (heads*T, N).

    The regions come last, since softmax over a few words is slow along memory.
    """
    if len(regions) == 1:
        return linear(rows, regions[0])
    out = rows.new_empty(len(rows), regions.shape[1])
    for some, own, to in zip(layout.split(rows), regions, layout.split(out), strict=True):
        torch.mm(some, own.t(), out=to)
    return out


def _means(weights: Tensor, layout: Layout, regions: Tensor) -> Tensor:
    """Means of each expression's regions (1 or G, N, C) by weights (heads*T, N): (heads, T, C)."""
    if len(regions) == 1:
        return layout.by_head(torch.mm(weights, regions[0]))
    out = weights.new_empty(len(weights), regions.shape[2])
    for some, own, to in zip(layout.split(weights), regions, layout.split(out), strict=True):
        torch.mm(some, own, out=to)
    return layout.by_head(out)


def _scatter(
    logits: Tensor,
    layout: Layout,
    rows: Tensor,
    finish: Callable[[Tensor], Tensor],
    regions: Regions,
) -> Regions:
    """Each region takes what its words tell it: softmax over words, residual, and ``finish``.

    Args:
        logits: (heads*T, N); rows: (heads*T, C).
    """
    count, (size, dim) = len(layout.sizes), regions.position.shape
    visual = logits.new_empty(count, size, dim)
    before = regions.visual.expand(count, -1, -1)
    every = zip(layout.split(logits), layout.split(rows), before, visual, strict=True)
    for some, told, own, to in every:
        weights = some.view(layout.heads, -1, size).softmax(dim=1).view(-1, size)
        torch.addmm(own, weights.t(), told, out=to)
    if count > 1:
        return Regions.of(finish(visual), regions.position)
    for start in range(0, size, ROWS):
        part = slice(start, start + ROWS)
        visual[0, part] = finish(visual[0, part])
    return Regions.of(visual, regions.position)


def _apart(lengths: tuple[int, ...]) -> Tensor:
    """(T, T), to be added to logits, so that the tokens of an expression see none of others."""
    owner = torch.repeat_interleave(torch.tensor(lengths))
    return torch.where(owner[:, None] == owner, 0.0, -torch.inf)


def _by_image(image_index: Tensor) -> dict[int, list[int]]:
    """The numbers of each image's expressions."""
    found: dict[int, list[int]] = {}
    for number, row in enumerate(image_index.tolist()):
        found.setdefault(row, []).append(number)
    return found


def _groups(numbers: list[int], limit: int) -> Iterator[list[int] | slice]:
    """Numbers in as few groups as the limit allows, of one size as nearly as can be."""
    count = -(-len(numbers) // limit)
    for k in range(count):
        part = numbers[k * len(numbers) // count : (k + 1) * len(numbers) // count]
        first, last = part[0], part[-1] + 1
        yield slice(first, last) if last - first == len(part) else part


@lru_cache(maxsize=64)
def _word_sines(length: int, dim: int) -> Tensor:
    return sine_positions_1d(length, dim)
