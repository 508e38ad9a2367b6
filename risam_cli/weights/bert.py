"""BERT's encoder with Hugging Face's names and arithmetic, and nothing else of transformers.

``transformers`` takes seconds to import, most of a short run with the bundled model, and a model
folder needs none of what it brings. This is BERT as published (Devlin et al. 2019): absolute
positions, GELU, norm after each residual. Weights of ``transformers.BertModel`` without its pooler
load key by key, and outputs are equal (a test holds both to it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class BertOutput:
    """What the backbone says of E expressions: (E, L, hidden), as transformers names it."""

    last_hidden_state: Tensor


class Bert(nn.Module):
    """BERT without pooler.

    Args:
        vocabulary, positions, types: rows of the three embedding tables.
        hidden, layers, heads, inner: width, depth, attention heads, width of the feed-forward.
        dropout, attention_dropout: shares dropped in training.
        eps: of the layer norms; pad_id: its embedding starts at zero and is not trained.
        config: kept as ``config`` for who writes the model; not read.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        positions: int,
        types: int,
        hidden: int,
        layers: int,
        heads: int,
        inner: int,
        dropout: float,
        attention_dropout: float,
        eps: float,
        pad_id: int | None,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(vocabulary, positions, types, hidden, dropout, eps, pad_id)
        self.encoder = _Encoder(
            nn.ModuleList(
                _Layer(hidden, heads, inner, dropout, attention_dropout, eps) for _ in range(layers)
            )
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BertOutput:
        """Maps (E, L) token ids and their mask, 0 at padding, to word vectors."""
        x = self.embeddings(input_ids)
        # (E, 1, 1, L): no word looks at padding. Without padding the kernel needs no mask.
        mask = None if attention_mask.all() else attention_mask.bool()[:, None, None]
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return BertOutput(x)


class _Embeddings(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        positions: int,
        types: int,
        hidden: int,
        dropout: float,
        eps: float,
        pad_id: int | None,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, hidden, padding_idx=pad_id)
        self.position_embeddings = nn.Embedding(positions, hidden)
        self.token_type_embeddings = nn.Embedding(types, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        """An expression is one sentence, so all its words are of type 0."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x + self.position_embeddings(place)))


class _Encoder(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layer = layers


class _Layer(nn.Module):
    def __init__(
        self,
        hidden: int,
        heads: int,
        inner: int,
        dropout: float,
        attention_dropout: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.attention = _Attention(hidden, heads, dropout, attention_dropout, eps)
        self.intermediate = _Dense(hidden, inner)
        self.output = _Residual(inner, hidden, dropout, eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class _Attention(nn.Module):
    def __init__(
        self, hidden: int, heads: int, dropout: float, attention_dropout: float, eps: float
    ) -> None:
        super().__init__()
        self.self = _SelfAttention(hidden, heads, attention_dropout)
        self.output = _Residual(hidden, hidden, dropout, eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, mask), x)


class _SelfAttention(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        parts = (self.query(x), self.key(x), self.value(x))  # each (E, L, hidden)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropped = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
        return mixed.transpose(1, 2).flatten(2)


class _Dense(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)


class _Residual(nn.Module):
    def __init__(self, inputs: int, hidden: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + before)
