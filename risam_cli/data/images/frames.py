"""From pictures to a network's input, and from its maps back to the picture.

A :class:`Frame` is all that a network's image processor does: to which size a picture is brought
and by which filter, what is padded, and how its pixels become numbers. It belongs to the model,
for a picture that was stretched must not be read as one that was padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from risam_cli.data.images.transforms import (
    PIXEL_MEAN,
    PIXEL_STD,
    fit_size,
    logits_to_size,
    normalize,
    resize_for_encoder,
    resize_maps,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Fit = Literal["pad", "stretch", "shortest"]
Filter = Literal["area", "nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Rgb = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Frame:
    """Geometry and normalization of a network's input.

    Attributes:
        fit: ``pad`` brings the longest side to the frame's and pads right and bottom; ``stretch``
            brings both sides to the frame's; ``shortest`` brings the shorter side to ``height``
            unless the longer one would be above ``width``, and pads nothing but smaller images of
            a batch.
        height, width: in pixels.
        mean, std: of red, green and blue, in units of ``unit``.
        unit: what 8-bit samples are divided by first: 1 or 255.
        filter: ``area`` averages over areas where it shrinks and is bilinear where it grows
            (OpenCV); the others are Pillow's.
        drafts: whether a JPEG decoder may go down to a smaller size by itself.
    """

    fit: Fit
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    unit: float = 255.0
    filter: Filter = "bilinear"
    drafts: bool = False

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture's part of the input, each at least 1."""
        if self.fit == "stretch":
            return self.height, self.width
        if self.fit == "pad":
            return fit_size(height, width, self.height)
        return _shortest(height, width, self.height, self.width)

    def resize(self, rgb: Rgb) -> Rgb:
        """Brings (H, W, 3) uint8 to (h, w, 3) uint8, its part of the input."""
        if self.filter == "area" and self.fit == "pad":
            return resize_for_encoder(rgb, self.height)
        height, width = self.fitted(*rgb.shape[:2])
        if (height, width) == rgb.shape[:2]:
            return rgb
        how = Image.Resampling[self.filter.upper()]
        return np.array(Image.fromarray(rgb).resize((width, height), how), np.uint8)

    def batch(self, views: Sequence[Rgb | Tensor], device: torch.device | str = "cpu") -> Pixels:
        """The network's input of B resized pictures.

        Args:
            views: (h, w, 3) uint8 each, from :meth:`resize`; tensors may be on the device already.
        """
        import torch

        sizes = [(int(view.shape[0]), int(view.shape[1])) for view in views]
        height = max(size[0] for size in sizes) if self.fit == "shortest" else self.height
        width = max(size[1] for size in sizes) if self.fit == "shortest" else self.width
        there = any(isinstance(view, torch.Tensor) for view in views)
        shape = (len(views), height, width, 3)
        batch = torch.zeros(shape, dtype=torch.uint8, device=device if there else "cpu")
        for row, view in zip(batch, views, strict=True):
            pixels = view if isinstance(view, torch.Tensor) else torch.from_numpy(view)
            row[: view.shape[0], : view.shape[1]] = pixels
        values = normalize(batch.to(device), sizes, self.mean, self.std, self.unit)
        return Pixels(values, tuple(sizes))

    def to_image(self, maps: Tensor, size: tuple[int, int], out: tuple[int, int]) -> Tensor:
        """Brings maps over the whole input to a picture, interpolating once.

        Args:
            maps: (I, h, w) at any resolution; (H, W) ``size`` is the picture's own.

        Returns:
            (I, *out) float32.
        """
        if self.fit == "pad":
            return logits_to_size(maps, fit_size(*size, self.height), self.height, out)
        return resize_maps(maps.float(), out)

    def boxes_to_frame(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Corners (x0, y0, x1, y1) in 0..1 of a picture of (H, W) to pixels of the input."""
        height, width = self.fitted(*size)
        return boxes * boxes.new_tensor([width, height, width, height])


def sam_frame(side: int) -> Frame:
    """SAM's: the longest side at ``side`` pixels, the rest padded right and bottom."""
    return Frame("pad", side, side, PIXEL_MEAN, PIXEL_STD, unit=1.0, filter="area", drafts=True)


@dataclass(frozen=True, slots=True)
class Pixels:
    """Input of a network.

    Attributes:
        values: (B, 3, h, w) float32, channels last in memory; zero in the padding.
        sizes: (h, w) of each picture's part.
    """

    values: Tensor
    sizes: tuple[tuple[int, int], ...]


def _shortest(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """DETR's rule, rounded as ``transformers.image_transforms.get_size_with_aspect_ratio`` does."""
    short, long = min(height, width), max(height, width)
    exact = float(side)
    if long / short * side > most:
        exact = most * short / long
        side = round(exact)
    other = long if short == side else int(exact * long / short)
    side, other = max(1, side), max(1, other)
    return (side, other) if height <= width else (other, side)
