"""Feature Enhancement: three depths of visual features become one [paper, Fig. 3]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.layers import LayerNorm2d


class FeatureEnhancement(nn.Module):
    """Fuses shallow, middle and deep features into enhanced visual features F_v.

    The paper's caption sends features of three depths in and takes F_v out. The form is ours:
    each depth is projected and normalized, the three are mixed by a 1×1 and a 3×3 convolution,
    and the mixture is added to the deep features. Language takes no part (ours), so F_v is
    computed once per image, however many expressions follow.

    Args:
        tap_dim: channels D of shallow and middle features.
        deep_dim: channels C of the deep features.
        dim: channels of F_v.
        enabled: False is the ablation "deep features only".
    """

    def __init__(self, tap_dim: int, deep_dim: int, dim: int, *, enabled: bool = True) -> None:
        super().__init__()
        self.deep = _project(deep_dim, dim)
        self.shallow = _project(tap_dim, dim) if enabled else None
        self.middle = _project(tap_dim, dim) if enabled else None
        self.mix = (
            nn.Sequential(
                nn.Conv2d(3 * dim, dim, kernel_size=1),
                nn.GELU(),
                nn.Conv2d(dim, dim, kernel_size=3, padding=1),
            )
            if enabled
            else None
        )
        self.norm = LayerNorm2d(dim)

    def forward(self, shallow: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
        """Maps (B, D, h, w), (B, D, h, w), (B, C, h, w) to F_v, (B, dim, h, w)."""
        fused = self.deep(deep)
        if self.mix is not None and self.shallow is not None and self.middle is not None:
            # Encoders of several strides are brought to the deep grid; SAM's ViT has one stride.
            levels = [
                F.interpolate(x, size=fused.shape[-2:], mode="bilinear", align_corners=False)
                if x.shape[-2:] != fused.shape[-2:]
                else x
                for x in (self.shallow(shallow), self.middle(middle))
            ]
            fused = fused + self.mix(torch.cat([*levels, fused], dim=1))
        return self.norm(fused)


def _project(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=1), LayerNorm2d(outputs))
