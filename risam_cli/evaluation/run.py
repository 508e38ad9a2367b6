"""One evaluation from answers to files: rows, failures, counts. Torch-free."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from risam_cli.console.console import Console
from risam_cli.data.readers.layout import is_file
from risam_cli.data.readers.source import SampleSource
from risam_cli.errors import DataError, OutputError, setting
from risam_cli.evaluation.scoring import Answered, Scored, Scorer
from risam_cli.files.durable import replace_durably
from risam_cli.metrics.protocols import Protocol
from risam_cli.types import Failure

ROWS_FILE = "per_expression.jsonl"
FAILURES_FILE = "failures.jsonl"
ANSWERS_FILE = "answers.jsonl"
"""Where a run in progress keeps its answers; a finished run has none."""
_MADE_KEPT = 1000  # generated images that may lie in the scratch folder
_SHOWN = 5  # failures told on the console; all are in the file


class FailureLog:
    """Rows of ``failures.jsonl``, written as they come; the file exists only where there are any.

    Attributes:
        by_stage: how many there were of each stage.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.path = folder / FAILURES_FILE
        self.by_stage: Counter[str] = Counter()
        self._console = console
        self._lock = threading.Lock()
        self._stream: TextIO | None = None
        self.path.unlink(missing_ok=True)

    def __call__(self, failure: Failure) -> None:
        """Take one failure in; from any thread."""
        with self._lock:
            if self._stream is None:
                self._stream = self.path.open("w", encoding="utf-8", errors="backslashreplace")
            self._stream.write(json.dumps(asdict(failure), ensure_ascii=False) + "\n")
            self.by_stage[failure.stage] += 1
            told = len(self)
        if told <= _SHOWN:
            self._console.warn(f"{failure.image or failure.id}: {failure.message}")
        elif told == _SHOWN + 1:
            self._console.warn(f"more failures follow; all are in {self.path}")

    def __len__(self) -> int:
        return sum(self.by_stage.values())

    def __enter__(self) -> FailureLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.close()


@dataclass(frozen=True, slots=True)
class EvalRun:
    """A finished evaluation.

    Attributes:
        seconds: the whole run by the clock.
        rows: the file of its expressions.
    """

    scored: Scored
    seconds: float
    rows: Path


def run_evaluation(
    source: SampleSource,
    answers: Iterator[Answered],
    protocol: Protocol,
    folder: Path,
    console: Console,
) -> EvalRun:
    """Score every answered image and write ``per_expression.jsonl`` whole or not at all.

    Raises:
        DataError: nothing could be scored.
        OutputError: the file cannot be written.
    """
    started = time.perf_counter()
    rows = folder / ROWS_FILE
    part = rows.with_name(f".{rows.name}.part")
    made: set[Path] = set()
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            scorer = Scorer(protocol, lambda line: _write_line(stream, line))
            with console.progress("score", source.planned, "expressions") as progress:
                for answered in answers:
                    progress.advance(scorer.add(answered))
                    if source.generated:
                        _tidy(made, answered.sample.path, scorer)
            scored = scorer.finish()
        if not len(scored.table):
            raise DataError(
                f"no expression of {source.dataset} {source.split} could be scored",
                "see the failures above" if not scored.unscored else "its truth is unknown",
            )
        replace_durably(part, rows)
    except OSError as error:
        raise OutputError(
            f"cannot write {rows}: {error.strerror or error}", "see space and rights"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return EvalRun(scored, time.perf_counter() - started, rows)


def _tidy(made: set[Path], latest: Path, scorer: Scorer) -> None:
    """Delete generated images that are scored and in no case, so that they do not pile up."""
    made.add(latest)
    if len(made) > _MADE_KEPT:
        for path in made - scorer.pictured():
            path.unlink(missing_ok=True)
            made.discard(path)


def _write_line(stream: TextIO, line: str) -> None:
    stream.write(line + "\n")


def drop_missing_images(
    source: SampleSource, on_failure: Callable[[Failure], None]
) -> tuple[SampleSource, int]:
    """The source without the images that are not there, and how many there were.

    Every expression of such an image is a failure of the stage ``decode``.

    Raises:
        DataError: not one image is there.
    """
    if source.generated:
        return source, 0
    kept: list[int] = []
    absent = 0
    left = source.limit
    looked: set[Path] = set()
    for index in source.order if source.order is not None else range(len(source.groups)):
        if left is not None and left <= 0:
            break
        group = source.groups[index]
        if is_file(group.path):
            kept.append(index)
            left = None if left is None else left - len(group.phrases)
            continue
        absent += 1
        looked.add(group.path.parent)
        for phrase in group.phrases:
            message = f"image {group.path} is missing"
            on_failure(
                Failure(phrase.id, group.image, phrase.text, "decode", "ImageError", message)
            )
    if not kept:
        raise images_nowhere(source, absent, looked)
    return (replace(source, order=tuple(kept)) if absent else source), absent


def count_missing_images(source: SampleSource) -> tuple[int, int]:
    """How many of the images that an iteration comes to are missing, and how many there are."""
    if source.generated:
        return 0, len(source)
    absent = total = 0
    for group in source.chosen():
        total += 1
        absent += not is_file(group.path)
    return absent, total


def images_nowhere(source: SampleSource, absent: int, looked: set[Path]) -> DataError:
    """The error of a split of which no image is found."""
    first = source.groups[0].image
    places = ", ".join(str(place) for place in sorted(looked)[:4])
    return DataError(
        f"none of the {absent} images of {source.dataset} {source.split} is there; looked for "
        f"{first} and the others in {places}",
        f"give {setting('image_root', 'DIR')}, the folder in which these names start",
    )
