"""What settings leave out because something else says it already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from risam_cli.settings.base import merge
from risam_cli.settings.load import apply_override, check, read_settings_file
from risam_cli.settings.train import TrainSettings
from risam_cli.weights import folder as model_folders


def complete(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Raw training settings with two things put in, where they are not given.

    A validation set that is null is left out, so that a file can drop one of those it extends.

    - ``model``, with ``init_from``: the folder's own settings, unless ``model.preset`` chooses
      others; single values beside them win.
    - a COCO-style validation set's ``annotations``, with ``images``: those of the training set.

    Raises:
        ModelError: ``init_from`` names no model folder, or one that cannot be read.
    """
    values = dict(raw)
    source, model = values.get("init_from"), values.get("model")
    if isinstance(source, str) and (model is None or _leaves_the_network_open(model)):
        stored = model_folders.read_model_folder(model_folders.find_model(source)).settings
        # Its weights are in the folder, or found through it.
        start = merge(stored, {"image_encoder": {"checkpoint": None}})
        values["model"] = merge(start, model or {})
    train, val = values.get("train"), values.get("val")
    if isinstance(train, Mapping) and isinstance(val, Mapping) and train.get("dataset") == "coco":
        same = {key: train[key] for key in ("annotations", "images") if key in train}
        values["val"] = val = {name: _with(data, same) for name, data in val.items()}
    if isinstance(val, Mapping):
        values["val"] = {name: data for name, data in val.items() if data is not None}
    return values


def _leaves_the_network_open(model: Any) -> bool:
    return isinstance(model, Mapping) and model.get("preset") is None


def _with(data: Any, same: Mapping[str, Any]) -> Any:
    if not isinstance(data, Mapping) or data.get("dataset") != "coco" or data.get("annotations"):
        return data
    return {**same, **{key: value for key, value in data.items() if value is not None}}


def load_settings(path: Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """Reads a YAML file and what it extends, applies ``a.b.c=value`` overrides, and checks it all.

    Raises:
        ConfigError: naming file, key, value and what it could have been.
    """
    raw = read_settings_file(path)
    for override in overrides:
        raw = apply_override(raw, override)
    return check(TrainSettings, complete(raw), str(path))
