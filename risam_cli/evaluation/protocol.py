"""Mask rules of protocols that compare masks elsewhere than at the image's size."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from risam_cli.evaluation.scoring import warp_through_letterbox
from risam_cli.inference.mask_rules import MaskRule, at_image_size
from risam_cli.metrics.protocols import Protocol
from risam_cli.segmenters.segmenter import Maps


def mask_rule(protocol: Protocol) -> MaskRule:
    """The rule of a protocol; see :class:`risam_cli.inference.mask_rules.MaskRule`."""
    if protocol.resolution == "stretch":
        return partial(_stretched, protocol.canvas)
    if protocol.resolution == "letterbox":
        return partial(_letterboxed, protocol.canvas)
    return at_image_size


def _stretched(canvas: int, maps: Maps, size: tuple[int, int], threshold: float) -> Tensor:
    """Masks of a square canvas, whatever the image's shape."""
    return maps.logits((canvas, canvas)).sigmoid() > threshold


def _letterboxed(canvas: int, maps: Maps, size: tuple[int, int], threshold: float) -> Tensor:
    """Masks at the image's size, of probabilities that went through a letterboxed canvas."""
    own = maps.logits(size).sigmoid().cpu().numpy()
    warped = [warp_through_letterbox(one, canvas) for one in own]
    return torch.from_numpy(np.reshape(warped, own.shape) > threshold)
