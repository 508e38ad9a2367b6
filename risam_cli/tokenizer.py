"""Expressions to token ids, with one fast tokenizer for CLIP, BERT and the small vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of E expressions, padded to the longest.

    Attributes:
        input_ids, attention_mask: (E, L) int64; the mask is 0 at padding.
        truncated: for each expression, whether it was cut.
        max_words: the most tokens an expression may have, special tokens included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    truncated: list[bool]
    max_words: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of an expression.

    Attributes:
        text: as the vocabulary writes it.
        word: number of the word that it is of, from 0; None for a special token.
        span: where it stands in the expression, first character and the one after the last.
        unknown: the vocabulary has no such word, and this token stands for all of those.
    """

    text: str
    word: int | None
    span: tuple[int, int]
    unknown: bool


class TextTokenizer:
    """Wraps a ``tokenizers.Tokenizer`` that adds its own special tokens.

    Args:
        tokenizer: without padding and truncation; both are done here.
        max_tokens: the most tokens that the text encoder takes; longer expressions lose their
            last words, never their closing special token.
        pad_id: id of padding.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, pad_id: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pad_id = pad_id

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Tokenizes E expressions, E at least 1."""
        import torch

        encoded = [item.ids for item in self.tokenizer.encode_batch(list(texts))]
        cut = [
            ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]
            for ids in encoded
        ]
        length = max(len(ids) for ids in cut)
        input_ids = torch.full((len(cut), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros((len(cut), length), dtype=torch.long)
        for row, ids in enumerate(cut):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        truncated = [len(ids) > self.max_tokens for ids in encoded]
        return TokenBatch(input_ids, mask, truncated, self.max_tokens)

    def words(self, text: str) -> list[str]:
        """The tokens of one expression as text, special ones included, cut as in ``encode``."""
        tokens: list[str] = self.tokenizer.encode(text).tokens
        return (
            tokens
            if len(tokens) <= self.max_tokens
            else [*tokens[: self.max_tokens - 1], tokens[-1]]
        )

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of one expression and where they stand in it, cut as in ``encode``.

        What counts as a word is the tokenizer's own choice: white space parts words, and mostly
        punctuation marks are words of their own.
        """
        item = self.tokenizer.encode(text)
        strange = getattr(self.tokenizer.model, "unk_token", None)
        found = [
            Piece(token, None if special else word, span, not special and token == strange)
            for token, word, span, special in zip(
                item.tokens, item.word_ids, item.offsets, item.special_tokens_mask, strict=True
            )
        ]
        return (
            found
            if len(found) <= self.max_tokens
            else [*found[: self.max_tokens - 1], found[-1]]
        )

    def to_json(self) -> str:
        """The tokenizer's own JSON, as ``tokenizer.json`` holds it."""
        text: str = self.tokenizer.to_str(pretty=False)
        return text


def tokenizer_from_words(words: Sequence[str]) -> Tokenizer:
    """A lower-casing whole-word tokenizer with BERT's special tokens; other words are [UNK]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer
