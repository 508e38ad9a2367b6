"""A throw-away head that teaches the small image encoder to segment (ours)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.image_encoder import EncoderFeatures
from risam_cli.model.layers import LayerNorm2d


@dataclass(frozen=True)
class DenseOutput:
    """Logits (B, classes, 4h, 4w) with class 0 background, and offsets (B, 2, 4h, 4w)."""

    shape: Tensor
    color: Tensor
    size: Tensor
    offset: Tensor


class DenseHead(nn.Module):
    """Per-pixel classes and the way to the instance's centre, at stride 4.

    SAM's encoder arrives pre-trained on a billion masks. The small one learns from scenes whose
    every pixel is known; afterwards this head is thrown away, and all three taps, the neck and
    the stem keep what they learned.

    Args:
        tap_dim: channels D; deep_dim: channels C; fine_dim: channels F, 0 without a stem.
        classes: numbers of shapes, colours and sizes, background not counted.
    """

    def __init__(
        self, tap_dim: int, deep_dim: int, fine_dim: int, classes: tuple[int, int, int]
    ) -> None:
        super().__init__()
        width = deep_dim // 2
        self.classes = classes
        self.merge = nn.Conv2d(2 * tap_dim + deep_dim, deep_dim, kernel_size=1)
        self.up1 = nn.ConvTranspose2d(deep_dim, width, kernel_size=2, stride=2)
        self.norm = LayerNorm2d(width)
        self.up2 = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.fine = nn.Conv2d(fine_dim, width, kernel_size=1) if fine_dim else None
        self.mix = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.out = nn.Conv2d(width, sum(classes) + 3 + 2, kernel_size=1)

    def forward(self, features: EncoderFeatures) -> DenseOutput:
        """Reads all that the encoder gives."""
        levels = [features.shallow, features.middle, features.deep]
        x = F.gelu(self.merge(torch.cat(levels, dim=1)))
        x = self.up2(F.gelu(self.norm(self.up1(x))))
        if self.fine is not None and features.fine is not None:
            x = x + self.fine(features.fine)
        x = self.out(F.gelu(self.mix(F.gelu(x))))
        widths = [count + 1 for count in self.classes] + [2]
        return DenseOutput(*x.split(widths, dim=1))
