"""Tables of positions: interpolated to other sizes, spread for use, and kept while they hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


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
