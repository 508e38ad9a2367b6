"""Where a training run stands: moving average, checkpoint file, place in the data."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from risam_cli.checkpoints import write_atomic
from risam_cli.errors import ModelError


class MovingAverage:
    """Exponential moving average of a module's trained parameters.

    Its decay starts low, (1 + n) / (10 + n) after n updates, so that early noise is forgotten.

    Args:
        module: its parameters that require gradients are averaged; decay: in 0..1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the parameters' present values in."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.average.values()), [p.data for p in self.live.values()], 1 - decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the module's values with the averaged ones; a second call undoes it."""
        for name, parameter in self.live.items():
            held = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(held)


class PlannedBatches:
    """Batches of dataset indices for the steps of a stage: a pure function of seed and step.

    Every epoch is its own permutation, and epochs run on without a short batch between, so
    that a resumed run sees the very batches that an unbroken one would have seen.

    Args:
        items: length of the data set; batch: indices of a step; first, last: steps [first, last).
    """

    def __init__(self, items: int, batch: int, first: int, last: int, seed: int) -> None:
        self.items = items
        self.batch = batch
        self.first = first
        self.last = last
        self.seed = seed

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.first, self.last):
            chosen = []
            for place in range(step * self.batch, (step + 1) * self.batch):
                if place // self.items != epoch:
                    epoch = place // self.items
                    generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
                    order = torch.randperm(self.items, generator=generator)
                chosen.append(int(order[place % self.items]))
            yield chosen


@dataclass
class Place:
    """Where a run stands: stage number, steps done in it, and what was best so far."""

    stage: int = 0
    step: int = 0
    best: float = -1.0
    seconds: float = 0.0
    expressions: int = 0


def stage_of_weights(place: Place) -> int:
    """The last stage that has borne on the weights: at a stage's start, the one before."""
    return place.stage - 1 if place.stage and not place.step else place.stage


def save_state(
    path: Path,
    place: Place,
    settings_hash: str,
    module: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: MovingAverage | None,
) -> None:
    """Writes all that a resumed run needs; an older checkpoint survives a failure.

    Raises:
        OutputError: where it cannot be written.
    """
    state: dict[str, Any] = {
        "format": 1,
        "place": vars(place).copy(),
        "settings_hash": settings_hash,
        "model": model.state_dict(),
        "module": module.state_dict() if module is not model else {},
        "optimizer": optimizer.state_dict() if optimizer else {},
        "average": average.average if average else {},
        "updates": average.updates if average else 0,
    }
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def read_state(path: Path, hashes: Sequence[str]) -> dict[str, Any]:
    """Reads a checkpoint of the same settings; runs no code that it may hold.

    Args:
        hashes: of the settings up to and with each stage. Stages that had not begun may have
            changed since, or been added.

    Raises:
        ModelError: a damaged file, or one of other settings.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"checkpoint {path} cannot be read: {reason}", "start without --resume"
        ) from error
    if not isinstance(state, dict) or state.get("format") != 1:
        raise ModelError(f"{path} is no checkpoint of risam train", "start without --resume")
    place = Place(**state["place"])
    # At a stage's start, either side of the border is the same state.
    fitting = {hashes[n] for n in (stage_of_weights(place), place.stage) if n < len(hashes)}
    if state["settings_hash"] not in fitting:
        raise ModelError(
            f"checkpoint {path} belongs to other settings",
            "resume with the settings it was started with (config.resolved.yaml), or choose "
            "another output folder",
        )
    return state


def restore(
    state: dict[str, Any],
    module: nn.Module,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
) -> None:
    """Puts a checkpoint's values back in place."""
    model.load_state_dict(state["model"])
    if state["module"]:
        module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        average.updates = state["updates"]
        with torch.no_grad():
            for name, value in state["average"].items():
                average.average[name].copy_(value)
