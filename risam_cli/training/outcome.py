"""What a training says of its best model at its end, beside the figure that it was chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from risam_cli.errors import ModelError
from risam_cli.metrics.figures import DEGENERATE, MOSTLY_NOTHING
from risam_cli.settings.train import TrainSettings
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
