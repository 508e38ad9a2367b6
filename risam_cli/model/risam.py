"""RISAM: the boxes of the paper's Figure 3, put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.model.layers import sine_positions_1d, sine_positions_2d
from risam_cli.model.mask_decoder import Decoded, MaskDecoder
from risam_cli.model.mutual_aware_attention import AttentionMaps, MutualAwareAttention
from risam_cli.model.streams import LinguisticStream, Reads, VisualStream
from risam_cli.model.text_encoder import TextEncoder, TextFeatures


@dataclass(frozen=True)
class ImageFeatures:
    """All that depends on the image alone, computed once per image.

    Attributes:
        visual: enhanced visual features F_v, (B, C, h, w).
        fine: (B, mask_dim, 4h, 4w) stride-4 features, or None.
    """

    visual: Tensor
    fine: Tensor | None

    def select(self, index: Tensor | slice) -> ImageFeatures:
        """The features of some of the images."""
        return ImageFeatures(self.visual[index], None if self.fine is None else self.fine[index])


class Risam(nn.Module):
    """Referring image segmentation with mutual-aware attention (arXiv 2311.15727).

    ``encode_image`` runs once per image, ``encode_text`` once per expression, and ``decode``
    takes E expressions over B images in one ragged batch.

    Args:
        image_encoder, text_encoder: finished modules.
        feature_enhancement: makes F_v (B, C, h, w) of the encoder's three depths; a rival's may
            have other channels, which its mask decoder knows.
        attention: the Mutual-Aware Attention blocks, in order; none for a rival.
        mask_decoder: the Mutual-Aware Mask Decoder, or a rival's.
        dim: width C of the network.
        decoder_reads: what the mask decoder gets of the expression: "words", the vision-aware
            linguistic features; "text", the linguistic features F_l; "both", one after the other.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        feature_enhancement: nn.Module,
        attention: list[MutualAwareAttention],
        mask_decoder: MaskDecoder,
        dim: int,
        decoder_reads: Reads = "words",
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.feature_enhancement = feature_enhancement
        self.attention = nn.ModuleList(attention)
        self.mask_decoder = mask_decoder
        self.project_position = nn.Linear(dim, dim)
        self.dim = dim
        self.decoder_reads = decoder_reads

    def encode_image(self, pixels: Tensor) -> ImageFeatures:
        """Encodes B images of (B, 3, S, S), normalized and zero-padded right and bottom."""
        features = self.image_encoder(pixels)
        return self.enhance(features.shallow, features.middle, features.deep, features.fine)

    def enhance(
        self, shallow: Tensor, middle: Tensor, deep: Tensor, fine: Tensor | None
    ) -> ImageFeatures:
        """Turns the encoder's three taps (and stride-4 features, if any) into F_v."""
        visual = self.feature_enhancement(shallow, middle, deep)
        return ImageFeatures(visual, self.mask_decoder.project_fine(fine))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> TextFeatures:
        """Encodes E expressions of (E, L) token ids."""
        features: TextFeatures = self.text_encoder(input_ids, attention_mask)
        return features

    def decode(self, image: ImageFeatures, text: TextFeatures, image_index: Tensor) -> Decoded:
        """Masks of E expressions over B images.

        Args:
            image_index: (E,) integers in 0..B-1, the image of each expression.
        """
        visual, language = self.streams(image, text, image_index)
        for block in self.attention:
            visual, language = block(visual, language)
        # Projected again for the decoder, so that its gradient adds up apart from the blocks'.
        visual = replace(visual, position=self.position(visual.grid, visual.features))
        decoded: Decoded = self.mask_decoder(visual, language.guiding(self.decoder_reads))
        return decoded

    def attention_maps(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor
    ) -> list[AttentionMaps]:
        """The two attention maps of every block (the paper's Figure 1)."""
        visual, language = self.streams(image, text, image_index)
        maps = []
        for block in self.attention:
            maps.append(cast(MutualAwareAttention, block).maps(visual, language))
            visual, language = block(visual, language)
        return maps

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, image_index: Tensor
    ) -> Decoded:
        """Images (B, 3, S, S) and expressions (E, L) to masks, in one go."""
        image = self.encode_image(pixels)
        text = self.encode_text(input_ids, attention_mask)
        return self.decode(image, text, image_index)

    def streams(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor
    ) -> tuple[VisualStream, LinguisticStream]:
        """What goes into the first block: F_v of each image and F_l of each expression."""
        height, width = image.visual.shape[-2:]
        visual = image.visual.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        position = self.position((height, width), visual)
        words = text.words  # (E, L, C)
        word_position = sine_positions_1d(words.shape[1], self.dim, words.device).to(words.dtype)
        return (
            VisualStream(visual, position, (height, width), image_index, image.fine),
            LinguisticStream(words, words, word_position, text.valid, text.sentence),
        )

    def position(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """Position encodings of the regions of a grid, (h*w, C)."""
        fixed = sine_positions_2d(*grid, self.dim, like.device).to(like.dtype)
        position: Tensor = self.project_position(fixed)
        return position
