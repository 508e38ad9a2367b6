"""The two streams that go through Mutual-Aware Attention into the mask decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Reads = Literal["words", "text", "both"]
"""What a part reads of the expression: its vision-aware words, its text as it came, or both."""


@dataclass(frozen=True)
class VisualStream:
    """Visual features of N = h·w regions, one row for each image, later for each expression.

    Attributes:
        features: (V, N, C), row-major regions; V images, or E expressions once language is in.
        position: (N, C), added to what attention compares.
        grid: (h, w).
        image_index: (E,) integers, the image of each expression.
        fine: (B, mask_dim, 4h, 4w) stride-4 features of the images, or None.
        per_expression: whether row e of ``features`` is expression e's own.
    """

    features: Tensor
    position: Tensor
    grid: tuple[int, int]
    image_index: Tensor
    fine: Tensor | None = None
    per_expression: bool = False

    @property
    def owner(self) -> Tensor | None:
        """(E,) the row of each expression; None where row e is expression e's own."""
        return None if self.per_expression else self.image_index

    @cached_property
    def placed(self) -> Tensor:
        """Features with their positions, (V, N, C)."""
        return self.features + self.position

    def of_expressions(self) -> Tensor:
        """The features of each expression's regions, (E, N, C)."""
        return self.features if self.per_expression else self.features[self.image_index]

    def with_language(self, features: Tensor) -> VisualStream:
        """The stream after language came in: (E, N, C), a row for each expression."""
        return replace(self, features=features, per_expression=True)


@dataclass(frozen=True)
class LinguisticStream:
    """Linguistic features of E expressions, padded to L words.

    Attributes:
        words: (E, L, C), vision-aware from the first Language-Guided Attention on.
        text: (E, L, C), the linguistic features F_l as they came.
        position: (L, C), added to what attention compares.
        valid: (E, L) bool, False at padding.
        sentence: (E, C), the same from the text encoder to the mask decoder.
    """

    words: Tensor
    text: Tensor
    position: Tensor
    valid: Tensor
    sentence: Tensor

    def guiding(self, reads: Reads) -> LinguisticStream:
        """What guides a decoder that reads the words, the text, or one after the other."""
        if reads == "both":
            words, valid = torch.cat([self.text, self.words], 1), torch.cat([self.valid] * 2, 1)
            return replace(self, words=words, valid=valid)
        return self if reads == "words" else replace(self, words=self.text)

    def with_vision(self, words: Tensor) -> LinguisticStream:
        """The stream after vision came in: (E, L, C)."""
        return replace(self, words=words)
