"""Attention between few tokens and many regions, with the projections on the tokens' side (ours).

Where q = W x and the product q·k is wanted for all regions x, (Wᵀ k)·x is the same for heads *
tokens rows instead of all channels, and what lies between is never made.

Tokens of several expressions, T in all, lie one after the other without padding. What is made of
them head by head is (heads, T, …); a product with regions wants (heads*T, …), all rows of an
expression together (:class:`Layout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from risam_cli.model.fast.linear import linear
from risam_cli.model.layers import MLP, LayerNorm2d
from risam_cli.model.mask_decoder import CrossAttention


@dataclass(frozen=True, slots=True)
class Affine:
    """Weight (M, N) and bias (M,) of a linear layer, without what a module costs at every call."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, *layers: nn.Module) -> Affine:
        """Those of a layer, or of layers of one input, their outputs one after the other."""
        weights = [cast(Tensor, layer.weight).detach() for layer in layers]
        biases = [cast(Tensor, layer.bias).detach() for layer in layers]
        if len(layers) == 1:
            return cls(weights[0], biases[0])
        return cls(torch.cat(weights), torch.cat(biases))

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """Maps (..., N) to (..., M)."""
        return linear(x, self.weight, self.bias, gelu=gelu)


@dataclass(frozen=True, slots=True)
class Chain:
    """The layers of an MLP, GELU between them."""

    layers: tuple[Affine, ...]

    @classmethod
    def of(cls, mlp: MLP, first: int = 0) -> Chain:
        """Those of an MLP, from one of them on."""
        return cls(tuple(Affine.of(layer) for layer in list(mlp.layers)[first:]))

    def __call__(self, x: Tensor) -> Tensor:
        """Maps (..., N) to (..., M)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x, gelu=True)
        return last(x)


@dataclass(frozen=True, slots=True)
class Norm:
    """A layer norm over C channels."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm | LayerNorm2d) -> Norm:
        """That of a layer."""
        return cls(norm.weight.detach(), norm.bias.detach(), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalizes (..., C)."""
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class FoldedLogits:
    """Logits between tokens and regions, each projected by a layer of its own.

    Attributes:
        token: tokens to inner channels, scaled.
        region: the weight of the regions' layer, (heads, inner/heads, C); bias: (heads,
            inner/heads, 1).
    """

    token: Affine
    region: Tensor
    bias: Tensor

    @classmethod
    def of(cls, tokens: nn.Linear, regions: nn.Linear, heads: int, scale: float) -> FoldedLogits:
        """Folds two layers, to inner channels each."""
        token, region = Affine.of(tokens), Affine.of(regions)
        return cls(
            Affine(token.weight * scale, token.bias * scale),
            region.weight.unflatten(0, (heads, -1)),
            region.bias.view(heads, -1, 1),
        )

    @classmethod
    def of_cross(cls, cross: CrossAttention, *, tokens_are_keys: bool = False) -> FoldedLogits:
        """Folds an attention between the two."""
        layers = (cross.key, cross.query) if tokens_are_keys else (cross.query, cross.key)
        return cls.of(*layers, cross.heads, scale_of(cross))

    @property
    def heads(self) -> int:
        """Of the attention."""
        return self.region.shape[0]

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (T, C) to (heads, T, inner/heads)."""
        return _by_head(self.token(tokens), self.heads)

    def rows(self, projected: Tensor) -> Tensor:
        """(heads, T, C), whose products with regions are the logits but for :meth:`share`."""
        return torch.bmm(projected, self.region)

    def share(self, projected: Tensor) -> Tensor:
        """(heads, T, 1), which the bias of the regions' layer adds to the logits of all regions.

        A softmax over regions needs none of it.
        """
        return torch.bmm(projected, self.bias)


@dataclass(frozen=True, slots=True)
class FoldedScatter:
    """What regions take of tokens: an output layer of the values that each head weighs.

    Attributes:
        values: tokens to inner channels.
        output: (heads, inner/heads, C); bias: (C,), a head's part. Weights of a head sum to 1.
    """

    values: Affine
    output: Tensor
    bias: Tensor

    @classmethod
    def of(cls, value: nn.Linear, output: nn.Linear, heads: int) -> FoldedScatter:
        """Folds two layers."""
        out = Affine.of(output)
        return cls(Affine.of(value), out.weight.t().unflatten(0, (heads, -1)), out.bias / heads)

    def rows(self, values: Tensor) -> Tensor:
        """Values (T, inner) to (heads, T, C), of which a region takes a weighted sum."""
        return torch.baddbmm(self.bias, _by_head(values, len(self.output)), self.output)


@dataclass(frozen=True, slots=True)
class FoldedGather:
    """What tokens take of regions: an output layer of the values that each head weighs.

    Attributes:
        values: (heads, C, inner/heads).
        output: from inner channels, with what the values' bias comes to: weights sum to 1.
    """

    values: Tensor
    output: Affine

    @classmethod
    def of(cls, value: nn.Linear, output: nn.Linear, heads: int) -> FoldedGather:
        """Folds two layers."""
        inner, out = Affine.of(value), Affine.of(output)
        values = inner.weight.unflatten(0, (heads, -1)).transpose(1, 2)
        return cls(values, Affine(out.weight, out(inner.bias)))

    def __call__(self, means: Tensor) -> Tensor:
        """Each head's weighted means of regions, (heads, T, C), to (T, C)."""
        values = torch.bmm(means, self.values)
        return self.output(values.transpose(0, 1).flatten(1))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of G expressions are.

    Attributes:
        heads: of the attention.
        rows: (heads * T,), which of the rows (heads, T) comes where those of an expression are
            together; back: the other way. None for one expression, where nothing moves.
        sizes: rows of each expression.
    """

    heads: int
    rows: Tensor | None
    back: Tensor | None
    sizes: tuple[int, ...]

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, lengths: tuple[int, ...], heads: int) -> Layout:
        """Of expressions of so many tokens each."""
        sizes = tuple(heads * length for length in lengths)
        if len(sizes) == 1:
            return cls(heads, None, None, sizes)
        numbers = torch.arange(sum(sizes)).view(heads, -1)
        rows = torch.cat([part.flatten() for part in numbers.split(lengths, dim=1)])
        return cls(heads, rows, rows.argsort(), sizes)

    def by_expression(self, x: Tensor) -> Tensor:
        """(heads, T, …) to (heads * T, …)."""
        x = x.flatten(0, 1)
        return x if self.rows is None else x.index_select(0, self.rows)

    def by_head(self, x: Tensor) -> Tensor:
        """(heads * T, …) to (heads, T, …)."""
        x = x if self.back is None else x.index_select(0, self.back)
        return x.unflatten(0, (self.heads, -1))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(heads * T, …) to the rows of each expression."""
        return x.split_with_sizes(self.sizes)


def scale_of(cross: CrossAttention) -> float:
    """By which the logits of an attention are multiplied."""
    return float((cross.query.out_features // cross.heads) ** -0.5)


def as_linear(up: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Weight (4 * out, in) and bias (4 * out,) of a transposed convolution of size and stride 2.

    One whose stride is its size is a linear layer of each cell.
    """
    weight = up.weight.permute(2, 3, 1, 0).reshape(-1, up.in_channels)
    return weight, cast(Tensor, up.bias).repeat(4)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(T, inner) to (heads, T, inner/heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(0, 1)
