"""Settings of the network, as YAML and a model folder hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from risam_cli.settings.base import Positive, Settings
from risam_cli.settings.load import merge
from risam_cli.settings.presets import PRESETS


class ImageEncoderSettings(Settings):
    """SAM's image encoder: see :class:`risam_cli.model.image_encoder.ImageEncoder`."""

    image_size: int = Field(gt=0, description="side of the square input in pixels")
    patch_size: int = Positive
    dim: int = Positive
    depth: int = Positive
    heads: int = Positive
    mlp_ratio: float = Positive
    out_dim: int = Positive
    window: int = Field(ge=0)
    global_blocks: tuple[int, ...]
    taps: tuple[int, int, int]
    adapter_dim: int = Field(ge=0, description="width of the adapters, 0 for none")
    stem: tuple[int, int, int] | None = None
    stem_in_deep: bool = Field(
        False, description="add the stem's stride-4 features, pooled, to the deep ones"
    )
    checkpoint: str | None = Field(
        None, description="SAM .pth file or Hugging Face SAM folder that the weights start from"
    )

    @model_validator(mode="after")
    def _check(self) -> ImageEncoderSettings:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {self.patch_size}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        last = self.depth - 1
        if not 0 <= self.taps[0] < self.taps[1] < self.taps[2] == last:
            raise ValueError(f"taps {self.taps} must rise and end at the last block, {last}")
        if not all(0 <= block <= last for block in self.global_blocks):
            raise ValueError(f"global_blocks {self.global_blocks} must be within 0..{last}")
        if self.stem is not None and (self.patch_size != 16 or any(w % 4 for w in self.stem)):
            raise ValueError(f"stem {self.stem} needs widths divisible by 4, and patch_size 16")
        return self


AUTO_SOURCE = "auto"
PRETRAINED_TEXT = "google-bert/bert-base-uncased"
"""The text encoder that ``source: auto`` takes where it can be had."""


class LoraSettings(Settings):
    """Low-rank side paths in the text encoder, trained in place of its own weights."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(16.0, gt=0, description="the side path is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(
        None, description="ends of layer names; by default queries and values of BERT and CLIP"
    )

    @property
    def scale(self) -> float:
        """Of the side paths."""
        return self.alpha / self.rank


class TextEncoderSettings(Settings):
    """The text encoder: a Hugging Face model, or a small BERT over a given vocabulary."""

    source: str | None = Field(
        None,
        description="folder or hub name of a CLIP or BERT model; auto: BERT where it can be had, "
        "else vocabulary data without lora",
    )
    vocabulary: Literal["refshapes", "data"] | None = Field(
        None,
        description="words of a small BERT made from scratch, in place of source: those of "
        "RefShapes, or subwords learned from the training expressions",
    )
    learn_words: bool = Field(
        False,
        description="learn subwords of the words of the training expressions that it does not "
        "know, and add them to what it knows, where all of it is trained",
    )
    hidden: int = Field(128, gt=0, description="of the small BERT")
    layers: int = Field(2, gt=0, description="of the small BERT")
    heads: int = Field(4, gt=0, description="of the small BERT")
    max_tokens: int = Field(32, gt=2, description="longer expressions are cut, with a note")
    trainable: bool = True
    lora: LoraSettings | None = Field(None, description="train these, and freeze all else of it")

    @property
    def learns_words(self) -> bool:
        """Whether its tokenizer depends on the training expressions."""
        return self.vocabulary == "data" or (
            self.learn_words and self.trainable and self.lora is None
        )

    @model_validator(mode="after")
    def _one_origin(self) -> TextEncoderSettings:
        if self.lora is not None and not self.trainable:
            raise ValueError("lora already freezes the encoder; leave trainable out")
        if (self.source is None) == (self.vocabulary is None):
            raise ValueError("give either source (a folder or hub name) or vocabulary")
        if self.vocabulary == "data" and not (self.trainable and self.lora is None):
            raise ValueError("vocabulary: data makes a new encoder, which must be trained")
        if self.vocabulary is not None and self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not divisible by heads {self.heads}")
        return self


class FusionSettings(Settings):
    """Feature Enhancement and the Mutual-Aware Attention blocks, with their ablations."""

    dim: int = Positive
    heads: int = Positive
    blocks: int = Positive
    ffn_dim: int = Positive
    feature_enhancement: bool = True
    vision_guided: bool = True
    language_guided: bool = True
    language_blocks: Literal["all", "last"] = Field(
        "all", description="which blocks have a Language-Guided branch"
    )
    identity_start: Literal["none", "language", "both"] = Field(
        "none", description="branches that begin as an identity"
    )
    vision_guided_reads: Literal["words", "text", "both"] = Field(
        "words",
        description="what Vision-Guided Attention reads: the vision-aware words, the text as it "
        "came, or the text and, added, what its words have seen",
    )
    decoder_reads: Literal["words", "text", "both"] = Field(
        "words", description="what the decoder gets: the vision-aware words, the text, or both"
    )
    own_temperature: bool = Field(
        False, description="Language-Guided Attention has a learned temperature for each head"
    )

    @model_validator(mode="after")
    def _check(self) -> FusionSettings:
        if self.dim % 4 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be divisible by 4 and by heads {self.heads}")
        return self


class DecoderSettings(Settings):
    """The Mutual-Aware Mask Decoder, or that of another kind of network."""

    heads: int = Positive
    layers: int = Positive
    ffn_dim: int = Positive
    mask_dim: int = Positive
    query_token: bool = True
    fine: bool = Field(False, description="sharpen masks by the stem's stride-4 features")
    no_target_evidence: bool = Field(
        False, description="let the predicted mask and the features under it speak on no-target"
    )
    minimap: int = Field(10, gt=0, le=64, description="regions a side, of kind rela")


class ModelSettings(Settings):
    """The network. ``preset`` gives every number that is not set beside it."""

    preset: str | None = None
    kind: Literal["risam", "sam", "cris", "rela"] = Field(
        "risam", description="RISAM, or a network that it is compared with, on the same encoders"
    )
    image_encoder: ImageEncoderSettings
    text_encoder: TextEncoderSettings
    fusion: FusionSettings
    decoder: DecoderSettings
    threshold: float = Field(0.5, gt=0, lt=1, description="mask probability above is foreground")
    no_target_threshold: float = Field(0.5, gt=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _kind_of_the_decoder(cls, values: Any) -> Any:
        """Models of earlier versions have the network's kind among the decoder's settings."""
        if not isinstance(values, Mapping) or not isinstance(values.get("decoder"), Mapping):
            return values
        decoder = dict(values["decoder"])
        kind = {"sam": "sam", "mutual_aware": "risam"}.get(str(decoder.pop("kind", None)))
        return values if kind is None else {"kind": kind, **values, "decoder": decoder}

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("preset") is None:
            return values
        name = values["preset"]
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; use one of {', '.join(PRESETS)}")
        return merge(PRESETS[name], values)

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        dim, heads = self.fusion.dim, self.decoder.heads
        if dim % (2 * heads):
            raise ValueError(f"fusion.dim {dim} is not divisible by twice decoder.heads {heads}")
        return self
