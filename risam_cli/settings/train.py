"""Everything that ``risam train`` is told, typed and checked, and how it is read from a file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from risam_cli.files.sizes import parse_size
from risam_cli.metrics.figures import FIGURES
from risam_cli.settings.base import Positive, Settings
from risam_cli.settings.data import AugmentSettings, DataSettings, RefShapesData
from risam_cli.settings.load import apply_override, check, merge, read_settings_file
from risam_cli.settings.model import ModelSettings


class DenseStage(Settings):
    """Trains the image encoder alone: per-pixel shape, colour, size and way to the centre."""

    kind: Literal["dense"]
    name: str
    steps: int = Positive
    images_per_step: int = Field(gt=0, le=1 << 20)
    accumulate: int = Field(
        1, gt=0, description="parts that a step's images are split into (gradient accumulation)"
    )
    learning_rate: float = Positive
    background_weight: float = Field(0.08, ge=0, le=1)
    warmup: int = Field(200, ge=0)


class ReferringStage(Settings):
    """Trains the network on expressions, the image encoder frozen or not."""

    kind: Literal["referring"]
    name: str
    steps: int = Positive
    images_per_step: int = Field(gt=0, le=1 << 20)
    accumulate: int = Field(
        1, gt=0, description="parts that a step's images are split into (gradient accumulation)"
    )
    learning_rate: float = Positive
    train_encoder: Literal["no", "adapters", "yes"] = "no"
    encoder_learning_rate: float | None = Field(None, gt=0)
    text_learning_rate: float | None = Field(None, gt=0)
    warmup: int = Field(200, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _yes_or_no(cls, values: Any) -> Any:
        """YAML takes a plain yes or no for a truth value."""
        if isinstance(values, dict) and isinstance(values.get("train_encoder"), bool):
            return {**values, "train_encoder": "yes" if values["train_encoder"] else "no"}
        return values


StageSettings = Annotated[DenseStage | ReferringStage, Field(discriminator="kind")]


class LossSettings(Settings):
    """Weights of the parts of the loss."""

    mask: float = Field(2.0, ge=0)
    dice: float = Field(1.0, ge=0)
    no_target: float = Field(0.2, ge=0)
    iou: float = Field(0.2, ge=0)
    focal_gamma: float = Field(0.0, ge=0)
    minimap: float = Field(0.2, ge=0, description="of kind rela; its authors' is mask / 10")
    target_size: int = Field(
        128, gt=0, le=8192, description="side of the masks that the loss compares"
    )

    @model_validator(mode="after")
    def _learns_masks(self) -> LossSettings:
        if self.mask == self.dice == 0:
            raise ValueError("mask and dice are both 0, so that no mask would be learned")
        return self


class OptimizerSettings(Settings):
    """AdamW, its rate over the steps, and what keeps it steady."""

    weight_decay: float = Field(
        0.02, ge=0, description="of matrices; norms, biases, embeddings and position tables have 0"
    )
    beta2: float = Field(0.99, gt=0, lt=1)
    clip_norm: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=True,
        description="the gradient's norm is clipped to this; .inf never clips",
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="0 keeps no moving average")
    schedule: Literal["cosine", "polynomial", "constant"] = Field(
        "cosine", description="schedule of the learning rate after the warm-up"
    )
    power: float = Field(0.9, gt=0, description="of the polynomial schedule")
    floor: float = Field(
        0.01, ge=0, le=1, description="fraction of the learning rate that is left at the end"
    )


class EarlyStoppingSettings(Settings):
    """Ends a stage that has stopped getting better."""

    patience: int = Field(
        gt=0, description="validations in a row without improvement before the stage ends"
    )
    figure: str | None = Field(None, description="the figure to watch; by default best_by")
    min_delta: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="smallest gain that counts as an improvement, in 0..1",
    )


class AveragingSettings(Settings):
    """At the end, the mean of several validated weights of the last stage becomes a model too."""

    count: int = Field(gt=1, description="how many are averaged")
    of: Literal["best", "last"] = Field("best", description="which: by best_by, or the newest")


class FeatureCacheSettings(Settings):
    """Keeps the frozen image encoder's features on disk, for all epochs, runs and commands."""

    folder: str = Field(description="may be shared with other runs, and with predict and eval")
    limit: str = Field("50GB", description="size limit of the folder")

    @field_validator("limit")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_size(value)
        return value


class TrainSettings(Settings):
    """Everything that ``risam train`` needs."""

    name: str
    seed: int = Field(0, ge=0, lt=1 << 32)
    output: str = Field(min_length=1)
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    workers: int = Field(1, ge=0, le=256)
    threads: int | None = Field(
        None, gt=0, le=4096, description="CPU threads; default is torch's own"
    )
    model: ModelSettings
    init_from: str | None = Field(None, description="model folder that all weights start from")
    init_encoder_from: str | None = Field(
        None,
        description="model folder, or checkpoints/last.pt of a training run, that the image "
        "encoder's weights start from; only what starts at zero may be new",
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
        False,
        description="recompute the image encoder's blocks in the backward pass, to save memory",
    )
    best_by: str = Field(
        "miou", description="what best/ maximizes: a mean over val, or one's, as in NAME.miou"
    )
    early_stopping: EarlyStoppingSettings | None = None
    averaging: AveragingSettings | None = None
    keep_last: int = Field(1, gt=0, description="checkpoints kept, the newest among them")
    pictures: int = Field(
        4, ge=0, le=1000, description="validation examples drawn at each validation"
    )

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
            encoder = self.model.image_encoder
            if tunes and encoder.adapter_dim == 0 and not encoder.stem_in_deep:
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
            raise ValueError(f"{name!r} is not a figure of the validation; {hint}")


# --- from a file ----------------------------------------------------------------------------------

StoredSettings = Callable[[str], Mapping[str, Any]]
"""The raw model settings of a model folder, by its path or bundled name."""


def complete(raw: Mapping[str, Any], stored: StoredSettings) -> dict[str, Any]:
    """Raw training settings with two things put in, where they are not given.

    A validation set that is null is left out, so that a file can drop one of those it extends.

    - ``model``, with ``init_from``: the folder's own settings, unless ``model.preset`` chooses
      others; single values beside them win.
    - a COCO-style validation set's ``annotations``, with ``images``: those of the training set.

    Args:
        stored: gives the model settings of the folder that ``init_from`` names.
    """
    values = dict(raw)
    source, model = values.get("init_from"), values.get("model")
    is_open = model is None or (isinstance(model, Mapping) and model.get("preset") is None)
    if isinstance(source, str) and is_open:
        # Its weights are in the folder, or found through it.
        start = merge(stored(source), {"image_encoder": {"checkpoint": None}})
        values["model"] = merge(start, model or {})
    train, val = values.get("train"), values.get("val")
    if isinstance(train, Mapping) and isinstance(val, Mapping) and train.get("dataset") == "coco":
        same = {key: train[key] for key in ("annotations", "images") if key in train}
        values["val"] = val = {name: _with(data, same) for name, data in val.items()}
    if isinstance(val, Mapping):
        values["val"] = {name: data for name, data in val.items() if data is not None}
    return values


def _with(data: Any, same: Mapping[str, Any]) -> Any:
    if not isinstance(data, Mapping) or data.get("dataset") != "coco" or data.get("annotations"):
        return data
    return {**same, **{key: value for key, value in data.items() if value is not None}}


def load_settings(
    path: Path, overrides: Sequence[str] = (), *, stored: StoredSettings
) -> TrainSettings:
    """Reads a YAML file and what it extends, applies ``a.b.c=value`` overrides, and checks it all.

    Args:
        stored: as in :func:`complete`, such as :func:`risam_cli.weights.folder.stored_settings`.

    Raises:
        ConfigError: naming file, key, value and what it could have been. What ``stored`` raises.
    """
    raw = read_settings_file(path)
    for override in overrides:
        raw = apply_override(raw, override)
    return check(TrainSettings, complete(raw, stored), str(path), overrides)
