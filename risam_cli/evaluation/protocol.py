"""Mask rules of protocols that compare masks elsewhere than at the image's size."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from risam_cli.data.images.transforms import fit_size, logits_to_size
from risam_cli.evaluation.scoring import warp_through_letterbox
from risam_cli.inference.mask_rules import MaskRule, at_image_size
from risam_cli.metrics.protocols import Protocol


def mask_rule(protocol: Protocol) -> MaskRule:
    """The rule of a protocol; see :class:`risam_cli.inference.mask_rules.MaskRule`."""
    if protocol.resolution == "stretch":
        return partial(_stretched, protocol.canvas)
    if protocol.resolution == "letterbox":
        return partial(_letterboxed, protocol.canvas)
    return at_image_size


def _stretched(
    canvas: int, logits: Tensor, size: tuple[int, int], side: int, threshold: float
) -> Tensor:
    """Masks of a square canvas, whatever the image's shape."""
    return _probabilities(logits, size, side, (canvas, canvas)) > threshold


def _letterboxed(
    canvas: int, logits: Tensor, size: tuple[int, int], side: int, threshold: float
) -> Tensor:
    """Masks at the image's size, of probabilities that went through a letterboxed canvas."""
    own = _probabilities(logits, size, side, size).cpu().numpy()
    warped = np.stack([warp_through_letterbox(one, canvas) for one in own])
    return torch.from_numpy(warped > threshold)


def _probabilities(
    logits: Tensor, size: tuple[int, int], side: int, out: tuple[int, int]
) -> Tensor:
    return logits_to_size(logits, fit_size(*size, side), side, out).sigmoid()
