"""Fusion and decoding on a CPU without gradients: one expression after another (ours).

It is :class:`.mutual_aware_attention.MutualAwareAttention` and
:class:`.mask_decoder.MutualAwareMaskDecoder` with the same weights and the same results up to
rounding, in an order that suits a processor. An expression has few words and an image has many
regions, so every projection between the two is folded into the side of the words: where q = W x and
the product q·k is wanted for all regions x, (Wᵀ k)·x is the same for heads * words rows instead of
all channels, and what lies between is never made. What is done region by region goes some rows at a
time, so that it stays in the caches. Padded words are left out rather than masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.fast.linear import apply_linear, linear
from risam_cli.model.mask_decoder import (
    CrossAttention,
    Decoded,
    DecoderLayer,
    MutualAwareMaskDecoder,
)
from risam_cli.model.mutual_aware_attention import Branch, MutualAwareAttention
from risam_cli.model.risam import ImageFeatures, Risam
from risam_cli.model.streams import VisualStream
from risam_cli.model.text_encoder import TextFeatures

BATCHED_BELOW = 512
"""Regions below which several expressions go in a batch after all: each step is too short alone."""

ROWS = 1024
"""Regions that go through a chain of layers at a time."""


@dataclass(frozen=True, slots=True)
class Regions:
    """The visual stream of one image or expression.

    Attributes:
        visual: (N, C), N = h·w; placed: the same with positions added.
    """

    visual: Tensor
    placed: Tensor

    @classmethod
    def of(cls, visual: Tensor, position: Tensor) -> Regions:
        """Those of an image, for all of its expressions."""
        return cls(visual, visual + position)

    def like(self) -> Regions:
        """Room for others, to be written over by one block after another."""
        return Regions(torch.empty_like(self.visual), torch.empty_like(self.placed))


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression without padding: F_l (L, C), its position (L, C), sentence (C,)."""

    text: Tensor
    position: Tensor
    sentence: Tensor


class RisamByExpression(Risam):
    """The network on a CPU: on large grids, and for one expression, decoded one by one."""

    def decode(self, image: ImageFeatures, text: TextFeatures, image_index: Tensor) -> Decoded:
        """See :meth:`risam_cli.model.risam.Risam.decode`."""
        height, width = image.visual.shape[-2:]
        if height * width < BATCHED_BELOW and len(image_index) != 1:
            return super().decode(image, text, image_index)
        visual, language = self.streams(image, text, image_index)
        images = visual.features.contiguous()  # (B, N, C)
        fine = None if image.fine is None else image.fine.permute(0, 2, 3, 1).contiguous()
        room: Regions | None = None
        placed: dict[int, Regions] = {}
        decoded = []
        for expression, row in enumerate(image_index.tolist()):
            if row not in placed:
                placed[row] = Regions.of(images[row], visual.position)
            room = room or placed[row].like()
            valid = language.valid[expression]
            one = Expression(
                language.text[expression, valid],
                language.position[valid],
                language.sentence[expression],
            )
            fine_of_image = None if fine is None else fine[row]
            decoded.append(self._decode_one(placed[row], room, one, visual, fine_of_image))
        if not decoded:
            none = images.new_zeros(0)
            return Decoded(images.new_zeros(0, 4 * height, 4 * width), none, none)
        return Decoded(
            torch.cat([one.mask_logits for one in decoded]),
            torch.cat([one.iou for one in decoded]),
            torch.cat([one.no_target_logits for one in decoded]),
        )

    def _decode_one(
        self,
        image: Regions,
        room: Regions,
        expression: Expression,
        visual: VisualStream,
        fine: Tensor | None,
    ) -> Decoded:
        """The mask of one expression about one image.

        Args:
            image: left as it is; room: written over.
            visual: for its position and grid; fine: (4h, 4w, mask_dim), or None.

        Returns:
            Of one expression: (1, 4h, 4w), (1,) and (1,).
        """
        decoder = cast(MutualAwareMaskDecoder, self.mask_decoder)
        position, regions = visual.position, image
        text = words = expression.text
        for block in self.attention:
            one = cast(MutualAwareAttention, block)
            read = words if one.reads == "words" else text
            affinity, new_words = _attend_words(
                one, regions.placed, read, words, expression.position
            )
            if one.vision_guided is not None:
                values = _word_values(one, read, words)
                _attend_regions(one, affinity, values, regions, room, position)
                regions = room
            words = new_words

        tokens = apply_linear(decoder.project_sentence, expression.sentence)[None]  # (1, C)
        if decoder.query_token is not None:
            guiding = {"words": [words], "text": [text], "both": [text, words]}
            guided_by = guiding[self.decoder_reads]
            tokens = torch.cat([tokens + decoder.query_token, *guided_by])  # (1 + m, C)
        for layer in decoder.layers:
            tokens = _exchange(cast(DecoderLayer, layer), tokens, regions, room, position)
            regions = room
        return _answer(decoder, tokens[:1], regions, fine, visual.grid)


def _attend_words(
    block: MutualAwareAttention,
    placed: Tensor,
    read: Tensor,
    words: Tensor,
    word_position: Tensor,
) -> tuple[Tensor, Tensor]:
    """The affinity, (heads, L, N), and the words after Language-Guided Attention."""
    key = apply_linear(block.affinity_language, read + word_position) * block.scale
    affinity = _logits(block.affinity_vision, key, block.heads, placed)
    if block.language_guided is None:
        return affinity, words
    branch = block.language_guided
    gathered = block.warmed(affinity).flatten(0, 1).softmax(dim=-1) @ placed  # (heads*L, C)
    value = _own_heads(branch.value, gathered, block.heads)
    return affinity, _finish(branch, words + apply_linear(branch.output, value))


def _word_values(block: MutualAwareAttention, read: Tensor, words: Tensor) -> Tensor:
    """What regions take of the words that the block reads, and of what they have seen: (L, C)."""
    value = apply_linear(cast(Branch, block.vision_guided).value, read)
    return value if block.value_seen is None else value + apply_linear(block.value_seen, words)


def _attend_regions(
    block: MutualAwareAttention,
    affinity: Tensor,
    values: Tensor,
    regions: Regions,
    new: Regions,
    position: Tensor,
) -> None:
    """Vision-Guided Attention: writes the new regions, which may be the old ones' memory.

    Args:
        values: of the words, (L, C).
    """
    branch = cast(Branch, block.vision_guided)
    change = _folded_out(branch.output, values, block.heads)
    _spread(affinity, change, partial(_finish, branch), regions, new, position)


def _exchange(
    layer: DecoderLayer, tokens: Tensor, regions: Regions, new: Regions, position: Tensor
) -> Tensor:
    """Two-way attention: gives the new tokens (m, C) and writes the new regions."""
    own = layer.self_attention(tokens[None], tokens[None], tokens[None])[0]
    tokens = layer.norm1(tokens + own)
    tokens = layer.norm2(tokens + _gather(layer.tokens_to_pixels, tokens, regions))
    tokens = layer.norm3(tokens + layer.mlp(tokens))
    cross = layer.pixels_to_tokens
    key = apply_linear(cross.key, tokens) * _scale(cross)
    logits = _logits(cross.query, key, cross.heads, regions.placed)
    change = _folded_out(cross.output, apply_linear(cross.value, tokens), cross.heads)
    _spread(logits, change, layer.norm4, regions, new, position)
    return tokens


def _spread(
    logits: Tensor,
    change: tuple[Tensor, Tensor],
    finish: Callable[[Tensor], Tensor],
    regions: Regions,
    new: Regions,
    position: Tensor,
) -> None:
    """Each region takes what its words tell it: softmax over words, residual, and ``finish``.

    Args:
        logits: (heads, m, N); change: from :func:`_folded_out`.
    """
    weights = logits.softmax(dim=1).flatten(0, 1).t()  # (N, heads*m)
    for part in _parts(position):
        new.visual[part] = finish(regions.visual[part] + linear(weights[part], *change))
        torch.add(new.visual[part], position[part], out=new.placed[part])


def _answer(
    decoder: MutualAwareMaskDecoder,
    query: Tensor,
    regions: Regions,
    fine: Tensor | None,
    grid: tuple[int, int],
) -> Decoded:
    """The heads, on the query (1, C) and the regions."""
    query = decoder.final_norm(query + _gather(decoder.final_attention, query, regions))
    mask = _mask(decoder, regions.visual, fine, decoder.mask_head(query)[0], grid)[None]
    no_target = decoder.no_target_head(query)[:, 0]
    if decoder.evidence is not None:
        no_target = no_target + decoder.evidence(mask, regions.visual[None])
    return Decoded(mask, decoder.iou_head(query)[:, 0].sigmoid(), no_target)


def _gather(cross: CrossAttention, tokens: Tensor, regions: Regions) -> Tensor:
    """Tokens (m, C) attend regions, whose keys know their places and whose values do not."""
    query = apply_linear(cross.query, tokens) * _scale(cross)
    weights = _logits(cross.key, query, cross.heads, regions.placed).flatten(0, 1).softmax(dim=-1)
    own = _own_heads(cross.value, weights @ regions.visual, cross.heads)
    return apply_linear(cross.output, own)


def _mask(
    decoder: MutualAwareMaskDecoder,
    visual: Tensor,
    fine: Tensor | None,
    head: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Upsamples the regions and takes their product with the query: (4h, 4w) logits.

    A transposed convolution whose stride is its size is a linear layer of each cell.
    """
    first, second = _as_linear(decoder.up1), _as_linear(decoder.up2)
    norm, sharp = decoder.up1_norm, decoder.sharpen if fine is not None else None
    middle, channels = decoder.up1.out_channels, decoder.up2.out_channels
    pixels = []
    for part in _parts(visual):
        x = linear(visual[part], *first).view(-1, middle)  # (n * 4, C / 2)
        x = F.gelu(F.layer_norm(x, (middle,), norm.weight, norm.bias, norm.eps))
        x = linear(x, *second, gelu=sharp is None).view(-1, channels)  # (n * 16, mask_dim)
        pixels.append(x if sharp is not None else x @ head)
    whole = torch.cat(pixels)
    if fine is None or sharp is None:
        return _unfold(whole, 1, grid)[..., 0]
    spread = F.gelu(_unfold(whole, channels, grid).add_(fine)).permute(2, 0, 1)
    # The product with the query after the convolution is a convolution to one channel.
    kernel = torch.einsum("c,cikl->ikl", head, sharp.weight)
    kernel[:, 1, 1] += head
    kernel = kernel[None].contiguous(memory_format=torch.channels_last)
    bias = cast(Tensor, sharp.bias) @ head
    return F.conv2d(spread[None], kernel, bias[None], padding=1)[0, 0]


# --- folding --------------------------------------------------------------------------------------


def _logits(layer: nn.Linear, key: Tensor, heads: int, regions: Tensor) -> Tensor:
    """Products of ``layer(regions)`` with keys, head by head.

    The regions come last, since softmax over a few words is slow along memory.

    Args:
        key: (m, inner); regions: (N, C).

    Returns:
        (heads, m, N).
    """
    keys = key.unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, m, d)
    weight = keys @ layer.weight.unflatten(0, (heads, -1))  # (heads, m, C)
    bias = keys @ layer.bias.unflatten(0, (heads, -1))[..., None]  # (heads, m, 1)
    return linear(weight.flatten(0, 1), regions).view(heads, len(key), -1).add_(bias)


def _folded_out(layer: nn.Linear, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Weight (C, heads*m) and bias (C,) that give ``layer`` of the heads' weighted values.

    Args:
        value: (m, inner).
    """
    values = value.unflatten(-1, (heads, -1)).transpose(0, 1)  # (heads, m, d)
    weight = values @ layer.weight.t().unflatten(0, (heads, -1))  # (heads, m, C)
    return weight.flatten(0, 1).t().contiguous(), layer.bias


def _own_heads(layer: nn.Linear, gathered: Tensor, heads: int) -> Tensor:
    """``layer`` of what each head gathered (heads*m, C), of which it takes its own channels.

    Returns:
        (m, inner).
    """
    each = gathered.unflatten(0, (heads, -1))  # (heads, m, C)
    own = each @ layer.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # (heads, m, d)
    return own.transpose(0, 1).flatten(1) + layer.bias


def _as_linear(up: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Weight (4 * out, in) and bias of a transposed convolution of size and stride 2."""
    weight = up.weight.permute(2, 3, 1, 0).reshape(-1, up.in_channels)
    return weight, cast(Tensor, up.bias).repeat(4)


def _unfold(x: Tensor, channels: int, grid: tuple[int, int]) -> Tensor:
    """Cells of 2x2 cells of 2x2 pixels, (h*w * 16 * channels), to (4h, 4w, channels)."""
    height, width = grid
    x = x.view(height, width, 2, 2, 2, 2, channels)
    return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(4 * height, 4 * width, channels)


def _finish(branch: Branch, stream: Tensor) -> Tensor:
    """Norm, FFN and norm of a stream that has its change added."""
    first, second = branch.ffn.layers
    x = branch.norm1(stream)
    y = apply_linear(cast(nn.Linear, second), apply_linear(cast(nn.Linear, first), x, gelu=True))
    return cast(Tensor, branch.norm2(y.add_(x)))


def _scale(cross: CrossAttention) -> float:
    return float((cross.query.out_features // cross.heads) ** -0.5)


def _parts(x: Tensor) -> Iterator[slice]:
    for start in range(0, len(x), ROWS):
        yield slice(start, start + ROWS)
