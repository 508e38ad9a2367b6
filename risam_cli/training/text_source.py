"""The text encoder of a run whose settings leave it open (``model.text_encoder.source: auto``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from risam_cli.console.console import Console
from risam_cli.errors import ModelError
from risam_cli.segmenters.hub import fetch
from risam_cli.settings.model import AUTO_SOURCE, PRETRAINED_TEXT
from risam_cli.settings.train import TrainSettings


def with_text_source(
    settings: TrainSettings, resolved: Path | None, console: Console
) -> TrainSettings:
    """The settings with a text encoder: what a run that goes on has; else a pretrained one from the
    cache or the hub; else one that learns the words of the training expressions.

    Args:
        resolved: the settings of the run that goes on; None of a new one.
    """
    if settings.model.text_encoder.source != AUTO_SOURCE:
        return settings
    if resolved is not None and (earlier := _of_run(resolved)) is not None:
        return _changed(settings, earlier)
    try:
        fetch(PRETRAINED_TEXT)
    except ModelError as error:
        console.warn(
            f"text encoder: {error.message}; instead, a new one learns the words of the "
            "training expressions from scratch"
        )
        return _changed(settings, {"source": None, "vocabulary": "data", "lora": None})
    return _changed(settings, {"source": PRETRAINED_TEXT})


def _of_run(resolved: Path) -> dict[str, Any] | None:
    """What a run that goes on has chosen; None where its settings cannot be read or differ."""
    try:
        chosen = yaml.safe_load(resolved.read_text(encoding="utf-8"))["model"]["text_encoder"]
        return {key: chosen.get(key) for key in ("source", "vocabulary", "lora")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _changed(settings: TrainSettings, changes: dict[str, Any]) -> TrainSettings:
    raw = settings.model_dump(mode="json")
    raw["model"]["text_encoder"] |= changes
    return TrainSettings.model_validate(raw)
