"""What a training says of its settings at its start, and of its best model at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from risam_cli.console.text import counted
from risam_cli.errors import ModelError
from risam_cli.metrics.figures import DEGENERATE, MOSTLY_NOTHING
from risam_cli.settings.data import MixedData, RefShapesData
from risam_cli.settings.train import ReferringStage, StageSettings, TrainSettings
from risam_cli.weights.folder import read_card

NAMES = {"miou": "mIoU", "oiou": "oIoU", "n_acc": "N-acc", "t_acc": "T-acc"}

Figures = Mapping[str, object]
"""As ``SET.figure``, each a fraction."""


def figures_of(model: Path) -> Figures:
    """The figures on a model's card; none where someone changed it since it was written."""
    try:
        figures = read_card(model).get("figures")
    except ModelError:
        return {}
    return figures if isinstance(figures, dict) else {}


def doubts_about(settings: TrainSettings) -> Iterator[str]:
    """What the settings ask for that has no effect, or that can only harm the training."""
    size = settings.model.image_encoder.image_size
    if settings.loss.target_size > size:
        yield (
            f"loss.target_size {settings.loss.target_size} is more than "
            f"model.image_encoder.image_size {size}: it takes memory and adds no detail"
        )
    for stage in settings.stages:
        yield from _doubts_about_stage(settings, stage)
    early = settings.early_stopping
    most = max(-(-stage.steps // settings.validate_every) for stage in settings.stages)
    if early is not None and early.patience >= most:
        yield (
            f"early_stopping ends no stage before its last step: its patience is {early.patience}, "
            f"and no stage has more than {counted(most, 'validation')} (validate_every "
            f"{settings.validate_every})"
        )
    train = settings.train
    members = train.members.values() if isinstance(train, MixedData) else [train]
    drawn = [_scenes(one) for one in members if isinstance(one, RefShapesData)]
    for name, data in settings.val.items():
        if isinstance(data, RefShapesData) and _scenes(data) in drawn:
            yield (
                f"train draws the scenes that val.{name} asks about, so its figures are inflated: "
                "give one of them another split or seed"
            )


def _scenes(data: RefShapesData) -> tuple[object, ...]:
    wide = data.variety == "wide" or data.split == "testC"
    return data.family, data.split, data.seed, wide


def _doubts_about_stage(settings: TrainSettings, stage: StageSettings) -> Iterator[str]:
    if stage.warmup >= stage.steps:
        yield (
            f"stage {stage.name!r}: its warmup of {counted(stage.warmup, 'step')} takes all of its "
            f"{counted(stage.steps, 'step')}, so the learning rate only rises, to "
            f"{stage.steps / stage.warmup:.0%} of what is set"
        )
    rates = {"learning_rate": stage.learning_rate}
    if isinstance(stage, ReferringStage):
        rate = stage.encoder_learning_rate
        if rate is not None and stage.train_encoder == "no":
            yield (
                f"stage {stage.name!r}: encoder_learning_rate has no effect with train_encoder: no"
            )
        text = stage.text_learning_rate
        if text is not None and not settings.model.text_encoder.trainable:
            yield (
                f"stage {stage.name!r}: text_learning_rate has no effect with "
                "model.text_encoder.trainable: false"
            )
        rates |= {"encoder_learning_rate": rate or 0.0, "text_learning_rate": text or 0.0}
    for key, value in rates.items():
        if value >= 1:
            yield (
                f"stage {stage.name!r}: {key} is {value:g}, and a step may move every weight by as "
                "much; 1e-5 to 1e-3 is usual"
            )


def shown(settings: TrainSettings, figures: Figures) -> str:
    """The foremost figures in brackets, each the mean over the validation sets that have it."""
    parts = []
    for key, name in NAMES.items():
        values = _by_set(settings, figures, key).values()
        if values:
            parts.append(f"{name} {sum(values) / len(values):.3f}")
    several = f", means of {len(settings.val)} sets" if len(settings.val) > 1 else ""
    return f" ({', '.join(parts)}{several})" if parts else ""


def warnings_of(settings: TrainSettings, figures: Figures) -> Iterator[str]:
    """What the figure that best/ goes by may hide: answers that are mostly, or never, "nothing"."""
    nothing = {k: v for k, v in _by_set(settings, figures, "t_acc").items() if v < MOSTLY_NOTHING}
    never = {k: v for k, v in _by_set(settings, figures, "n_acc").items() if v <= DEGENERATE}
    best_by = settings.best_by
    if nothing:
        most = "nearly all" if max(nothing.values()) <= DEGENERATE else "most"
        why = ""
        if best_by.rpartition(".")[2] in ("miou", "giou"):
            why = f"; {NAMES.get(best_by, best_by)} counts a correct 'nothing' as 1"
        yield (
            f"the best model by {best_by} answers 'nothing' to {most} expressions that have a "
            f"target in {_told(nothing, 'T-acc')}{why}: {_advice(best_by, 'oiou')}"
        )
    if never:
        yield (
            f"the best model by {best_by} answers hardly any expression that has no target with "
            f"'nothing' in {_told(never, 'N-acc')}: {_advice(best_by, 'n_acc')}"
        )


def _by_set(settings: TrainSettings, figures: Figures, key: str) -> dict[str, float]:
    """A figure by the names of the sets that have it."""
    values = {name: figures.get(f"{name}.{key}") for name in settings.val}
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _told(sets: Mapping[str, float], name: str) -> str:
    return ", ".join(f"{one} ({name} {value:.3f})" for one, value in sets.items())


def _advice(best_by: str, other: str) -> str:
    more = "" if best_by.rpartition(".")[2] == other else f", or set best_by to {other}"
    return f"train longer{more}"
