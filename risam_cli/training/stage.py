"""What a training run is made of: its stages, and what they share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from risam_cli.training.checkpoint import Place
from risam_cli.training.log import Example
from risam_cli.training.optimize import Schedule
from risam_cli.training.tasks import Task


@dataclass(frozen=True)
class Stage:
    """One stage, finished by the builder: what to train, on what, and how long.

    Attributes:
        groups: AdamW's parameter groups, each with its ``base_lr``.
        data: examples, by epoch too (see :class:`risam_cli.training.batches.PlannedBatches`).
            Where it has them, ``expressions_of(index)`` evens out the processes, and
            ``name_of(index)`` names an example in messages.
        collate: makes a batch of examples.
        accumulate: parts that a step's images go through the network in.
        validate: gives figures of the present weights, ``best`` to maximize, ``watched`` for early
            stopping; raises what ``stopping`` raises, which it calls between its batches.
        draw: the fixed validation examples as they are answered now.
        answers: whether the network can answer expressions after this stage, so that it is worth
            a model folder.
    """

    name: str
    task: Task
    groups: list[dict[str, Any]]
    data: Any
    collate: Callable[[Any], Any]
    steps: int
    images_per_step: int
    warmup: int
    validate: Callable[[Callable[[], None]], dict[str, float]]
    accumulate: int = 1
    draw: Callable[[], list[Example]] = list
    answers: bool = True


@dataclass(frozen=True)
class LoopSettings:
    """What all stages share; see :class:`risam_cli.settings.train.TrainSettings`.

    Attributes:
        patience: validations in a row without ``min_delta`` more that end a stage; None: none do.
        averaged: how many validated weights are averaged at the end, 0 for none; average_of:
            "best" or "last".
    """

    seed: int
    device: torch.device
    dtype: torch.dtype
    workers: int
    beta2: float
    clip_norm: float
    ema_decay: float
    validate_every: int
    checkpoint_every: int
    log_every: int
    schedule: Schedule = field(default_factory=Schedule)
    patience: int | None = None
    min_delta: float = 0.0
    averaged: int = 0
    average_of: str = "best"
    keep_last: int = 1


SaveModel = Callable[[str, Stage, Mapping[str, float], Place, Sequence[int]], None]
"""Writes a model folder: its name, and the steps whose weights are averaged in it, if they are."""


def hash_settings(values: Any) -> str:
    """SHA-256 of plain settings values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
