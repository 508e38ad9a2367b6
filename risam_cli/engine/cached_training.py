"""Training on features from disk, where the image encoder is frozen; see :mod:`.embeddings`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from risam_cli.data.collate import ReferringBatch, ReferringCollate
from risam_cli.data.dataset import ReferringExample
from risam_cli.engine.embeddings import FeatureCache, image_key
from risam_cli.model.image_encoder import EncoderFeatures
from risam_cli.transforms import normalize

_READERS = 8


@dataclass(frozen=True)
class KeyedBatch(ReferringBatch):
    """A batch with the key of each image; see :func:`risam_cli.engine.embeddings.image_key`."""

    keys: tuple[str, ...] = ()


class KeyedCollate(ReferringCollate):
    """As its base, with the images' keys: hashed in the worker, so that the loop does not."""

    def __call__(self, examples: Sequence[ReferringExample]) -> KeyedBatch:
        """Makes one ragged batch of B examples."""
        batch = super().__call__(examples)
        return KeyedBatch(**vars(batch), keys=tuple(image_key(one.image) for one in examples))


class CachedEncoder:
    """Gives the encoder's features of batches from disk, or computes and keeps them.

    The cache is opened with the first batch: what a resumed run loads is then in the encoder.

    Args:
        encoder: frozen; open_cache: opens its cache.
    """

    def __init__(
        self, encoder: nn.Module, open_cache: Callable[[], AbstractContextManager[FeatureCache]]
    ) -> None:
        self._encoder = encoder
        self._open_cache = open_cache
        self._closing = ExitStack()
        self._cache: FeatureCache | None = None
        self._readers = ThreadPoolExecutor(_READERS, "risam-features")

    @torch.no_grad()
    def __call__(self, batch: KeyedBatch) -> EncoderFeatures:
        """The taps of B images, on the device of the batch."""
        if self._cache is None:
            self._cache = self._closing.enter_context(self._open_cache())
        fitted = batch.fitted.tolist()

        def encode(rows: Sequence[int]) -> EncoderFeatures:
            pixels = normalize(batch.images[list(rows)], [fitted[row] for row in rows])
            features: EncoderFeatures = self._encoder(pixels)
            return features

        found = list(self._readers.map(self._cache.find, batch.keys))
        return self._cache.features(batch.keys, found, encode)

    def close(self) -> None:
        """Waits until all is written, and says what the cache did."""
        self._readers.shutdown()
        self._closing.close()
