"""The only bridge from settings to model, data, loss and optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from risam_cli.errors import ModelError, reason_of
from risam_cli.model.feature_enhancement import FeatureEnhancement
from risam_cli.model.image_encoder import ImageEncoder
from risam_cli.model.mask_decoder import MutualAwareMaskDecoder
from risam_cli.model.mutual_aware_attention import MutualAwareAttention
from risam_cli.model.risam import Risam
from risam_cli.model.rivals.cris import CrisDecoder, CrisTaps
from risam_cli.model.rivals.rela import RelaDecoder
from risam_cli.model.rivals.sam import DeepFeatures, SamMaskDecoder
from risam_cli.model.text_encoder import TextEncoder
from risam_cli.settings.model import ImageEncoderSettings, ModelSettings, TextEncoderSettings
from risam_cli.weights import lora
from risam_cli.weights.text import TextParts, grow_embeddings, pretrained_text, small_bert
from risam_cli.weights.tokenizer import tokenizer_from_words, with_learned_words


def build_image_encoder(settings: ImageEncoderSettings) -> ImageEncoder:
    """SAM's encoder with random weights; see :mod:`risam_cli.weights.sam` for its checkpoints."""
    return ImageEncoder(**settings.model_dump(exclude={"checkpoint"}))


def build_model(settings: ModelSettings, text: TextParts) -> Risam:
    """The network, with a finished text backbone and all else at random weights.

    Raises:
        ModelError: parts that do not go together, or a baseline without its package.
    """
    encoder, dim = settings.image_encoder, settings.fusion.dim
    if encoder.stem_in_deep and encoder.stem is None:
        raise ModelError(
            "image_encoder.stem_in_deep needs a convolutional stem",
            "set image_encoder.stem, or image_encoder.stem_in_deep to false",
        )
    if settings.kind == "risam" and settings.decoder.fine and encoder.stem is None:
        raise ModelError(
            "decoder.fine needs stride-4 features, which only a convolutional stem gives",
            "set image_encoder.stem, or decoder.fine to false",
        )
    parts = {"risam": _risam_parts, "sam": _sam_parts, "cris": _cris_parts, "rela": _rela_parts}
    try:
        return Risam(
            image_encoder=build_image_encoder(encoder),
            text_encoder=TextEncoder(
                text.backbone,
                text.config.hidden_size,
                dim,
                eos_token_id=_end_of_sentence(text),
                trainable=settings.text_encoder.trainable,
            ),
            **parts[settings.kind](settings),
            dim=dim,
        )
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes that no machine has
        why = f"cannot build the network: {reason_of(error)}"
        raise ModelError(why, "set smaller sizes") from error


def _risam_parts(settings: ModelSettings) -> dict[str, Any]:
    """What stands between the two encoders and the mask in the paper's Figure 3."""
    fusion, decoder, encoder = settings.fusion, settings.decoder, settings.image_encoder
    return {
        "feature_enhancement": FeatureEnhancement(
            encoder.dim, encoder.out_dim, fusion.dim, enabled=fusion.feature_enhancement
        ),
        "attention": [
            MutualAwareAttention(
                fusion.dim,
                fusion.heads,
                fusion.ffn_dim,
                vision_guided=fusion.vision_guided,
                language_guided=fusion.language_guided
                and (fusion.language_blocks == "all" or number == fusion.blocks - 1),
                identity_start=fusion.identity_start,
                reads=fusion.vision_guided_reads,
                own_temperature=fusion.own_temperature,
            )
            # Without either branch a block is an affinity that nobody reads.
            for number in range(
                fusion.blocks if fusion.vision_guided or fusion.language_guided else 0
            )
        ],
        "decoder_reads": fusion.decoder_reads,
        "mask_decoder": MutualAwareMaskDecoder(
            fusion.dim,
            decoder.heads,
            decoder.layers,
            decoder.ffn_dim,
            decoder.mask_dim,
            fine_dim=encoder.stem[1] if decoder.fine and encoder.stem else 0,
            query_token=decoder.query_token,
            no_target_evidence=decoder.no_target_evidence,
        ),
    }


def _sam_parts(settings: ModelSettings) -> dict[str, Any]:
    """The paper's baseline: deep features, no Mutual-Aware blocks, SAM's own decoder."""
    dim, decoder = settings.fusion.dim, settings.decoder
    try:
        mask_decoder = SamMaskDecoder(dim, decoder.heads, decoder.layers, decoder.ffn_dim)
    except ModuleNotFoundError as error:
        raise ModelError(
            "model.kind is 'sam', but the package segment_anything is not installed",
            "pip install segment-anything",
        ) from error
    except ValueError as error:
        raise ModelError(
            f"model.kind 'sam': {error}", "change fusion.dim or decoder.heads"
        ) from error
    return {
        "feature_enhancement": DeepFeatures(settings.image_encoder.out_dim, dim),
        "attention": [],
        "mask_decoder": mask_decoder,
    }


def _cris_parts(settings: ModelSettings) -> dict[str, Any]:
    """CRIS: three depths, and its neck, vision-language decoder and projector."""
    dim, decoder, encoder = settings.fusion.dim, settings.decoder, settings.image_encoder
    return {
        "feature_enhancement": CrisTaps(encoder.dim, encoder.out_dim, dim),
        "attention": [],
        "mask_decoder": CrisDecoder(dim, decoder.heads, decoder.layers, decoder.ffn_dim),
    }


def _rela_parts(settings: ModelSettings) -> dict[str, Any]:
    """ReLA: Feature Enhancement for its pixel decoder, and its ReLAtionship block."""
    dim, decoder, encoder = settings.fusion.dim, settings.decoder, settings.image_encoder
    return {
        "feature_enhancement": FeatureEnhancement(encoder.dim, encoder.out_dim, dim),
        "attention": [],
        "mask_decoder": RelaDecoder(
            dim,
            decoder.heads,
            decoder.layers,
            decoder.ffn_dim,
            decoder.mask_dim,
            decoder.minimap,
        ),
    }


def _end_of_sentence(text: TextParts) -> int | None:
    """The token whose vector stands for the sentence: CLIP's closing one; None is BERT's first."""
    if "clip" not in text.config.model_type:
        return None
    # Of the tokenizer, since OpenAI's CLIP folders name a wrong eos_token_id in config.json.
    return int(text.tokenizer.encode([""]).input_ids[0, -1])


def new_text_parts(settings: TextEncoderSettings, texts: Iterable[str] = ()) -> TextParts:
    """A text encoder to start from: a pretrained one from ``source``, or the small BERT.

    Args:
        texts: the training expressions, for an encoder that learns words from them.
    """
    from risam_cli.data.refshapes.vocabulary import VOCABULARY

    if settings.source is not None:
        parts = pretrained_text(settings.source, settings.max_tokens)
        if settings.learns_words:
            parts = learn_words(parts, texts)
    else:
        tokenizer = tokenizer_from_words(VOCABULARY if settings.vocabulary == "refshapes" else [])
        if settings.learns_words:
            tokenizer = with_learned_words(tokenizer, texts)
        sizes = settings.hidden, settings.layers, settings.heads, settings.max_tokens
        parts = small_bert(tokenizer, *sizes)
    add_lora(parts.backbone, parts.config.model_type, settings)
    return parts


def learn_words(text: TextParts, texts: Iterable[str]) -> TextParts:
    """The text encoder with what it does not know of the texts' words added, if anything."""
    tokenizer = with_learned_words(text.tokenizer.tokenizer, texts)
    if tokenizer is text.tokenizer.tokenizer:
        return text
    return grow_embeddings(text, tokenizer)


def add_lora(backbone: nn.Module, kind: str, settings: TextEncoderSettings) -> None:
    """Adds the settings' side paths, if they ask for any; see :mod:`risam_cli.weights.lora`."""
    side = settings.lora
    if side is not None:
        lora.add_lora(backbone, kind, side.rank, side.alpha, side.dropout, side.targets)
