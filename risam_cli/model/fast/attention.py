"""SAM's attention with decomposed relative positions, by the fastest exact way of each device.

All ways compute the numbers of :func:`risam_cli.model.image_encoder.relative_attention`, itself one
of them, up to rounding, and without gradients. :func:`fast_attention` takes one, by what
docs/benchmarks.md measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from risam_cli.model.fast.linear import has_fast_products, linear
from risam_cli.model.image_encoder import relative_attention, relative_bias

FLASH_WIDEST = 256  # channels of a head that the flash kernel of a GPU takes
HOST_LOGITS = 4 << 20  # bytes of logits at a time for each thread, which stay in the CPU's caches
DEVICE_LOGITS = 256 << 20  # bytes of biases at a time on a GPU
BY_ROWS_FROM = 512  # tokens from where by_rows is faster than biased on a CPU

Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def fast_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Softmax attention with SAM's bias, ``q·rel_h[row] + q·rel_w[column]``.

    Args:
        q, k, v: (B, heads, h*w, d), strided as they come.
        rel_h: (h, h, d), by row of query and row of key.
        rel_w: (w, w, d), by column of query and column of key.

    Returns:
        (B, heads, h*w, d) in q's number format.
    """
    way = WAYS[choose_way(q, rel_h.shape[0], rel_w.shape[0])]
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):  # the formats here are meant
            return way(q, k, v, rel_h, rel_w)
    return way(q, k, v, rel_h, rel_w)


def choose_way(q: Tensor, height: int, width: int) -> str:
    """The name of the way for queries (B, heads, h*w, d): one of ``WAYS``.

    The choice depends on device, format and sizes alone, so that a run gives the same bits again.
    """
    tokens, dim = q.shape[-2:]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        rows = tokens >= BY_ROWS_FROM and has_fast_products(_working(q))
        return "by_rows" if rows else "biased"
    if q.device.type == "cuda":
        if torch.compiler.is_compiling():
            return "flex"
        half = q.dtype in (torch.float16, torch.bfloat16)
        return "one_hot" if half and dim + height + width <= FLASH_WIDEST else "biased"
    return "one_hot"


# --- the ways -------------------------------------------------------------------------------------


def biased(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Fused attention with the bias as its mask, which is made for some queries at a time.

    On a CPU in float32 whatever the format: its kernel gains nothing by a lower one.
    """
    batch, heads, tokens, _ = q.shape
    height, width = rel_h.shape[0], rel_w.shape[0]
    on_host = q.device.type == "cpu"
    working = torch.float32 if on_host and q.dtype != torch.float64 else q.dtype
    limit = _host_logits() if on_host else DEVICE_LOGITS
    row = heads * width * tokens * working.itemsize  # bytes of one row of queries of one window
    windows = max(1, limit // (row * height))
    rows = height if windows > 1 else min(height, max(1, limit // row))
    out = q.new_empty(batch, tokens, heads, q.shape[-1]).transpose(1, 2)
    for start in range(0, batch, windows):
        some = slice(start, start + windows)
        query, key, value = (t[some].to(working) for t in (q, k, v))
        bias_h, bias_w = relative_bias(query, rel_h.to(working), rel_w.to(working))
        for begin in range(0, tokens, rows * width):
            part = slice(begin, begin + rows * width)
            bias = bias_h[:, :, part, :, None] + bias_w[:, :, part, None, :]
            out[some, :, part] = F.scaled_dot_product_attention(
                query[:, :, part], key, value, attn_mask=bias.flatten(3)
            )
    return out


def by_rows(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Written out for a CPU, head by head, some rows of queries at a time.

    The logits of a part stay in the caches; the two products go through :func:`linear`, whose
    kernel is twice as fast as the one in PyTorch's fused attention for CPUs. They are taken in
    bfloat16 where q, k and v come in it; biases and softmax are float32's.
    """
    batch, heads, tokens, dim = q.shape
    height, width = rel_h.shape[0], rel_w.shape[0]
    rel_h, rel_w = rel_h.float(), rel_w.float()
    working = _working(q)
    rows = max(1, _host_logits() // (4 * tokens * width))
    out = q.new_empty(batch, tokens, heads, dim)
    for image in range(batch):
        for head in range(heads):
            query = q[image, head].float()
            bias_h, bias_w = relative_bias(query[None, None], rel_h, rel_w)
            query = (query * dim**-0.5).to(working)
            key = k[image, head].to(working).contiguous()
            value = v[image, head].to(working).t().contiguous()
            for begin in range(0, tokens, rows * width):
                part = slice(begin, begin + rows * width)
                logits = linear(query[part], key).float()  # (rows*w, h*w)
                grid = logits.view(-1, height, width)
                grid += bias_h[0, 0, part, :, None]
                grid += bias_w[0, 0, part, None, :]
                torch.softmax(logits, dim=-1, out=logits)
                out[image, part, head] = linear(logits, value).to(out.dtype)
    return out.transpose(1, 2)


def _working(q: Tensor) -> torch.dtype:
    """The format that :func:`by_rows` multiplies in."""
    return q.dtype if q.dtype == torch.bfloat16 else torch.float32


def flex(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """PyTorch's FlexAttention, which compiles a kernel that adds the bias as it goes.

    It is fast only where it is compiled: within a compiled encoder, or by its own here.
    """
    from torch.nn.attention.flex_attention import flex_attention

    width = rel_w.shape[0]
    bias_h, bias_w = relative_bias(q, rel_h, rel_w)

    def with_bias(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias_h[b, head, i, j // width] + bias_w[b, head, i, j % width]

    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    attended: Tensor = attend(q, k, v, score_mod=with_bias)
    return attended


WAYS: dict[str, Way] = {
    "one_hot": relative_attention,
    "biased": biased,
    "by_rows": by_rows,
    "flex": flex,
}
"""Every way by name; all give the same up to rounding."""


# --- what they share ------------------------------------------------------------------------------


def _host_logits() -> int:
    """Bytes of logits at a time on a CPU."""
    return HOST_LOGITS * min(torch.get_num_threads(), 16)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
