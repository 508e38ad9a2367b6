"""From pictures to the encoder's square input, and from mask logits back to the picture.

SAM's geometry: the longest side is brought to the encoder's size S, the rest is padded right
and bottom. Pixel mean and standard deviation are SAM's (segment_anything/build_sam.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def fit_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the longest side is ``size`` pixels; each at least 1."""
    scale = size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_for_encoder(rgb: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Brings (H, W, 3) uint8 to (h, w, 3) uint8 with the longest side at ``size``.

    Shrinking averages over areas, so that thin things do not alias; growing is bilinear.
    """
    height, width = fit_size(rgb.shape[0], rgb.shape[1], size)
    if (height, width) == rgb.shape[:2]:
        return rgb
    shrinks = height < rgb.shape[0] or width < rgb.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(rgb, (width, height), interpolation=how), np.uint8)


def normalize(
    batch: Tensor,
    fitted: Sequence[Sequence[int]],
    mean: Sequence[float] = PIXEL_MEAN,
    std: Sequence[float] = PIXEL_STD,
    unit: float = 1.0,
) -> Tensor:
    """Normalizes padded images on their device.

    Args:
        batch: (B, H, W, 3) uint8; fitted: B pairs (h, w), the picture's part of the input.
        mean, std: of samples divided by ``unit``.

    Returns:
        (B, 3, H, W) float32, zero in the padding.
    """
    import torch

    pixels = batch.float() if unit == 1 else batch.float() / unit
    device = batch.device
    pixels = (pixels - torch.tensor(mean, device=device)) / torch.tensor(std, device=device)
    for row, (height, width) in zip(pixels, fitted, strict=True):
        row[height:] = 0
        row[:, width:] = 0
    # Channels last in memory, which convolutions like best.
    return pixels.permute(0, 3, 1, 2)


def logits_to_size(
    logits: Tensor, fitted: tuple[int, int], size: int, out: tuple[int, int]
) -> Tensor:
    """Brings mask logits of the padded square to the picture's size, interpolating once.

    SAM's own post-processing interpolates twice (to S, then, cropped, to the picture). Here the
    sampling grid of the picture is laid into the logits directly (ours).

    Args:
        logits: (E, h, w) of the padded square.
        fitted: (h, w) of the picture inside the S×S square, in encoder pixels.
        size: S.
        out: (H, W) of the picture.

    Returns:
        (E, H, W) float32.
    """
    logits = logits.detach().float()
    for axis, (pixels, inside) in enumerate(zip(out, fitted, strict=True), start=1):
        if inside != size:
            logits = _sample(logits, axis, pixels, inside / size)
    return resize_maps(logits, out)


def resize_maps(maps: Tensor, out: tuple[int, int]) -> Tensor:
    """Brings (I, h, w) float32 to (I, *out), bilinear; on a CPU by OpenCV, four times as fast."""
    import torch
    from torch.nn import functional as F

    if len(maps) == 0:
        return maps.new_zeros((0, *out))
    if maps.device.type != "cpu":
        return F.interpolate(maps[:, None], size=out, mode="bilinear", align_corners=False)[:, 0]
    found = np.empty((len(maps), *out), np.float32)
    for one, to in zip(maps.detach().contiguous().numpy(), found, strict=True):
        cv2.resize(one, out[::-1], dst=to, interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(found)


def _sample(maps: Tensor, axis: int, pixels: int, share: float) -> Tensor:
    """Pixels over the first ``share`` of an axis, bilinear; the border goes on outside."""
    import torch

    last = maps.shape[axis] - 1
    centre = torch.arange(pixels, device=maps.device, dtype=torch.float32) + 0.5
    place = (centre * (share * (last + 1) / pixels) - 0.5).clamp(0, last)
    low = place.long().clamp(max=max(0, last - 1))
    part = (place - low).view(-1, *[1] * (maps.ndim - 1 - axis))
    high = (low + 1).clamp(max=last)
    return maps.index_select(axis, low) * (1 - part) + maps.index_select(axis, high) * part
