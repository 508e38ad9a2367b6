"""The network's modules for training on a CPU: same weights and, up to rounding, results (ours).

What PyTorch does for gradients is slow here, or wrong: each class says what. Fusion and decoding
are folded into the side of the words as in :mod:`.folding`, so that what lies between is never
made, kept or given a gradient; weights are folded anew at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from risam_cli.model.fast.folding import as_linear, scale_of
from risam_cli.model.image_encoder import FUSED_FROM, Attention, relative_table, with_positions
from risam_cli.model.layers import LayerNorm2d
from risam_cli.model.mask_decoder import (
    CrossAttention,
    Decoded,
    DecoderLayer,
    MutualAwareMaskDecoder,
)
from risam_cli.model.mutual_aware_attention import MutualAwareAttention
from risam_cli.model.risam import ImageFeatures, Risam
from risam_cli.model.streams import LinguisticStream
from risam_cli.model.text_encoder import TextEncoder, TextFeatures


class TrainedAttention(Attention):
    """The image encoder's attention, written out where heads are narrow.

    PyTorch has no fused kernel for values narrower than keys, and what it does in its place takes
    three times as long.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int) -> Tensor:
        """Attention of (B, heads, rows*columns, D/heads), with positions, to the same shape."""
        if q.shape[-1] >= FUSED_FROM:
            return super().attend(q, k, v, rows, columns)
        tables = relative_table(self.rel_pos_h, rows), relative_table(self.rel_pos_w, columns)
        query, key = with_positions(q, k, *tables)
        weights = (query @ key.transpose(-1, -2)).softmax(dim=-1)  # (B, heads, h*w, h*w)
        return weights.to(v.dtype) @ v


class TrainedTextEncoder(TextEncoder):
    """The text encoder without PyTorch's fused attention, whose gradient is slow for few words."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """Maps token ids and mask, both (E, L) integers, to linguistic features."""
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(input_ids, attention_mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalizes (..., C) over C.

    PyTorch adds the gradients of weight and bias up in the format of ``x`` on a CPU. In bfloat16
    that stops at a few hundred rows: of 65,536, weight and bias learn from less than a tenth. Here
    they are added up in float32.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled():
        return _normalized(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class TrainedLayerNorm(nn.LayerNorm):
    """A layer norm that computes by :func:`layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to the same shape."""
        return layer_norm(x, self.weight, self.bias, self.eps)


class TrainedLayerNorm2d(LayerNorm2d):
    """A layer norm over channels that computes by :func:`layer_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes (B, C, H, W) over C."""
        x = layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rate = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rate)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rate = ctx.saved_tensors
        (grad,) = grads
        to_x = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, mean, rate, weight, bias, [True, False, False]
        )[0]
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None
        # Sums over rows as products, which add up in float32: of grad, and of grad * (x - mean) *
        # rate without a tensor of its size in between.
        grad, x = grad.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1])
        rates = rate.reshape(1, -1)
        rows = torch.cat([torch.ones_like(rates), rates * mean.reshape(1, -1)]).to(grad.dtype)
        to_bias, shift = (rows @ grad).float()
        to_weight = (rates.to(grad.dtype) @ (grad * x))[0].float() - shift
        return to_x, to_weight, to_bias, None


_normalized: Callable[[Tensor, Tensor, Tensor, float], Tensor] = _Norm.apply

# --- fusion and decoding --------------------------------------------------------------------------


class TrainedRisam(Risam):
    """The network, whose attention between words and regions is folded into the words."""

    def decode(self, image: ImageFeatures, text: TextFeatures, image_index: Tensor) -> Decoded:
        """See :meth:`risam_cli.model.risam.Risam.decode`."""
        folded = MutualAwareAttention, CrossAttention
        heads = max(part.heads for part in self.modules() if isinstance(part, folded))
        if heads * (1 + text.words.shape[1]) > self.dim:  # What is folded would be the larger.
            return super().decode(image, text, image_index)
        stream, language = self.streams(image, text, image_index)
        position = stream.position
        # Not by indexing, whose gradient is added up element by element.
        regions = stream.features.index_select(0, image_index)  # (E, N, C)
        for block in self.attention:
            regions, language = _attend(
                cast(MutualAwareAttention, block), regions, position, language
            )
        language = language.guiding(self.decoder_reads)

        decoder = cast(MutualAwareMaskDecoder, self.mask_decoder)
        tokens = decoder.project_sentence(language.sentence)[:, None]  # (E, 1, C)
        valid = language.valid.new_ones(len(tokens), 1)
        if decoder.query_token is not None:
            tokens = torch.cat([tokens + decoder.query_token, language.words], dim=1)
            valid = F.pad(language.valid, (1, 0), value=True)
        for layer in decoder.layers:
            tokens, regions = _exchange(cast(DecoderLayer, layer), tokens, valid, regions, position)

        query = tokens[:, :1]
        query = query + _gather(decoder.final_attention, query, regions + position, regions)
        query = decoder.final_norm(query)[:, 0]  # (E, C)
        mask = _mask(decoder, regions, decoder.mask_head(query), stream.grid, image, image_index)
        no_target = decoder.no_target_head(query)[:, 0]
        if decoder.evidence is not None:
            no_target = no_target + decoder.evidence(mask, regions)
        return Decoded(mask, decoder.iou_head(query)[:, 0].sigmoid(), no_target)


def _attend(
    block: MutualAwareAttention, regions: Tensor, position: Tensor, language: LinguisticStream
) -> tuple[Tensor, LinguisticStream]:
    """Mutual-Aware Attention on regions (E, N, C)."""
    read = language.words if block.reads == "words" else language.text
    placed = regions + position
    key = block.affinity_language(read + language.position) * block.scale
    affinity = _logits(block.affinity_vision, key, block.heads, placed)  # (E, L, heads, N)
    seen = language
    if block.language_guided is not None:
        branch = block.language_guided
        weights = block.warmed(affinity.transpose(1, 2)).transpose(1, 2).softmax(dim=-1)
        change = branch.output(_own_heads(branch.value, weights, placed))
        seen = language.with_vision(branch.finish(language.words + change))
    if block.vision_guided is not None:
        branch = block.vision_guided
        value = branch.value(read)
        if block.value_seen is not None:
            value = value + block.value_seen(language.words)
        bias = _own_bias(block.affinity_vision, key, block.heads, language.valid)
        change = _folded_out(branch.output, value, block.heads)
        regions = branch.finish(_spread(affinity + bias, change, regions))
    return regions, seen


def _exchange(
    layer: DecoderLayer, tokens: Tensor, valid: Tensor, regions: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Two-way attention: the new tokens (E, m, C) and the new regions (E, N, C)."""
    placed = regions + position
    mask = valid[:, None, None, :]
    tokens = layer.norm1(tokens + layer.self_attention(tokens, tokens, tokens, mask))
    tokens = layer.norm2(tokens + _gather(layer.tokens_to_pixels, tokens, placed, regions))
    tokens = layer.norm3(tokens + layer.mlp(tokens))
    cross = layer.pixels_to_tokens
    key = cross.key(tokens) * scale_of(cross)
    logits = _logits(cross.query, key, cross.heads, placed)
    bias = _own_bias(cross.query, key, cross.heads, valid)
    change = _folded_out(cross.output, cross.value(tokens), cross.heads)
    return tokens, layer.norm4(_spread(logits + bias, change, regions))


def _gather(cross: CrossAttention, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Tokens (E, m, C) attend regions, (E, N, C) both."""
    query = cross.query(tokens) * scale_of(cross)
    weights = _logits(cross.key, query, cross.heads, keys).softmax(dim=-1)
    return cross.output(_own_heads(cross.value, weights, values))


def _spread(logits: Tensor, change: Tensor, regions: Tensor) -> Tensor:
    """Regions (E, N, C) with what their words tell them added: softmax over words.

    Args:
        logits: (E, m, heads, N); change: from :func:`_folded_out`.
    """
    weights = logits.softmax(dim=1).flatten(1, 2).transpose(1, 2)  # (E, N, m*heads)
    return torch.baddbmm(regions, weights, change)


def _mask(
    decoder: MutualAwareMaskDecoder,
    regions: Tensor,
    head: Tensor,
    grid: tuple[int, int],
    image: ImageFeatures,
    image_index: Tensor,
) -> Tensor:
    """Upsamples the regions (E, N, C) and takes their product with head (E, mask_dim).

    Returns:
        (E, 4h, 4w) logits.
    """
    norm, channels = decoder.up1_norm, decoder.up2.out_channels
    x = F.linear(regions, *as_linear(decoder.up1)).view(-1, decoder.up1.out_channels)
    x = F.gelu(layer_norm(x, norm.weight, norm.bias, norm.eps))  # (E * N * 4, C / 2)
    x = F.linear(x, *as_linear(decoder.up2)).view(len(head), -1, channels)  # (E, N * 16, c)
    if image.fine is None or decoder.sharpen is None:
        return _to_pixels((F.gelu(x) @ head[:, :, None]).transpose(1, 2), grid)[:, 0]
    fine = image.fine.index_select(0, image_index)  # (E, c, 4h, 4w)
    pixels = F.gelu(_to_pixels(x.transpose(1, 2), grid) + fine)
    return torch.einsum("ec,echw->ehw", head, pixels + decoder.sharpen(pixels))


def _to_pixels(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells of 2x2 cells of 2x2 pixels, (E, c, h*w * 16), to (E, c, 4h, 4w)."""
    height, width = grid
    x = x.reshape(*x.shape[:2], height, width, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return x.reshape(*x.shape[:2], 4 * height, 4 * width)


# --- folding --------------------------------------------------------------------------------------


def _logits(layer: nn.Linear, key: Tensor, heads: int, regions: Tensor) -> Tensor:
    """Products of ``layer(regions)`` with keys, head by head, but for the share of its bias.

    The regions come last, since softmax over a few words is slow along memory.

    Args:
        key: (E, m, inner); regions: (E, N, C).

    Returns:
        (E, m, heads, N).
    """
    keys = _each_head(key.unflatten(-1, (heads, -1)), layer.weight).flatten(1, 2)
    return _products(keys, regions.to(keys.dtype)).unflatten(1, (-1, heads))


def _own_bias(layer: nn.Linear, key: Tensor, heads: int, valid: Tensor) -> Tensor:
    """What the bias of ``layer`` adds to :func:`_logits`, (E, m, heads, 1), with padding masked.

    Args:
        valid: (E, m), False at padding.
    """
    own = (key * layer.bias.to(key.dtype)).unflatten(-1, (heads, -1)).sum(dim=-1, keepdim=True)
    return own.masked_fill(~valid[:, :, None, None], torch.finfo(own.dtype).min / 2)


class _Logits(torch.autograd.Function):
    """``keys @ regions.transpose``, with the regions' gradient as they lie in memory."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, regions: Tensor) -> Tensor:
        ctx.save_for_backward(keys, regions)
        return torch.bmm(keys, regions.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        keys, regions = ctx.saved_tensors
        return torch.bmm(grads[0], regions), torch.bmm(grads[0].transpose(1, 2), keys)


_products: Callable[[Tensor, Tensor], Tensor] = _Logits.apply


def _folded_out(layer: nn.Linear, value: Tensor, heads: int) -> Tensor:
    """(E, m*heads, C), by which the heads' weights give ``layer`` of the weighted values.

    Weights of a head sum to 1, so that each may carry its share of the bias.

    Args:
        value: (E, m, inner).
    """
    change = _each_head(value.unflatten(-1, (heads, -1)), layer.weight.t())
    return (change + (layer.bias / heads).to(change.dtype)).flatten(1, 2)


def _own_heads(layer: nn.Linear, weights: Tensor, regions: Tensor) -> Tensor:
    """``layer`` of what each head gathers of the regions, of which it takes its own channels.

    Args:
        weights: (E, m, heads, N); regions: (E, N, C).

    Returns:
        (E, m, inner).
    """
    heads = weights.shape[2]
    gathered = torch.bmm(weights.flatten(1, 2), regions)  # (E, m*heads, C)
    own = _each_head(gathered.unflatten(1, (-1, heads)), layer.weight, back=True).flatten(2)
    return own + layer.bias.to(own.dtype)


def _each_head(x: Tensor, weight: Tensor, *, back: bool = False) -> Tensor:
    """Each head's channels times its own rows of a weight (inner, C).

    Args:
        x: (E, m, heads, inner / heads), or with ``back``, for the other way, (E, m, heads, C).

    Returns:
        (E, m, heads, C), or the other way (E, m, heads, inner / heads).
    """
    rows = weight.unflatten(0, (x.shape[2], -1))  # (heads, inner / heads, C)
    product = torch.bmm(x.flatten(0, 1).transpose(0, 1), rows.transpose(1, 2) if back else rows)
    return product.transpose(0, 1).unflatten(0, x.shape[:2])
