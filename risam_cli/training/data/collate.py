"""Examples to ragged batches of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from risam_cli.training.data.dataset import DenseExample, ReferringExample
from risam_cli.weights.tokenizer import TextTokenizer


@dataclass(frozen=True)
class ReferringBatch:
    """E expressions over B images.

    Attributes:
        images: (B, S, S, 3) uint8, zero-padded; fitted: (B, 2) height and width inside.
        image_index: (E,) image of each expression.
        input_ids, attention_mask: (E, L).
        targets: (E, T, T) uint8, 255 is full cover.
        no_target: (E,) float, 1 where nothing fits.
    """

    images: Tensor
    fitted: Tensor
    image_index: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    no_target: Tensor


@dataclass(frozen=True)
class DenseBatch:
    """B scenes: images (B, S, S, 3) uint8, labels (B, 3, t, t) uint8, centres (B, 2, t, t)."""

    images: Tensor
    labels: Tensor
    centres: Tensor


class ReferringCollate:
    """Collates :class:`ReferringExample`; tokenizes in the worker, so that the loop does not.

    Args:
        tokenizer: of the text encoder; size: side S of the encoder's input.
    """

    def __init__(self, tokenizer: TextTokenizer, size: int) -> None:
        self.tokenizer = tokenizer
        self.size = size

    def __call__(self, examples: Sequence[ReferringExample]) -> ReferringBatch:
        """Makes one ragged batch of B examples."""
        images = torch.zeros(len(examples), self.size, self.size, 3, dtype=torch.uint8)
        for row, example in zip(images, examples, strict=True):
            height, width = example.image.shape[:2]
            row[:height, :width] = torch.from_numpy(example.image)
        tokens = self.tokenizer.encode([text for e in examples for text in e.texts])
        counts = torch.tensor([len(e.texts) for e in examples])
        return ReferringBatch(
            images=images,
            fitted=torch.tensor([e.image.shape[:2] for e in examples]),
            image_index=torch.repeat_interleave(torch.arange(len(examples)), counts),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            targets=torch.cat([torch.from_numpy(e.targets) for e in examples]),
            no_target=torch.cat([torch.from_numpy(e.no_target) for e in examples]).float(),
        )


def collate_dense(examples: Sequence[DenseExample]) -> DenseBatch:
    """Stacks :class:`DenseExample`."""
    return DenseBatch(
        images=torch.stack([torch.from_numpy(e.image) for e in examples]),
        labels=torch.stack([torch.from_numpy(e.labels) for e in examples]),
        centres=torch.stack([torch.from_numpy(e.centres) for e in examples]),
    )
