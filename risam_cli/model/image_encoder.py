"""SAM's ViT image encoder with three taps and adapters.

Module names and arithmetic follow ``segment_anything.modeling.image_encoder`` (Apache-2.0), so
that its checkpoints load key by key. What differs: attention and matrix products run through the
device's fastest kernels (:mod:`.attention`, :mod:`.linear`), features are tapped at three depths, a
block may carry an adapter, and small models may start with a stem of convolutions, whose stride-4
features are handed on for sharp mask edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from risam_cli.model.fast.attention import relative_attention
from risam_cli.model.fast.linear import apply_linear, linear
from risam_cli.model.fast.tables import TableCache, relative_table, resize_pos_embed
from risam_cli.model.layers import LayerNorm2d

HOST_TOKENS = 1024  # that go through a block's parts at a time on a CPU, for each of its threads


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
        self.image_size = image_size
        self.patch_size = patch_size
        self.taps = taps
        self.checkpoint_blocks = False
        self._positions = TableCache(resize_pos_embed)
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

    def forward(self, pixels: Tensor) -> EncoderFeatures:
        """Encodes images.

        Args:
            pixels: (B, 3, H, W), normalized by SAM's mean and standard deviation; H and W
                multiples of the patch size. Other sizes than the built one are allowed: the
                position tables are interpolated.
        """
        x, fine = self.patch_embed(pixels)  # (B, h, w, D)
        x = x + self._positions(self.pos_embed, x.shape[1], x.shape[2])
        tapped = []
        for index, block in enumerate(self.blocks):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if index in self.taps[:2]:
                tapped.append(x.permute(0, 3, 1, 2))
        return EncoderFeatures(tapped[0], tapped[1], self._to_deep(x), fine)

    def _to_deep(self, x: Tensor) -> Tensor:
        """SAM's neck, (B, h, w, D) to (B, C, h, w); a 1×1 convolution is taken as a product."""
        neck: Any = self.neck
        narrow, norm, spread, last_norm = neck
        y = linear(x, narrow.weight.flatten(1)).permute(0, 3, 1, 2)  # (B, C, h, w)
        if spread.weight.dtype == norm.weight.dtype:
            return last_norm(spread(norm(y)))
        y = spread(norm(y.to(norm.weight.dtype)).to(spread.weight.dtype))
        return last_norm(y.to(norm.weight.dtype))

    @property
    def precision(self) -> torch.dtype:
        """The format of its matrices; see :meth:`hold_weights_in`."""
        narrow: Any = self.neck[0]
        dtype: torch.dtype = narrow.weight.dtype
        return dtype

    def hold_weights_in(self, dtype: torch.dtype) -> None:
        """Brings the weights of the blocks' and the neck's products to a format, for inference.

        Norms, position tables, the first convolutions and the stream between the blocks stay in
        float32, so features come out in float32 (ours). Half of the memory goes, and with it the
        casts that autocast does at every call; no autocast is needed, and results are closer to
        float32's without.
        """
        for part in (self.blocks, self.neck):
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)

    def compile_blocks(self) -> None:
        """Has PyTorch compile the blocks when they first run, for inference on a GPU.

        Block by block, since blocks of a kind share what is compiled: one for windows and one for
        global attention, whatever the depth. PyTorch keeps it on disk for later processes, in the
        folder that ``TORCHINDUCTOR_CACHE_DIR`` names.
        """
        for block in self.blocks:
            block.compile()


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
        if x.device.type == "cpu" and not (
            torch.is_grad_enabled() or torch.compiler.is_compiling()
        ):
            return self._in_parts(x)
        x = x + self.attn(self.norm1(x), self.window)
        return x + self._feed_forward(self.norm2(x))

    def _in_parts(self, x: Tensor) -> Tensor:
        """The same on a CPU, some windows and some rows at a time, for its caches and memory."""
        if self.window:
            attended = torch.empty_like(x)
            for part in _parts(x, self.window):
                torch.add(x[part], self.attn(self.norm1(x[part]), self.window), out=attended[part])
        else:
            attended = x + self.attn(self.norm1(x))
        for part in _parts(x):
            attended[part] += self._feed_forward(self.norm2(attended[part]))
        return attended

    def _feed_forward(self, y: Tensor) -> Tensor:
        if self.adapter is None:
            return self.mlp(y)
        return self.mlp(y) + self.adapter(y)


def _parts(x: Tensor, multiple: int = 1) -> Iterator[tuple[slice, slice]]:
    """Cuts (B, h, w, D) into whole images, or else into rows of one, by a multiple of rows."""
    batch, height, width = x.shape[:3]
    limit = HOST_TOKENS * torch.get_num_threads()
    images = max(1, limit // (height * width))
    rows = max(1, limit // (width * multiple)) * multiple
    for first in range(0, batch, images):
        for top in range(0, height, rows):
            yield slice(first, first + images), slice(top, top + rows)


class MLPBlock(nn.Module):
    """The ViT's MLP, with segment-anything's names."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to the same shape."""
        return apply_linear(self.lin2, apply_linear(self.lin1, x, gelu=True))


class Attention(nn.Module):
    """Multi-head self-attention with decomposed relative positions (Li et al. 2022, MViTv2)."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self._table_h, self._table_w = TableCache(relative_table), TableCache(relative_table)

    def forward(self, x: Tensor, window: int = 0) -> Tensor:
        """Maps (B, h, w, D) to the same shape; ``window`` patches see each other, or 0 for all."""
        batch, height, width, dim = x.shape
        qkv = apply_linear(self.qkv, x)  # (B, h, w, 3D)
        if window:
            qkv = window_partition(self._padded(qkv, window), window)  # (B·n, window, window, 3D)
        rows, columns = qkv.shape[1:3]
        qkv = qkv.reshape(-1, rows * columns, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B or B·n, heads, rows*columns, D/heads)
        rel_h = self._table_h(self.rel_pos_h, rows).to(q.dtype)
        rel_w = self._table_w(self.rel_pos_w, columns).to(q.dtype)
        x = relative_attention(q, k, v, rel_h, rel_w)
        x = x.transpose(1, 2).reshape(-1, rows, columns, dim)
        if window:
            x = window_unpartition(x, window, height, width)
        return apply_linear(self.proj, x.reshape(batch, height, width, dim))

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
        return apply_linear(self.up, apply_linear(self.down, x, gelu=True))
