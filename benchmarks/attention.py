"""The ways of attention with relative positions, one against the other, at the sizes that matter.

What :func:`risam_cli.model.fast.attention.choose_way` takes rests on this. FlexAttention, which
has to be compiled first, is timed on a GPU only; ``plain`` is attention as segment_anything writes
it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from common import Options, Row, Times, in_turns
from parity import written_out
from torch import Tensor
from torch.nn import functional as F

from risam_cli.model.fast.attention import WAYS, choose_way
from risam_cli.model.fast.linear import linear
from risam_cli.model.image_encoder import relative_table

# Windows or images, heads, side of the grid, channels of a head.
CASES = {
    "ViT-B, a global block": (1, 12, 64, 64),
    "ViT-B, a windowed block": (25, 12, 14, 64),
    "ViT-H, a global block": (1, 16, 64, 80),
    "tiny, a global block": (1, 6, 16, 32),
}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(options: Options) -> list[Row]:
    """Milliseconds of each way for each case, and of one matrix product by either kernel."""
    device = torch.device(options.device)
    rows = [] if device.type == "cuda" else products(options)
    for title, (batch, heads, side, dim) in CASES.items():
        if device.type == "cpu" and (title.startswith("ViT-H") or (options.quick and side > 16)):
            continue
        for precision, dtype in FORMATS.items():
            if device.type == "cpu" and precision != "fp32":
                continue  # there all ways but one compute in float32
            rows += ways(f"{title}, {precision}", (batch, heads, side, dim), dtype, options)
    return rows


def ways(
    title: str, case: tuple[int, int, int, int], dtype: torch.dtype, options: Options
) -> list[Row]:
    """One case by every way, in turns."""
    batch, heads, side, dim = case
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, side * side, 3, heads, dim, generator=generator).to(device, dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    table = relative_table(torch.randn(2 * side - 1, dim, generator=generator), side)
    table = table.to(device, dtype)
    on_gpu = device.type == "cuda"
    names = [name for name in WAYS if name != "flex" or on_gpu]
    calls: dict[str, Callable[[], Tensor]] = {
        name: partial(WAYS[name], q, k, v, table, table)
        for name in names
        if name != "by_rows" or not on_gpu
    }
    calls["plain"] = partial(written_out, q, k, v, table, table)
    with torch.inference_mode():
        times = in_turns(
            calls,
            options.repeats,
            synchronize=torch.cuda.synchronize if on_gpu else lambda: None,
        )
        chosen = choose_way(q, side, side)
    return [
        _row(f"{title}: {name}", taken, on_gpu, name == chosen) for name, taken in times.items()
    ]


def products(options: Options) -> list[Row]:
    """The MLP's first product of ViT-B by either kernel."""
    x, weight, bias = torch.randn(4096, 768), torch.randn(3072, 768), torch.randn(3072)
    calls: dict[str, Callable[[], Tensor]] = {
        "a product of 4096x768x3072, fp32: torch.nn.functional": partial(F.linear, x, weight, bias),
        "a product of 4096x768x3072, fp32: risam": partial(linear, x, weight, bias),
    }
    with torch.inference_mode():
        times = in_turns(calls, max(5, options.repeats))
    return [_row(name, taken, False, False) for name, taken in times.items()]


def _row(name: str, times: Times, on_gpu: bool, chosen: bool) -> Row:
    row = times.row(name, by="wall" if on_gpu else "cpu")
    assert row.spread is not None
    spread = (1e3 * row.spread[0], 1e3 * row.spread[1])
    return Row(name, 1e3 * row.value, "ms", spread, "the way that is taken" if chosen else "")
