"""YAML and overrides to plain values, merged where one file extends another, and checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from risam_cli.errors import ConfigError, DataError, reason_of, setting
from risam_cli.files.jsonlines import brief, read_text
from risam_cli.files.safe_yaml import load_yaml
from risam_cli.settings.base import OddValue, Settings

EXTENDS = "extends"
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
        raise ConfigError(f"{path}: extends = {base!r} is not a file name", "name one YAML file")
    seen = (*above, path.resolve())
    other = path.parent / base
    if other.resolve() in seen:
        raise ConfigError(
            f"{path}: extends = {base!r} leads back to a file that extends it", "break the cycle"
        )
    return merge(_read(other, seen), values)


def _values(path: Path) -> dict[str, Any]:
    try:
        raw = load_yaml(read_text(path, _LONGEST), unique=True)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {reason_of(error)}", "give the path of a YAML file"
        ) from error
    except DataError as error:  # packed or encoded in a way that its first bytes belie
        raise ConfigError(error.message, error.fix) from error
    except ValueError as error:  # not UTF-8, or what load_yaml says
        raise ConfigError(f"{path} is not YAML: {error}", "fix the file") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no settings at its top level", "write 'key: value' lines")
    return raw


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


AnySettings = TypeVar("AnySettings", bound=Settings)


def check(
    kind: type[AnySettings], raw: Any, where: str, overrides: Sequence[str] = ()
) -> AnySettings:
    """Makes settings of ``raw``.

    Args:
        where: the file that a message names; overrides: KEY=VALUE pairs that were set on top of it.

    Raises:
        ConfigError: one line naming place, key, value, and near or possible names.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(*_explain(error, kind, where, overrides)) from error


def _explain(
    error: ValidationError, kind: type[Settings], where: str, overrides: Sequence[str]
) -> tuple[str, str]:
    every = error.errors()
    # A list is also said to be too short where an item of it is wrong.
    problems = [p for p in every if not any(_is_below(q["loc"], p["loc"]) for q in every)]
    # A misspelt key is also one that is missing under its right name: the former tells more.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = [str(part) for part in first["loc"]]
    odd = first.get("ctx", {}).get("error")
    if isinstance(odd, OddValue):
        path.append(odd.key)
    key = ".".join(_as_written(kind, path))
    for override in overrides:
        name = override.partition("=")[0]
        if fnmatchcase(f"{key}.", f"{name}.*") or (
            first["type"] == "extra_forbidden" and name.startswith(f"{key}.")
        ):
            where = setting("set", brief(override))
    if first["type"] == "extra_forbidden":
        kinds = _kinds_at(kind, path[:-1])
        known = list(dict.fromkeys(name for one in kinds for name in one.model_fields))
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        meant = (*first["loc"][:-1], near[0]) if near else ()
        problems = [p for p in problems if p["type"] != "missing" or p["loc"] != meant]
        message = f"{where}: unknown key {brief(key)}"
    elif first["type"] == "missing":
        message, hint = f"{where}: key {key!r} is missing", "add it"
    else:
        text = first["msg"].removeprefix("Value error, ")
        value = odd.value if isinstance(odd, OddValue) else brief(first["input"])
        # What concerns several keys names them itself.
        message = f"{where}: {key} = {value}: {text}" if key else f"{where}: {text}"
        hint = f"see risam train, {setting('print_config')}, for the keys and their values"
    more = len(problems) - 1
    return message + (f" (and {more} more)" if more else ""), hint


def _is_below(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _as_written(kind: type[Settings], path: list[str]) -> list[str]:
    """The path without the tags of unions, which pydantic puts in."""
    written: list[str] = []
    for number, part in enumerate(path):
        kinds = _kinds_at(kind, path[:number])
        if len(kinds) == 1 or not any(part in _tags(one) for one in kinds):
            written.append(part)
    return written


def _kinds_at(kind: type[Settings], path: list[str]) -> list[type[Settings]]:
    candidates = [kind]
    for part in path:
        held = [c.model_fields[part].annotation for c in candidates if part in c.model_fields]
        if held:
            candidates = [found for annotation in held for found in _nested(annotation)]
        else:  # A list index, a name in a table, or a union's tag, which picks one of them.
            candidates = [c for c in candidates if part in _tags(c)] or candidates
    return candidates


def _nested(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for part in get_args(annotation) for found in _nested(part)]


def _tags(kind: type[Settings]) -> list[str]:
    fields = [kind.model_fields.get(name) for name in ("kind", "dataset")]
    return [tag for field in fields if field is not None for tag in get_args(field.annotation)]


def apply_override(values: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Sets one ``a.b.c=value`` in nested settings; the value is read as YAML.

    In a list, a part is the number of an item, or ``*`` for all of them.

    Raises:
        ConfigError: where there is no ``=`` or a part of the key is not a section.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"{setting('set', brief(override))} has no '='",
            f"write {setting('set', 'section.key=value')}",
        )
    try:
        value = load_yaml(text)
    except ValueError as error:
        raise ConfigError(
            f"{setting('set', brief(override))}: value is not YAML", "quote it"
        ) from error
    return _set(values, key.split("."), value, override)


def _set(values: Any, keys: list[str], value: Any, override: str) -> Any:
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if isinstance(values, list) and head == "*":
        return [_set(one, rest, value, override) for one in values]
    if isinstance(values, list) and head.isdecimal() and int(head) < len(values):
        number = int(head)
        return [_set(v, rest, value, override) if i == number else v for i, v in enumerate(values)]
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{setting('set', brief(override))}: {head!r} is not inside a section",
            f"see {setting('print_config')} for keys",
        )
    return {**values, head: _set(values.get(head), rest, value, override)}


def dump(settings: Settings) -> str:
    """The settings as YAML, complete and in order."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
