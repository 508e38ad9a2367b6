"""The base of all settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Positive = Field(gt=0)
