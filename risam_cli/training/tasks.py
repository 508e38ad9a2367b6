"""What one training step computes: a task owns the modules of its stage and gives the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from risam_cli.data.images.transforms import normalize
from risam_cli.model.image_encoder import EncoderFeatures, ImageEncoder
from risam_cli.model.mask_decoder import Decoded
from risam_cli.model.risam import Risam
from risam_cli.training.data.collate import DenseBatch, ReferringBatch
from risam_cli.training.dense_head import DenseHead
from risam_cli.training.losses import ReferringLoss, dense_counts, dense_loss, referring_counts


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
        encoder, head: modules; background_weight: see :func:`risam_cli.training.losses.dense_loss`.
    """

    def __init__(self, encoder: ImageEncoder, head: DenseHead, background_weight: float) -> None:
        self.module = nn.ModuleDict({"encoder": encoder, "head": head})
        self.encoder = encoder
        self.head = head
        self.background_weight = background_weight

    def counts(self, batch: DenseBatch) -> Tensor:
        """See :func:`risam_cli.training.losses.dense_counts`."""
        return dense_counts(batch.labels, self.background_weight)

    def loss(
        self, batch: DenseBatch, counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :func:`risam_cli.training.losses.dense_loss`."""
        size = batch.images.shape[1]
        pixels = normalize(batch.images, [(size, size)] * len(batch.images))
        output = self.head(self.encoder(pixels))
        return dense_loss(
            output.shape,
            output.color,
            output.size,
            output.offset,
            batch.labels.long(),
            batch.centres,
            self.background_weight,
            counts,
        )

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
        """See :func:`risam_cli.training.losses.referring_counts`."""
        return referring_counts(batch.no_target)

    def loss(
        self, batch: ReferringBatch, counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`risam_cli.training.losses.ReferringLoss`."""
        decoded = self.decode(batch)
        target = batch.targets.float() / 255
        parts = self.criterion(decoded, target, inside(batch, target), batch.no_target, counts)
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
