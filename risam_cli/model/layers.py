"""Small layers that several boxes share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of (B, C, H, W); parameter names as in segment-anything."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes (B, C, H, W) over C."""
        # The fused kernel wants channels last; the permutes are views in channels-last memory.
        x = x.permute(0, 2, 3, 1)
        x = nn.functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class MLP(nn.Module):
    """Linear layers with GELU between them.

    Args:
        widths: input width, hidden widths, output width.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., first width) to (..., last width)."""
        for index, layer in enumerate(self.layers):
            x = layer(x if index == 0 else nn.functional.gelu(x))
        return x


def sine_positions_1d(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed sine/cosine position encodings ("Attention Is All You Need", 3.5).

    Returns:
        (length, dim) float32 in -1..1.
    """
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    rate = torch.exp(
        torch.arange(0, dim, 2, device=device, dtype=torch.float32) * (-math.log(1e4) / dim)
    )
    angle = position * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


def sine_positions_2d(
    height: int, width: int, dim: int, device: torch.device | None = None
) -> Tensor:
    """Fixed encodings of pixel centres, in units of the picture, so any grid size fits (ours).

    Half of the channels code y, half x; wavelengths run from twice the picture's side down
    by powers of two, since "leftmost" needs the long ones and edges the short ones.

    Returns:
        (height * width, dim) float32 in -1..1, row-major.
    """
    if dim % 4:
        raise ValueError(f"dim {dim} is not divisible by 4")
    frequency = math.pi * 2.0 ** (torch.arange(dim // 4, device=device) * (8.0 / (dim // 4)))

    def encode(length: int) -> Tensor:
        centre = (torch.arange(length, device=device, dtype=torch.float32) + 0.5) / length
        angle = centre[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (length, dim / 2)

    y = encode(height)[:, None].expand(height, width, dim // 2)
    x = encode(width)[None].expand(height, width, dim // 2)
    return torch.cat([y, x], dim=-1).reshape(height * width, dim)
