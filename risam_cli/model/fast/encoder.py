"""The image encoder's modules for inference: the same weights and, up to rounding, results.

Each class below stands in for its base, whose modules :mod:`.prepare` turns into it. Products go
through :mod:`.linear` and attention through :mod:`.attention`; tables of positions are made once;
weights may be held in a lower format, to which inputs are brought. Attention and blocks are to be
called without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from risam_cli.model.fast.attention import fast_attention
from risam_cli.model.fast.linear import apply_linear, linear
from risam_cli.model.image_encoder import (
    Adapter,
    Attention,
    Block,
    ImageEncoder,
    MLPBlock,
    relative_table,
    resize_pos_embed,
)

HOST_TOKENS = 1024  # that go through a block's parts at a time on a CPU, for each of its threads


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


class HostBlock(Block):
    """A block on a CPU: some windows and some rows at a time, for its caches and memory."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, h, w, D) to the same shape."""
        if self.window:
            attended = torch.empty_like(x)
            for part in _parts(x, self.window):
                torch.add(x[part], self.attn(self.norm1(x[part]), self.window), out=attended[part])
        else:
            attended = x + self.attn(self.norm1(x))
        for part in _parts(x):
            attended[part] += self.feed_forward(self.norm2(attended[part]))
        return attended


def _parts(x: Tensor, multiple: int = 1) -> Iterator[tuple[slice, slice]]:
    """Cuts (B, h, w, D) into whole images, or else into rows of one, by a multiple of rows."""
    batch, height, width = x.shape[:3]
    limit = HOST_TOKENS * torch.get_num_threads()
    images = max(1, limit // (height * width))
    rows = max(1, limit // (width * multiple)) * multiple
    for first in range(0, batch, images):
        for top in range(0, height, rows):
            yield slice(first, first + images), slice(top, top + rows)


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
        return self.lin2(apply_linear(self.lin1, x, gelu=True))


class FastAdapter(Adapter):
    """An adapter with its GELU inside the first product."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., dim) to the change that is added to the block's output."""
        return self.up(apply_linear(self.down, x, gelu=True))


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
