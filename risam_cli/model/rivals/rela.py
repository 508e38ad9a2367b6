"""ReLA: the picture as P×P regions that ask the image, each other and the words.

After "GRES: Generalized Referring Expression Segmentation" (Liu, Ding, Jiang; CVPR 2023, arXiv
2306.00968), section 4, and the structure of the authors' published code. Own code. The encoders are
this project's. The authors' image encoder takes the words in at every stage; here it is frozen and
knows the image alone, so one pixel-word attention of that kind stands behind it. Ours, too: Feature
Enhancement and transposed convolutions in place of the deformable pixel decoder, regions that
attend all pixels in place of those of the last guess, region-language attention in every layer
as in the paper's equations, and the head for predicted IoU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.layers import MLP, LayerNorm2d
from risam_cli.model.mask_decoder import CrossAttention, Decoded, MaskDecoder
from risam_cli.model.streams import LinguisticStream, VisualStream


class RelaDecoder(MaskDecoder):
    """ReLAtionship modelling behind the encoders: regions, minimap, region filters.

    Args:
        dim: width C, a multiple of 4; heads; layers of the ReLAtionship block.
        ffn_dim: hidden width of its FFNs; mask_dim: channels of the mask features.
        minimap: P, regions a side; 10 in the paper.
    """

    def __init__(
        self, dim: int, heads: int, layers: int, ffn_dim: int, mask_dim: int, minimap: int = 10
    ) -> None:
        super().__init__()
        self.minimap = minimap
        self.pixel_words = PixelWords(dim, heads)
        self.regions = nn.Parameter(torch.randn(minimap**2, dim) * 0.02)
        self.region_position = nn.Parameter(torch.randn(minimap**2, dim) * 0.02)
        self.layers = nn.ModuleList(RelationLayer(dim, heads, ffn_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2),
            LayerNorm2d(dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, mask_dim, kernel_size=2, stride=2),
        )
        self.minimap_head = nn.Linear(dim, 1)
        self.filter_head = MLP([dim, dim, dim, mask_dim])
        self.no_target_head = MLP([dim, dim, 1])
        self.iou_head = MLP([dim, dim, 1])

    def forward(self, visual: VisualStream, language: LinguisticStream) -> Decoded:
        """Decodes E expressions; looks at neither sentences nor stride-4 features."""
        words, mask = language.words, language.valid[:, None, None, :]
        own = visual.of_expressions()
        features = self.pixel_words(own, visual.position, words, mask)  # (E, N, C)
        placed = features + visual.position

        regions = self.regions.expand(len(features), -1, -1)  # (E, P², C)
        for layer in self.layers:
            regions = layer(regions, self.region_position, placed, features, words, mask)
        regions = self.norm(regions)

        minimap = self.minimap_head(regions)[:, :, 0]  # (E, P²)
        filters = self.filter_head(regions)  # (E, P², mask_dim)
        on_grid = features.transpose(1, 2).unflatten(2, visual.grid)  # (E, C, h, w)
        pixels = self.up(on_grid)  # (E, mask_dim, 4h, 4w)
        # M = Σ_n x_n (f_n·F_m) = (Σ_n x_n f_n)·F_m: the regions' masks are never made.
        weights = torch.einsum("en,enc->ec", minimap.sigmoid(), filters)
        pooled = regions.mean(dim=1)
        return Decoded(
            torch.einsum("ec,echw->ehw", weights, pixels),
            self.iou_head(pooled)[:, 0].sigmoid(),
            self.no_target_head(pooled)[:, 0],
            minimap.unflatten(1, (self.minimap, self.minimap)),
        )


class RelationLayer(nn.Module):
    """Region-image, region-language and region-region attention, then an FFN.

    Args:
        dim: width C; heads; ffn_dim: hidden width of the FFN.
    """

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.to_image = CrossAttention(dim, heads, downsample=1)
        self.to_words = CrossAttention(dim, heads, downsample=1)
        self.to_regions = CrossAttention(dim, heads, downsample=1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.ffn = MLP([dim, ffn_dim, dim])

    def forward(
        self,
        regions: Tensor,
        region_position: Tensor,
        placed: Tensor,
        visual: Tensor,
        words: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Maps regions (E, P², C) to the same shape.

        Args:
            region_position: (P², C); placed, visual: pixels (E, N, C), with positions and without.
            words: (E, L, C); mask: (E, 1, 1, L).
        """
        asking = regions + region_position
        regions = self.norm1(regions + self.to_image(asking, placed, visual))
        own = regions + region_position
        among = self.to_regions(own, own, regions)
        spoken = self.to_words(own, words, words, mask)
        regions = self.norm2(regions + among + spoken)
        changed: Tensor = self.norm3(regions + self.ffn(regions))
        return changed


class PixelWords(nn.Module):
    """Each pixel gates itself by the words that it attends (LAVT's pixel-word attention).

    Args:
        dim: width C; heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = CrossAttention(dim, heads, downsample=1)
        self.own = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, visual: Tensor, position: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Maps pixels (E, N, C) to the same shape; words (E, L, C), mask (E, 1, 1, L)."""
        spoken = self.attention(visual + position, words, words, mask)
        gated = F.gelu(self.own(visual)) * spoken
        changed: Tensor = self.norm(visual + F.gelu(self.output(gated)))
        return changed
