"""The training loop: stages, checkpoints, validation; every run resumes where it was cut."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from risam_cli.console.console import Progress, get_console
from risam_cli.console.text import first_of
from risam_cli.errors import ConfigError, Interrupted, OutputError, RisamError, setting
from risam_cli.files.confine import require_own_tree
from risam_cli.files.folder import OutputFolder
from risam_cli.files.write import write_file, writing
from risam_cli.interrupts import StopRequest
from risam_cli.settings.load import check, dump, read_settings_file
from risam_cli.settings.train import TrainSettings
from risam_cli.training.checkpoint import (
    LAST,
    Checkpoints,
    KeptWeights,
    MovingAverage,
    Place,
    Untrained,
    forget_lost_best,
    read_state,
    restore,
    stage_of_weights,
    weights_in,
)
from risam_cli.training.data.collate import DealtBatches, PlannedBatches, begin_worker
from risam_cli.training.distributed import Processes
from risam_cli.training.identity import judge_hash, settings_that_differ, stage_hashes
from risam_cli.training.log import METRICS, PICTURES, TrainingLog
from risam_cli.training.optimize import NotFinite, Stepper, autocast, rate_factor
from risam_cli.training.outcome import doubts_about, figures_of, shown, warnings_of
from risam_cli.training.page import PAGE, write_page
from risam_cli.training.stage import Stage, TrainingBuilder, check_paths, require_start_kept
from risam_cli.training.text_source import with_text_source
from risam_cli.weights.trained_on import to_card

RESOLVED = "config.resolved.yaml"
_WRITTEN = (
    *(RESOLVED, METRICS, PAGE),
    *("best", "averaged", "checkpoints", "tensorboard", PICTURES),
)
_MODELS = ("best", "averaged")
_NAMED = 8  # images of a bad batch that a message names


def train(
    settings: TrainSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: Processes | None = None,
    command: Sequence[str] = (),
) -> Path:
    """Runs every stage and returns the folder of the best model.

    A start that fails before its first step leaves nothing behind.

    Args:
        resume: go on from the folder's last checkpoint, if it has one.
        overwrite: what an earlier run left in the folder makes way, once this one can start.
        processes: of which this is one; the first one writes.
        command: as it was typed, to be shown in ``training.html``.

    Raises:
        OutputError: the output folder holds what was trained and neither ``resume`` nor
            ``overwrite`` is given, or another process works in it.
        RisamError: data, weights or settings that do not fit, or a loss that is not finite.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint has been written.
    """
    processes = processes or Processes()
    folder = Path(settings.output)
    # One process holds the folder for all.
    with OutputFolder(folder, "train", _WRITTEN) if processes.leads else nullcontext():
        return _train(settings, resume, overwrite, processes, command)


def _train(
    settings: TrainSettings,
    resume: bool,
    overwrite: bool,
    processes: Processes,
    command: Sequence[str],
) -> Path:
    console = get_console()
    folder = Path(settings.output)
    # All look before one writes.
    if any(processes.gather(holds_weights(folder))) and not (resume or overwrite):
        raise OutputError(
            f"{folder} holds a training run",
            f"continue with {setting('resume')}",
            f"replace it with {setting('overwrite')}",
            f"give another folder by {setting('output', 'OTHER')}",
        )
    require_own_tree(folder)
    check_paths(settings)
    if not resume:
        require_start_kept(settings, [folder / name for name in _WRITTEN])
    for line in doubts_about(settings):
        console.warn(line)
    earlier = folder / RESOLVED if resume else None
    settings = processes.first(lambda: with_text_source(settings, earlier, console))
    builder = TrainingBuilder(settings, console, processes)
    parameters = sum(p.numel() for p in builder.model.parameters())
    several = f" in {processes.world} processes" if processes.world > 1 else ""
    console.info(
        f"{settings.name}: {parameters / 1e6:.2f} M parameters on {builder.device}{several}, "
        f"{str(builder.dtype).removeprefix('torch.')}, output {folder}"
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The others wait for the first one, or it would remove what they make.
        processes.first(lambda: _make_way(folder, resume))
        kept = {entry.name for entry in folder.iterdir()}
        run = TrainingRun(folder, builder)
        if resume:
            run.resume()
        # Only now: a refused --resume must not overwrite the settings that it asks for.
        if processes.leads:
            write_file(folder / RESOLVED, dump(settings))
    with _page_at_the_end(run, command, kept), closing(builder):
        run.run()
    best = folder / "best"
    if not best.is_dir():  # Only dense stages: there is nothing yet that answers expressions.
        console.info(f"done: the encoder is in {run.checkpoints.last}, curves in {folder / PAGE}")
        return best
    figures = figures_of(best)
    for line in warnings_of(settings, figures):
        console.warn(line)
    # Below 0 where a finished run goes on with another val: best/ is not judged by it.
    by = f"best {settings.best_by} {run.place.best:.4f}" if run.place.best >= 0 else "nothing new"
    console.info(f"done: {by}{shown(settings, figures)}; the model is in {best}")
    console.info(f"curves and pictures: {folder / PAGE}")
    return best


@contextmanager
def _page_at_the_end(
    run: TrainingRun, command: Sequence[str], kept: Collection[str]
) -> Iterator[None]:
    """Writes ``training.html``, after each validation and however the run ends short of a kill.

    A run that ends before its first step is removed.

    Args:
        kept: names of what was in the folder before.
    """
    outcome = "Finished."
    run.command = command
    try:
        yield
    except KeyboardInterrupt:
        outcome = "Interrupted."
        raise
    except RisamError as error:
        outcome = f"Stopped early: {error}"
        raise
    finally:
        if run.processes.leads and run.place == run.unbegun():
            _remove_run(run.folder, kept)
        else:
            run.write_page(outcome)


def holds_weights(folder: Path) -> bool:
    """Whether something was trained there, and kept."""
    return (folder / "checkpoints" / LAST).exists() or any((folder / n).exists() for n in _MODELS)


def _make_way(folder: Path, resume: bool) -> None:
    """Before a run goes on, clears up after the one that was cut; before a new one, removes it."""
    clear_leftovers(folder)
    if not resume and (folder / RESOLVED).is_file():
        _remove_run(folder)


def _remove_run(folder: Path, kept: Collection[str] = ()) -> None:
    """Removes what a run has written but for the names ``kept``. Raises OSError where it cannot."""
    for name in (*_MODELS, "checkpoints", "tensorboard", PICTURES, METRICS, PAGE, RESOLVED):
        path = folder / name
        if name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Removes what a killed run left half written, and puts back what it was about to replace."""
    for name in _MODELS:
        whole, old = folder / name, folder / f".{name}-old"
        if old.is_dir() and not whole.exists():
            old.rename(whole)
        for half in folder.glob(f".{name}-*"):
            shutil.rmtree(half, ignore_errors=True)
    for part in [*folder.glob(".*.part"), *folder.glob("*/.*.part"), *folder.glob("*/*/.*.part")]:
        part.unlink(missing_ok=True)


class TrainingRun:
    """Trains a model through its stages.

    Args:
        folder: output folder; ``checkpoints/`` and ``metrics.jsonl`` go there.
        builder: has the settings and the network, and makes the stages.

    Raises:
        RisamError: a loss that is not finite, or a checkpoint that does not fit.
        Interrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint has been written.
    """

    def __init__(self, folder: Path, builder: TrainingBuilder) -> None:
        settings, averaging = builder.settings, builder.settings.averaging
        self.folder = folder
        self.builder = builder
        self.settings = settings
        self.model = builder.model
        self.hashes = stage_hashes(settings, builder.tokenizer.to_json())
        self.console = builder.console
        self.processes = builder.processes
        self.place = self.unbegun()
        self.state: dict[str, Any] | None = None
        self.untrained = Untrained(self.model)
        self.checkpoints = Checkpoints(folder / "checkpoints", settings.keep_last)
        kept = folder / "checkpoints" / "kept"
        self.kept = KeptWeights(kept, averaging.count, averaging.of) if averaging else None
        self.log = TrainingLog(folder, self.console, silent=not self.processes.leads)
        self.stop = StopRequest()
        self.command: Sequence[str] = ()
        self.told = 0.0, 0  # seconds and expressions when the rate was last shown
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)

    def unbegun(self) -> Place:
        """The place before the first step."""
        judged = judge_hash(self.settings, self.builder.data.judged_by)
        return Place(judged=judged, trained_on=to_card(self.builder.data.trained_on))

    def resume(self) -> None:
        """Takes up the last checkpoint, if there is one."""
        self.state = self.processes.first(self._read)
        if self.state is not None:
            self.place = Place(**self.state["place"])
            self.place.trained_on = self.builder.data.continued(self.place.trained_on)
            self._judge_anew(was=self.place.judged)
            forget_lost_best(self.place, self.folder / "best", len(self.settings.stages))
            if self.processes.leads and self.checkpoints.last.is_file():
                self.checkpoints.follow(self.place)
                self._prune()
            at = f"resuming at stage {self.place.stage + 1}, step {self.place.step}"
            done = f"all stages of {self.folder} are trained already"
            self.console.info(at if self.place.stage < len(self.settings.stages) else done)
        else:
            self.console.info(f"nothing to resume in {self.folder}: starting at the first step")
        self.log.drop_rows_after(self.place)

    def _judge_anew(self, was: str) -> None:
        """Forgets the figures so far where they were measured by something else."""
        place = self.place
        place.judged = judge_hash(self.settings, self.builder.data.judged_by)
        if was and was != place.judged:
            place.best, place.stage_best, place.since_best = -1.0, -math.inf, 0
            place.kept = [(step, -1.0) for step, _ in place.kept]
            self.console.warn(
                "best_by or val has changed, so its figures are no longer compared: "
                "the next validation's weights become best/"
            )

    def _read(self) -> dict[str, Any] | None:
        path = self.checkpoints.to_resume()
        return None if path is None else read_state(path, self.hashes, self._differences)

    def _differences(self, stage: int) -> str:
        """Which settings are others than those that the run was started with."""
        try:
            was = check(TrainSettings, read_settings_file(self.folder / RESOLVED), RESOLVED)
        except ConfigError:
            return ""  # removed, or of another version
        if told := settings_that_differ(was, self.settings, stage):
            return told
        learned = self.settings.model.text_encoder.learns_words
        return "the words of the training expressions have changed" if learned else ""

    def run(self) -> None:
        """Runs all stages that are not yet done; each is built when its turn comes."""
        stages = self.settings.stages
        with self.log, self.stop:
            for number, settings in enumerate(stages):
                if number >= self.place.stage:
                    stage = self.builder.stage(settings)
                    self._run_stage(number, stage, last=number == len(stages) - 1)
            if self.kept is not None and not self.place.averaged:
                self._average(self.builder.stage(stages[-1]), self.kept)

    def _run_stage(self, number: int, stage: Stage, *, last: bool) -> None:
        if stage.settings.images_per_step < self.processes.world:
            raise ConfigError(
                f"stage {stage.settings.name!r}: images_per_step {stage.settings.images_per_step} "
                f"is less than the {self.processes.world} processes",
                "start fewer, or use more images",
            )
        if self.state is not None and self.place.step == 0:
            self.untrained.load(self.state["model"], self.state["untrained"])
            self.state = None
        module = stage.task.module
        module.train()
        decay = self.settings.optimizer.ema_decay
        average = MovingAverage(module, decay) if decay else None
        stepper = self._stepper(stage, average)
        self.untrained.stage_begins()
        if self.place.step == 0:
            self.place.kept, self.place.averaged = [], False
        self._steps(number, stage, stepper, average, self.kept if last else None)
        if average is not None:
            average.swap()  # The next stage goes on from the average.
        p = self.place
        done = number + 1, 0, p.best, p.seconds, p.expressions
        self.place = Place(*done, kept=p.kept, judged=p.judged, trained_on=p.trained_on)
        # A run cut in the next stage's first steps finds the finished stage here.
        self._save()

    def _stepper(self, stage: Stage, average: MovingAverage | None) -> Stepper:
        """The stage's optimizer, as a run that is resumed within the stage left it."""
        stepper = Stepper(
            stage.task,
            stage.groups,
            self.builder.device,
            self.builder.dtype,
            self.processes,
            self.settings.optimizer,
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
        kept: KeptWeights | None,
    ) -> None:
        place, run, s = self.place, self.settings, stage.settings
        self.told = place.seconds, place.expressions
        begun = time.monotonic() - place.seconds
        dealt = self._dealt(number, stage)
        batches = self._batches(dealt, stage)
        per_step = dealt.per_step(s.images_per_step)
        shown = self.console.progress(f"stage {s.name}", s.steps, "steps", place.step)
        with shown as progress:
            if self._owes_validation(stage):
                self._validate(stage, stepper, average, kept)
            while place.step < s.steps and not place.stopped:
                rate = rate_factor(run.optimizer, place.step, s.steps, s.warmup)
                # Each step has its own seed, so that a resumed run needs no random state.
                seed = run.seed * 1_000_003 + number * 100_003 + place.step
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
                    self._validate(stage, stepper, average, kept)
                ends = place.step == s.steps or place.stopped
                if stopping or ends or place.step % run.checkpoint_every == 0:
                    self._save(stage, stepper, average)
                if stopping:
                    raise self._interrupted()

    def _owes_validation(self, stage: Stage) -> bool:
        step = self.place.step
        due = step == stage.settings.steps or step % self.settings.validate_every == 0
        return due and self.place.validated < step

    def _tell(
        self, progress: Progress, stage: Stage, figures: Mapping[str, torch.Tensor], rate: float
    ) -> None:
        place = self.place
        if place.step % self.settings.log_every == 0:
            recent = {name: float(value) for name, value in figures.items()}
            recent["lr"] = rate * stage.settings.learning_rate
            self.log.row(place, stage.settings.name, recent, "train")
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
        named = first_of([name(index) for index in bad], _NAMED)
        return RisamError(
            f"{error} at stage {stage.settings.name!r}, step {self.place.step}, in the batch of "
            f"images {named}",
            f"lower the learning rate, or look at these images{self.checkpoints.kept()}",
        )

    def _dealt(self, number: int, stage: Stage) -> DealtBatches:
        """This process's parts of the batches that are still to come."""
        planned = PlannedBatches(
            len(stage.data),
            stage.settings.images_per_step,
            self.place.step,
            stage.settings.steps,
            self.settings.seed * 1009 + number,
        )
        processes = self.processes
        size = getattr(stage.data, "expressions_of", lambda index: 1)
        parts = stage.settings.accumulate
        return DealtBatches(planned, processes.rank, processes.world, parts, size)

    def _batches(self, dealt: DealtBatches, stage: Stage) -> Iterator[Any]:
        workers = self.settings.workers
        return iter(
            DataLoader(
                stage.data,
                batch_sampler=dealt,
                collate_fn=stage.collate,
                num_workers=workers,
                worker_init_fn=begin_worker,
                prefetch_factor=4 if workers else None,
                pin_memory=self.builder.device.type == "cuda",
            )
        )

    def _validate(
        self,
        stage: Stage,
        stepper: Stepper,
        average: MovingAverage | None,
        kept: KeptWeights | None,
    ) -> None:
        place = self.place
        try:
            with average.applied() if average is not None else nullcontext():
                figures = self._figures(stage)
                place.validated = place.step
                self.log.row(place, stage.settings.name, figures, "val")
                if self.processes.leads:
                    self.log.pictures(place, stage.settings.name, stage.draw())
                if kept is not None and stage.answers:
                    leads = self.processes.leads
                    kept.add(place, figures["best"], stage.task.module, write=leads)
                if figures["best"] > place.best:
                    place.best = figures["best"]
                    self._save_model("best", stage, figures)
        except Interrupted:  # With the validation still owed.
            self._save(stage, stepper, average)
            raise
        self.write_page("Still training.")
        self._watch(stage, figures.get("watched", figures["best"]))

    def write_page(self, outcome: str) -> None:
        """Writes ``training.html``; without room for it, the run goes on."""
        if self.processes.leads:
            try:
                write_page(self.folder, self.command, outcome)
            except (OutputError, OSError) as error:
                self.console.warn(f"{PAGE} is not written: {error}")
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                why = f"what it is drawn from is damaged ({type(error).__name__}: {error})"
                self.console.warn(f"{PAGE} is not written: {why}")

    def _figures(self, stage: Stage, of: str = "") -> dict[str, float]:
        with autocast(self.builder.device, self.builder.dtype), self.processes.together():
            figures = stage.validate(self._stop_between)
        # All of them are in the log; one line has room for the foremost.
        plain = [k for k in figures if k not in ("best", "watched")]
        foremost = [k for k in plain if k.endswith(".miou")] or plain
        shown = ", ".join(f"{k} {figures[k]:.3f}" for k in [*foremost, "best"])
        self.console.info(
            f"stage {stage.settings.name}, {of or f'step {self.place.step}'}: {shown}"
        )
        return figures

    def _watch(self, stage: Stage, figure: float) -> None:
        """Early stopping."""
        place, early, s = self.place, self.settings.early_stopping, stage.settings
        if figure > place.stage_best + (early.min_delta if early else 0.0):
            place.stage_best, place.since_best = figure, 0
            return
        place.since_best += 1
        if early is not None and place.since_best >= early.patience:
            place.stopped = True
            if place.step < s.steps:
                self.log.row(place, stage.settings.name, {"watched": place.stage_best}, "stop")
                self.console.info(
                    f"stage {s.name} ends at step {place.step} of {s.steps}: no better "
                    f"than {place.stage_best:.4f} in {place.since_best} validations"
                )

    def _average(self, stage: Stage, kept: KeptWeights) -> None:
        """The mean of the kept weights as a model folder, and as the best one if it is better."""
        if self.state is not None:
            self.untrained.load(self.state["model"], self.state["untrained"])
            self.state = None
        place = self.place
        if stage.answers and not place.kept:
            self.console.warn(
                "averaging: the last stage has kept no weights, so there is nothing to average"
            )
        if stage.answers and place.kept:
            mean = self.processes.first(lambda: kept.mean(place))
            with weights_in(stage.task.module, mean):
                steps = [step for step, _ in place.kept]
                told = f"mean of the weights after steps {', '.join(map(str, steps))}"
                figures = self._figures(stage, told)
                at = replace(place, stage=place.stage - 1, step=steps[-1])
                self.log.row(at, stage.settings.name, figures, "average")
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
            f"interrupted after step {self.place.step}; {self.checkpoints.last} was saved",
            f"continue with {setting('resume')}",
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
        self._prune()

    def _prune(self) -> None:
        """Removes the kept weights that the checkpoint just written names no more."""
        if self.kept is not None:
            self.kept.prune(self.place)

    def _save_model(
        self,
        name: str,
        stage: Stage,
        figures: Mapping[str, float],
        averaged: Sequence[int] = (),
    ) -> None:
        if self.processes.leads and stage.answers:
            self.builder.save_model(self.folder / name, stage, figures, self.place, averaged)
