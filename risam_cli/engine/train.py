"""The training loop: stages, checkpoints, validation; every run resumes where it was cut."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import nn
from torch.utils.data import DataLoader

from risam_cli.console import Console
from risam_cli.engine.tasks import Task
from risam_cli.engine.training_state import (
    MovingAverage,
    Place,
    PlannedBatches,
    read_state,
    restore,
    save_state,
    stage_of_weights,
)
from risam_cli.errors import RisamError

LAST = "last.pt"


@dataclass(frozen=True)
class Stage:
    """One stage, finished by the builder: what to train, on what, and how long.

    Attributes:
        groups: AdamW's parameter groups, each with its ``base_lr``.
        data: indexable examples; collate: makes a batch of them.
        validate: gives figures of the present weights, the one to maximize under ``best``.
    """

    name: str
    task: Task
    groups: list[dict[str, Any]]
    data: Any
    collate: Callable[[Any], Any]
    steps: int
    images_per_step: int
    warmup: int
    validate: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class LoopSettings:
    """What all stages share; see :class:`risam_cli.config.TrainSettings`."""

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


class TrainingRun:
    """Trains a model through its stages.

    Args:
        folder: output folder; ``checkpoints/`` and ``metrics.jsonl`` go there.
        model: the network, on its device.
        hashes: of the settings up to and with each stage; a checkpoint of others is refused.
        save_best: called with the moving average in the model whenever it is the best so far.

    Raises:
        RisamError: a loss that is not finite, or a checkpoint that does not fit.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        loop: LoopSettings,
        hashes: Sequence[str],
        save_best: Callable[[Stage, dict[str, float], Place], None],
        console: Console,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.model = model
        self.loop = loop
        self.hashes = hashes
        self.save_best = save_best
        self.console = console
        self.place = Place()
        self.state: dict[str, Any] | None = None
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        self.board = SummaryWriter(str(folder / "tensorboard"))
        self.checkpoint = folder / "checkpoints" / LAST

    def resume(self) -> None:
        """Takes up the last checkpoint, if there is one."""
        if self.checkpoint.is_file():
            self.state = read_state(self.checkpoint, self.hashes)
            self.place = Place(**self.state["place"])
            self.console.info(f"resuming at stage {self.place.stage + 1}, step {self.place.step}")
        _drop_rows_after(self.folder / "metrics.jsonl", self.place)

    def run(self, stages: Sequence[Callable[[], Stage]]) -> None:
        """Runs all stages that are not yet done; each is built when its turn comes."""
        with closing(self.board):
            for number, build in enumerate(stages):
                if number >= self.place.stage:
                    self._run_stage(number, build())

    def _run_stage(self, number: int, stage: Stage) -> None:
        module = stage.task.module
        module.train()
        optimizer = torch.optim.AdamW(stage.groups, betas=(0.9, self.loop.beta2))
        if self.state is not None and self.place.step == 0:
            self.model.load_state_dict(self.state["model"])
            self.state = None
        average = MovingAverage(module, self.loop.ema_decay) if self.loop.ema_decay else None
        if self.state is not None:
            restore(self.state, module, self.model, optimizer, average)
            self.state = None
        self._steps(number, stage, optimizer, average)
        if average is not None:
            average.swap()  # The next stage goes on from the average.
        seconds, expressions = self.place.seconds, self.place.expressions
        self.place = Place(number + 1, 0, self.place.best, seconds, expressions)
        # A run cut in the next stage's first steps finds the finished stage here.
        self._save(self.model, None, None)

    def _steps(
        self,
        number: int,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        average: MovingAverage | None,
    ) -> None:
        batches = self._batches(number, stage)
        begun = time.monotonic() - self.place.seconds
        recent: dict[str, float] = {}
        with self.console.progress(
            f"stage {stage.name}", stage.steps, "steps", self.place.step
        ) as progress:
            for batch in batches:
                step = self.place.step
                rate = learning_rate(step, stage.steps, stage.warmup)
                figures = self._step(stage, batch, optimizer, rate, number)
                if average is not None:
                    average.update()
                self.place.step = step + 1
                self.place.seconds = time.monotonic() - begun
                self.place.expressions += stage.task.expressions(batch)
                if self.place.step % self.loop.log_every == 0:
                    recent = {name: float(value) for name, value in figures.items()}
                    self._log(stage, {**recent, "lr": rate}, "train")
                progress.advance(1, **{k: f"{v:.3f}" for k, v in recent.items()})
                done = self.place.step == stage.steps
                if done or self.place.step % self.loop.validate_every == 0:
                    self._validate(stage, average)
                if done or self.place.step % self.loop.checkpoint_every == 0:
                    self._save(stage.task.module, optimizer, average)

    def _step(
        self,
        stage: Stage,
        batch: Any,
        optimizer: torch.optim.Optimizer,
        rate: float,
        number: int,
    ) -> dict[str, torch.Tensor]:
        # Each step has its own seed, so that a resumed run needs no random state.
        torch.manual_seed(self.loop.seed * 1_000_003 + number * 100_003 + self.place.step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        bfloat = self.loop.dtype == torch.bfloat16
        with torch.autocast(self.loop.device.type, torch.bfloat16, enabled=bfloat):
            loss, figures = stage.task.loss(to_device(batch, self.loop.device))
        self._check_finite("loss", loss, stage)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, self.loop.clip_norm)
        # One bad gradient would spoil the weights, and a checkpoint of them, before any loss shows.
        self._check_finite("gradient", norm, stage)
        optimizer.step()
        return {"loss": loss.detach(), **figures}

    def _check_finite(self, what: str, value: torch.Tensor, stage: Stage) -> None:
        if torch.isfinite(value):
            return
        kept = f"; the last good checkpoint is {self.checkpoint}" * self.checkpoint.is_file()
        raise RisamError(
            f"{what} is {value.item()} at stage {stage.name!r}, step {self.place.step}",
            f"lower the learning rate{kept}",
        )

    def _batches(self, number: int, stage: Stage) -> Iterator[Any]:
        plan = PlannedBatches(
            len(stage.data),
            stage.images_per_step,
            self.place.step,
            stage.steps,
            self.loop.seed * 1009 + number,
        )
        workers = self.loop.workers
        return iter(
            DataLoader(
                stage.data,
                batch_sampler=plan,
                collate_fn=stage.collate,
                num_workers=workers,
                worker_init_fn=_begin_worker,
                prefetch_factor=4 if workers else None,
                pin_memory=self.loop.device.type == "cuda",
            )
        )

    def _validate(self, stage: Stage, average: MovingAverage | None) -> None:
        if average is not None:
            average.swap()
        try:
            bfloat = self.loop.dtype == torch.bfloat16
            with torch.autocast(self.loop.device.type, torch.bfloat16, enabled=bfloat):
                figures = stage.validate()
            self._log(stage, figures, "val")
            shown = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
            self.console.info(f"stage {stage.name}, step {self.place.step}: {shown}")
            if figures["best"] > self.place.best:
                self.place.best = figures["best"]
                self.save_best(stage, figures, self.place)
        finally:
            if average is not None:
                average.swap()

    def _save(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        average: MovingAverage | None,
    ) -> None:
        save_state(
            self.checkpoint,
            self.place,
            self.hashes[stage_of_weights(self.place)],
            module,
            self.model,
            optimizer,
            average,
        )

    def _log(self, stage: Stage, figures: dict[str, float], kind: str) -> None:
        row = {
            "kind": kind,
            "stage": self.place.stage,
            "name": stage.name,
            "step": self.place.step,
            "seconds": round(self.place.seconds, 1),
            "expressions": self.place.expressions,
            **{name: None if math.isnan(v) else round(v, 6) for name, v in figures.items()},
        }
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(f"{stage.name}/{kind}/{name}", value, self.place.step)


def _begin_worker(number: int) -> None:
    """Leaves signals to the main process, which ends the workers, and cores to the network."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Factor of the base rate: linear warm-up, then a cosine down to 1 %."""
    if step < warmup:
        return (step + 1) / warmup
    part = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * part))


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on a device."""
    if device.type == "cpu":
        return batch
    moved = {name: value.to(device, non_blocking=True) for name, value in vars(batch).items()}
    return type(batch)(**moved)


def hash_settings(values: Any) -> str:
    """SHA-256 of plain settings values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _drop_rows_after(path: Path, place: Place) -> None:
    """Removes log rows that a cut run wrote after its last checkpoint."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # A torn last line.
        if (row["stage"], row["step"]) <= (place.stage, place.step):
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
