"""Mutual-Aware Mask Decoder: a multi-modal query token reads both streams [paper, Fig. 5]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.layers import MLP, LayerNorm2d
from risam_cli.model.streams import LinguisticStream, VisualStream


@dataclass(frozen=True)
class Decoded:
    """What the decoder says of E expressions.

    Attributes:
        mask_logits: (E, 4h, 4w); above 0 means "part of the referent" at threshold 0.5.
        iou: (E,) predicted IoU of the mask, 0..1.
        no_target_logits: (E,); above 0 means "nothing in the image fits".
        minimap_logits: (E, P, P), where of P×P parts of the square the referent lies; of decoders
            that learn from that too, or None.
    """

    mask_logits: Tensor
    iou: Tensor
    no_target_logits: Tensor
    minimap_logits: Tensor | None = None


class MaskDecoder(nn.Module):
    """What every network here ends in: RISAM's own decoder, and those of its rivals."""

    def project_fine(self, fine: Tensor | None) -> Tensor | None:
        """Projects stride-4 features (B, F, 4h, 4w), once per image; None where it has no use."""
        return None

    def forward(self, visual: VisualStream, language: LinguisticStream) -> Decoded:
        """Decodes E expressions."""
        raise NotImplementedError


class MutualAwareMaskDecoder(MaskDecoder):
    """Decodes masks from language-aware visual and vision-aware linguistic features.

    Paper: vision-aware linguistic features guide the decoder, and a multi-modal query token
    aggregates linguistic information and interacts with the visual features. Ours: tokens are
    [query; words], query = learned token + projected sentence; per layer, self-attention over
    tokens, tokens attend pixels, MLP, pixels attend tokens; ×4 upsampling by transposed
    convolutions as in SAM; mask = MLP(query)·pixels; heads for IoU and no-target on the query.

    Args:
        dim: width; heads; layers; ffn_dim: hidden width of the token MLP.
        mask_dim: channels of the upsampled pixels.
        fine_dim: channels of stride-4 features that sharpen the upsampled pixels, 0 for none.
        query_token: False is the ablation without the multi-modal query token; the projected
            sentence alone, without learned token or attention over words, is then the query.
        no_target_evidence: the no-target answer is also drawn from the predicted mask and the
            visual features under it (ours); without it, from the query alone.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        ffn_dim: int,
        mask_dim: int,
        *,
        fine_dim: int = 0,
        query_token: bool = True,
        no_target_evidence: bool = False,
    ) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(dim) * 0.02) if query_token else None
        self.project_sentence = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, ffn_dim) for _ in range(layers))
        self.final_attention = CrossAttention(dim, heads)
        self.final_norm = nn.LayerNorm(dim)
        self.up1 = nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)
        self.up1_norm = LayerNorm2d(dim // 2)
        self.up2 = nn.ConvTranspose2d(dim // 2, mask_dim, kernel_size=2, stride=2)
        self.fine = nn.Conv2d(fine_dim, mask_dim, kernel_size=1) if fine_dim else None
        self.sharpen = nn.Conv2d(mask_dim, mask_dim, kernel_size=3, padding=1) if fine_dim else None
        self.mask_head = MLP([dim, dim, dim, mask_dim])
        self.iou_head = MLP([dim, dim, 1])
        self.no_target_head = MLP([dim, dim, 1])
        self.evidence = NoTargetEvidence(dim) if no_target_evidence else None

    def project_fine(self, fine: Tensor | None) -> Tensor | None:
        """Projects stride-4 features (B, F, 4h, 4w) to (B, mask_dim, 4h, 4w), once per image."""
        return None if self.fine is None or fine is None else self.fine(fine)

    def forward(self, visual: VisualStream, language: LinguisticStream) -> Decoded:
        """Decodes E expressions from language-aware visual and vision-aware linguistic features."""
        query = self.project_sentence(language.sentence)[:, None]  # (E, 1, C)
        tokens, valid = query, language.valid.new_ones(len(query), 1)
        if self.query_token is not None:
            tokens = torch.cat([query + self.query_token, language.words], dim=1)  # (E, 1 + L, C)
            valid = F.pad(language.valid, (1, 0), value=True)

        regions = visual.of_expressions()  # (E, N, C)
        for layer in self.layers:
            tokens, regions = layer(tokens, regions, visual.position, valid)
        query, placed = tokens[:, :1], regions + visual.position
        query = self.final_norm(query + self.final_attention(query, placed, regions))[:, 0]

        pixels = self.upsample(visual.with_language(regions))  # (E, mask_dim, 4h, 4w)
        mask = torch.einsum("ec,echw->ehw", self.mask_head(query), pixels)
        iou = self.iou_head(query)[:, 0].sigmoid()
        no_target = self.no_target_head(query)[:, 0]
        if self.evidence is not None:
            no_target = no_target + self.evidence(mask, regions)
        return Decoded(mask, iou, no_target)

    def upsample(self, visual: VisualStream) -> Tensor:
        """Brings (E, h·w, C) to (E, mask_dim, 4h, 4w), sharpened by stride-4 features if any."""
        pixels = visual.features.transpose(1, 2).unflatten(2, visual.grid)  # (E, C, h, w)
        pixels = F.gelu(self.up1_norm(self.up1(pixels)))
        pixels = self.up2(pixels)
        if visual.fine is not None and self.sharpen is not None:
            # Gathered only here, where each expression's own pixels exist anyway.
            pixels = F.gelu(pixels + visual.fine[visual.image_index])
            return pixels + self.sharpen(pixels)
        return F.gelu(pixels)


class NoTargetEvidence(nn.Module):
    """What the predicted mask and the features under it say against a target (ours).

    Attention averages, so a query hardly tells "some region fits in part" from "one fits"; the
    most confident pixel and the features of the mask's own region do. Starts at zero, so that it
    can be added to trained weights.

    Args:
        dim: channels of the visual features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = MLP([dim + 2, dim, 1])
        for parameter in self.head.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, mask_logits: Tensor, visual: Tensor) -> Tensor:
        """Logits (E,) out of masks (E, 4h, 4w) and visual features (E, h*w, C)."""
        # The mask answers to its own loss alone.
        logits = mask_logits.detach()
        share = F.avg_pool2d(logits.sigmoid()[:, None], 4).flatten(1)  # (E, h*w) in 0..1
        weights = share / (share.sum(dim=1, keepdim=True) + 1e-2)
        pooled = (weights[:, None] @ visual)[:, 0]  # (E, C)
        peak = logits.flatten(1).amax(dim=1) / 8
        figures = torch.stack([peak, share.sum(dim=1).sqrt() / 8], dim=1)
        return self.head(torch.cat([pooled, figures.to(pooled.dtype)], dim=1))[:, 0]


class DecoderLayer(nn.Module):
    """One layer of two-way attention, after SAM's TwoWayAttentionBlock.

    Args:
        dim: width; heads; ffn_dim: hidden width of the token MLP.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attention = CrossAttention(dim, heads, downsample=1)
        self.norm1 = nn.LayerNorm(dim)
        self.tokens_to_pixels = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP([dim, ffn_dim, dim])
        self.norm3 = nn.LayerNorm(dim)
        self.pixels_to_tokens = CrossAttention(dim, heads)
        self.norm4 = nn.LayerNorm(dim)

    def forward(
        self, tokens: Tensor, visual: Tensor, position: Tensor, token_valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Maps tokens (E, m, C) and regions (E, N, C) to the same shapes."""
        mask = token_valid[:, None, None, :]
        tokens = self.norm1(tokens + self.self_attention(tokens, tokens, tokens, mask))
        placed = visual + position
        tokens = self.norm2(tokens + self.tokens_to_pixels(tokens, placed, visual))
        tokens = self.norm3(tokens + self.mlp(tokens))
        visual = self.norm4(visual + self.pixels_to_tokens(placed, tokens, tokens, mask))
        return tokens, visual


class CrossAttention(nn.Module):
    """Multi-head attention whose inner width may be smaller than its outer one, as in SAM.

    Args:
        dim: outer width; heads; downsample: outer width over inner width.
    """

    def __init__(self, dim: int, heads: int, downsample: int = 2) -> None:
        super().__init__()
        inner = dim // downsample
        self.heads = heads
        self.query = nn.Linear(dim, inner)
        self.key = nn.Linear(dim, inner)
        self.value = nn.Linear(dim, inner)
        self.output = nn.Linear(inner, dim)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Maps (E, n, C), (E, m, C), (E, m, C) to (E, n, C); mask fits (E, heads, n, m)."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        attended = self.attend(q, k, v, mask)  # (E, heads, n, d)
        return self.output(attended.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of (E, heads, n, d) to (E, heads, m, d); mask as for :meth:`forward`."""
        # Written out: one side has a few tokens only, where the fused kernel's backward pass is
        # several times slower on a CPU and there is no large matrix to save.
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (E, heads, n, m)
        if mask is not None:
            weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min)
        return weights.softmax(dim=-1).to(v.dtype) @ v
