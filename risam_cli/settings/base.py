"""The base of all settings, and those of the training loop; see :mod:`risam_cli.settings.train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


TAG = "dataset"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested update: values of ``over`` win, sections are merged.

    Data of another ``dataset`` takes the place of the old as a whole: its keys are others.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            same = value.get(TAG, old.get(TAG)) == old.get(TAG)
            merged[key] = merge(old, value) if same else value
        else:
            merged[key] = value
    return merged


Positive = Field(gt=0)
