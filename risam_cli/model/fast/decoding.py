"""Fusion and decoding on a CPU without gradients, the expressions of an image together (ours).

It is :class:`.mutual_aware_attention.MutualAwareAttention` and
:class:`.mask_decoder.MutualAwareMaskDecoder` with the same weights and the same results up to
rounding, in an order that suits a processor. An expression has few words and an image has many
regions, so every projection between the two is folded into the side of the words: where q = W x and
the product q·k is wanted for all regions x, (Wᵀ k)·x is the same for heads * words rows instead of
all channels, and what lies between is never made. Expressions go together as far as their regions
stay in the caches, those of a large grid one by one; what is done region by region goes some rows
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.fast.linear import apply_linear, linear
from risam_cli.model.layers import MLP, sine_positions_2d
from risam_cli.model.mask_decoder import (
    CrossAttention,
    Decoded,
    DecoderLayer,
    MutualAwareMaskDecoder,
)
from risam_cli.model.mutual_aware_attention import Branch, MutualAwareAttention
from risam_cli.model.risam import ImageFeatures, Risam
from risam_cli.model.streams import LinguisticStream
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
        text: linguistic features F_l (G, L, C); position: (L, C).
        sentence: (G, C).
        padding: (G, L) bool, True at padding; None where there is none.
    """

    text: Tensor
    position: Tensor
    sentence: Tensor
    padding: Tensor | None

    @classmethod
    def of(cls, language: LinguisticStream, part: list[int] | slice) -> Group:
        """Some rows of a stream, without words that none of them has."""
        text, valid, position = language.text[part], language.valid[part], language.position
        if not valid.all():
            used = valid.any(dim=0)
            text, valid, position = text[:, used], valid[:, used], position[used]
        padding = None if valid.all() else ~valid
        return cls(text, position, language.sentence[part], padding)


class FastRisam(Risam):
    """The network on a CPU: the expressions of one image after those of another."""

    def decode(self, image: ImageFeatures, text: TextFeatures, image_index: Tensor) -> Decoded:
        """See :meth:`risam_cli.model.risam.Risam.decode`."""
        visual, language = self.streams(image, text, image_index)
        height, width = visual.grid
        features = visual.features
        mask = features.new_empty(len(image_index), 4 * height, 4 * width)
        iou, no_target = (features.new_empty(len(image_index)) for _ in range(2))
        limit = max(1, GROUP_ROWS // (height * width))
        for row, expressions in _by_image(image_index).items():
            regions = Regions.of(features[row : row + 1].contiguous(), visual.position)
            fine = None if image.fine is None else _to_cells(image.fine[row])
            for part in _groups(expressions, limit):
                found = self._decode(regions, Group.of(language, part), visual.grid, fine)
                mask[part], iou[part] = found.mask_logits, found.iou
                no_target[part] = found.no_target_logits
        return Decoded(mask, iou, no_target)

    def position(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """See :meth:`risam_cli.model.risam.Risam.position`."""
        position: Tensor = self.project_position(_sines(*grid, self.dim).to(like.dtype))
        return position

    def _decode(
        self, image: Regions, group: Group, grid: tuple[int, int], fine: Tensor | None
    ) -> Decoded:
        """The masks of G expressions about an image; fine: see :func:`_to_cells`, or None."""
        decoder = cast(MutualAwareMaskDecoder, self.mask_decoder)
        regions = image
        text = words = group.text
        for block in self.attention:
            one = cast(MutualAwareAttention, block)
            read = words if one.reads == "words" else text
            affinity, new_words = _attend_words(one, regions, read, words, group)
            if one.vision_guided is not None:
                values = _word_values(one, read, words)
                regions = _attend_regions(one, affinity, values, group, regions)
            words = new_words

        tokens = apply_linear(decoder.project_sentence, group.sentence)[:, None]  # (G, 1, C)
        padding = None
        if decoder.query_token is not None:
            guiding = {"words": [words], "text": [text], "both": [text, words]}[self.decoder_reads]
            tokens = torch.cat([tokens + decoder.query_token, *guiding], dim=1)  # (G, 1 + m, C)
            if group.padding is not None:
                padding = F.pad(group.padding.repeat(1, len(guiding)), (1, 0))
        for layer in decoder.layers:
            tokens, regions = _exchange(cast(DecoderLayer, layer), tokens, padding, regions)
        return _answer(decoder, tokens[:, :1], regions, fine, grid)


def _attend_words(
    block: MutualAwareAttention, regions: Regions, read: Tensor, words: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """The affinity, (G, L, heads, N), and the words after Language-Guided Attention."""
    key = apply_linear(block.affinity_language, read + group.position) * block.scale
    affinity = _logits(block.affinity_vision, key, block.heads, regions.placed)
    affinity += _own_bias(block.affinity_vision, key, block.heads)
    if block.language_guided is None:
        return affinity, words
    branch = block.language_guided
    weights = block.warmed(affinity.transpose(1, 2)).transpose(1, 2).softmax(dim=-1)
    value = _own_heads(branch.value, weights, regions.placed)
    return affinity, _finish(branch, words + apply_linear(branch.output, value))


def _word_values(block: MutualAwareAttention, read: Tensor, words: Tensor) -> Tensor:
    """What regions take of the words that the block reads, and of what they have seen."""
    value = apply_linear(cast(Branch, block.vision_guided).value, read)
    return value if block.value_seen is None else value + apply_linear(block.value_seen, words)


def _attend_regions(
    block: MutualAwareAttention,
    affinity: Tensor,
    values: Tensor,
    group: Group,
    regions: Regions,
) -> Regions:
    """Vision-Guided Attention: the new regions.

    Args:
        values: of the words, (G, L, C).
    """
    branch = cast(Branch, block.vision_guided)
    change = _folded_out(branch.output, values, block.heads)
    return _spread(affinity, group.padding, change, partial(_finish, branch), regions)


def _exchange(
    layer: DecoderLayer, tokens: Tensor, padding: Tensor | None, regions: Regions
) -> tuple[Tensor, Regions]:
    """Two-way attention: the new tokens (G, m, C) and the new regions."""
    mask = None if padding is None else ~padding[:, None, None, :]
    tokens = layer.norm1(tokens + layer.self_attention(tokens, tokens, tokens, mask))
    tokens = layer.norm2(tokens + _gather(layer.tokens_to_pixels, tokens, regions))
    tokens = layer.norm3(tokens + _mlp(layer.mlp, tokens))
    cross = layer.pixels_to_tokens
    key = apply_linear(cross.key, tokens) * _scale(cross)
    logits = _logits(cross.query, key, cross.heads, regions.placed)
    logits += _own_bias(cross.query, key, cross.heads)
    change = _folded_out(cross.output, apply_linear(cross.value, tokens), cross.heads)
    return tokens, _spread(logits, padding, change, layer.norm4, regions)


def _spread(
    logits: Tensor,
    padding: Tensor | None,
    change: Tensor,
    finish: Callable[[Tensor], Tensor],
    regions: Regions,
) -> Regions:
    """Each region takes what its words tell it: softmax over words, residual, and ``finish``.

    Args:
        logits: (G, m, heads, N), written over; padding: (G, m), True at padding, or None.
        change: from :func:`_folded_out`.
    """
    if padding is not None:
        logits.masked_fill_(padding[:, :, None, None], torch.finfo(logits.dtype).min)
    weights = logits.softmax(dim=1).flatten(1, 2).transpose(1, 2)  # (G, N, m*heads)
    told = []
    for part in _parts(regions.position):
        change_of_part = _product(weights[:, part], change)  # (G, n, C)
        told.append(finish(change_of_part.add_(regions.visual[:, part])))
    visual = torch.cat(told, dim=1) if len(told) > 1 else told[0]
    return Regions.of(visual, regions.position)


def _answer(
    decoder: MutualAwareMaskDecoder,
    query: Tensor,
    regions: Regions,
    fine: Tensor | None,
    grid: tuple[int, int],
) -> Decoded:
    """The heads, on the queries (G, 1, C) and the regions."""
    query = query + _gather(decoder.final_attention, query, regions)
    query = decoder.final_norm(query)[:, 0]  # (G, C)
    visual = regions.visual.expand(len(query), -1, -1)
    mask = _mask(decoder, visual, fine, _mlp(decoder.mask_head, query), grid)
    no_target = _mlp(decoder.no_target_head, query)[:, 0]
    if decoder.evidence is not None:
        no_target = no_target + decoder.evidence(mask, visual)
    return Decoded(mask, _mlp(decoder.iou_head, query)[:, 0].sigmoid(), no_target)


def _gather(cross: CrossAttention, tokens: Tensor, regions: Regions) -> Tensor:
    """Tokens (G, m, C) attend regions, whose keys know their places and whose values do not."""
    query = apply_linear(cross.query, tokens) * _scale(cross)
    weights = _logits(cross.key, query, cross.heads, regions.placed).softmax(dim=-1)
    return apply_linear(cross.output, _own_heads(cross.value, weights, regions.visual))


def _mask(
    decoder: MutualAwareMaskDecoder,
    visual: Tensor,
    fine: Tensor | None,
    head: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Upsamples the regions (G, N, C) and takes their product with head (G, mask_dim).

    A transposed convolution whose stride is its size is a linear layer of each cell.

    Returns:
        (G, 4h, 4w) logits.
    """
    first, second = _as_linear(decoder.up1), _as_linear(decoder.up2)
    norm, sharp = decoder.up1_norm, decoder.sharpen if fine is not None else None
    middle, channels = decoder.up1.out_channels, decoder.up2.out_channels
    pixels = []
    for part in _parts(visual[0]):
        x = linear(visual[:, part], *first).view(-1, middle)  # (G * n * 4, C / 2)
        x = F.gelu(F.layer_norm(x, (middle,), norm.weight, norm.bias, norm.eps))
        x = linear(x, *second, gelu=sharp is None).view(len(head), -1, channels)
        pixels.append(x if sharp is not None else x @ head[:, :, None])  # (G, n * 16, mask_dim)
    whole = torch.cat(pixels, dim=1) if len(pixels) > 1 else pixels[0]
    if fine is None or sharp is None:
        return _to_pixels(whole.transpose(1, 2), grid)[:, 0]
    spread = F.gelu(whole.add_(fine))  # (G, 16 * N, mask_dim)
    # The product with the query after the convolution is a convolution to one channel, which is
    # taken as products at nine places, moved to where they belong and added up.
    kernel = torch.einsum("gc,cikl->gikl", head, sharp.weight)
    kernel[:, :, 1, 1] += head
    places = torch.bmm(kernel.flip(2, 3).flatten(2).transpose(1, 2), spread.transpose(1, 2))
    places = _to_pixels(places, grid).flatten(2)  # (G, 9, 16 * N)
    bias = head @ cast(Tensor, sharp.bias)
    size = (4 * grid[0], 4 * grid[1])
    return F.fold(places, size, 3, padding=1)[:, 0] + bias[:, None, None]


# --- folding --------------------------------------------------------------------------------------


def _logits(layer: nn.Linear, key: Tensor, heads: int, regions: Tensor) -> Tensor:
    """Products of ``layer(regions)`` with keys, head by head, but for the share of its bias.

    The regions come last, since softmax over a few words is slow along memory.

    Args:
        key: (G, m, inner); regions: (1 or G, N, C).

    Returns:
        (G, m, heads, N).
    """
    weight = _apart(key, heads) @ layer.weight  # (G, m, heads, C)
    logits = _product(weight.flatten(1, 2), regions.transpose(1, 2))
    return logits.unflatten(1, (-1, heads))


def _own_bias(layer: nn.Linear, key: Tensor, heads: int) -> Tensor:
    """What the bias of ``layer`` adds to :func:`_logits`, (G, m, heads, 1)."""
    own = (key * layer.bias).unflatten(-1, (heads, -1))
    return own.sum(dim=-1, keepdim=True)


def _folded_out(layer: nn.Linear, value: Tensor, heads: int) -> Tensor:
    """(G, m*heads, C), by which the heads' weights give ``layer`` of the weighted values.

    Weights of a head sum to 1, so that each may carry its share of the bias.

    Args:
        value: (G, m, inner).
    """
    return linear(_apart(value, heads), layer.weight, layer.bias / heads).flatten(1, 2)


def _own_heads(layer: nn.Linear, weights: Tensor, regions: Tensor) -> Tensor:
    """``layer`` of what each head gathers of the regions, of which it takes its own channels.

    Args:
        weights: (G, m, heads, N); regions: (1 or G, N, C).

    Returns:
        (G, m, inner).
    """
    heads = weights.shape[2]
    gathered = _product(weights.flatten(1, 2), regions)  # (G, m*heads, C)
    each = apply_linear(layer, gathered).unflatten(-1, (heads, -1))  # (G, m*heads, heads, d)
    own = each.unflatten(1, (-1, heads)).diagonal(dim1=2, dim2=3)  # (G, m, d, heads)
    return own.transpose(-1, -2).flatten(2)


def _apart(x: Tensor, heads: int) -> Tensor:
    """(G, m, inner) once for each head, which keeps its own channels: (G, m, heads, inner)."""
    own = torch.eye(heads, dtype=x.dtype).repeat_interleave(x.shape[-1] // heads, dim=1)
    return x[:, :, None] * own


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of (G, r, n) and (1 or G, n, c)."""
    if len(b) == 1:
        return linear(a.flatten(0, 1), b[0].t()).unflatten(0, (len(a), -1))
    return torch.bmm(a, b)


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


@lru_cache(maxsize=16)
def _sines(height: int, width: int, dim: int) -> Tensor:
    return sine_positions_2d(height, width, dim)


def _as_linear(up: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Weight (4 * out, in) and bias of a transposed convolution of size and stride 2."""
    weight = up.weight.permute(2, 3, 1, 0).reshape(-1, up.in_channels)
    return weight, cast(Tensor, up.bias).repeat(4)


def _to_pixels(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells of 2x2 cells of 2x2 pixels, (G, c, h*w * 16), to (G, c, 4h, 4w)."""
    height, width = grid
    x = x.reshape(*x.shape[:2], height, width, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return x.reshape(*x.shape[:2], 4 * height, 4 * width)


def _to_cells(x: Tensor) -> Tensor:
    """Pixels (c, 4h, 4w) to cells of 2x2 cells of 2x2 pixels, (h*w * 16, c)."""
    channels, height, width = x.shape
    x = x.reshape(channels, height // 4, 2, 2, width // 4, 2, 2)
    return x.permute(1, 4, 2, 5, 3, 6, 0).reshape(-1, channels)


def _finish(branch: Branch, stream: Tensor) -> Tensor:
    """Norm, FFN and norm of a stream that has its change added."""
    x = branch.norm1(stream)
    return cast(Tensor, branch.norm2(_mlp(branch.ffn, x).add_(x)))


def _mlp(mlp: MLP, x: Tensor) -> Tensor:
    *hidden, last = (cast(nn.Linear, layer) for layer in mlp.layers)
    for layer in hidden:
        x = apply_linear(layer, x, gelu=True)
    return apply_linear(last, x)


def _scale(cross: CrossAttention) -> float:
    return float((cross.query.out_features // cross.heads) ** -0.5)


def _parts(x: Tensor) -> Iterator[slice]:
    for start in range(0, len(x), ROWS):
        yield slice(start, start + ROWS)
