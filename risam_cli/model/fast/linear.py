"""Matrix products of the image encoder, through the fastest kernel that this machine has.

PyTorch multiplies float32 matrices on x86 by MKL, which holds back on processors that are not
Intel's: half the speed of the same product through oneDNN, which PyTorch carries as well and uses
for bfloat16 (on one AVX-512 core of an AMD EPYC 82 against 162 GFLOP/s; on Intel's MKL may be
ahead). So inference takes oneDNN's, with the MLP's GELU inside the product, unless this machine was
measured and does better otherwise (:mod:`.tuning`); where gradients are wanted, under autocast, and
off x86, all stays with ``torch.nn.functional.linear``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.fast.tuning import in_use

SMALL = 8 << 20
"""Multiplications below which MKL takes a product in float32.

oneDNN's call costs more, and it makes a kernel for each new number of rows, in half a millisecond;
expressions have any number of words.
"""

_Product = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, then GELU where asked, in the weight's number format.

    Args:
        x: (..., N); brought to the weight's format where no autocast does so.
        weight: (M, N); bias: (M,).

    Returns:
        (..., M).
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast or weight.dtype != torch.float32:
        if x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        if _fits(x, weight, bias):
            product = _onednn(weight.dtype)
            if product is not None:
                return product(x, weight, bias, gelu)
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


class FastLinear(nn.Linear):
    """A layer that computes by :func:`linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., N) to (..., M)."""
        return linear(x, self.weight, self.bias)


def has_fast_products(kind: torch.dtype) -> bool:
    """Whether oneDNN's products of a number format can be taken on this machine's CPU."""
    return _onednn(kind) is not None


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's product, which knows no gradients, may take these."""
    if weight.dtype == torch.float32 and x.numel() * weight.shape[0] < SMALL:
        return False
    if not x.is_cpu or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if torch.compiler.is_compiling():  # the compiler chooses, and fuses more
        return False
    if not x.numel() or not weight.is_contiguous():
        return False
    if in_use().product(weight.dtype) != "onednn":
        return False
    return not torch.is_grad_enabled() or not (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


@cache
def _onednn(kind: torch.dtype) -> _Product | None:
    """The product of oneDNN, or None where this PyTorch or machine has none that is right.

    In bfloat16 it has none for processors without AVX-512.
    """
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return None

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        name, algorithm = ("gelu", "none") if gelu else ("none", "")
        y: Tensor = operator(x, weight, bias, name, [], algorithm)
        return y

    return product if _is_right(product, kind) else None


def _is_right(product: _Product, kind: torch.dtype) -> bool:
    """Tries the product, an operator that PyTorch does not document, on a small case."""
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        x = torch.linspace(-2, 2, 48).view(6, 8).to(kind)
        weight, bias = torch.linspace(1, -1, 40).view(5, 8), torch.linspace(-1, 1, 5)
        weight, bias = weight.to(kind), bias.to(kind)
        try:
            plain, curved = product(x, weight, bias, False), product(x, weight, bias, True)
        except RuntimeError:
            return False
        expected = F.linear(x.float(), weight.float(), bias.float())
        within = 1e-5 if kind == torch.float32 else 2e-2
        return all(
            torch.allclose(found.float(), wanted, rtol=within, atol=within)
            for found, wanted in ((plain, expected), (curved, F.gelu(expected)))
        )
