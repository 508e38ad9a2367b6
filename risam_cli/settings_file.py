"""YAML files of settings to plain values; one file may extend another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from risam_cli.errors import ConfigError
from risam_cli.files.jsonlines import read_text
from risam_cli.files.safe_yaml import load_yaml

EXTENDS = "extends"
TAG = "dataset"
_LONGEST = 16 << 20  # bytes


def read_settings_file(path: Path) -> dict[str, Any]:
    """Reads a YAML file; its ``extends: OTHER.yaml`` (beside it) gives what it does not set.

    Raises:
        ConfigError: a file that cannot be read or is no table of settings, or a ring of files.
    """
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    values = _values(path)
    if EXTENDS not in values:
        return values
    base = values.pop(EXTENDS)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends = {base!r} is no file name", "name one YAML file")
    seen = (*above, path.resolve())
    other = path.parent / base
    if other.resolve() in seen:
        raise ConfigError(
            f"{path}: extends = {base!r} comes back to a file that extends it", "break the ring"
        )
    return merge(_read(other, seen), values)


def _values(path: Path) -> dict[str, Any]:
    try:
        raw = load_yaml(read_text(path, _LONGEST))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", "give the path of a YAML file"
        ) from error
    except ValueError as error:  # not UTF-8, or what load_yaml says
        raise ConfigError(f"{path} is not YAML: {error}", "mend the file") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no settings at its top level", "write 'key: value' lines")
    return raw


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
