"""Which settings bear on the weights, stage by stage: what makes a run the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from risam_cli.console.text import first_of
from risam_cli.files.jsonlines import brief
from risam_cli.settings.train import TrainSettings

_OPERATIONAL = {
    "averaging",
    "best_by",
    "checkpoint_every",
    "device",
    "gradient_checkpointing",
    "keep_last",
    "log_every",
    "output",
    "pictures",
    "val",
    "validate_every",
    "workers",
}
_STOPPING = {"best_by", "val", "validate_every"}  # these decide when a stage stops early
_EXPRESSIONS_ONLY = {"expressions_per_scene", "unknown_word_rate"}
_TOLD = 4  # settings that a message names


def stage_hashes(settings: TrainSettings, tokenizer: str = "") -> list[str]:
    """For each stage, a hash of all settings that bear on the weights at its end.

    Later stages may be edited, and a run moved, without losing what is done. Settings at their
    defaults are left out, so that a version with more of them goes on with older checkpoints.

    Args:
        tokenizer: its JSON, which bears on the weights where it is learned from the data.
    """
    learned = hash_settings(tokenizer) if settings.model.text_encoder.learns_words else None
    every = range(len(settings.stages))
    return [hash_settings([*_bearing(settings, number, learned)]) for number in every]


def _bearing(
    settings: TrainSettings, number: int, tokenizer: str | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What bears on the weights at a stage's end: the run's settings, and stages up to it."""
    without = _OPERATIONAL - (_STOPPING if settings.early_stopping is not None else set())
    if settings.train.dataset == "mixed":
        without = without - {"val"}  # a mixture leaves out what this run validates on
    values = settings.model_dump(mode="json", exclude_defaults=True, exclude={*without, "stages"})
    stages = settings.stages[: number + 1]
    done = [
        stage.model_dump(mode="json", exclude_defaults=True, exclude={"accumulate"})
        for stage in stages
    ]
    if tokenizer is not None:
        values["tokenizer"] = tokenizer
    if all(stage.kind == "dense" for stage in stages):
        # Dense stages know nothing of expressions.
        train = {k: v for k, v in values["train"].items() if k not in _EXPRESSIONS_ONLY}
        dense = {**values, "train": train, "loss": None}
        for unknown in ("augment", "feature_cache", "tokenizer"):
            dense.pop(unknown, None)
        return dense, done
    if "feature_cache" in values:
        values["feature_cache"] = "half precision"  # wherever it is
    return values, done


_WHERE = {"annotations", "images", "root"}


def judge_hash(settings: TrainSettings, files: Mapping[str, Sequence[str]]) -> str:
    """A hash of what validations measure: figures under different ones are not comparable.

    Where the data lie is left out.

    Args:
        files: SHA-256 of the annotation files, by validation set.
    """
    sets = {
        name: data.model_dump(mode="json", exclude_defaults=True, exclude=_WHERE)
        for name, data in settings.val.items()
    }
    return hash_settings([settings.best_by, sets, *([files] if files else [])])


def settings_that_differ(was: TrainSettings, now: TrainSettings, number: int) -> str:
    """The settings that bear on the weights at a stage's end and are no longer what they were.

    Args:
        number: of the stage, from 0.

    Returns:
        "KEY was VALUE and is VALUE" for each, of many for some; empty where there is none.
    """
    if number >= len(now.stages):
        return f"stages were {number + 1} at least and are {len(now.stages)}"
    old, new = (dict(_flat(_as_written(one, number))) for one in (was, now))
    full = [dict(_flat(one.model_dump(mode="json"))) for one in (was, now)]
    told = []
    for key in dict.fromkeys([*old, *new]):
        before, after = (_value(one, key) for one in full)
        if old.get(key) != new.get(key) and before != after:
            told.append(f"{key} was {before} and is {after}")
    return first_of(told, _TOLD)


def _as_written(settings: TrainSettings, number: int) -> dict[str, Any]:
    values, done = _bearing(settings, number)
    return {**values, "stages": done}


def _flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Single values by their dotted keys."""
    inner: Mapping[Any, Any] | None = values if isinstance(values, Mapping) else None
    if isinstance(values, Sequence) and any(isinstance(one, Mapping) for one in values):
        inner = dict(enumerate(values))
    if inner is None:
        yield key, values
        return
    for name, value in inner.items():
        yield from _flat(value, f"{key}.{name}" if key else str(name))


def _value(flat: Mapping[str, Any], key: str) -> str:
    if key in flat:
        return "not set" if flat[key] is None else brief(flat[key])
    return "set" if any(name.startswith(f"{key}.") for name in flat) else "not set"


def hash_settings(values: Any) -> str:
    """SHA-256 of plain settings values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
