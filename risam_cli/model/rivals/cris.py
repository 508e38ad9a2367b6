"""CRIS: a vision-language decoder, then the sentence as a dynamic kernel over the pixels.

After "CRIS: CLIP-Driven Referring Image Segmentation" (Wang, Lu, Li, Tao, Guo, Gong, Liu; CVPR
2022, arXiv 2111.15174), sections 3.2 to 3.4, and the structure of the authors' published code. Own
code. The encoders are this project's. Ours, where CRIS says nothing or does not fit: layer norms
in place of batch norms, since a ragged batch has no fixed statistics; all taps have one stride, so
the neck neither pools nor upsamples; no dropout; heads for predicted IoU and for "nothing fits".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.layers import MLP, LayerNorm2d, sine_positions_1d
from risam_cli.model.mask_decoder import CrossAttention, Decoded, MaskDecoder
from risam_cli.model.streams import LinguisticStream, VisualStream


class CrisTaps(nn.Module):
    """The neck's half that knows the image alone: three depths, each at the network's width.

    Args:
        tap_dim: channels D of shallow and middle features; deep_dim: of the deep ones.
        dim: width C of the network.
    """

    def __init__(self, tap_dim: int, deep_dim: int, dim: int) -> None:
        super().__init__()
        self.shallow = _conv(tap_dim, dim, 3)
        self.middle = _conv(tap_dim, dim, 3)
        self.deep = _conv(deep_dim, dim, 1)

    def forward(self, shallow: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
        """Maps (B, D, h, w) twice and (B, deep_dim, h, w) to (B, 3·C, h, w)."""
        return torch.cat([self.shallow(shallow), self.middle(middle), self.deep(deep)], dim=1)


class CrisDecoder(MaskDecoder):
    """CRIS behind the encoders: cross-modal neck, vision-language decoder, projector.

    Args:
        dim: width C, a multiple of 4; heads; layers: of the vision-language decoder, 3 in the
            paper; ffn_dim: hidden width of its FFNs.
    """

    KERNEL = 3
    """Side of the sentence's kernel, as the authors have it."""

    def __init__(self, dim: int, heads: int, layers: int, ffn_dim: int) -> None:
        super().__init__()
        self.neck = CrisNeck(dim)
        self.layers = nn.ModuleList(CrisLayer(dim, heads, ffn_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.up1 = _conv(dim, dim, 3)
        self.up2 = _conv(dim, dim // 2, 3)
        self.pixels = nn.Conv2d(dim // 2, dim // 2, kernel_size=1)
        self.sentence_kernel = nn.Linear(dim, dim // 2 * self.KERNEL**2 + 1)
        self.iou_head = MLP([2 * dim, dim, 1])
        self.no_target_head = MLP([2 * dim, dim, 1])

    def forward(self, visual: VisualStream, language: LinguisticStream) -> Decoded:
        """Decodes E expressions from the (E, N, 3·C) of :class:`CrisTaps`."""
        words, sentence = language.words, language.sentence
        taps = visual.of_expressions().transpose(1, 2).unflatten(2, visual.grid)
        fused = self.neck(taps, sentence)  # (E, C, h, w)

        pixels = fused.flatten(2).transpose(1, 2)  # (E, N, C)
        placed_words = words + sine_positions_1d(words.shape[1], words.shape[2], words.device)
        mask = language.valid[:, None, None, :]
        for layer in self.layers:
            pixels = layer(pixels, visual.position, words, placed_words.to(words.dtype), mask)
        pixels = self.norm(pixels)

        summary = torch.cat([pixels.mean(dim=1), sentence], dim=-1)  # (E, 2C)
        return Decoded(
            self.project(pixels.transpose(1, 2).unflatten(2, visual.grid), sentence),
            self.iou_head(summary)[:, 0].sigmoid(),
            self.no_target_head(summary)[:, 0],
        )

    def project(self, pixels: Tensor, sentence: Tensor) -> Tensor:
        """The projector: pixels (E, C, h, w), upsampled, under the sentence's kernel.

        Returns:
            (E, 4h, 4w) logits.
        """
        x = self.up1(F.interpolate(pixels, scale_factor=2.0, mode="bilinear"))
        x = self.up2(F.interpolate(x, scale_factor=2.0, mode="bilinear"))
        x = self.pixels(x)  # (E, C/2, 4h, 4w)
        kernel = self.sentence_kernel(sentence)
        bias = kernel[:, -1, None, None]
        kernel = kernel[:, :-1].view(len(x), x.shape[1], -1)  # (E, C/2, 9)
        # A 3x3 convolution to one channel: the product at each of 9 places, moved and added up.
        places = torch.einsum("eck,echw->ekhw", kernel, x).unflatten(1, (self.KERNEL, self.KERNEL))
        height, width = x.shape[-2:]
        padded = F.pad(places, (1, 1, 1, 1))
        moved = [
            padded[:, i, j, i : i + height, j : j + width]
            for i in range(self.KERNEL)
            for j in range(self.KERNEL)
        ]
        return torch.stack(moved).sum(dim=0) + bias


class PixelAttention(CrossAttention):
    """The same where both sides are pixels: fused, so that N×N weights are never held."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of (E, heads, N, d) thrice."""
        return F.scaled_dot_product_attention(q, k, v, mask)


class CrisNeck(nn.Module):
    """Cross-modal neck: the sentence gates the deep features, the other depths are added.

    Args:
        dim: width C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sentence = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.ReLU())
        self.gated = nn.Sequential(LayerNorm2d(dim), nn.ReLU())
        self.with_middle = _conv(2 * dim, dim, 1)
        self.with_shallow = _conv(2 * dim, dim, 1)
        self.levels = nn.ModuleList(_conv(dim, dim, 3) for _ in range(3))
        self.mix = _conv(3 * dim, dim, 1)
        self.place = nn.Sequential(_conv(dim + 2, dim, 3), _conv(dim, dim, 3))

    def forward(self, taps: Tensor, sentence: Tensor) -> Tensor:
        """Maps taps (E, 3·C, h, w) and sentences (E, C) to (E, C, h, w)."""
        shallow, middle, deep = taps.chunk(3, dim=1)
        deep = self.gated(deep * self.sentence(sentence)[:, :, None, None])
        middle = self.with_middle(torch.cat([middle, deep], dim=1))
        shallow = self.with_shallow(torch.cat([shallow, middle], dim=1))
        each = [level(x) for level, x in zip(self.levels, (shallow, middle, deep), strict=True)]
        fused = self.mix(torch.cat(each, dim=1))  # (E, C, h, w)
        count, _, height, width = fused.shape
        y = torch.linspace(-1, 1, height, device=fused.device, dtype=fused.dtype)
        x = torch.linspace(-1, 1, width, device=fused.device, dtype=fused.dtype)
        places = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(count, -1, -1, -1)
        placed: Tensor = self.place(torch.cat([fused, places], dim=1))
        return placed


class CrisLayer(nn.Module):
    """One layer of the vision-language decoder, pre-norm, with norms after attention too.

    Args:
        dim: width C; heads; ffn_dim: hidden width of the FFN.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = PixelAttention(dim, heads, downsample=1)
        self.self_norm = nn.LayerNorm(dim)
        self.word_attention = CrossAttention(dim, heads, downsample=1)
        self.word_norm = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.ReLU(), nn.LayerNorm(ffn_dim), nn.Linear(ffn_dim, dim)
        )

    def forward(
        self, pixels: Tensor, position: Tensor, words: Tensor, placed_words: Tensor, mask: Tensor
    ) -> Tensor:
        """Maps pixels (E, N, C) to the same shape; words (E, L, C), mask (E, 1, 1, L)."""
        x = self.norm1(pixels)
        placed = x + position
        pixels = pixels + self.self_norm(self.self_attention(placed, placed, x))
        x = self.norm2(pixels) + position
        pixels = pixels + self.word_norm(self.word_attention(x, placed_words, words, mask))
        changed: Tensor = pixels + self.ffn(self.norm3(pixels))
        return changed


def _conv(inputs: int, outputs: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False),
        LayerNorm2d(outputs),
        nn.ReLU(),
    )
