"""What is got ready of an image beside the network, in the thread that loaded it.

With a feature cache, what it holds of the image; for a GPU, a copy of that or of the pixels,
through pinned memory and in a stream of its own, so that the network finds its input there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from risam_cli.data.images.images import EncoderImage
from risam_cli.data.images.transforms import normalize, to_pixels
from risam_cli.inference.device import is_out_of_memory
from risam_cli.inference.feature_cache import FeatureCache, HalfFeatures, image_key


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is ready of one image.

    Attributes:
        key: in the feature cache; empty without one.
        features: what the cache holds; None where that is nothing.
        pixels: (h, w, 3) uint8 on a GPU; None where they are on the host only, or not needed.
    """

    key: str = ""
    features: HalfFeatures | None = None
    pixels: Tensor | None = None


class Preparer:
    """Gets images ready; called from several threads.

    Args:
        device: of the network.
        cache: of its encoder, if one is used.
    """

    def __init__(self, device: torch.device, cache: FeatureCache | None) -> None:
        self._device = device
        self._cache = cache
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, image: EncoderImage) -> Ahead:
        """What can be had of an image without the network."""
        key, features = "", None
        if self._cache is not None:
            key = image_key(image.rgb)
            features = self._cache.find(key)
        if self._stream is None:
            return Ahead(key, features)
        try:
            if features is None:
                return Ahead(key, None, self._moved(_pinned(image.rgb), self._stream))
            moved = {k: self._moved(v, self._stream) for k, v in features.tensors.items()}
            return Ahead(key, HalfFeatures(moved, features.computed))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return Ahead(key, features)  # the network, which can make room, does it itself

    def _moved(self, tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
        """A copy on the device, done when this returns; the network goes on meanwhile."""
        with torch.cuda.stream(stream):
            moved = tensor.to(self._device, non_blocking=True)
        stream.synchronize()
        # Its memory must not be used again before the network's stream is done with it.
        moved.record_stream(torch.cuda.default_stream(self._device))
        return moved


def batch_pixels(
    images: Sequence[EncoderImage], ahead: Sequence[Ahead], size: int, device: torch.device
) -> Tensor:
    """The encoder's input (B, 3, size, size) of images, from their copies where there are some."""
    if all(one.pixels is None for one in ahead):
        return to_pixels([image.rgb for image in images], size, device)
    batch = torch.zeros(len(images), size, size, 3, dtype=torch.uint8, device=device)
    for row, image, one in zip(batch, images, ahead, strict=True):
        height, width = image.rgb.shape[:2]
        row[:height, :width] = torch.from_numpy(image.rgb) if one.pixels is None else one.pixels
    return normalize(batch, [image.rgb.shape[:2] for image in images])


def _pinned(rgb: NDArray[np.uint8]) -> Tensor:
    tensor = torch.from_numpy(rgb)
    if tensor.is_pinned():  # as it comes from worker processes
        return tensor
    pinned = torch.empty(rgb.shape, dtype=torch.uint8, pin_memory=True)
    pinned.numpy()[:] = rgb
    return pinned
