"""The training loop: stages, checkpoints, validation; every run resumes where it was cut."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from risam_cli.console.console import Console, Progress
from risam_cli.errors import ConfigError, Interrupted, RisamError
from risam_cli.interrupts import StopRequest
from risam_cli.model.risam import Risam
from risam_cli.training.averaging import KeptWeights, weights_in
from risam_cli.training.batches import DealtBatches, PlannedBatches, begin_worker
from risam_cli.training.checkpoint import (
    Checkpoints,
    MovingAverage,
    Place,
    Untrained,
    read_state,
    restore,
    stage_of_weights,
)
from risam_cli.training.distributed import Processes
from risam_cli.training.log import TrainingLog
from risam_cli.training.optimize import NotFinite, Stepper, autocast
from risam_cli.training.stage import LoopSettings, SaveModel, Stage

_NAMED = 8  # images of a bad batch that a message names


class TrainingRun:
    """Trains a model through its stages.

    Args:
        folder: output folder; ``checkpoints/`` and ``metrics.jsonl`` go there.
        model: the network, on its device.
        hashes: of the settings up to and with each stage; a checkpoint of others is refused.
        save_model: writes a model folder of that name with the network as it is: ``best``
            whenever the validated weights are the best so far, ``averaged`` at the end.
        processes: of which this is one; the first one writes.

    Raises:
        RisamError: a loss that is not finite, or a checkpoint that does not fit.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """

    def __init__(
        self,
        folder: Path,
        model: Risam,
        loop: LoopSettings,
        hashes: Sequence[str],
        save_model: SaveModel,
        console: Console,
        processes: Processes | None = None,
    ) -> None:
        self.folder = folder
        self.model = model
        self.loop = loop
        self.hashes = hashes
        self.save_model = save_model
        self.console = console
        self.processes = processes or Processes()
        self.place = Place()
        self.state: dict[str, Any] | None = None
        self.untrained = Untrained(model)
        self.checkpoints = Checkpoints(folder / "checkpoints", loop.keep_last)
        self.kept = KeptWeights(folder / "checkpoints" / "kept", loop.averaged, loop.average_of)
        self.log = TrainingLog(folder, console, silent=not self.processes.leads)
        self.stop = StopRequest()
        self.told = 0.0, 0  # seconds and expressions when the rate was last shown
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Takes up the last checkpoint, if there is one."""
        self.state = self.processes.first(self._read)
        if self.state is not None:
            self.place = Place(**self.state["place"])
            self.console.info(f"resuming at stage {self.place.stage + 1}, step {self.place.step}")
        self.log.drop_rows_after(self.place)

    def _read(self) -> dict[str, Any] | None:
        last = self.checkpoints.last
        return read_state(last, self.hashes) if last.is_file() else None

    def run(self, stages: Sequence[Callable[[], Stage]]) -> None:
        """Runs all stages that are not yet done; each is built when its turn comes."""
        with self.log, self.stop:
            for number, build in enumerate(stages):
                if number >= self.place.stage:
                    self._run_stage(number, build(), last=number == len(stages) - 1)
            if self.loop.averaged and not self.place.averaged:
                self._average(stages[-1]())

    def _run_stage(self, number: int, stage: Stage, *, last: bool) -> None:
        if stage.images_per_step < self.processes.world:
            raise ConfigError(
                f"stage {stage.name!r}: images_per_step {stage.images_per_step} is less than the "
                f"{self.processes.world} processes",
                "start fewer, or take more images",
            )
        if self.state is not None and self.place.step == 0:
            self.untrained.load(self.state["model"], self.state["untrained"])
            self.state = None
        module = stage.task.module
        module.train()
        average = MovingAverage(module, self.loop.ema_decay) if self.loop.ema_decay else None
        stepper = self._stepper(stage, average)
        self.untrained.stage_begins()
        if self.place.step == 0:
            self.place.kept, self.place.averaged = [], False
        self._steps(number, stage, stepper, average, keep=last and bool(self.loop.averaged))
        if average is not None:
            average.swap()  # The next stage goes on from the average.
        p = self.place
        self.place = Place(number + 1, 0, p.best, p.seconds, p.expressions, kept=p.kept)
        # A run cut in the next stage's first steps finds the finished stage here.
        self._save()

    def _stepper(self, stage: Stage, average: MovingAverage | None) -> Stepper:
        """The stage's optimizer, as a run that is resumed within the stage left it."""
        stepper = Stepper(
            stage.task,
            stage.groups,
            self.loop.device,
            self.loop.dtype,
            self.processes,
            beta2=self.loop.beta2,
            clip_norm=self.loop.clip_norm,
        )
        if self.state is not None:
            module, optimizer = stage.task.module, stepper.optimizer
            restore(self.state, module, self.untrained, optimizer, stepper.scaler, average)
            self.state = None
        return stepper

    def _steps(
        self,
        number: int,
        stage: Stage,
        stepper: Stepper,
        average: MovingAverage | None,
        *,
        keep: bool,
    ) -> None:
        place, loop = self.place, self.loop
        self.told = place.seconds, place.expressions
        begun = time.monotonic() - place.seconds
        dealt = self._dealt(number, stage)
        batches = self._batches(dealt, stage)
        per_step = dealt.per_step(stage.images_per_step)
        with self._progress(stage) as progress:
            if self._owes_validation(stage):
                self._validate(stage, stepper, average, keep=keep)
            while place.step < stage.steps and not place.stopped:
                rate = loop.schedule(place.step, stage.steps, stage.warmup)
                # Each step has its own seed, so that a resumed run needs no random state.
                seed = loop.seed * 1_000_003 + number * 100_003 + place.step
                try:
                    figures = stepper(list(islice(batches, per_step)), rate, seed)
                except NotFinite as error:
                    raise self._not_finite(error, number, stage) from error
                if average is not None:
                    average.update()
                place.step += 1
                place.seconds = time.monotonic() - begun
                place.expressions += int(figures.pop("expressions"))
                self._tell(progress, stage, figures, rate)
                stopping = self.processes.any(self.stop.requested)
                if self._owes_validation(stage) and not stopping:
                    self._validate(stage, stepper, average, keep=keep)
                ends = place.step == stage.steps or place.stopped
                if stopping or ends or place.step % loop.checkpoint_every == 0:
                    self._save(stage, stepper, average)
                if stopping:
                    raise self._interrupted()

    def _owes_validation(self, stage: Stage) -> bool:
        step = self.place.step
        due = step == stage.steps or step % self.loop.validate_every == 0
        return due and self.place.validated < step

    def _progress(self, stage: Stage) -> Any:
        return self.console.progress(f"stage {stage.name}", stage.steps, "steps", self.place.step)

    def _tell(
        self, progress: Progress, stage: Stage, figures: Mapping[str, torch.Tensor], rate: float
    ) -> None:
        place = self.place
        if place.step % self.loop.log_every == 0:
            recent = {name: float(value) for name, value in figures.items()}
            self.log.row(place, stage.name, {**recent, "lr": rate}, "train")
            shown: dict[str, Any] = {"loss": f"{recent['loss']:.3f}"}
            then, before = self.told
            if place.seconds > then:
                rate = (place.expressions - before) / (place.seconds - then)
                shown["expressions/s"] = f"{rate:.3g}"
            self.told = place.seconds, place.expressions
            if place.best >= 0:
                shown["best"] = f"{place.best:.4f}"
            progress.update(**shown)
        progress.advance(1)

    def _not_finite(self, error: NotFinite, number: int, stage: Stage) -> RisamError:
        """The message of a step that would have spoilt the weights: what, where, which images."""
        dealt = self._dealt(number, stage)
        chosen = next(iter(dealt.planned))
        bad = [
            index
            for rank, parts in enumerate(error.parts)
            for part, indices in enumerate(dealt.of(chosen, rank))
            if part in parts
            for index in indices
        ]
        name = getattr(stage.data, "name_of", str)
        named = ", ".join(name(index) for index in bad[:_NAMED])
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        return RisamError(
            f"{error} at stage {stage.name!r}, step {self.place.step}, in the batch of images "
            f"{named}{more}",
            f"lower the learning rate, or look at these images{self.checkpoints.kept()}",
        )

    def _dealt(self, number: int, stage: Stage) -> DealtBatches:
        """This process's parts of the batches that are still to come."""
        planned = PlannedBatches(
            len(stage.data),
            stage.images_per_step,
            self.place.step,
            stage.steps,
            self.loop.seed * 1009 + number,
        )
        processes = self.processes
        size = getattr(stage.data, "expressions_of", None)
        return DealtBatches(planned, processes.rank, processes.world, stage.accumulate, size)

    def _batches(self, dealt: DealtBatches, stage: Stage) -> Iterator[Any]:
        workers = self.loop.workers
        return iter(
            DataLoader(
                stage.data,
                batch_sampler=dealt,
                collate_fn=stage.collate,
                num_workers=workers,
                worker_init_fn=begin_worker,
                prefetch_factor=4 if workers else None,
                pin_memory=self.loop.device.type == "cuda",
            )
        )

    def _validate(
        self, stage: Stage, stepper: Stepper, average: MovingAverage | None, *, keep: bool
    ) -> None:
        place = self.place
        try:
            with average.applied() if average is not None else nullcontext():
                figures = self._figures(stage)
                place.validated = place.step
                self.log.row(place, stage.name, figures, "val")
                if self.processes.leads:
                    self.log.pictures(place, stage.name, stage.draw())
                if keep and stage.answers:
                    leads = self.processes.leads
                    self.kept.add(place, figures["best"], stage.task.module, write=leads)
                if figures["best"] > place.best:
                    place.best = figures["best"]
                    self._save_model("best", stage, figures)
        except Interrupted:  # With the validation still owed.
            self._save(stage, stepper, average)
            raise
        self._watch(stage, figures.get("watched", figures["best"]))

    def _figures(self, stage: Stage, of: str = "") -> dict[str, float]:
        with autocast(self.loop.device, self.loop.dtype), self.processes.together():
            figures = stage.validate(self._stop_between)
        # All of them are in the log; one line has room for the foremost.
        plain = [k for k in figures if k not in ("best", "watched")]
        foremost = [k for k in plain if k.endswith(".miou")] or plain
        shown = ", ".join(f"{k} {figures[k]:.3f}" for k in [*foremost, "best"])
        self.console.info(f"stage {stage.name}, {of or f'step {self.place.step}'}: {shown}")
        return figures

    def _watch(self, stage: Stage, figure: float) -> None:
        """Early stopping."""
        place, loop = self.place, self.loop
        if figure > place.stage_best + loop.min_delta:
            place.stage_best, place.since_best = figure, 0
            return
        place.since_best += 1
        if loop.patience is not None and place.since_best >= loop.patience:
            place.stopped = True
            if place.step < stage.steps:
                self.log.row(place, stage.name, {"watched": place.stage_best}, "stop")
                self.console.info(
                    f"stage {stage.name} ends at step {place.step} of {stage.steps}: no better "
                    f"than {place.stage_best:.4f} in {place.since_best} validations"
                )

    def _average(self, stage: Stage) -> None:
        """The mean of the kept weights as a model folder, and as the best one if it is better."""
        if self.state is not None:
            self.untrained.load(self.state["model"], self.state["untrained"])
            self.state = None
        place = self.place
        if stage.answers and place.kept:
            mean = self.processes.first(lambda: self.kept.mean(place))
            with weights_in(stage.task.module, mean):
                steps = [step for step, _ in place.kept]
                told = f"mean of the weights after steps {', '.join(map(str, steps))}"
                figures = self._figures(stage, told)
                at = replace(place, stage=place.stage - 1, step=steps[-1])
                self.log.row(at, stage.name, figures, "average")
                self._save_model("averaged", stage, figures, steps)
                if figures["best"] > place.best:
                    place.best = figures["best"]
                    self._save_model("best", stage, figures, steps)
        place.averaged = True
        self._save()

    def _stop_between(self) -> None:
        # Where there are several processes, they cannot agree in the midst of a validation.
        if self.stop.requested and self.processes.world == 1:
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            f"interrupted after step {self.place.step}; {self.checkpoints.last} holds it",
            "go on with --resume",
        )

    def _save(
        self,
        stage: Stage | None = None,
        stepper: Stepper | None = None,
        average: MovingAverage | None = None,
    ) -> None:
        """Writes a checkpoint, in the midst of a stage with all that belongs to it."""
        if not self.processes.leads:
            return
        self.log.sync()  # a resumed run does not write again what came before its checkpoint
        self.checkpoints.save(
            self.place,
            self.hashes[stage_of_weights(self.place)],
            self.model if stage is None else stage.task.module,
            self.untrained,
            stepper.optimizer if stepper else None,
            stepper.scaler if stepper else None,
            average,
        )
        self.kept.prune(self.place)

    def _save_model(
        self,
        name: str,
        stage: Stage,
        figures: Mapping[str, float],
        averaged: Sequence[int] = (),
    ) -> None:
        if self.processes.leads and stage.answers:
            self.save_model(name, stage, figures, self.place, averaged)
