"""Scoring a split: answers in, table, rows and cases out. Torch-free; a model's answers come from
:mod:`risam_cli.evaluation.answers`.

Memory holds the table's columns, one block of rows and a bounded number of cases; masks go by one
image at a time.
"""

from __future__ import annotations

import heapq
import json
import math
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from PIL import Image

from risam_cli.console.console import Console
from risam_cli.data.readers.layout import is_file
from risam_cli.data.readers.predictions import Answer, PredictionIndex
from risam_cli.data.readers.source import OnFailure, SampleSource
from risam_cli.errors import DataError, setting
from risam_cli.files.folder import OutputFolder
from risam_cli.files.jsonlines import brief
from risam_cli.files.write import create, sync_file, writing
from risam_cli.masks import rle as masks
from risam_cli.metrics.figures import ExpressionScore, ScoreTable, Tally, outcome, score_masks
from risam_cli.metrics.protocols import Protocol
from risam_cli.metrics.slicer import CustomSlice, Slicer
from risam_cli.metrics.slices import Facts, Slice
from risam_cli.types import Expression, Failure, Rle, Sample

_BLOCK = 1024  # rows scored at once
_POOL = 60  # cases kept of each kind; the gallery picks among them


@dataclass(frozen=True, slots=True)
class Answered:
    """One image with its answers, parallel to its expressions; None scores zero."""

    sample: Sample
    answers: tuple[Answer | None, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One expression with all that its picture needs."""

    id: str
    image: str
    path: Path
    expression: str
    iou: float
    score: float
    target: Rle
    prediction: Rle
    gt_no_target: bool
    answered_none: bool


@dataclass(frozen=True, slots=True)
class Scored:
    """What a run gives.

    Attributes:
        worst, best, typical: cases, the first two by IoU and the last drawn evenly; the best are
            among expressions with a target.
        unscored: expressions without a known truth.
        overlapping: expressions whose truth has pixels that several polygons of an annotation
            cover, so that protocols differ in it; None where the protocol draws it anew.
        seconds: time spent on scoring.
    """

    table: ScoreTable
    slices: tuple[Slice, ...]
    images: int
    worst: tuple[Case, ...]
    best: tuple[Case, ...]
    typical: tuple[Case, ...]
    unscored: int
    overlapping: int | None
    seconds: float


@dataclass(slots=True)
class _Pending:
    score: ExpressionScore
    expression: Expression
    levels: dict[str, int]
    path: Path
    prediction: Rle | None


@dataclass(slots=True)
class _Pool:
    """The ``size`` cases of highest rank, ties broken by a hash of the id, not by order."""

    size: int
    heap: list[tuple[float, int, str, Case]] = field(default_factory=list)

    def offer(self, rank: float, name: str, make: Callable[[], Case]) -> None:
        key = (rank, zlib.crc32(name.encode("utf-8", "surrogatepass")), name)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, (*key, make()))
        elif key > self.heap[0][:3]:
            heapq.heapreplace(self.heap, (*key, make()))

    def cases(self) -> tuple[Case, ...]:
        return tuple(entry[3] for entry in sorted(self.heap, key=lambda e: e[:3], reverse=True))


class Scorer:
    """Takes answered images one by one.

    Args:
        write_row: gets each line of ``per_expression.jsonl``, in order.
        custom: slices of the user's.
    """

    def __init__(
        self,
        protocol: Protocol,
        write_row: Callable[[str], object],
        custom: Sequence[CustomSlice] = (),
    ) -> None:
        self.protocol = protocol
        self._write_row = write_row
        self._slicer = Slicer(custom)
        self._tally = Tally(self._slicer.names)
        self._pending: list[_Pending] = []
        self._worst, self._best, self._typical = _Pool(_POOL), _Pool(_POOL), _Pool(_POOL)
        self._unscored = 0
        self._overlapping = 0
        self._seconds = 0.0

    def add(self, answered: Answered) -> int:
        """Score one image; gives how many of its expressions had a known truth.

        Raises:
            DataError: a mask is of another size than its truth.
        """
        started = time.perf_counter()
        sample = answered.sample
        scored = 0
        at_canvas: dict[str, Rle] = {}
        for expression, answer in zip(sample.expressions, answered.answers, strict=True):
            if expression.target is None:
                self._unscored += 1
                continue
            scored += 1
            truth = expression.target
            if expression.redrawn is not None:
                self._overlapping += 1
                truth = truth if self.protocol.truth == "union" else expression.redrawn
            target = _at_resolution(truth, self.protocol, at_canvas)
            facts = Facts(expression.text, _share(expression.target), expression.attributes)
            self._pending.append(
                _Pending(
                    self._score(sample, expression, target, answer),
                    expression,
                    self._slicer.levels(facts),
                    sample.path,
                    answer.segmentation if answer else None,
                )
            )
        if len(self._pending) >= _BLOCK:
            self._flush()
        self._seconds += time.perf_counter() - started
        return scored

    def pictured(self) -> set[Path]:
        """Images that a picture may still be drawn of."""
        pools = (self._worst, self._best, self._typical)
        return {case.path for pool in pools for case in pool.cases()} | {
            pending.path for pending in self._pending
        }

    def finish(self) -> Scored:
        """Score what is left and give everything."""
        started = time.perf_counter()
        self._flush()
        table = self._tally.table()
        self._seconds += time.perf_counter() - started
        return Scored(
            table,
            self._slicer.slices(),
            self._tally.images,
            self._worst.cases(),
            self._best.cases(),
            self._typical.cases(),
            self._unscored,
            None if self.protocol.truth == "resized" else self._overlapping,
            self._seconds,
        )

    def _score(
        self, sample: Sample, expression: Expression, target: Rle, answer: Answer | None
    ) -> ExpressionScore:
        nothing = bool(expression.no_target)
        if answer is None:
            area = masks.area(target)
            return ExpressionScore(
                expression.id, sample.image, 0, area, 0, area, nothing, missing=True
            )
        return score_masks(
            expression.id,
            sample.image,
            _at_resolution(answer.segmentation, self.protocol, {}),
            target,
            gt_no_target=nothing,
            pred_no_target=answer.no_target,
            score=answer.score,
            no_target_probability=answer.no_target_probability,
        )

    def _flush(self) -> None:
        block = Tally()
        block.extend(pending.score for pending in self._pending)
        seen = outcome(block.table(), self.protocol)
        for k, pending in enumerate(self._pending):
            self._tally.add(pending.score, pending.levels)
            iou, none = float(seen.iou[k]), bool(seen.answered_none[k])
            self._write_row(_row(pending, iou, none, self._slicer.labels(pending.levels)))
            if pending.prediction is not None:
                self._offer(pending, pending.prediction, iou, none)
        self._pending.clear()

    def _offer(self, pending: _Pending, prediction: Rle, iou: float, none: bool) -> None:
        score, expression = pending.score, pending.expression

        def make() -> Case:
            assert expression.target is not None
            return Case(
                score.id,
                score.image,
                pending.path,
                expression.text,
                iou,
                score.score,
                expression.target,
                prediction,
                score.gt_no_target,
                none,
            )

        self._worst.offer(-iou, score.id, make)
        if not score.gt_no_target:  # a right "no target" is nothing to look at
            self._best.offer(iou, score.id, make)
        self._typical.offer(0.0, score.id, make)


def answers_from_predictions(
    source: SampleSource, index: PredictionIndex, on_failure: OnFailure
) -> Iterator[Answered]:
    """Every image of a split with what the predictions say; a malformed record is a failure and
    scores zero, as a missing one does.
    """
    for sample in source.iterate(on_failure):
        answers: list[Answer | None] = []
        for expression in sample.expressions:
            try:
                answer = index.find(sample, expression)
                if answer is None and expression.target is not None:
                    told = f"no prediction for {brief(expression.text)}; it scores zero"
                    on_failure(_failure(sample, expression, told))
            except DataError as error:
                answer = None
                on_failure(_failure(sample, expression, f"{error}; it scores zero"))
            answers.append(answer)
        yield Answered(sample, tuple(answers))


def pick_cases(cases: Sequence[Case], number: int) -> list[Case]:
    """The first ``number`` of different images; images repeat only where there are too few."""
    by_image: dict[str, int] = {}
    rounds = []
    for place, case in enumerate(cases):
        rounds.append((by_image.get(case.image, 0), place))
        by_image[case.image] = by_image.get(case.image, 0) + 1
    return [cases[place] for _, place in sorted(sorted(rounds)[:number], key=lambda r: r[1])]


def resize_nearest(rle: Rle, side: int) -> Rle:
    """The mask stretched to ``side`` x ``side`` by Pillow's nearest neighbour, as LAVT does it."""
    picture = Image.fromarray(masks.decode(rle).view(np.uint8))
    stretched = picture.resize((side, side), Image.Resampling.NEAREST)
    return masks.encode(np.asarray(stretched).astype(np.bool_))


def warp_through_letterbox(
    probabilities: np.ndarray[Any, np.dtype[np.float32]], side: int
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Probabilities (H, W) as CRIS has them: on a letterboxed ``side`` square, and back.

    The transforms are those of CRIS's ``getTransformMat``: corners to corners, the image centred;
    there bilinear, back bicubic, zero outside.
    """
    height, width = probabilities.shape
    scale = min(side / height, side / width)
    new_h, new_w = height * scale, width * scale
    left, top = (side - new_w) / 2, (side - new_h) / 2
    own = np.array([[0, 0], [width, 0], [0, height]], np.float32)
    boxed = np.array([[left, top], [new_w + left, top], [left, new_h + top]], np.float32)
    canvas = cv2.warpAffine(
        probabilities, cv2.getAffineTransform(own, boxed), (side, side), flags=cv2.INTER_LINEAR
    )
    back = cv2.warpAffine(
        canvas, cv2.getAffineTransform(boxed, own), (width, height), flags=cv2.INTER_CUBIC
    )
    return np.asarray(back, np.float32)


def _at_resolution(rle: Rle, protocol: Protocol, cache: dict[str, Rle]) -> Rle:
    """The mask where the protocol compares it; masks already at its canvas stay as they are."""
    side = protocol.canvas
    if protocol.resolution != "stretch" or rle["size"] == [side, side]:
        return rle
    if rle["counts"] not in cache:
        cache[rle["counts"]] = resize_nearest(rle, side)
    return cache[rle["counts"]]


def _share(target: Rle) -> float:
    height, width = target["size"]
    return masks.area(target) / (height * width)


def _row(pending: _Pending, iou: float, none: bool, levels: Mapping[str, str]) -> str:
    score = pending.score
    row = {
        "id": score.id,
        "image": score.image,
        "expression": pending.expression.text,
        "iou": iou,
        "intersection": score.intersection,
        "union": score.union,
        "pred_area": score.pred_area,
        "gt_area": score.gt_area,
        "gt_no_target": score.gt_no_target,
        "pred_no_target": score.pred_no_target,
        "answered_none": none,
        "missing": score.missing,
        "score": _known(score.score),
        "no_target_probability": _known(score.no_target_probability),
        "slices": levels,
    }
    return json.dumps(row, ensure_ascii=False)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _failure(sample: Sample, expression: Expression, message: str) -> Failure:
    return Failure(expression.id, sample.image, expression.text, "match", "DataError", message)


# --- one evaluation from answers to files: rows, failures, images that are missing ----------------

REPORT_FILE = "report.json"
ROWS_FILE = "per_expression.jsonl"
FAILURES_FILE = "failures.jsonl"
ANSWERS_FILE = "answers.jsonl"
"""Where a run in progress keeps its answers; a finished run has none."""
_MADE_KEPT = 1000  # generated images that may lie in the scratch folder
_SHOWN = 5  # failures told on the console; all are in the file


class FailureLog:
    """Rows of ``failures.jsonl``, written aside as they come; there is a file only where there are
    any. It comes into place with the reports, or at once where the run stops and no report stands.

    Attributes:
        path: its place.
        by_stage: how many there were of each stage.
    """

    def __init__(self, folder: OutputFolder, console: Console) -> None:
        self.path = folder.path / FAILURES_FILE
        self.by_stage: Counter[str] = Counter()
        self._console = console
        self._lock = threading.Lock()
        self._stream: TextIO | None = None
        self._folder = folder

    def __call__(self, failure: Failure) -> None:
        """Take one failure in; from any thread."""
        with self._lock:
            if self._stream is None:
                part = create(self._folder.staging / FAILURES_FILE)
                self._stream = TextIOWrapper(part, "utf-8", "backslashreplace")
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

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._stream is None:
            return
        self._stream.close()
        if kind is not None and not (self._folder.path / REPORT_FILE).exists():
            self._folder.place([(self._folder.staging / FAILURES_FILE, FAILURES_FILE)])


@dataclass(frozen=True, slots=True)
class EvalRun:
    """A finished evaluation.

    Attributes:
        seconds: the whole run by the clock.
        rows: the file of its expressions, yet to come into place.
    """

    scored: Scored
    seconds: float
    rows: Path


def run_evaluation(
    source: SampleSource,
    answers: Iterator[Answered],
    protocol: Protocol,
    folder: OutputFolder,
    console: Console,
    custom: Sequence[CustomSlice] = (),
) -> EvalRun:
    """Score every answered image and write ``per_expression.jsonl`` aside.

    Raises:
        DataError: nothing could be scored.
        OutputError: the file cannot be written.
    """
    started = time.perf_counter()
    part = folder.staging / ROWS_FILE
    made: set[Path] = set()
    with writing(folder.path / ROWS_FILE):
        with part.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            scorer = Scorer(protocol, lambda line: stream.write(f"{line}\n"), custom)
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
        sync_file(part)
    return EvalRun(scored, time.perf_counter() - started, part)


def _tidy(made: set[Path], latest: Path, scorer: Scorer) -> None:
    """Delete generated images that are scored and in no case, so that they do not pile up."""
    made.add(latest)
    if len(made) > _MADE_KEPT:
        for path in made - scorer.pictured():
            path.unlink(missing_ok=True)
            made.discard(path)


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
    """The error of a split of which no image is found, or that has none."""
    if not absent:
        return DataError(
            f"{source.dataset} {source.split} holds no expressions",
            "give a file, a split or a part of one that has some",
        )
    first = source.groups[0].image
    places = ", ".join(str(place) for place in sorted(looked)[:4])
    return DataError(
        f"none of the {absent} images of {source.dataset} {source.split} was found; looked for "
        f"{first} and the others in {places}",
        f"give {setting('image_root', 'DIR')}, the folder in which these names start",
    )
