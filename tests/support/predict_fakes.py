"""A network small enough to reason about, for the tests of predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from risam_cli.model.mask_decoder import Decoded
from risam_cli.model.risam import ImageFeatures
from risam_cli.model.text_encoder import TextFeatures
from risam_cli.segmenters.risam import RisamSegmenter
from risam_cli.weights.load import LoadedModel
from risam_cli.weights.tokenizer import TokenBatch

SIZE = 32


class FakeTokenizer:
    """A word is one token, its length; at most eight."""

    max_tokens = 8

    def unknown_words(self, text: str) -> tuple[str, ...]:
        return tuple(word for word in text.split() if word == "unheard-of")

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        words = [[len(word) for word in text.split()] for text in texts]
        longest = min(8, max(len(ids) for ids in words))
        ids = torch.zeros(len(words), longest, dtype=torch.long)
        for row, own in zip(ids, words, strict=True):
            row[: min(8, len(own))] = torch.tensor(own[:8])
        return TokenBatch(ids, (ids > 0).long(), [len(own) > 8 for own in words], 8)


@dataclass
class FakeNetwork:
    """Marks pixels brighter than the sum of a text's token ids, which is 0 for "nothing fits".

    Attributes:
        encoded, decoded: sizes of the batches that went through.
        before_encode, before_decode: called with the batch; may raise.
    """

    encoded: list[int] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    before_encode: Callable[[Tensor], None] = lambda pixels: None
    before_decode: Callable[[Tensor], None] = lambda sums: None

    def parameters(self) -> tuple[Tensor, ...]:
        return ()

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        self.before_encode(pixels)
        self.encoded.append(len(pixels))
        return ImageFeatures(F.avg_pool2d(pixels.mean(1, keepdim=True), 4), None)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        sums = (input_ids * attention_mask).sum(1, keepdim=True).float()
        return TextFeatures(sums[:, None], attention_mask.bool(), sums)

    def decode(self, image: ImageFeatures, text: TextFeatures, index: Tensor) -> Decoded:
        sums = text.sentence[:, 0]
        self.before_decode(sums)
        self.decoded.append(len(sums))
        logits = image.visual[index, 0] - (sums[:, None, None] - 10) / 20
        logits = torch.where(sums[:, None, None] == 13, torch.nan, logits)
        return Decoded(logits, (sums / 40).clamp(0, 1), sums - 20.5)


@dataclass
class FakeLoaded:
    """As load.LoadedModel, of the network above."""

    model: FakeNetwork = field(default_factory=FakeNetwork)
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    image_size: int = SIZE
    threshold: float = 0.5
    no_target_threshold: float = 0.5
    name: str = "fake"
    hash: str = "0" * 64


class FakeModel(RisamSegmenter):
    """The network above as a segmenter."""

    def __init__(self, network: FakeNetwork | None = None, device: str = "cpu") -> None:
        self.network = network or FakeNetwork()
        loaded = cast(LoadedModel, FakeLoaded(self.network))
        super().__init__(loaded, torch.device(device), torch.float32)
