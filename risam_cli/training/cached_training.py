"""Training on features from disk, where the image encoder is frozen; see :mod:`.embeddings`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch

from risam_cli.data.images.transforms import normalize
from risam_cli.inference.feature_cache import FeatureCache, image_key
from risam_cli.model.image_encoder import EncoderFeatures, ImageEncoder
from risam_cli.training.data.collate import ReferringBatch, ReferringCollate
from risam_cli.training.data.dataset import ReferringExample

_READERS = 8


@dataclass(frozen=True)
class KeyedBatch(ReferringBatch):
    """A batch with each image's key; see :func:`risam_cli.inference.feature_cache.image_key`."""

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
        encoder: frozen. In half precision a copy runs in its place, which holds its weights as
            predict and eval do, so that features are theirs to the bit.
        precision: of the training.
        open_cache: opens the cache of the encoder that runs.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        precision: torch.dtype,
        open_cache: Callable[[ImageEncoder], AbstractContextManager[FeatureCache]],
    ) -> None:
        self._encoder = encoder
        self._precision = precision
        self._open_cache = open_cache
        self._closing = ExitStack()
        self._cache: FeatureCache | None = None
        self._readers = ThreadPoolExecutor(_READERS, "risam-features")

    @torch.no_grad()
    def __call__(self, batch: KeyedBatch) -> EncoderFeatures:
        """The taps of B images, on the device of the batch."""
        cache = self._cache or self._open()
        fitted = batch.fitted.tolist()

        def encode(rows: Sequence[int]) -> EncoderFeatures:
            pixels = normalize(batch.images[list(rows)], [fitted[row] for row in rows])
            features: EncoderFeatures = self._encoder(pixels)
            return features

        found = list(self._readers.map(cache.find, batch.keys))
        with torch.autocast(batch.images.device.type, enabled=False):
            return cache.features(batch.keys, found, encode)

    def _open(self) -> FeatureCache:
        if self._precision != torch.float32:
            self._encoder = copy.deepcopy(self._encoder).eval()
            self._encoder.hold_weights_in(self._precision)
        self._cache = self._closing.enter_context(self._open_cache(self._encoder))
        return self._cache

    def close(self) -> None:
        """Waits until all is written, and says what the cache did."""
        self._readers.shutdown()
        self._closing.close()
