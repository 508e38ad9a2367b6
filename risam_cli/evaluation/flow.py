"""What ``risam eval`` does, step by step; torch is loaded only where a model answers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path

import click

from risam_cli.console.console import get_console
from risam_cli.data.readers.catalog import count_differences
from risam_cli.data.readers.predictions import PredictionIndex
from risam_cli.data.readers.refer import SPLIT_BY
from risam_cli.data.readers.source import SampleSource
from risam_cli.errors import EXIT_OK, EXIT_SOME_FAILED, setting, told
from risam_cli.evaluation.report.assemble import (
    Done,
    assemble,
    dataset_part,
    file_note,
    gallery,
    write_reports,
)
from risam_cli.evaluation.report.compare import Other
from risam_cli.evaluation.report.render import console_table, remarks
from risam_cli.evaluation.report.schema import AnswersPart, Report, TimingPart
from risam_cli.evaluation.request import (
    DEFAULT_FAMILY,
    PART_FILE,
    SURPLUS_FILE,
    WRITTEN,
    EvalRequest,
    count,
)
from risam_cli.evaluation.scoring import (
    ANSWERS_FILE,
    FailureLog,
    answers_from_predictions,
    count_missing_images,
    run_evaluation,
)
from risam_cli.files.folder import OutputFolder
from risam_cli.files.locks import PRIVATE, Taken
from risam_cli.files.write import create
from risam_cli.metrics.protocols import Protocol, get_protocol
from risam_cli.runs.ranks import Ranks, part_folders, patiently, ranks_of_environment


def evaluate(asked: EvalRequest) -> int:
    """Evaluate as asked, alone or as a process of torchrun's; gives the exit code."""
    asked.check()
    ranks = ranks_of_environment()
    if ranks is None:
        return _evaluate(asked)
    with ranks.speaking():
        if asked.predictions is None:
            return _evaluate_together(asked, ranks)
        return _evaluate(asked) if ranks.leads else EXIT_OK


def _evaluate_together(asked: EvalRequest, ranks: Ranks) -> int:
    """Answer this process's part; where it is the last, score all, as one that resumes."""
    part, output = ranks.shard.folder(asked.output), asked.output
    resume, overwrite = ranks.settled(
        part, PART_FILE, resume=asked.resume, overwrite=asked.overwrite
    )
    own = replace(asked, resume=resume, overwrite=overwrite)
    if overwrite and ranks.leads:
        _remove_parts(output, but=ranks.shard.count)
    elif not overwrite:
        ranks.require_count(output)
    with ranks.quietly(silent=True):
        own.check_output()
        own.open_other()
        protocol = get_protocol(own.protocol_name)
        scratch = part / PRIVATE / "scratch"
        source = _open(own, protocol, scratch)
        with (
            OutputFolder(part, "eval", (*WRITTEN, PART_FILE)) as folder,
            _emptied(scratch),
            FailureLog(folder, get_console()) as failures,
        ):
            from risam_cli.evaluation.answers import answer_part

            answer_part(own, source, protocol, folder, failures, ranks)
    if not ranks.all_done(PART_FILE, output):
        return EXIT_OK
    try:
        code = _evaluate(replace(asked, resume=True, answered=tuple(part_folders(output))))
    except Taken:  # two were the last
        return EXIT_OK
    _remove_parts(output)
    return code


def _remove_parts(output: Path, but: int = 0) -> None:
    """Delete what processes of torchrun left, but the parts of ``but`` processes."""
    for part in part_folders(output):
        if not part.name.endswith(f"-of-{but:05d}"):
            with patiently(partial(OutputFolder, part, "eval", (*WRITTEN, PART_FILE))):
                for name in (*WRITTEN, PART_FILE):
                    (part / name).unlink(missing_ok=True)
            with suppress(OSError):
                part.rmdir()


def _open(asked: EvalRequest, protocol: Protocol, scratch: Path) -> SampleSource:
    source = asked.open_source(scratch)
    # Where the protocol takes the union, the other rule is counted only.
    truth = "once" if protocol.truth == "union" else protocol.truth
    return source.redrawn(truth, protocol.canvas)


def _evaluate(asked: EvalRequest) -> int:
    """Evaluate as asked, write the reports, and give the exit code."""
    console = get_console()
    protocol = get_protocol(asked.protocol_name)
    # Within the output folder, so that what a killed run leaves is found by the next one.
    scratch = asked.output / PRIVATE / "scratch"
    source = _open(asked, protocol, scratch)
    other = asked.open_other()
    asked.check_output()
    with OutputFolder(asked.output, "eval", WRITTEN) as folder, _emptied(scratch):
        with FailureLog(folder, console) as failures:
            if asked.predictions is not None:
                done = _from_predictions(asked, source, protocol, folder, failures)
            else:
                from risam_cli.evaluation.answers import answer_and_score

                done = answer_and_score(asked, source, protocol, folder, failures)
        report = _report(asked, source, protocol, done, other)
        write_reports(folder, report, gallery(done.run.scored, asked.bands))
        _place_all(folder)
        done.finish()
    console.block(console_table(report))
    compared = report.comparison
    for line in (*remarks(report), *(compared.remarks if compared else ())):
        console.warn(line)
    _tell_empty_bins(asked, report)
    console.info(f"reports are in {asked.output}")
    if asked.as_json:
        click.echo(json.dumps({name: f.value for name, f in report.figures.items()}))
    return _exit_code(report, asked.skip_missing)


def _tell_empty_bins(asked: EvalRequest, report: Report) -> None:
    """Warn of bins that hold nothing: a word may be mistyped, and reports leave them out."""
    held = {(part.name, level.label) for part in report.slices for level in part.levels}
    for one in asked.custom:
        labels = zip(one.bins, one.as_slice().levels, strict=False)  # the last is "other"
        if empty := [bin.label for bin, label in labels if (one.name, label) not in held]:
            get_console().warn(
                told(f"{setting('slice', one.name)}: no expression is in {', '.join(empty)}")
            )


def _place_all(folder: OutputFolder) -> None:
    """Move all that was written aside to its place, the report last; what is not there is gone."""
    names = [name for name in reversed(WRITTEN) if name != ANSWERS_FILE]
    there = [name for name in names if (folder.staging / name).exists()]
    folder.require_held()
    for name in names:
        if name not in there:
            (folder.path / name).unlink(missing_ok=True)
    folder.place([(folder.staging / name, name) for name in there])


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
    asked: EvalRequest,
    source: SampleSource,
    protocol: Protocol,
    folder: OutputFolder,
    failures: FailureLog,
) -> Done:
    """Score records. Images serve the pictures only, so they are counted but stop nothing."""
    assert asked.predictions is not None
    console = get_console()
    side = protocol.canvas if protocol.resolution == "stretch" else 0
    with PredictionIndex(
        asked.predictions, failures, canvas=side, source=source, confine=asked.confine
    ) as index:
        absent, wanted = count_missing_images(source)
        if absent:
            console.warn(f"{absent} of {wanted} images are missing; pictures show masks only")
        answers = answers_from_predictions(source, index, failures)
        run = run_evaluation(source, answers, protocol, folder, console, asked.custom)
        for line in index.notes():
            console.warn(line)
        surplus = _tell_surplus(index, source, asked, folder)
        answered = AnswersPart(
            kind="predictions",
            name=_predictions_name(asked.predictions),
            sha256=file_note(index.path).sha256 if index.path.is_file() else None,
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


def _tell_surplus(
    index: PredictionIndex, source: SampleSource, asked: EvalRequest, folder: OutputFolder
) -> int:
    """Count records that no expression asked for, and name them in ``surplus.jsonl``.

    They are no failures: a file may hold predictions of several splits.
    """
    if not index.unused:
        return 0
    taken = [("limit", asked.limit)] if asked.limit is not None else []
    if taken := [*taken, *filter(None, [asked.part])]:
        why = ", ".join(setting(key, value) for key, value in taken)
        get_console().info(told(f"{index.unused} predictions were ignored ({why})"))
        return 0
    first = ""
    part = create(folder.staging / SURPLUS_FILE)
    with TextIOWrapper(part, "utf-8", "backslashreplace") as stream:
        for name, image, text in index.surplus():
            first = first or name or f"{image}: {text}"
            row = {"id": name, "image": image, "expression": text}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    get_console().warn(
        f"{index.unused} predictions belong to no expression of {source.dataset} {source.split} "
        f"(the first is {first}); all are in "
        f"{folder.path / SURPLUS_FILE}"
    )
    return index.unused


def _predictions_name(path: Path) -> str:
    if str(path) == "-":
        return "stdin"
    return path.parent.resolve().name if path.name == "predictions.jsonl" else path.name


def _report(
    asked: EvalRequest, source: SampleSource, protocol: Protocol, done: Done, other: Other | None
) -> Report:
    data = dataset_part(
        source,
        count_differences(source, asked.split_by) if asked.part is None else [],
        split_by=asked.split_by or SPLIT_BY.get(asked.dataset, (None,))[0],
        family=(asked.family or DEFAULT_FAMILY) if asked.dataset == "refshapes" else None,
        only_every=asked.only_every,
        leave_out_every=asked.leave_out_every,
        limit=asked.limit,
        shuffle=asked.shuffle,
    )
    return assemble(["risam", *sys.argv[1:]], data, protocol, done, other)


def _exit_code(report: Report, skip_missing: bool) -> int:
    counts = report.counts
    failed = counts.failed + counts.missing + counts.doubled + counts.malformed
    if counts.images_missing and not skip_missing:
        return EXIT_SOME_FAILED
    return EXIT_SOME_FAILED if failed else EXIT_OK
