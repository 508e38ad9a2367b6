"""Training losses on ragged batches of masks (ours; weights come from the settings)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.model.mask_decoder import Decoded


@dataclass(frozen=True)
class LossParts:
    """Weighted parts and their sum, scalars; no minimap where the network has none."""

    total: Tensor
    mask: Tensor
    dice: Tensor
    no_target: Tensor
    iou: Tensor
    minimap: Tensor | None = None


class ReferringLoss(nn.Module):
    """BCE or focal + Dice on the mask, BCE on no-target, MSE on predicted IoU.

    Expressions without target have no Dice and teach the IoU head nothing; their masks are
    still pulled to empty by the BCE.

    Args:
        mask_weight, dice_weight, no_target_weight, iou_weight: factors, 0 switches a part off.
        focal_gamma: 0 is plain BCE; above, focal loss (Lin et al. 2017).
        minimap_weight: of the BCE on the minimap of networks that have one.
    """

    def __init__(
        self,
        mask_weight: float,
        dice_weight: float,
        no_target_weight: float,
        iou_weight: float,
        focal_gamma: float,
        minimap_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_target_weight = no_target_weight
        self.iou_weight = iou_weight
        self.focal_gamma = focal_gamma
        self.minimap_weight = minimap_weight

    def forward(
        self,
        decoded: Decoded,
        target: Tensor,
        valid: Tensor,
        no_target: Tensor,
        counts: Tensor | None = None,
    ) -> LossParts:
        """Compares predictions with soft targets.

        Args:
            decoded: of E expressions; mask logits are brought to the targets' size.
            target: (E, T, T) in 0..1, the part of each cell that the referent covers.
            valid: (E, T, T) in 0..1, 0 where the square is padding.
            no_target: (E,) 1 where nothing fits.
            counts: (2,) expressions, and those with a target, of the batch that this one is a
                part of: the losses of the parts add up to the whole's. None: it is the whole.
        """
        if counts is None:
            counts = referring_counts(no_target)
        expressions, targets = counts.clamp(min=1).unbind()
        logits = decoded.mask_logits.float()[:, None]
        logits = F.interpolate(
            logits, size=target.shape[-2:], mode="bilinear", align_corners=False
        )[:, 0]
        area = valid.sum(dim=(1, 2)).clamp(min=1)
        has_target = 1 - no_target

        pixel = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        probability = logits.sigmoid()
        if self.focal_gamma > 0:
            agreement = 1 - (probability - target).abs()
            pixel = pixel * (1 - agreement).clamp(min=1e-6) ** self.focal_gamma
        mask = ((pixel * valid).sum(dim=(1, 2)) / area).sum() / expressions

        probability = probability * valid
        overlap = (probability * target).sum(dim=(1, 2))
        size = probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2))
        dice = ((1 - (2 * overlap + 1) / (size + 1)) * has_target).sum() / targets

        none = F.binary_cross_entropy_with_logits(
            decoded.no_target_logits.float(), no_target, reduction="sum"
        )
        none = none / expressions
        with torch.no_grad():
            hard = (probability > 0.5) & (valid > 0)
            truth = target > 0.5
            both = (hard & truth).sum(dim=(1, 2))
            achieved = both / (hard | truth).sum(dim=(1, 2)).clamp(min=1)
        error = (decoded.iou.float() - achieved) ** 2
        iou = (error * has_target).sum() / targets

        parts = (
            self.mask_weight * mask,
            self.dice_weight * dice,
            self.no_target_weight * none,
            self.iou_weight * iou,
        )
        total = parts[0] + parts[1] + parts[2] + parts[3]
        if decoded.minimap_logits is None:
            return LossParts(total, *parts)
        minimap = decoded.minimap_logits.float()
        where = F.adaptive_avg_pool2d(target, minimap.shape[-1])  # (E, P, P) in 0..1
        apart = F.binary_cross_entropy_with_logits(minimap, where, reduction="none")
        apart = self.minimap_weight * apart.mean(dim=(1, 2)).sum() / expressions
        return LossParts(total + apart, *parts, apart)


def referring_counts(no_target: Tensor) -> Tensor:
    """(2,) expressions, and those with a target: what :class:`ReferringLoss` divides by."""
    expressions = no_target.new_tensor(len(no_target))
    return torch.stack([expressions, (1 - no_target).sum()])


def dense_counts(labels: Tensor, background_weight: float) -> Tensor:
    """(2,) weight of all pixels, and foreground pixels: what :func:`dense_loss` divides by."""
    foreground = (labels[:, 0] > 0).sum().double()
    background = labels[:, 0].numel() - foreground
    return torch.stack([foreground + background_weight * background, foreground]).float()


def dense_loss(
    shape: Tensor,
    color: Tensor,
    size: Tensor,
    offset: Tensor,
    labels: Tensor,
    centres: Tensor,
    background_weight: float,
    counts: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-pixel loss of the encoder's first stage on RefShapes (ours).

    Args:
        shape, color, size: (B, classes, t, t) logits; class 0 is background.
        offset: (B, 2, t, t) predicted (x, y) way to the instance's centre, in picture sides.
        labels: (B, 3, t, t) class numbers of shape, colour and size, 0 at background.
        centres: (B, 2, t, t) true way to the centre; ignored at background.
        background_weight: weight of background pixels, far below 1 since they are most.
        counts: (2,) from :func:`dense_counts` of the batch that this one is a part of: losses and
            figures of the parts add up to the whole's. None: it is the whole.

    Returns:
        The loss, and foreground accuracies in 0..1 by name with the mean centre error.
    """
    if counts is None:
        counts = dense_counts(labels, background_weight)
    whole, count = counts.clamp(min=1).unbind()
    foreground = (labels[:, 0] > 0).float()
    weight = foreground + background_weight * (1 - foreground)
    total = shape.new_zeros(())
    figures = {}
    for number, (name, logits) in enumerate((("shape", shape), ("color", color), ("size", size))):
        loss = F.cross_entropy(logits.float(), labels[:, number], reduction="none")
        total = total + (loss * weight).sum() / whole
        correct = (logits.argmax(dim=1) == labels[:, number]).float()
        figures[name] = ((correct * foreground).sum() / count).detach()
    distance = F.smooth_l1_loss(offset.float(), centres, reduction="none", beta=0.02).sum(dim=1)
    total = total + 10 * (distance * foreground).sum() / count
    figures["centre_error"] = (
        ((offset.float() - centres).norm(dim=1) * foreground).sum() / count
    ).detach()
    return total, figures
