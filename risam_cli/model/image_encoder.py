"""SAM's ViT image encoder with three taps and adapters.

Module names and arithmetic follow ``segment_anything.modeling.image_encoder`` (Apache-2.0), so
that its checkpoints load key by key. What differs: features are tapped at three depths, a block
may carry an adapter, and small models may start with a stem of convolutions, whose stride-4
features are handed on for sharp mask edges. :mod:`.fast.prepare` gives it a device's fastest
kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.layers import LayerNorm2d

# Fused kernels want queries, keys and values of one width, so values are padded for them; else
# PyTorch makes the (h*w)² logits after all. Heads narrower than this gain little by it.
FUSED_FROM = 64


@dataclass(frozen=True)
class EncoderFeatures:
    """What the encoder says of B images on its grid of h×w patches.

    Attributes:
        shallow: F_v1, (B, D, h, w), after the first tapped block.
        middle: F_v2, (B, D, h, w), after the second tapped block.
        deep: F_v3, (B, C, h, w), the last block's output through SAM's neck.
        fine: (B, F, 4h, 4w) from a convolutional stem, or None.
    """

    shallow: Tensor
    middle: Tensor
    deep: Tensor
    fine: Tensor | None


class PatchEmbed(nn.Module):
    """SAM's patch embedding: one strided convolution, (B, 3, S, S) to (B, h, w, D)."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Gives the grid, and no stride-4 features."""
        return self.proj(x).permute(0, 2, 3, 1), None


class ConvStem(nn.Module):
    """Convolutions down to stride 16 in place of the patch embedding (ours, for small models).

    After "Early Convolutions Help Transformers See Better" (Xiao et al. 2021), which trains in
    far fewer steps than a patch embedding.

    Args:
        widths: channels at stride 2, 4 and 8.
        dim: channels at stride 16.
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        half, quarter, eighth = widths
        self.to_fine = nn.Sequential(
            _conv_norm_act(3, half, 2),
            _conv_norm_act(half, quarter, 2),
            _conv_norm_act(quarter, quarter),
        )
        self.to_grid = nn.Sequential(
            _conv_norm_act(quarter, eighth, 2),
            _conv_norm_act(eighth, eighth),
            nn.Conv2d(eighth, dim, kernel_size=3, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, 3, S, S) to the grid (B, S/16, S/16, D) and fine features (B, F, S/4, S/4)."""
        fine = self.to_fine(x)
        return self.to_grid(fine).permute(0, 2, 3, 1), fine


def _conv_norm_act(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(4, outputs),
        nn.GELU(),
    )


class ImageEncoder(nn.Module):
    """SAM's image encoder (Kirillov et al. 2023), tapped at three depths [paper, Fig. 3].

    Args:
        image_size: side S of the square input in pixels that the position tables are made for.
        patch_size: side of a patch in pixels; S must be a multiple of it.
        dim, depth, heads, mlp_ratio: the ViT's.
        out_dim: channels C after the neck.
        window: side of local attention windows in patches, for blocks not in ``global_blocks``.
        global_blocks: indices of the blocks with global attention.
        taps: the two block indices of shallow and middle features, and the last block's (ours:
            the ends of thirds). The deep features pass the neck, so every SAM weight is used.
        adapter_dim: width of the adapters, 0 for none.
        stem: channels of a convolutional stem at stride 2, 4 and 8, or None for SAM's patches.
        stem_in_deep: add the stem's stride-4 features to the deep ones, see :class:`StemInDeep`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        out_dim: int,
        window: int,
        global_blocks: Sequence[int],
        taps: tuple[int, int, int],
        adapter_dim: int,
        stem: Sequence[int] | None,
        stem_in_deep: bool = False,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        if taps[2] != depth - 1 or not 0 <= taps[0] < taps[1] < taps[2]:
            raise ValueError(f"taps {taps} must rise and end at the last block, {depth - 1}")
        if stem is not None and patch_size != 16:
            raise ValueError("a convolutional stem has stride 16, so patch_size must be 16")
        if stem_in_deep and stem is None:
            raise ValueError("stem_in_deep needs a stem")
        self.image_size = image_size
        self.patch_size = patch_size
        self.taps = taps
        grid = image_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, dim) if stem is None else ConvStem(stem, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                heads=heads,
                mlp_ratio=mlp_ratio,
                window=0 if index in global_blocks else window,
                grid=grid,
                adapter_dim=adapter_dim,
            )
            for index in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dim, out_dim, kernel_size=1, bias=False),
            LayerNorm2d(out_dim),
            nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_dim),
        )
        self.stem_in_deep = StemInDeep(stem[1], out_dim) if stem and stem_in_deep else None

    def forward(self, pixels: Tensor) -> EncoderFeatures:
        """Encodes images.

        Args:
            pixels: (B, 3, H, W), normalized by SAM's mean and standard deviation; H and W
                multiples of the patch size. Other sizes than the built one are allowed: the
                position tables are interpolated.
        """
        x, fine = self.patch_embed(pixels)  # (B, h, w, D)
        x = x + self.position(x.shape[1], x.shape[2])
        tapped = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps[:2]:
                tapped.append(x.permute(0, 3, 1, 2))
        return EncoderFeatures(tapped[0], tapped[1], self.add_stem(self.to_deep(x), fine), fine)

    def position(self, height: int, width: int) -> Tensor:
        """The position embeddings of a grid, (1, h, w, D)."""
        return resize_pos_embed(self.pos_embed, height, width)

    def to_deep(self, x: Tensor) -> Tensor:
        """SAM's neck, (B, h, w, D) to (B, C, h, w); a 1×1 convolution is taken as a product."""
        neck: Any = self.neck
        narrow, norm, spread, last_norm = neck
        y = F.linear(x, narrow.weight.flatten(1)).permute(0, 3, 1, 2)  # (B, C, h, w)
        return last_norm(spread(norm(y)))

    def add_stem(self, deep: Tensor, fine: Tensor | None) -> Tensor:
        """The deep features (B, C, h, w) with the stem's (B, F, 4h, 4w), where asked for."""
        if self.stem_in_deep is None or fine is None:
            return deep
        return deep + self.stem_in_deep(fine).to(deep.dtype)


_GAIN = 8.0


class StemInDeep(nn.Module):
    """The stem's features on the encoder's grid, to be added to the deep ones (ours).

    A small ViT trained beside a stem leaves to it what the stem knows already: its deep features
    then hold no colours, and a phrase's second object cannot be told by its colour. The projection
    starts at zero, so that where it is new it changes nothing.

    Args:
        fine_dim: channels F of the stem at stride 4; out_dim: channels C of the deep features.
    """

    def __init__(self, fine_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(fine_dim)
        # AdamW moves a weight by its learning rate at most: from zero, what is added would stay a
        # twentieth of the deep features for a thousand steps.
        nn.init.constant_(self.norm.weight, _GAIN)
        self.proj = nn.Conv2d(fine_dim, out_dim, kernel_size=1, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, fine: Tensor) -> Tensor:
        """Maps (B, F, 4h, 4w) to (B, C, h, w)."""
        projected: Tensor = self.proj(self.norm(F.avg_pool2d(fine, kernel_size=4)))
        return projected


class Block(nn.Module):
    """A ViT block with global or windowed attention and, where asked, an adapter by its MLP."""

    def __init__(
        self, *, dim: int, heads: int, mlp_ratio: float, window: int, grid: int, adapter_dim: int
    ) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, window or grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio))
        self.adapter = Adapter(dim, adapter_dim) if adapter_dim else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, h, w, D) to the same shape."""
        x = x + self.attn(self.norm1(x), self.window)
        return x + self.feed_forward(self.norm2(x))

    def feed_forward(self, y: Tensor) -> Tensor:
        """MLP and adapter, side by side."""
        return self.mlp(y) if self.adapter is None else self.mlp(y) + self.adapter(y)


class MLPBlock(nn.Module):
    """The ViT's MLP, with segment-anything's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to the same shape."""
        return self.lin2(F.gelu(self.lin1(x)))


class Attention(nn.Module):
    """Multi-head self-attention with decomposed relative positions (Li et al. 2022, MViTv2)."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        """Maps (B, h, w, D) to the same shape; ``window`` patches see each other, or 0 for all."""
        batch, height, width, dim = x.shape
        qkv = self.qkv(x)  # (B, h, w, 3D)
        if window:
            qkv = window_partition(self._padded(qkv, window), window)  # (B·n, window, window, 3D)
        rows, columns = qkv.shape[1:3]
        qkv = qkv.reshape(-1, rows * columns, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B or B·n, heads, rows*columns, D/heads)

        x = self.attend(q, k, v, rows, columns)

        x = x.transpose(1, 2).reshape(-1, rows, columns, dim)
        if window:
            x = window_unpartition(x, window, height, width)
        return self.proj(x.reshape(batch, height, width, dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int) -> Tensor:
        """Attention of (B, heads, rows*columns, D/heads), with positions, to the same shape."""
        rel_h = relative_table(self.rel_pos_h, rows)
        return relative_attention(q, k, v, rel_h, relative_table(self.rel_pos_w, columns))

    def _padded(self, qkv: Tensor, window: int) -> Tensor:
        """Pads (B, h, w, 3D) to whole windows as SAM does, without computing the padding.

        SAM pads with zeros before the projection, so a padded patch's query, key and value are the
        projection's bias; they take part in attention.
        """
        batch, height, width, channels = qkv.shape
        below, right = -height % window, -width % window
        if not below and not right:
            return qkv
        bias: Tensor = self.qkv.bias.to(qkv.dtype)
        padded = bias.expand(batch, height + below, width + right, channels).clone()
        padded[:, :height, :width] = qkv
        return padded


def relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Softmax attention with SAM's bias, ``q·rel_h[row] + q·rel_w[column]``, in one product.

    The bias of query i and key j is ``h_i[row of j] + w_i[column of j]``, where ``h_i`` is the
    query times the table of its own row and ``w_i`` times that of its own column (Li et al. 2022,
    MViTv2, as segment_anything has it). Appending h_i and w_i to the query's channels, and one-hot
    codes of row and column to the key's, makes the bias part of the inner product, so that no
    (h*w)² tensor is ever made (ours).

    Args:
        q, k, v: (B, heads, h*w, d), strided as they come.
        rel_h: (h, h, d), by row of query and row of key.
        rel_w: (w, w, d), by column of query and column of key.

    Returns:
        (B, heads, h*w, d).
    """
    dim = q.shape[-1]
    query, key = with_positions(q, k, rel_h, rel_w)
    if dim < FUSED_FROM:
        return F.scaled_dot_product_attention(query, key, v, scale=1.0)
    v = F.pad(v, (0, query.shape[-1] - dim))
    return F.scaled_dot_product_attention(query, key, v, scale=1.0)[..., :dim]


def with_positions(q: Tensor, k: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, heads, h*w, d + h + w) whose products are the biased logits."""
    batch, heads, _, dim = q.shape
    bias_h, bias_w = relative_bias(q, rel_h, rel_w)
    code = _one_hot_code(rel_h.shape[0], rel_w.shape[0], q.device, q.dtype)
    query = torch.cat([q * dim**-0.5, bias_h, bias_w], dim=-1)
    return query, torch.cat([k, code.expand(batch, heads, -1, -1)], dim=-1)


def relative_bias(q: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor, Tensor]:
    """The biases of queries (B, heads, h*w, d) by key row, (..., h*w, h), and column, (..., w)."""
    batch, heads, _, dim = q.shape
    grid = q.reshape(batch, heads, rel_h.shape[0], rel_w.shape[0], dim)
    bias_h = torch.einsum("bnhwd,hkd->bnhwk", grid, rel_h)
    bias_w = torch.einsum("bnhwd,wkd->bnhwk", grid, rel_w)
    return bias_h.flatten(2, 3), bias_w.flatten(2, 3)


def _one_hot_code(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Codes of row and column of each key, (h*w, h + w)."""
    rows = torch.eye(height, device=device, dtype=dtype).repeat_interleave(width, dim=0)
    columns = torch.eye(width, device=device, dtype=dtype).repeat(height, 1)
    return torch.cat([rows, columns], dim=-1)


def window_partition(x: Tensor, window: int) -> Tensor:
    """Splits (B, h, w, D) into windows (B·n, window, window, D), zero-padded right and bottom."""
    batch, height, width, dim = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.view(batch, rows, window, columns, window, dim)
    return x.transpose(2, 3).reshape(-1, window, window, dim)


def window_unpartition(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undoes :func:`window_partition` and drops the padding: back to (B, height, width, D)."""
    rows, columns = -(-height // window), -(-width // window)
    x = windows.view(-1, rows, columns, window, window, windows.shape[-1])
    x = x.transpose(2, 3).reshape(-1, rows * window, columns * window, windows.shape[-1])
    return x[:, :height, :width]


class Adapter(nn.Module):
    """A bottleneck beside a block's MLP: down, GELU, up.

    The paper names parameter-efficient fine-tuning; this form is ours (after Houlsby et al.
    2019, run in parallel). The up-projection starts at zero, so that an untrained adapter
    leaves the encoder as it is.

    Args:
        dim: width of the block.
        hidden: width of the bottleneck, at least 1.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.up = nn.Linear(hidden, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to the change that is added to the block's output."""
        return self.up(F.gelu(self.down(x)))


def relative_table(rel_pos: Tensor, side: int) -> Tensor:
    """Spreads a relative-position table (2·side-1, d) to (side, side, d)."""
    length = 2 * side - 1
    if rel_pos.shape[0] != length:
        rel_pos = resize_rel_pos(rel_pos, length)
    index = torch.arange(side, device=rel_pos.device)
    return rel_pos[index[:, None] - index[None, :] + side - 1]


def resize_rel_pos(rel_pos: Tensor, length: int) -> Tensor:
    """Interpolates a table (L, d) linearly to (length, d), as segment-anything does."""
    return (
        F.interpolate(rel_pos.float().t()[None], size=length, mode="linear")[0]
        .t()
        .to(rel_pos.dtype)
    )


def resize_pos_embed(pos_embed: Tensor, height: int, width: int) -> Tensor:
    """Interpolates (1, h, w, D) position embeddings to another grid, bicubic (ours)."""
    if pos_embed.shape[1:3] == (height, width):
        return pos_embed
    grid = pos_embed.permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).to(pos_embed.dtype)
