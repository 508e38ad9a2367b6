"""What ``risam eval`` does, step by step; torch is loaded only where a model answers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from risam_cli.confine import require_own
from risam_cli.console.console import get_console
from risam_cli.data.readers.catalog import count_differences, open_dataset
from risam_cli.data.readers.predictions import PredictionIndex
from risam_cli.data.readers.refshapes import BENCHMARKS, open_refshapes, open_refshapes_files
from risam_cli.data.readers.source import SampleSource
from risam_cli.engine.eval_run import (
    ANSWERS_FILE,
    FAILURES_FILE,
    ROWS_FILE,
    EvalRun,
    FailureLog,
    count_missing_images,
    run_evaluation,
)
from risam_cli.engine.evaluate import answers_from_predictions
from risam_cli.engine.ledger import LEDGER
from risam_cli.errors import EXIT_OK, EXIT_SOME_FAILED, OutputError, UsageError
from risam_cli.locks import PRIVATE, FolderLock
from risam_cli.metrics.protocols import Protocol, get_protocol
from risam_cli.reports.assemble import (
    HTML_FILE,
    MARKDOWN_FILE,
    RunFacts,
    assemble,
    dataset_part,
    file_note,
    gallery,
    write_reports,
)
from risam_cli.reports.compare import REPORT_FILE, Other, read_other
from risam_cli.reports.schema import (
    AnswersPart,
    CountsPart,
    NoTargetFitPart,
    Report,
    TimingPart,
)
from risam_cli.reports.text import console_table

if TYPE_CHECKING:
    from risam_cli.engine.embeddings import CacheSettings

SURPLUS_FILE = "surplus.jsonl"
_WRITTEN = (
    *(REPORT_FILE, MARKDOWN_FILE, HTML_FILE),
    *(ROWS_FILE, FAILURES_FILE, SURPLUS_FILE, ANSWERS_FILE),
)
DEFAULT_FAMILY = next(iter(BENCHMARKS))


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of one call; names as on the command line."""

    dataset: str
    root: Path | None
    images: Path | None
    split: str | None
    split_by: str | None
    family: str | None
    model: str | None
    predictions: Path | None
    protocol_name: str
    output: Path
    compare: Path | None
    fit_no_target: bool
    limit: int | None
    shuffle: int | None
    skip_missing: bool
    threshold: float | None
    no_target_threshold: float | None
    device: str
    precision: str
    compiled: bool
    batch_size: int
    workers: int | None
    feature_cache: Path | None
    feature_cache_limit: int
    full_decode: bool
    resume: bool
    overwrite: bool
    as_json: bool

    def check(self) -> None:
        """Refuse options that contradict each other. Raises UsageError."""
        if self.predictions is not None:
            for name, given in (
                ("--model", self.model is not None),
                ("--threshold", self.threshold is not None),
                ("--no-target-threshold", self.no_target_threshold is not None),
                ("--fit-no-target", self.fit_no_target),
                ("--resume", self.resume),
                ("--feature-cache", self.feature_cache is not None),
            ):
                if given:
                    raise UsageError(f"{name} is for a model, --predictions brings its own masks")
        if self.dataset != "refshapes":
            if self.family is not None:
                raise UsageError("--family is for --dataset refshapes")
            if self.root is None:
                raise UsageError(
                    f"--dataset {self.dataset} needs --root", "name the folder of its files"
                )
        elif self.split_by is not None:
            raise UsageError("--split-by is not for refshapes", "leave it out")
        if self.split is None and self.dataset != "coco":
            raise UsageError(f"--dataset {self.dataset} needs --split", "such as --split val")

    def kept_features(self) -> CacheSettings | None:
        """Where the image encoder's features are kept, if they are."""
        from risam_cli.engine.embeddings import CacheSettings

        if self.feature_cache is None:
            return None
        return CacheSettings(self.feature_cache, self.feature_cache_limit)

    def open_source(self, scratch: Path) -> SampleSource:
        """The split that was asked for; images that are generated go to ``scratch``."""
        console = get_console()
        split = self.split or "all"
        family = self.family or DEFAULT_FAMILY
        if self.dataset != "refshapes":
            assert self.root is not None
            source = open_dataset(
                self.dataset, self.root, split, split_by=self.split_by, image_root=self.images
            )
        elif self.root is not None:
            source = open_refshapes_files(self.root, family, split, self.images)
        else:
            source = open_refshapes(family, split, scratch)
        for line in (*count_differences(source, self.split_by), *source.notes):
            console.warn(line)
        return source.limited(self.limit, self.shuffle)

    def open_other(self) -> Other | None:
        """The report to compare with, read before any work is done."""
        if self.compare is None:
            return None
        mine = {self.output.resolve(), (self.output / "report.json").resolve()}
        if self.compare.resolve() in mine:
            raise UsageError("--compare names the folder that -o writes to", "choose another -o")
        return read_other(self.compare)

    def prepare_output(self) -> None:
        """Make the folder; refuse one that holds a report unless told to replace it."""
        if (self.output / LEDGER).exists():
            raise OutputError(
                f"{self.output} holds a run of predict, which has files of the same names",
                "choose another -o",
            )
        # A run that was cut off between its reports and its end still has its answers.
        cut_off = self.resume and (self.output / ANSWERS_FILE).exists()
        if (self.output / "report.json").exists() and not (self.overwrite or cut_off):
            raise OutputError(
                f"{self.output} holds a report already", "choose another -o or give --overwrite"
            )
        parts = [f".{name}.part" for name in _WRITTEN]
        require_own(self.output, [*_WRITTEN, *parts])
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make {self.output}: {error.strerror or error}", "choose another -o"
            ) from error


@dataclass(frozen=True, slots=True)
class Done:
    """A finished run with what its kind of answers adds to the report.

    Attributes:
        finish: to be called once the reports are written: what was kept to go on with may go.
    """

    run: EvalRun
    answers: AnswersPart
    counts: CountsPart
    timing: TimingPart
    threshold: float | None = None
    no_target_fit: NoTargetFitPart | None = None
    finish: Callable[[], None] = lambda: None


def evaluate(asked: Asked) -> int:
    """Evaluate as asked, write the reports, and give the exit code."""
    asked.check()
    console = get_console()
    protocol = get_protocol(asked.protocol_name)
    # Within the output folder, so that what a killed run leaves is found by the next one.
    scratch = asked.output / PRIVATE / "scratch"
    source = asked.open_source(scratch)
    other = asked.open_other()
    asked.prepare_output()
    with FolderLock(asked.output), _emptied(scratch):
        with FailureLog(asked.output, console) as failures:
            if asked.predictions is not None:
                done = _from_predictions(asked, source, protocol, failures)
            else:
                done = _from_model(asked, source, protocol, failures)
        report = _report(asked, source, protocol, done, other)
        write_reports(asked.output, report, gallery(done.run.scored))
        done.finish()
    console.block(console_table(report))
    console.info(f"reports are in {asked.output}")
    if asked.as_json:
        click.echo(json.dumps({name: f.value for name, f in report.figures.items()}))
    return _exit_code(report, asked.skip_missing)


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """A folder that is empty at first and gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _from_predictions(
    asked: Asked, source: SampleSource, protocol: Protocol, failures: FailureLog
) -> Done:
    """Score records. Images serve the pictures only, so they are counted but stop nothing."""
    assert asked.predictions is not None
    console = get_console()
    with PredictionIndex(asked.predictions, failures) as index:
        absent, wanted = count_missing_images(source)
        if absent:
            console.warn(f"{absent} of {wanted} images are missing; pictures show masks only")
        answers = answers_from_predictions(source, index, failures)
        run = run_evaluation(source, answers, protocol, asked.output, console)
        surplus = _tell_surplus(index, source, asked.output)
        answered = AnswersPart(
            kind="predictions",
            name=_predictions_name(asked.predictions),
            sha256=None if str(index.path) == "-" else file_note(index.path).sha256,
            records=len(index),
        )
        counts = count(
            run,
            failed=failures.by_stage["read"] - index.broken,
            surplus=surplus,
            doubled=index.doubled,
            malformed=index.broken,
            # No folder of images at all is a way to work; a hole in it is a fault.
            images_missing=0 if absent == wanted else absent,
        )
    timing = TimingPart(
        score=run.scored.seconds,
        total=run.seconds,
        expressions_per_second=len(run.scored.table) / run.seconds,
    )
    return Done(run, answered, counts, timing)


def _from_model(
    asked: Asked, source: SampleSource, protocol: Protocol, failures: FailureLog
) -> Done:
    """Have a model answer. Torch is loaded here."""
    from risam_cli.commands.eval_model import answer_and_score

    return answer_and_score(asked, source, protocol, failures)


def _tell_surplus(index: PredictionIndex, source: SampleSource, folder: Path) -> int:
    """Count records that no expression asked for, and name them in ``surplus.jsonl``.

    They are no failures: a file may hold predictions of several splits.
    """
    path = folder / SURPLUS_FILE
    path.unlink(missing_ok=True)
    if not index.unused:
        return 0
    if source.limit is not None:
        get_console().info(f"{index.unused} predictions were not looked at (--limit)")
        return 0
    first = ""
    with path.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for name, image, text in index.surplus():
            first = first or name or f"{image}: {text}"
            row = {"id": name, "image": image, "expression": text}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    get_console().warn(
        f"{index.unused} predictions belong to no expression of {source.dataset} {source.split} "
        f"(the first is {first}); all are in {path}"
    )
    return index.unused


def _predictions_name(path: Path) -> str:
    if str(path) == "-":
        return "stdin"
    return path.parent.resolve().name if path.name == "predictions.jsonl" else path.name


def count(run: EvalRun, **more: int) -> CountsPart:
    """What the figures of a run stand on; ``more`` are fields of the schema."""
    table = run.scored.table
    return CountsPart(
        images=run.scored.images,
        scored=len(table),
        no_target=int(table.gt_no_target.sum()),
        missing=int(table.missing.sum()),
        unscored=run.scored.unscored,
        **more,
    )


def _report(
    asked: Asked, source: SampleSource, protocol: Protocol, done: Done, other: Other | None
) -> Report:
    data = dataset_part(
        source,
        count_differences(source, asked.split_by),
        split_by=asked.split_by,
        family=(asked.family or DEFAULT_FAMILY) if asked.dataset == "refshapes" else None,
        limit=asked.limit,
        shuffle=asked.shuffle,
    )
    facts = RunFacts(
        command=["risam", *sys.argv[1:]],
        dataset=data,
        answers=done.answers,
        counts=done.counts,
        timing=done.timing,
        threshold=asked.threshold,
        no_target_fit=done.no_target_fit,
    )
    return assemble(facts, done.run.scored, protocol, done.run.rows, other)


def _exit_code(report: Report, skip_missing: bool) -> int:
    counts = report.counts
    failed = counts.failed + counts.missing + counts.doubled + counts.malformed
    if counts.images_missing and not skip_missing:
        return EXIT_SOME_FAILED
    return EXIT_SOME_FAILED if failed else EXIT_OK
