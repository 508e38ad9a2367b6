"""From the network's answers to results: RLE, no-target rule, masks kept, order restored."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.images.files import FileStamp
from risam_cli.errors import (
    NAME_ERRORS,
    ImageError,
    OutputError,
    RisamError,
    machine_error,
    reason_of,
    told,
)
from risam_cli.files.write import CHECK, shown
from risam_cli.inference.compute import NetworkAnswer
from risam_cli.inference.loading import Loaded
from risam_cli.inference.mask_rules import unpacked
from risam_cli.masks import rle as masks
from risam_cli.types import Expression, Failure, Prediction, Rle, Sample

T = TypeVar("T")
_WAITING_BYTES = 256 << 20  # full-size masks that may wait for a thread


@dataclass(frozen=True, slots=True)
class Raw:
    """What the network said, before the no-target rule.

    Attributes:
        mask: as thresholded, even where nothing fits.
        iou: predicted IoU of that mask, 0..1.
        no_target: probability that nothing fits, 0..1.
    """

    mask: Rle
    iou: float
    no_target: float


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What became of one sample.

    Attributes:
        predictions: in the order of its expressions, without those that failed.
        failures: one for each expression that failed.
        raw: one beside each prediction, where settings ask for it; else empty.
        sha256: of the image file; None where it could not be read.
        stamp: of the image file; None where there is none.
        seconds: spent on this sample: ``load``, ``encode``, ``decode``, ``finish``.
    """

    sample: Sample
    predictions: tuple[Prediction, ...]
    failures: tuple[Failure, ...]
    raw: tuple[Raw, ...] = ()
    sha256: str | None = None
    stamp: FileStamp | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class MaskSink(Protocol):
    """Takes full-size masks as they are made; called from several threads.

    An OSError or OutputError that it raises fails the expression at stage "write"; a full or
    read-only disk ends the run.
    """

    def save(
        self,
        sample: Sample,
        expression: Expression,
        mask: NDArray[np.bool_],
        instance: int | None = None,
    ) -> str | None:
        """Keeps one mask (H, W) and gives what the record says in ``mask``.

        Args:
            instance: its number among those of the expression, where they are kept one by one.
        """

    def finish(self, sample: Sample, predictions: Sequence[Prediction]) -> None:
        """Called once all masks of a sample are kept."""


@dataclass(slots=True)
class _Open(Generic[T]):
    """A sample on its way out."""

    sample: Sample
    item: T
    loaded: Loaded
    outcomes: list[list[tuple[Prediction, Raw | None]] | Failure | None]
    left: int  # outcomes to come, and one for the batch
    seconds: dict[str, float]
    computed: bool = False  # its batch is through the network
    done: bool = False
    fatal: Exception | None = None

    def result(self) -> ImageResult:
        good = [one for found in self.outcomes if isinstance(found, list) for one in found]
        image = self.loaded.image
        return ImageResult(
            self.sample,
            tuple(prediction for prediction, _ in good),
            tuple(outcome for outcome in self.outcomes if isinstance(outcome, Failure)),
            tuple(raw for _, raw in good if raw is not None),
            image.sha256 if image is not None else None,
            self.loaded.stamp,
            self.seconds,
        )


class Finishers(Generic[T]):
    """A bounded pool that finishes answers; results come out in the order of the source.

    Args:
        no_target_threshold: probability of "nothing fits" above which the mask is emptied.
        keep_raw: also give the mask before that rule.
        sink: keeps full-size masks.
    """

    def __init__(self, no_target_threshold: float, keep_raw: bool, sink: MaskSink | None) -> None:
        self._no_target_threshold = no_target_threshold
        self._keep_raw = keep_raw
        self._sink = sink
        self._changed = threading.Condition()
        self._waiting_bytes = 0
        self._open: dict[int, _Open[T]] = {}
        self._next = 0
        self._ended = False
        self._error: BaseException | None = None
        self._pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), "risam-finisher")

    def __enter__(self) -> Finishers[T]:
        return self

    def __exit__(self, *unused: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, index: int, sample: Sample, item: T, loaded: Loaded) -> bool:
        """Begins a sample; False where nothing is to be asked, for its image is not as it must be.

        Every sample that is begun must be given to :meth:`computed`.

        Args:
            index: its number in the source, from 0.
            item: comes out beside its result.
        """
        count = len(sample.expressions)
        wrong = _wrong(sample, loaded)
        entry = _Open(sample, item, loaded, [None] * count, 1 if wrong else count + 1, {})
        if wrong:
            entry.outcomes = [_failure(sample, k, "decode", *wrong) for k in range(count)]
        with self._changed:
            self._open[index] = entry
        return not wrong

    def computed(self, indices: Sequence[int], **seconds: float) -> None:
        """Says that the samples' batch is through the network, and what it took for all."""
        with self._changed:
            entries = [self._open[index] for index in indices]
            for entry in entries:
                entry.computed = True
                for part, value in seconds.items():
                    entry.seconds[part] = entry.seconds.get(part, 0.0) + value / len(indices)
        for entry in entries:
            self._pool.submit(self._one_less, entry)

    def finish(self, index: int, number: int, answer: NetworkAnswer) -> None:
        """Has the outcome of a sample's expression made in a thread; waits for room first."""
        size = max((mask.nbytes for mask in answer.masks), default=0)
        with self._changed:
            # One mask larger than all the room passes when it is alone.
            while self._waiting_bytes and self._waiting_bytes + size > _WAITING_BYTES:
                self._changed.wait()
            self._waiting_bytes += size
            entry = self._open[index]
        self._pool.submit(self._finish, entry, number, answer, size)

    def end(self, error: BaseException | None) -> None:
        """Says that nothing more is begun.

        Args:
            error: to be raised once all that was begun has come out.
        """
        with self._changed:
            self._ended = True
            self._error = error
            self._changed.notify_all()

    def results(self) -> Iterator[tuple[T, ImageResult]]:
        """The results in order, each beside its item, each as soon as it is ready, to the end.

        Raises:
            OutputError: masks cannot be kept any more.
            BaseException: what :meth:`end` was given.
        """
        while True:
            with self._changed:
                while not self._is_ready():
                    # With a time, so that Ctrl-C comes through on every system.
                    self._changed.wait(1.0)
                entry = self._open.pop(self._next, None)
                self._next += 1
            if entry is not None and entry.fatal is not None:
                raise entry.fatal
            if entry is None or not entry.done:
                if self._error is not None:
                    raise self._error
                return
            yield entry.item, entry.result()

    def _is_ready(self) -> bool:
        """Whether the next sample has its outcomes, or never will."""
        entry = self._open.get(self._next)
        if entry is None:
            return self._ended
        return entry.done or entry.fatal is not None or (self._ended and not entry.computed)

    # --- in the threads ---------------------------------------------------------------------------

    def _finish(self, entry: _Open[T], number: int, answer: NetworkAnswer, size: int) -> None:
        started = time.perf_counter()
        fatal: Exception | None = None
        outcome: list[tuple[Prediction, Raw | None]] | Failure
        try:
            outcome = self._outcome(entry, number, answer)
        except Exception as error:
            outcome = _not_written(entry.sample, number, error)
            fatal = _fatal(error)
        with self._changed:
            entry.outcomes[number] = outcome
            entry.fatal = fatal or entry.fatal
            spent = time.perf_counter() - started
            entry.seconds["finish"] = entry.seconds.get("finish", 0.0) + spent
            self._waiting_bytes -= size
            self._changed.notify_all()
        self._one_less(entry)

    def _one_less(self, entry: _Open[T]) -> None:
        """Counts down; the last one closes the sample."""
        with self._changed:
            entry.left -= 1
            last = entry.left == 0
        if not last:
            return
        fatal = None
        if self._sink is not None and entry.fatal is None:
            fatal = self._close(entry, self._sink)
        with self._changed:
            entry.fatal = fatal or entry.fatal
            entry.done = True
            self._changed.notify_all()

    def _outcome(
        self, entry: _Open[T], number: int, answer: NetworkAnswer
    ) -> list[tuple[Prediction, Raw | None]] | Failure:
        expression = entry.sample.expressions[number]
        if answer.error:
            message = f"{entry.sample.image}: {expression.text!r}: {answer.error}"
            return _failure(entry.sample, number, "predict", answer.error_kind, message)
        nothing = answer.empty or answer.no_target > self._no_target_threshold
        each: Sequence[int | None] = [None]
        if answer.by_instance and not nothing:
            each = range(len(answer.masks))
        return [self._prediction(entry.sample, expression, answer, nothing, k) for k in each]

    def _prediction(
        self,
        sample: Sample,
        expression: Expression,
        answer: NetworkAnswer,
        nothing: bool,
        instance: int | None,
    ) -> tuple[Prediction, Raw | None]:
        """The record of one of an answer's masks."""
        mask, iou = unpacked(answer.masks[instance or 0]), answer.scores[instance or 0]
        shown = np.zeros_like(mask) if nothing else mask
        rle = masks.encode(shown)
        raw = None
        if self._keep_raw:
            whole = masks.encode(mask) if nothing else rle
            raw = Raw(whole, iou, answer.no_target)
        name = self._sink.save(sample, expression, shown, instance) if self._sink else None
        height, width = mask.shape
        prediction = Prediction(
            id=expression.id,
            image=sample.image,
            expression=expression.text,
            height=height,
            width=width,
            segmentation=rle,
            bbox=masks.bbox(rle),
            area=masks.area(rle),
            score=score(answer.no_target if nothing else iou),
            no_target=nothing,
            mask=name,
            notes=answer.notes,
            instance=instance,
            unknown_words=answer.unknown,
        )
        return prediction, raw

    def _close(self, entry: _Open[T], sink: MaskSink) -> Exception | None:
        """Tells the sink that a sample is complete; the error that ends the run, if any."""
        good = [one for found in entry.outcomes if isinstance(found, list) for one, _ in found]
        try:
            sink.finish(entry.sample, good)
        except Exception as error:
            for number, outcome in enumerate(entry.outcomes):
                if isinstance(outcome, list):
                    entry.outcomes[number] = _not_written(entry.sample, number, error)
            return _fatal(error)
        return None


def score(value: float) -> float:
    """How good an answer probably is, 0..1, to six digits (ours).

    Args:
        value: the predicted IoU of its mask, or how sure the model is of it; where the answer is
            "nothing fits", the probability of that, which is the IoU to be expected of an empty
            mask.
    """
    return round(min(1.0, max(0.0, value)), 6)


def _wrong(sample: Sample, loaded: Loaded) -> tuple[str, str] | None:
    """Kind and message of what is wrong with a sample's image."""
    if loaded.image is None:
        return "ImageError", told(loaded.error)
    if sample.size is not None and sample.size != loaded.image.size:
        (height, width), (said_height, said_width) = loaded.image.size, sample.size
        return "DataError", (
            f"{sample.path}: the image is {width}x{height}, its annotation says "
            f"{said_width}x{said_height}; name the images that were annotated"
        )
    return None


def _failure(sample: Sample, number: int, stage: str, kind: str, message: str) -> Failure:
    expression = sample.expressions[number]
    return Failure(expression.id, sample.image, expression.text, stage, kind, message)


def _not_written(sample: Sample, number: int, error: Exception) -> Failure:
    kind = type(error).__name__
    return _failure(sample, number, "write", kind, " ".join(str(error).split()) or kind)


def _fatal(error: Exception) -> Exception | None:
    """The error to end the run with, where every later sample would meet it too."""
    if (machine := machine_error(error)) is not None:
        return machine
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and not isinstance(error, ImageError):
        if cause.errno in NAME_ERRORS:
            return None  # another name would do
        # A file of our own that the system refuses: every later one would fail as well.
        if isinstance(error, OutputError):
            return error
        where = shown(cause.filename or "the output folder")
        return OutputError(f"{where}: {reason_of(cause)}", CHECK)
    # An image that is gone by the time that its overlay is drawn costs that overlay alone. Other
    # errors of the family speak for themselves; anything else fails its item only.
    alone = isinstance(error, (OutputError, ImageError)) or not isinstance(error, RisamError)
    return None if alone else error
