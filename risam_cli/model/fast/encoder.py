"""The image encoder's modules for inference: the same weights and, up to rounding, results.

Each class below stands in for its base, whose modules :mod:`.prepare` turns into it. Products go
through :mod:`.linear` and attention through :mod:`.attention`; tables of positions are made once;
weights may be held in a lower format, to which inputs are brought. Attention and blocks are to be
called without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from risam_cli.model.fast.attention import fast_attention
from risam_cli.model.fast.crew import share, threads_of
from risam_cli.model.fast.linear import linear
from risam_cli.model.fast.tuning import in_use
from risam_cli.model.image_encoder import (
    Adapter,
    Attention,
    Block,
    EncoderFeatures,
    ImageEncoder,
    MLPBlock,
    relative_table,
    resize_pos_embed,
)

SMALL_IMAGE = 768
"""Patches of an image whose heads go through global attention together."""


class FastImageEncoder(ImageEncoder):
    """The encoder, whose features come out in float32 whatever its matrices are held in."""

    def position(self, height: int, width: int) -> Tensor:
        """The position embeddings of a grid, (1, h, w, D), made once for a size."""
        return self._positions(self.pos_embed, height, width)

    def to_deep(self, x: Tensor) -> Tensor:
        """SAM's neck, (B, h, w, D) to (B, C, h, w)."""
        neck: Any = self.neck
        narrow, norm, spread, last_norm = neck
        y = linear(x, narrow.weight.flatten(1)).permute(0, 3, 1, 2)  # (B, C, h, w)
        if spread.weight.dtype == norm.weight.dtype:
            return last_norm(spread(norm(y)))
        y = spread(norm(y.to(norm.weight.dtype)).to(spread.weight.dtype))
        return last_norm(y.to(norm.weight.dtype))

    @property
    def precision(self) -> torch.dtype:
        """The format of its matrices."""
        narrow: Any = self.neck[0]
        dtype: torch.dtype = narrow.weight.dtype
        return dtype

    def keep_tables(self) -> None:
        """To be called once, when a plain encoder has become one of these."""
        self._positions = TableCache(resize_pos_embed)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some images, or some rows and columns of one: of (B, h, w, D)."""

    images: slice
    rows: slice
    columns: slice

    @property
    def index(self) -> tuple[slice, slice, slice]:
        return self.images, self.rows, self.columns


class HostImageEncoder(FastImageEncoder):
    """The encoder on a CPU: tile after tile through all blocks between two with global attention.

    What a tile needs stays in the caches of the core that works on it, and cores meet only where
    every patch sees every other (see :mod:`.crew`).
    """

    def forward(self, pixels: Tensor) -> EncoderFeatures:
        """See :meth:`risam_cli.model.image_encoder.ImageEncoder.forward`."""
        threads = torch.get_num_threads()
        # Convolutions and group norms add up in another order where they have more threads.
        with threads_of(1):
            x, fine = self.patch_embed(pixels)  # (B, h, w, D)
            x = x + self.position(x.shape[1], x.shape[2])
            tapped = {tap: torch.empty_like(x) for tap in self.taps[:2]}
            for chain in self._chains():
                self._through(chain, x, tapped, threads)
            deep = self.add_stem(self.to_deep(x), fine)
        shallow, middle = (tapped[tap].permute(0, 3, 1, 2) for tap in self.taps[:2])
        return EncoderFeatures(shallow, middle, deep, fine)

    def through_some(self, x: Tensor) -> None:
        """Takes x (B, h, w, D) through the longest chain of blocks, for a measurement."""
        threads = torch.get_num_threads()
        with threads_of(1):
            self._through(max(self._chains(), key=len), x, {}, threads)

    def _chains(self) -> Iterator[dict[int, Block]]:
        """Blocks by number: one with global attention and the windowed ones that follow it."""
        chain: dict[int, Block] = {}
        for number, block in enumerate(cast(Iterable[Block], self.blocks)):
            if chain and not block.window:
                yield chain
                chain = {}
            chain[number] = block
        yield chain

    def _through(
        self, chain: dict[int, Block], x: Tensor, tapped: dict[int, Tensor], threads: int
    ) -> None:
        """Takes x, which is written over, through a chain, and keeps what is tapped on the way."""
        window = max(block.window for block in chain.values())
        attended = None
        first = next(iter(chain.values()))
        if not first.window:
            attended = _attend_globally(first, x, threads)

        def work(tile: _Tile) -> None:
            y = x[tile.index]
            for number, block in chain.items():
                if attended is not None and block is first:
                    y = y + block.attn.proj(attended[tile.index])
                else:
                    y = y + block.attn(block.norm1(y), block.window)
                y += block.feed_forward(block.norm2(y))
                if number in tapped:
                    tapped[number][tile.index] = y
            x[tile.index] = y

        share(_tiles(x, window or 1), work, threads)


def _attend_globally(block: Block, x: Tensor, threads: int) -> Tensor:
    """What each patch gathers of all others, (B, h, w, D), before the output projection."""
    attention = cast(FastAttention, block.attn)
    batch, height, width, dim = x.shape
    heads = attention.heads
    weight = attention.qkv.weight
    qkv = x.new_empty(batch, height, width, 3 * dim, dtype=_format(x, weight))

    def project(tile: _Tile) -> None:
        qkv[tile.index] = attention.qkv(block.norm1(x[tile.index]))

    share(_tiles(x, 1), project, threads)
    q, k, v = qkv.view(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
    gathered = qkv.new_empty(batch, height * width, heads, dim // heads)

    def attend(part: tuple[slice, slice]) -> None:
        some = attention.attend(q[part], k[part], v[part], height, width)
        gathered[part[0], :, part[1]] = some.transpose(1, 2)

    share(_heads(batch, heads, height * width), attend, threads)
    return gathered.view(batch, height, width, dim)


def _format(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of a product's result."""
    if weight.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return weight.dtype


def _heads(batch: int, heads: int, tokens: int) -> list[tuple[slice, slice]]:
    """Cuts (B, heads) into pieces: a head of one image, or where images are small, some images."""
    if tokens >= SMALL_IMAGE:
        return [(slice(b, b + 1), slice(h, h + 1)) for b in range(batch) for h in range(heads)]
    step = SMALL_IMAGE // tokens
    return [(slice(b, b + step), slice(0, heads)) for b in range(0, batch, step)]


def _tiles(x: Tensor, window: int) -> list[_Tile]:
    """Cuts (B, h, w, D) into tiles of whole windows; how many threads there are changes none.

    Returns:
        large ones first, so that threads end at the same time.
    """
    batch, height, width = x.shape[:3]
    limit = in_use().tile
    images = max(1, limit // (height * width))
    rows, columns = height, width
    if height * width > limit:
        rows = _evenly(height, window, limit // width)
        columns = _evenly(width, window, limit // rows)
    tiles = [
        _Tile(slice(b, b + images), slice(top, top + rows), slice(left, left + columns))
        for b in range(0, batch, images)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]
    return sorted(tiles, key=lambda tile: -x[tile.index].numel())


def _evenly(length: int, window: int, limit: int) -> int:
    """The length of parts that are about equal: whole windows, at least one, within a limit."""
    windows = -(-length // window)
    parts = -(-windows // max(1, limit // window))
    return -(-windows // parts) * window


class FastAttention(Attention):
    """Attention by the device's fastest way, its tables made once for a size."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int) -> Tensor:
        """Attention of (B, heads, rows*columns, D/heads), with positions, to the same shape."""
        rel_h = self._table_h(self.rel_pos_h, rows).to(q.dtype)
        rel_w = self._table_w(self.rel_pos_w, columns).to(q.dtype)
        return fast_attention(q, k, v, rel_h, rel_w)

    def keep_tables(self) -> None:
        """To be called once, when plain attention has become one of these."""
        self._table_h, self._table_w = TableCache(relative_table), TableCache(relative_table)


class FastMLPBlock(MLPBlock):
    """The MLP with its GELU inside the first product."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to the same shape."""
        return self.lin2(linear(x, self.lin1.weight, self.lin1.bias, gelu=True))


class FastAdapter(Adapter):
    """An adapter with its GELU inside the first product."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to the change that is added to the block's output."""
        return self.up(linear(x, self.down.weight, self.down.bias, gelu=True))


class TableCache:
    """Keeps what a function makes of a parameter, as long as nothing can have changed it.

    Kept for inference only, for one size at a time and 16 in all; where gradients are wanted, or
    a compiler looks on, the function is simply called.

    Args:
        make: gives a table of a parameter and sizes.
    """

    KEPT = 16

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._known: dict[tuple[int, ...], Tensor] = {}
        self._state: tuple[object, ...] = ()

    def __call__(self, parameter: Tensor, *sizes: int) -> Tensor:
        """The table of a parameter for some sizes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or parameter.is_inference():
            table: Tensor = self._make(parameter, *sizes)
            return table
        # A change in place raises the version; another tensor in its place has another address.
        state = (parameter.data_ptr(), parameter._version, parameter.dtype, parameter.device)
        if state != self._state or len(self._known) >= self.KEPT:
            self._known.clear()
            self._state = state
        known = self._known.get(sizes)
        if known is None:
            known = self._known[sizes] = self._make(parameter, *sizes)
        return known

    def __deepcopy__(self, memo: object) -> TableCache:
        return TableCache(self._make)

    def __reduce__(self) -> tuple[object, ...]:
        return TableCache, (self._make,)
