"""The base of all settings, and those of the training loop; see :mod:`risam_cli.config`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from risam_cli.files.sizes import parse_size


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerSettings(Settings):
    """AdamW, its rate over the steps, and what keeps it steady."""

    weight_decay: float = Field(
        0.02, ge=0, description="of matrices; norms, biases, embeddings and position tables have 0"
    )
    beta2: float = Field(0.99, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0, description="the gradient's norm is cut to this")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="0 keeps no moving average")
    schedule: Literal["cosine", "polynomial", "constant"] = Field(
        "cosine", description="how the rate comes down after the warm-up"
    )
    power: float = Field(0.9, gt=0, description="of the polynomial schedule")
    floor: float = Field(0.01, ge=0, le=1, description="part of the rate that is left at the end")


class EarlyStoppingSettings(Settings):
    """Ends a stage that has stopped getting better."""

    patience: int = Field(gt=0, description="validations in a row that may bring nothing")
    figure: str | None = Field(None, description="the figure to watch; by default best_by")
    min_delta: float = Field(0.0, ge=0, description="less than this more is nothing")


class AveragingSettings(Settings):
    """At the end, the mean of several validated weights of the last stage becomes a model too."""

    count: int = Field(gt=1, description="how many are averaged")
    of: Literal["best", "last"] = Field("best", description="which: by best_by, or the newest")


class FeatureCacheSettings(Settings):
    """Keeps the frozen image encoder's features on disk, for all epochs, runs and commands."""

    folder: str = Field(description="may be shared with other runs, and with predict and eval")
    limit: str = Field("50GB", description="how large the folder may get")

    @field_validator("limit")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_size(value)
        return value
