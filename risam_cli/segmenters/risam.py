"""RISAM as a segmenter: one mask an expression, in a padded square of SAM's kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from risam_cli.data.images.frames import Frame, Pixels, sam_frame
from risam_cli.segmenters.segmenter import (
    Capabilities,
    GridMaps,
    Instances,
    Texts,
    Thresholds,
)
from risam_cli.weights.load import LoadedModel

if TYPE_CHECKING:
    from risam_cli.model.image_encoder import EncoderFeatures
    from risam_cli.model.mutual_aware_attention import AttentionMaps
    from risam_cli.model.risam import ImageFeatures


class RisamSegmenter:
    """See :class:`risam_cli.segmenters.segmenter.Segmenter`.

    Args:
        loaded: the model.
        device, precision: where it runs. Where the image encoder does not hold its matrices in
            that precision itself, autocast brings everything to it.
    """

    kind = "risam"
    capabilities = Capabilities(any_threads=True)

    def __init__(self, loaded: LoadedModel, device: torch.device, precision: torch.dtype) -> None:
        self.loaded = loaded
        self.name = loaded.name
        self.hash = loaded.hash
        self.folders: Mapping[str, str] = {"model": loaded.name}
        self.versions: Mapping[str, str] = {}
        self.frames: tuple[Frame, ...] = (sam_frame(loaded.image_size),)
        self.thresholds = Thresholds(loaded.threshold, loaded.no_target_threshold)
        self.parameters = sum(p.numel() for p in loaded.model.parameters())
        self.max_tokens = loaded.tokenizer.max_tokens
        self.device = device
        self.precision = precision

    def autocast(self) -> torch.autocast:
        """The run's precision, where the encoder does not hold it."""
        # An encoder that holds its matrices in that format asks for none of this, and the rest, a
        # small part of the work, stays in float32: the masks are ten times as close to float32's.
        encoder = getattr(self.loaded.model, "image_encoder", None)
        held = getattr(encoder, "precision", torch.float32) != torch.float32
        lower = self.precision != torch.float32 and not held
        return torch.autocast(
            self.device.type, dtype=self.precision if lower else None, enabled=lower
        )

    def encode_images(self, inputs: Sequence[Pixels]) -> ImageFeatures:
        """The enhanced features F_v of B images."""
        with self.autocast():
            return self.loaded.model.encode_image(inputs[0].values)

    def backbone(self, inputs: Sequence[Pixels]) -> EncoderFeatures:
        """What a feature cache keeps: the outputs of the image encoder."""
        with self.autocast():
            found: EncoderFeatures = self.loaded.model.image_encoder(inputs[0].values)
        return found

    def from_backbone(self, kept: EncoderFeatures) -> ImageFeatures:
        """The features that :meth:`encode_images` gives, from the encoder's outputs."""
        with self.autocast():
            return self.loaded.model.enhance(kept.shallow, kept.middle, kept.deep, kept.fine)

    def encode_texts(self, texts: Sequence[str]) -> Texts:
        """Words and sentence of each expression, in one batch."""
        tokenizer = self.loaded.tokenizer
        tokens = tokenizer.encode(list(texts))
        with self.autocast():
            features = self.loaded.model.encode_text(
                tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
            )
        cut_to = [tokens.max_words if cut else 0 for cut in tokens.truncated]
        return Texts(features, cut_to, [tokenizer.unknown_words(text) for text in texts])

    def decode(
        self,
        features: ImageFeatures,
        texts: Texts,
        rows: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        instance_threshold: float | None = None,
    ) -> list[Instances]:
        """See :class:`risam_cli.segmenters.segmenter.Segmenter`."""
        owners = torch.tensor(rows, device=self.device)
        with self.autocast():
            decoded = self.loaded.model.decode(features, texts.features, owners)
        nothing = decoded.no_target_logits.float().sigmoid()
        found = []
        start = 0
        for end in range(1, len(rows) + 1):
            if end < len(rows) and rows[end] == rows[start]:
                continue
            own = slice(start, end)
            maps = GridMaps(decoded.mask_logits[own], self.frames[0], sizes[rows[start]])
            ones = [1] * (end - start)
            found.append(Instances(maps, ones, decoded.iou[own].float(), nothing[own]))
            start = end
        return found

    def attention(
        self, features: ImageFeatures, texts: Texts, rows: Sequence[int]
    ) -> list[AttentionMaps]:
        """The two attention maps of every block (the paper's Figure 1); none without blocks."""
        owners = torch.tensor(rows, device=self.device)
        with self.autocast():
            return self.loaded.model.attention_maps(features, texts.features, owners)
