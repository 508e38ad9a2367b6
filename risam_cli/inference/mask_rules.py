"""From maps to masks on the host.

A rule brings the maps of one image to masks where they are wanted: at the image's size, or where
a protocol compares them. What it gives stays on the device; all masks of a chunk then reach the
host in one copy, from a GPU with eight pixels to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from risam_cli.segmenters.segmenter import Maps


@dataclass(frozen=True, slots=True)
class PackedMask:
    """A mask with eight pixels to the byte, row by row, the first pixel lowest.

    Attributes:
        bits: uint8, the last byte filled up; size: (H, W).
    """

    bits: NDArray[np.uint8]
    size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Of the mask once it is unpacked: what it will take."""
        return self.size[0] * self.size[1]

    def unpack(self) -> NDArray[np.bool_]:
        """(H, W) bool."""
        flat = np.unpackbits(self.bits, count=self.nbytes, bitorder="little")
        return flat.view(np.bool_).reshape(self.size)


Mask = NDArray[np.bool_] | PackedMask


def unpacked(mask: Mask) -> NDArray[np.bool_]:
    """The mask as (H, W) bool."""
    return mask.unpack() if isinstance(mask, PackedMask) else mask


class MaskRule(Protocol):
    """How maps become masks."""

    def __call__(self, maps: Maps, size: tuple[int, int], threshold: float) -> Tensor:
        """Masks of I instances in one image.

        Args:
            size: (H, W) of the image.
            threshold: a pixel is in the mask where its probability is greater; 0..1.

        Returns:
            (I, h', w') bool, on any device.
        """


def at_image_size(maps: Maps, size: tuple[int, int], threshold: float) -> Tensor:
    """Masks at the image's size, interpolated once; see :class:`MaskRule`."""
    # Of the logit: a sigmoid would cost as much again for each pixel.
    return maps.logits(size) > logit(threshold)


def logit(probability: float) -> float:
    """The logit of a probability; infinite at 0 and at 1."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))


def to_host(masks: Sequence[Tensor], numbers: Tensor) -> tuple[list[Mask], list[list[float]]]:
    """Masks and figures of a chunk, in one copy from the device.

    Args:
        masks: groups of (e, h, w) bool, each group of one size.
        numbers: (N, E) float32, on the device of the network.

    Returns:
        The masks one by one, and N lists of E.
    """
    if numbers.device.type == "cpu":
        return [one for group in masks for one in group.cpu().numpy()], numbers.tolist()
    return _through_bits(masks, numbers)


def _through_bits(masks: Sequence[Tensor], numbers: Tensor) -> tuple[list[Mask], list[list[float]]]:
    """:func:`to_host` from a device with memory of its own."""
    parts = [numbers.contiguous().view(torch.uint8).flatten()]
    parts += [pack(group.to(numbers.device)).flatten() for group in masks]
    host = _copied(torch.cat(parts))
    taken = parts[0].numel()
    columns = host[:taken].view(np.float32).reshape(numbers.shape).tolist()
    found: list[Mask] = []
    for group in masks:
        height, width = group.shape[1:]
        step = -(-height * width // 8)
        for _ in range(len(group)):
            found.append(PackedMask(host[taken : taken + step], (height, width)))
            taken += step
    return found, columns


def to_bits(masks: Tensor) -> list[Mask]:
    """(e, h, w) bool to masks on the host, with eight pixels to the byte."""
    size = (int(masks.shape[1]), int(masks.shape[2]))
    return [PackedMask(bits, size) for bits in _copied(pack(masks))]


def pack(masks: Tensor) -> Tensor:
    """(e, h, w) bool to (e, ceil(h*w / 8)) uint8, on its device; see :class:`PackedMask`."""
    flat = masks.flatten(1)
    flat = F.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    places = torch.arange(8, device=masks.device, dtype=torch.uint8)
    return (flat << places).sum(-1, dtype=torch.uint8)


def _copied(tensor: Tensor) -> NDArray[np.uint8]:
    """A device's bytes on the host; from CUDA through pinned memory, the fastest way."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host.numpy()
