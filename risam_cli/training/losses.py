"""What one training step computes: a task owns the modules of its stage and gives the loss (ours).

Batches are ragged; the weights of the parts of the loss come from the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from risam_cli.data.images.transforms import normalize
from risam_cli.model.image_encoder import EncoderFeatures, ImageEncoder
from risam_cli.model.layers import LayerNorm2d
from risam_cli.model.mask_decoder import Decoded
from risam_cli.model.risam import Risam
from risam_cli.training.data.collate import DenseBatch, ReferringBatch


class Task(Protocol):
    """A stage's modules and its loss."""

    @property
    def module(self) -> nn.Module:
        """Holds every weight that the stage may train."""

    def counts(self, batch: Any) -> Tensor:
        """(n,) what the loss is divided by; counts of a step's parts add up to the step's."""

    def loss(self, batch: Any, counts: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to descend, and figures to log.

        Args:
            counts: of the whole step that ``batch`` is a part of: losses and figures of the parts
                then add up to the step's. None: the batch is the whole.
        """

    def expressions(self, batch: Any) -> int:
        """How many expressions (or scenes) a batch counts for."""


class DenseTask:
    """Trains the image encoder with a dense head.

    Args:
        encoder, head: modules; background_weight: see :func:`dense_loss`.
    """

    def __init__(self, encoder: ImageEncoder, head: DenseHead, background_weight: float) -> None:
        self.module = nn.ModuleDict({"encoder": encoder, "head": head})
        self.encoder = encoder
        self.head = head
        self.background_weight = background_weight

    def counts(self, batch: DenseBatch) -> Tensor:
        """See :func:`dense_counts`."""
        return dense_counts(batch.labels, self.background_weight)

    def loss(
        self, batch: DenseBatch, counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :func:`dense_loss`."""
        pixels = normalize(batch.images, batch.fitted.tolist())
        output = self.head(self.encoder(pixels))
        labels = batch.labels.long()
        return dense_loss(output, labels, batch.centres, self.background_weight, counts)

    def expressions(self, batch: DenseBatch) -> int:
        """Scenes of the batch."""
        return len(batch.images)


class ReferringTask:
    """Trains the network on expressions; each image is encoded once for all of its own.

    Args:
        model: the network; encoder_frozen: run the image encoder without gradients.
        features: gives a batch's taps in the encoder's place, such as from a cache.
    """

    def __init__(
        self,
        model: Risam,
        loss: ReferringLoss,
        *,
        encoder_frozen: bool,
        features: Callable[[Any], EncoderFeatures] | None = None,
    ) -> None:
        self.module = model
        self.model = model
        self.criterion = loss
        self.encoder_frozen = encoder_frozen
        self.features = features

    def decode(self, batch: ReferringBatch) -> Decoded:
        """Runs the network on a batch."""
        if self.features is not None:
            taps = self.features(batch)
        else:
            pixels = normalize(batch.images, batch.fitted.tolist())
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen):
                taps = self.model.image_encoder(pixels)
        image = self.model.enhance(taps.shallow, taps.middle, taps.deep, taps.fine)
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        return self.model.decode(image, text, batch.image_index)

    def counts(self, batch: ReferringBatch) -> Tensor:
        """See :func:`referring_counts`."""
        return referring_counts(batch.no_target, batch.weights)

    def loss(
        self, batch: ReferringBatch, counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`ReferringLoss`."""
        decoded = self.decode(batch)
        target = batch.targets.float() / 255
        valid, weights = inside(batch, target), batch.weights
        parts = self.criterion(decoded, target, valid, batch.no_target, counts, weights)
        figures = {name: value for name, value in vars(parts).items() if value is not None}
        return figures.pop("total"), {name: value.detach() for name, value in figures.items()}

    def expressions(self, batch: ReferringBatch) -> int:
        """Expressions of the batch."""
        return len(batch.image_index)


def inside(batch: ReferringBatch, target: Tensor) -> Tensor:
    """(E, T, T) of 1 where a target's cell lies in the picture and 0 where in the padding."""
    cells = target.shape[-1]
    edge = batch.fitted.to(target.device) * (cells / batch.images.shape[1])  # (B, 2)
    place = torch.arange(cells, device=target.device) + 0.5
    rows = (place < edge[:, :1]).float()
    columns = (place < edge[:, 1:]).float()
    return (rows[:, :, None] * columns[:, None, :])[batch.image_index]


# --- referring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossParts:
    """Weighted parts and their sum, scalars; no minimap where the network has none."""

    total: Tensor
    mask: Tensor
    dice: Tensor
    no_target: Tensor
    iou: Tensor
    minimap: Tensor | None = None


_LEAST = 1e-6  # of what is divided by, where no expression counts


class ReferringLoss(nn.Module):
    """BCE or focal + Dice on the mask, BCE on no-target, MSE on predicted IoU.

    Expressions without target have no Dice and teach the IoU head nothing; their masks are
    still pulled to empty by the BCE.

    Args:
        mask, dice, no_target, iou: factors, 0 switches a part off.
        focal_gamma: 0 is plain BCE; above, focal loss (Lin et al. 2017).
        minimap: factor of the BCE on the minimap of networks that have one.
    """

    def __init__(
        self,
        mask: float,
        dice: float,
        no_target: float,
        iou: float,
        focal_gamma: float,
        minimap: float = 0.0,
    ) -> None:
        super().__init__()
        self.mask_weight = mask
        self.dice_weight = dice
        self.no_target_weight = no_target
        self.iou_weight = iou
        self.focal_gamma = focal_gamma
        self.minimap_weight = minimap

    def forward(
        self,
        decoded: Decoded,
        target: Tensor,
        valid: Tensor,
        no_target: Tensor,
        counts: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> LossParts:
        """Compares predictions with soft targets.

        Args:
            decoded: of E expressions; mask logits are brought to the targets' size.
            target: (E, T, T) in 0..1, the part of each cell that the referent covers.
            valid: (E, T, T) in 0..1, 0 where the square is padding.
            no_target: (E,) 1 where nothing fits.
            counts: (2,) expressions, and those with a target, of the batch that this one is a
                part of, by weight: the losses of the parts add up to the whole's. None: it is the
                whole.
            weights: (E,) of the expressions; None is 1 for each.
        """
        weights = torch.ones_like(no_target) if weights is None else weights
        if counts is None:
            counts = referring_counts(no_target, weights)
        expressions, targets = counts.clamp(min=_LEAST).unbind()
        logits = decoded.mask_logits.float()
        if logits.shape != target.shape:
            logits = F.interpolate(
                logits[:, None], size=target.shape[-2:], mode="bilinear", align_corners=False
            )[:, 0]
        area = valid.sum(dim=(1, 2)).clamp(min=1)
        has_target = (1 - no_target) * weights

        pixel = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        probability = logits.sigmoid()
        if self.focal_gamma > 0:
            agreement = 1 - (probability - target).abs()
            pixel = pixel * (1 - agreement).clamp(min=1e-6) ** self.focal_gamma
        mask = ((pixel * valid).sum(dim=(1, 2)) / area * weights).sum() / expressions

        probability = probability * valid
        overlap = (probability * target).sum(dim=(1, 2))
        size = probability.sum(dim=(1, 2)) + target.sum(dim=(1, 2))
        dice = ((1 - (2 * overlap + 1) / (size + 1)) * has_target).sum() / targets

        none = F.binary_cross_entropy_with_logits(
            decoded.no_target_logits.float(), no_target, reduction="none"
        )
        none = (none * weights).sum() / expressions
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
        apart = self.minimap_weight * (apart.mean(dim=(1, 2)) * weights).sum() / expressions
        return LossParts(total + apart, *parts, apart)


def referring_counts(no_target: Tensor, weights: Tensor) -> Tensor:
    """(2,) weight of all expressions, and of those with a target: what the loss divides by.

    Args:
        no_target: (E,) 1 where nothing fits; weights: (E,).
    """
    return torch.stack([weights.sum(), ((1 - no_target) * weights).sum()])


# --- dense ----------------------------------------------------------------------------------------


def dense_counts(labels: Tensor, background_weight: float) -> Tensor:
    """(2,) weight of all pixels, and foreground pixels: what :func:`dense_loss` divides by."""
    foreground = (labels[:, 0] > 0).sum().double()
    background = labels[:, 0].numel() - foreground
    return torch.stack([foreground + background_weight * background, foreground]).float()


def dense_loss(
    output: DenseOutput,
    labels: Tensor,
    centres: Tensor,
    background_weight: float,
    counts: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-pixel loss of the encoder's first stage on RefShapes (ours).

    Args:
        output: of the head, t cells a side.
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
    total = foreground.new_zeros(())
    figures = {}
    for number, name in enumerate(("shape", "color", "size")):
        logits = getattr(output, name)
        loss = F.cross_entropy(logits.float(), labels[:, number], reduction="none")
        total = total + (loss * weight).sum() / whole
        correct = (logits.argmax(dim=1) == labels[:, number]).float()
        figures[name] = ((correct * foreground).sum() / count).detach()
    offset = output.offset.float()
    distance = F.smooth_l1_loss(offset, centres, reduction="none", beta=0.02).sum(dim=1)
    total = total + 10 * (distance * foreground).sum() / count
    figures["centre_error"] = (((offset - centres).norm(dim=1) * foreground).sum() / count).detach()
    return total, figures


@dataclass(frozen=True)
class DenseOutput:
    """Logits (B, classes, 4h, 4w) with class 0 background, and offsets (B, 2, 4h, 4w): the (x, y)
    way to the instance's centre in picture sides.
    """

    shape: Tensor
    color: Tensor
    size: Tensor
    offset: Tensor


class DenseHead(nn.Module):
    """Per-pixel classes and the way to the instance's centre, at stride 4.

    SAM's encoder arrives pre-trained on a billion masks. The small one learns from scenes whose
    every pixel is known; afterwards this head is thrown away, and all three taps, the neck and
    the stem keep what they learned.

    Args:
        tap_dim: channels D; deep_dim: channels C; fine_dim: channels F, 0 without a stem.
        classes: numbers of shapes, colours and sizes, background not counted.
    """

    def __init__(
        self, tap_dim: int, deep_dim: int, fine_dim: int, classes: tuple[int, int, int]
    ) -> None:
        super().__init__()
        width = deep_dim // 2
        self.classes = classes
        self.merge = nn.Conv2d(2 * tap_dim + deep_dim, deep_dim, kernel_size=1)
        self.up1 = nn.ConvTranspose2d(deep_dim, width, kernel_size=2, stride=2)
        self.norm = LayerNorm2d(width)
        self.up2 = nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
        self.fine = nn.Conv2d(fine_dim, width, kernel_size=1) if fine_dim else None
        self.mix = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.out = nn.Conv2d(width, sum(classes) + 3 + 2, kernel_size=1)

    def forward(self, features: EncoderFeatures) -> DenseOutput:
        """Reads all that the encoder gives."""
        levels = [features.shallow, features.middle, features.deep]
        x = F.gelu(self.merge(torch.cat(levels, dim=1)))
        x = self.up2(F.gelu(self.norm(self.up1(x))))
        if self.fine is not None and features.fine is not None:
            x = x + self.fine(features.fine)
        x = self.out(F.gelu(self.mix(F.gelu(x))))
        widths = [count + 1 for count in self.classes] + [2]
        return DenseOutput(*x.split(widths, dim=1))
