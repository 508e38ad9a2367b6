"""Raw values to settings; what does not fit is told in one line."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from risam_cli.errors import ConfigError
from risam_cli.files.jsonlines import brief
from risam_cli.settings import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)


def check(kind: type[AnySettings], raw: Any, where: str) -> AnySettings:
    """Makes settings of ``raw``.

    Raises:
        ConfigError: one line naming place, key, value, and near or possible names.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(*_explain(error, kind, where)) from error


def _explain(error: ValidationError, kind: type[Settings], where: str) -> tuple[str, str]:
    problems = error.errors()
    first = problems[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        message = f"{where}: unknown key {key!r}"
    elif first["type"] == "missing":
        message, hint = f"{where}: key {key!r} is missing", "add it"
    else:
        text = first["msg"].removeprefix("Value error, ")
        # What concerns several keys names them itself.
        message = f"{where}: {key} = {brief(first['input'])}: {text}" if key else f"{where}: {text}"
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
