"""Settings: YAML and ``--set`` to typed, checked values. Config objects end at the builder."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from risam_cli.errors import ConfigError
from risam_cli.files.safe_yaml import load_yaml
from risam_cli.metrics.figures import FIGURES
from risam_cli.model.presets import PRESETS
from risam_cli.settings import (
    AveragingSettings,
    EarlyStoppingSettings,
    FeatureCacheSettings,
    OptimizerSettings,
    Settings,
)
from risam_cli.settings_check import check as check
from risam_cli.settings_data import AugmentSettings
from risam_cli.settings_data import CocoData as CocoData
from risam_cli.settings_data import DataSettings as DataSettings
from risam_cli.settings_data import RefShapesData as RefShapesData
from risam_cli.settings_file import merge as merge

Positive = Field(gt=0)


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
    checkpoint: str | None = Field(
        None, description="SAM .pth file or Hugging Face SAM folder that the weights start from"
    )

    @model_validator(mode="after")
    def _check(self) -> ImageEncoderSettings:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of {self.patch_size}")
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

    source: str | None = Field(None, description="folder or hub name of a CLIP or BERT model")
    vocabulary: Literal["refshapes"] | None = Field(
        None, description="words of a small BERT made from scratch, in place of source"
    )
    hidden: int = Field(128, gt=0, description="of the small BERT")
    layers: int = Field(2, gt=0, description="of the small BERT")
    heads: int = Field(4, gt=0, description="of the small BERT")
    max_tokens: int = Field(32, gt=2, description="longer expressions are cut, and said to be")
    trainable: bool = True
    lora: LoraSettings | None = Field(None, description="train these, and freeze all else of it")

    @model_validator(mode="after")
    def _one_origin(self) -> TextEncoderSettings:
        if self.lora is not None and not self.trainable:
            raise ValueError("lora is what is trained of a frozen encoder; leave trainable out")
        if (self.source is None) == (self.vocabulary is None):
            raise ValueError("give either source (a folder or hub name) or vocabulary")
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

    @model_validator(mode="after")
    def _check(self) -> FusionSettings:
        if self.dim % 4 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be divisible by 4 and by heads {self.heads}")
        return self


class DecoderSettings(Settings):
    """The Mutual-Aware Mask Decoder, or SAM's own (the paper's baseline)."""

    kind: Literal["mutual_aware", "sam"] = "mutual_aware"
    heads: int = Positive
    layers: int = Positive
    ffn_dim: int = Positive
    mask_dim: int = Positive
    query_token: bool = True
    fine: bool = Field(False, description="sharpen masks by the stem's stride-4 features")
    no_target_evidence: bool = Field(
        False, description="let the predicted mask and the features under it speak on no-target"
    )


class ModelSettings(Settings):
    """The network. ``preset`` gives every number that is not set beside it."""

    preset: str | None = None
    image_encoder: ImageEncoderSettings
    text_encoder: TextEncoderSettings
    fusion: FusionSettings
    decoder: DecoderSettings
    threshold: float = Field(0.5, gt=0, lt=1, description="mask probability above is foreground")
    no_target_threshold: float = Field(0.5, gt=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("preset") is None:
            return values
        name = values["preset"]
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown; take one of {', '.join(PRESETS)}")
        return merge(PRESETS[name], values)

    @model_validator(mode="after")
    def _check(self) -> ModelSettings:
        dim, heads = self.fusion.dim, self.decoder.heads
        if dim % (2 * heads):
            raise ValueError(f"fusion.dim {dim} is not divisible by twice decoder.heads {heads}")
        return self


class DenseStage(Settings):
    """Trains the image encoder alone: per-pixel shape, colour, size and way to the centre."""

    kind: Literal["dense"]
    name: str
    steps: int = Positive
    images_per_step: int = Positive
    accumulate: int = Field(
        1, gt=0, description="parts that a step's images go through the network in"
    )
    learning_rate: float = Positive
    background_weight: float = Field(0.08, ge=0, le=1)
    warmup: int = Field(200, ge=0)


class ReferringStage(Settings):
    """Trains the network on expressions, the image encoder frozen or not."""

    kind: Literal["referring"]
    name: str
    steps: int = Positive
    images_per_step: int = Positive
    accumulate: int = Field(
        1, gt=0, description="parts that a step's images go through the network in"
    )
    learning_rate: float = Positive
    train_encoder: Literal["no", "adapters", "yes"] = "no"
    encoder_learning_rate: float | None = Field(None, gt=0)
    text_learning_rate: float | None = Field(None, gt=0)
    warmup: int = Field(200, ge=0)


StageSettings = Annotated[DenseStage | ReferringStage, Field(discriminator="kind")]


class LossSettings(Settings):
    """Weights of the parts of the loss."""

    mask: float = Field(2.0, ge=0)
    dice: float = Field(1.0, ge=0)
    no_target: float = Field(0.2, ge=0)
    iou: float = Field(0.2, ge=0)
    focal_gamma: float = Field(0.0, ge=0)
    target_size: int = Field(128, gt=0, description="side of the masks that the loss compares")


class TrainSettings(Settings):
    """Everything that ``risam train`` needs."""

    name: str
    seed: int = Field(0, ge=0)
    output: str
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    workers: int = Field(1, ge=0)
    threads: int | None = Field(None, gt=0, description="CPU threads; default is torch's own")
    model: ModelSettings
    init_from: str | None = Field(None, description="model folder that all weights start from")
    init_encoder_from: str | None = Field(
        None,
        description="model folder, or checkpoints/last.pt of a training run, that the image "
        "encoder's weights start from; only adapters may be new",
    )
    train: DataSettings
    val: dict[str, DataSettings] = Field(min_length=1)
    augment: AugmentSettings = AugmentSettings()
    feature_cache: FeatureCacheSettings | None = Field(
        None, description="for stages that train nothing of the image encoder"
    )
    stages: tuple[StageSettings, ...] = Field(min_length=1)
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validate_every: int = Field(1000, gt=0, description="steps")
    checkpoint_every: int = Field(500, gt=0, description="steps")
    log_every: int = Field(50, gt=0, description="steps")
    gradient_checkpointing: bool = Field(
        False, description="compute the image encoder's blocks again going back, to save memory"
    )
    best_by: str = Field(
        "miou", description="what best/ maximizes: a mean over val, or one's, as in NAME.miou"
    )
    early_stopping: EarlyStoppingSettings | None = None
    averaging: AveragingSettings | None = None
    keep_last: int = Field(1, gt=0, description="checkpoints kept, the newest among them")
    pictures: int = Field(4, ge=0, description="validation examples drawn at each validation")

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        starts = [self.init_from, self.init_encoder_from, self.model.image_encoder.checkpoint]
        if sum(start is not None for start in starts) > 1:
            raise ValueError(
                "init_from, init_encoder_from and model.image_encoder.checkpoint all fill the "
                "image encoder; give one of them"
            )
        self._check_feature_cache()
        self._check_figure(self.best_by)
        if self.early_stopping is not None and self.early_stopping.figure is not None:
            self._check_figure(self.early_stopping.figure)
        for stage in self.stages:
            if stage.accumulate > stage.images_per_step:
                raise ValueError(
                    f"stage {stage.name!r}: accumulate {stage.accumulate} is more than its "
                    f"images_per_step {stage.images_per_step}"
                )
            if stage.kind == "dense" and not isinstance(self.train, RefShapesData):
                raise ValueError(f"stage {stage.name!r}: dense training needs RefShapes scenes")
            tunes = stage.kind == "referring" and stage.train_encoder == "adapters"
            if tunes and self.model.image_encoder.adapter_dim == 0:
                raise ValueError(f"stage {stage.name!r} trains adapters, but adapter_dim is 0")
        return self

    def _check_feature_cache(self) -> None:
        if self.feature_cache is None:
            return
        if self.augment.changes_pixels:
            raise ValueError(
                "feature_cache needs pictures that stay the same, but augment changes them; "
                "leave one of the two out"
            )
        if not any(
            stage.kind == "referring" and stage.train_encoder == "no" for stage in self.stages
        ):
            raise ValueError(
                "feature_cache is for a frozen image encoder, but no stage has train_encoder: no"
            )

    def _check_figure(self, name: str) -> None:
        known = [*FIGURES, *(f"{held_out}.{figure}" for held_out in self.val for figure in FIGURES)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or [
                one for one in known if one.lower() == name.lower()
            ]
            hint = f"did you mean {near[0]!r}" if near else f"one of {', '.join(FIGURES)}"
            raise ValueError(f"{name!r} is no figure of the validation; {hint}")


def apply_override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Sets one ``a.b.c=value`` in nested settings; the value is read as YAML.

    Raises:
        ConfigError: where there is no ``=`` or a part of the key is not a section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} has no '='", "write --set section.key=value")
    try:
        value = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {override!r}: value is not YAML", "quote it") from error
    return _set(values, key.split("."), value, override)


def _set(values: Any, keys: list[str], value: Any, override: str) -> Any:
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if isinstance(values, list) and head.isdigit() and int(head) < len(values):
        number = int(head)
        return [_set(v, rest, value, override) if i == number else v for i, v in enumerate(values)]
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"--set {override!r}: {head!r} is not inside a section", "see --print-config for keys"
        )
    return {**values, head: _set(values.get(head), rest, value, override)}


def dump(settings: Settings) -> str:
    """The settings as YAML, complete and in order."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
