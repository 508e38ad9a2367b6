"""Settings: YAML and ``--set`` to typed, checked values. Config objects end at the builder."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from risam_cli.errors import ConfigError
from risam_cli.model.presets import PRESETS

AnySettings = TypeVar("AnySettings", bound="Settings")
Positive = Field(gt=0)


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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

    @model_validator(mode="after")
    def _one_origin(self) -> TextEncoderSettings:
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


RefShapesFamily = Literal["refshapes", "refshapes+", "refshapesg", "grefshapes"]


class RefShapesData(Settings):
    """Scenes of RefShapes, drawn while they are used."""

    dataset: Literal["refshapes"]
    family: Literal["refshapes", "refshapes+", "refshapesg", "grefshapes", "mixed"] = "mixed"
    mix: dict[RefShapesFamily, float] | None = Field(
        None, description="shares of the families in mixed; None is equal ones"
    )
    split: Literal["train", "val", "testA", "testB"] = "train"
    scenes: int | None = Field(None, gt=0)
    expressions_per_scene: int = Field(6, gt=0)
    seed: int = Field(0, ge=0)
    unknown_word_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of expressions whose noun is replaced by a word "
        "outside the vocabulary, and which then refer to nothing",
    )


class CocoData(Settings):
    """COCO-style JSON of image/expression pairs."""

    dataset: Literal["coco"]
    annotations: str = Field(description="the JSON file")
    images: str | None = Field(None, description="folder that file names are relative to")
    limit: int | None = Field(None, gt=0)


DataSettings = Annotated[RefShapesData | CocoData, Field(discriminator="dataset")]


class DenseStage(Settings):
    """Trains the image encoder alone: per-pixel shape, colour, size and way to the centre."""

    kind: Literal["dense"]
    name: str
    steps: int = Positive
    images_per_step: int = Positive
    learning_rate: float = Positive
    background_weight: float = Field(0.08, ge=0, le=1)
    warmup: int = Field(200, ge=0)


class ReferringStage(Settings):
    """Trains the network on expressions, the image encoder frozen or not."""

    kind: Literal["referring"]
    name: str
    steps: int = Positive
    images_per_step: int = Positive
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


class OptimizerSettings(Settings):
    """AdamW and what keeps it steady."""

    weight_decay: float = Field(0.02, ge=0)
    beta2: float = Field(0.99, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1, description="0 keeps no moving average")


class TrainSettings(Settings):
    """Everything that ``risam train`` needs."""

    name: str
    seed: int = Field(0, ge=0)
    output: str
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = Field(1, ge=0)
    threads: int | None = Field(None, gt=0, description="CPU threads; default is torch's own")
    model: ModelSettings
    init_from: str | None = Field(None, description="model folder that all weights start from")
    train: DataSettings
    val: dict[str, DataSettings] = Field(min_length=1)
    stages: tuple[StageSettings, ...] = Field(min_length=1)
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    validate_every: int = Field(1000, gt=0, description="steps")
    checkpoint_every: int = Field(500, gt=0, description="steps")
    log_every: int = Field(50, gt=0, description="steps")

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        for stage in self.stages:
            if stage.kind == "dense" and not isinstance(self.train, RefShapesData):
                raise ValueError(f"stage {stage.name!r}: dense training needs RefShapes scenes")
            tunes = stage.kind == "referring" and stage.train_encoder == "adapters"
            if tunes and self.model.image_encoder.adapter_dim == 0:
                raise ValueError(f"stage {stage.name!r} trains adapters, but adapter_dim is 0")
        return self


def load_settings(path: Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Reads a YAML file, applies ``a.b.c=value`` overrides, and checks all of it.

    Raises:
        ConfigError: naming file, key, value and what it could have been.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "give the path of a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {line}", "mend the file") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no settings at its top level", "write 'key: value' lines")
    for override in overrides:
        raw = apply_override(raw, override)
    return check(TrainSettings, raw, str(path))


def apply_override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Sets one ``a.b.c=value`` in nested settings; the value is read as YAML.

    Raises:
        ConfigError: where there is no ``=`` or a part of the key is not a section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} has no '='", "write --set section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
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


def check(kind: type[AnySettings], raw: Any, where: str) -> AnySettings:
    """Makes settings of ``raw``.

    Raises:
        ConfigError: one line naming place, key, value, and near or possible names.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(*_explain(error, kind, where)) from error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested update: values of ``over`` win, sections are merged."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = merge(old, value) if both and isinstance(old, Mapping) else value
    return merged


def dump(settings: Settings) -> str:
    """The settings as YAML, complete and in order."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(error: ValidationError, kind: type[Settings], where: str) -> tuple[str, str]:
    problems = error.errors()
    first = problems[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path) or "(top level)"
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        message = f"{where}: unknown key {key!r}"
    elif first["type"] == "missing":
        message, hint = f"{where}: key {key!r} is missing", "add it"
    else:
        text = first["msg"].removeprefix("Value error, ")
        message = f"{where}: {key} = {_short(first['input'])}: {text}"
        hint = "see risam train --print-config for the keys and their values"
    more = len(problems) - 1
    return message + (f" (and {more} more)" if more else ""), hint


def _fields_at(kind: type[Settings], path: list[str]) -> list[str]:
    """Names of the settings at a place in an error's path, tags of unions and all."""
    candidates = [kind]
    for part in path:
        held = [c.model_fields[part].annotation for c in candidates if part in c.model_fields]
        if held:
            candidates = [found for annotation in held for found in _nested(annotation)]
        else:  # A list index, a name in a table, or a union's tag, which picks one of them.
            candidates = [c for c in candidates if part in _tags(c)] or candidates
    return list(dict.fromkeys(name for c in candidates for name in c.model_fields))


def _nested(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for part in get_args(annotation) for found in _nested(part)]


def _tags(kind: type[Settings]) -> list[str]:
    fields = [kind.model_fields.get(name) for name in ("kind", "dataset")]
    return [tag for field in fields if field is not None for tag in get_args(field.annotation)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
