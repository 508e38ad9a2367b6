"""RISAM: the boxes of the paper's Figure 3, put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from risam_cli.model.fast.by_expression import BATCHED_BELOW, Regions, decode_one
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.model.layers import sine_positions_1d, sine_positions_2d
from risam_cli.model.mask_decoder import Decoded, MaskDecoder, MutualAwareMaskDecoder
from risam_cli.model.mutual_aware_attention import AttentionMaps, MutualAwareAttention, Reads
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
        if self._goes_by_expression(image.visual, len(image_index)):
            return self._decode_by_expression(image, text, image_index)
        visual, words, owner, _ = self._attend(image, text, image_index, with_maps=False)
        if owner is not None:
            # Without Vision-Guided Attention the visual stream is still one per image.
            visual = visual[owner]
        words, valid = self._guiding(text.words, words, text.valid)
        height, width = image.visual.shape[-2:]
        decoded: Decoded = self.mask_decoder(
            visual,
            self._visual_position(height, width, visual),
            words,
            valid,
            text.sentence,
            image.fine,
            image_index,
            (height, width),
        )
        return decoded

    def _guiding(self, text: Tensor, words: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What guides the decoder: (E, m, C) and (E, m), m = L, or 2·L of both."""
        if self.decoder_reads == "both":
            return torch.cat([text, words], dim=1), torch.cat([valid, valid], dim=1)
        return (words if self.decoder_reads == "words" else text), valid

    def _goes_by_expression(self, visual: Tensor, expressions: int) -> bool:
        """Whether this is inference on a CPU, in the weights' own format, and gains by it."""
        regions = visual.shape[-2] * visual.shape[-1]
        return (
            (regions >= BATCHED_BELOW or expressions == 1)
            and visual.device.type == "cpu"
            and isinstance(self.mask_decoder, MutualAwareMaskDecoder)
            and visual.dtype == self.project_position.weight.dtype
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def _decode_by_expression(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor
    ) -> Decoded:
        """:meth:`decode` where batching gains nothing; see :mod:`.by_expression`."""
        height, width = image.visual.shape[-2:]
        visual = image.visual.flatten(2).transpose(1, 2).contiguous()  # (B, h*w, C)
        position = self._visual_position(height, width, visual)
        places = sine_positions_1d(text.words.shape[1], self.dim).to(visual.dtype)
        images = {row: Regions.of(visual[row], position) for row in set(image_index.tolist())}
        fine = None if image.fine is None else image.fine.permute(0, 2, 3, 1).contiguous()
        room = None
        found = []
        for expression, row in enumerate(image_index.tolist()):
            valid = text.valid[expression]
            room = room or images[row].like()
            found.append(
                decode_one(
                    self.attention,
                    cast(MutualAwareMaskDecoder, self.mask_decoder),
                    images[row],
                    room,
                    position,
                    text.words[expression, valid],
                    places[valid],
                    text.sentence[expression],
                    None if fine is None else fine[row],
                    (height, width),
                    self.decoder_reads,
                )
            )
        if not found:
            none = visual.new_zeros(0)
            return Decoded(visual.new_zeros(0, 4 * height, 4 * width), none, none)
        return Decoded(
            torch.cat([one.mask_logits for one in found]),
            torch.cat([one.iou for one in found]),
            torch.cat([one.no_target_logits for one in found]),
        )

    def attention_maps(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor
    ) -> list[AttentionMaps]:
        """The two attention maps of every block (the paper's Figure 1)."""
        return self._attend(image, text, image_index, with_maps=True)[3]

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor, image_index: Tensor
    ) -> Decoded:
        """Images (B, 3, S, S) and expressions (E, L) to masks, in one go."""
        image = self.encode_image(pixels)
        text = self.encode_text(input_ids, attention_mask)
        return self.decode(image, text, image_index)

    def _attend(
        self, image: ImageFeatures, text: TextFeatures, image_index: Tensor, *, with_maps: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, list[AttentionMaps]]:
        visual = image.visual.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
        words = text.words
        height, width = image.visual.shape[-2:]
        position = self._visual_position(height, width, visual)
        word_position = sine_positions_1d(words.shape[1], self.dim, words.device).to(words.dtype)
        owner: Tensor | None = image_index
        maps = []
        for block in self.attention:
            visual, words, block_maps = block(
                visual,
                position,
                words,
                word_position,
                text.valid,
                owner,
                text=text.words,
                with_maps=with_maps,
            )
            if block.vision_guided is not None:
                owner = None  # The block has made the visual stream one per expression.
            if block_maps is not None:
                maps.append(block_maps)
        return visual, words, owner, maps

    def _visual_position(self, height: int, width: int, like: Tensor) -> Tensor:
        position = sine_positions_2d(height, width, self.dim, like.device)
        return self.project_position(position.to(like.dtype))
