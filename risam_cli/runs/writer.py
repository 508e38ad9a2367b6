"""Writes the output folder behind the network: nothing counts as done before it is on the disk.

Masks are made in the finishers' threads and staged under names of no meaning. A thread of its own
then commits what is ready, many samples at a time: records and failures are appended, the ledger
says what belongs to them; once that is synced, the staged masks move to their places; only then are
the records streamed and counted. A kill in between leaves what checksums tell apart from done.
"""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from risam_cli.data.images.images import Bands, Rgb, open_for_encoder, open_rgb
from risam_cli.data.inputs.inputs import Entry
from risam_cli.drawing.overlay import draw_overlay
from risam_cli.drawing.png import encode_mask, encode_rgb
from risam_cli.errors import ImageError, OutputError, machine_error, reason_of, setting
from risam_cli.files.jsonlines import seal
from risam_cli.files.patience import within
from risam_cli.files.write import CHECK, make_file, shown, sync_folder, writing
from risam_cli.inference.finish import ImageResult
from risam_cli.inference.loading import TIMEOUT, timed_out
from risam_cli.masks import rle as masks
from risam_cli.outputs.gallery import encode_item, outline, small_size
from risam_cli.outputs.naming import AS_GIVEN, Names, gallery_name, mask_name, overlay_name
from risam_cli.outputs.records import failure_to_json, to_json
from risam_cli.runs.folder import RunFolder
from risam_cli.runs.ledger import FileMark, LedgerLine, Redone, Span
from risam_cli.runs.resume import Place
from risam_cli.runs.splice import splice_redone
from risam_cli.types import Expression, Failure, Prediction, Sample

_QUEUED = 512  # results that may wait for the disk
_AT_ONCE = 256  # results committed together


# --- files of a sample, made in the finishers' threads --------------------------------------------


@dataclass(frozen=True, slots=True)
class Saving:
    """What is written beside the records.

    Attributes:
        png: the masks.
        overlay: the image with all its masks drawn into it.
        max_pixels, timeout, bands: as for reading the image.
        html: a gallery of the run, see :mod:`risam_cli.outputs.gallery`.
        files: what images are called in the names of files.
    """

    png: bool
    overlay: bool
    max_pixels: int
    html: bool = False
    timeout: float = TIMEOUT
    bands: Bands | None = None
    files: Names = AS_GIVEN

    @property
    def names(self) -> list[str]:
        """What is written, by the names that the setting ``save`` takes."""
        return [name for name in ("png", "overlay", "html") if getattr(self, name)]


@dataclass(frozen=True, slots=True)
class Staged:
    """A file in the staging folder, and what it will be."""

    path: Path
    mark: FileMark


class Stager:
    """Makes masks, overlays and gallery items in the staging folder; see MaskSink."""

    def __init__(self, folder: RunFolder, saving: Saving) -> None:
        self._folder = folder
        self._saving = saving
        self._numbers = itertools.count()
        self._staged: dict[str, Staged] = {}
        self._names: dict[tuple[str, int], list[str]] = {}  # of masks, by image and expression
        self._outlines: dict[str, dict[int | None, str]] = {}  # until their sample is finished

    def save(
        self,
        sample: Sample,
        expression: Expression,
        mask: NDArray[np.bool_],
        instance: int | None = None,
    ) -> str | None:
        """Stages one mask; gives the name that it will have."""
        if self._saving.html:
            self._outlines.setdefault(expression.id, {})[instance] = outline(mask)
        if not self._saving.png:
            return None
        name = mask_name(
            sample.image, expression.number, expression.text, instance, self._saving.files
        )
        self._names.setdefault((sample.image, expression.number), []).append(name)
        self._stage(name, encode_mask(mask))
        return name

    def finish(self, sample: Sample, predictions: Sequence[Prediction]) -> None:
        """Stages the overlay of a sample and its item in the gallery."""
        traced = {one.id: self._outlines.pop(one.id, {}) for one in sample.expressions}
        if not predictions or not (self._saving.overlay or self._saving.html):
            return
        own, first = (predictions[0].height, predictions[0].width), sample.expressions[0].number
        bands = self._saving.bands
        if self._saving.overlay:
            rgb = self._read(sample.path, lambda path, most: open_rgb(path, most, bands))
            drawn = draw_overlay(
                rgb,
                [masks.decode(one.segmentation) for one in predictions],
                [one.expression for one in predictions],
            )
            self._stage(overlay_name(sample.image, first, self._saving.files), encode_rgb(drawn))
        else:
            side = max(small_size(*own))
            rgb = self._read(
                sample.path, lambda path, most: open_for_encoder(path, side, most, bands)[0]
            )
        if self._saving.html:
            item = encode_item(rgb, own, [traced[one.id][one.instance] for one in predictions])
            self._stage(gallery_name(sample.image, first, self._saving.files), item)

    def take(self, sample: Sample, predictions: Sequence[Prediction]) -> list[Staged]:
        """The staged files of a sample's records; those of expressions that failed are deleted."""
        names = [one.mask for one in predictions if one.mask is not None]
        names += self._of_whole(sample) if predictions else ()
        taken = [self._staged.pop(name) for name in names]
        for name in self._names_of(sample):
            left = self._staged.pop(name, None)
            if left is not None:
                left.path.unlink(missing_ok=True)
        return taken

    def _names_of(self, sample: Sample) -> Iterator[str]:
        """All names that staged files of a sample may have."""
        for one in sample.expressions:
            yield from self._names.pop((sample.image, one.number), ())
        yield from self._of_whole(sample)

    def _of_whole(self, sample: Sample) -> Iterator[str]:
        """The names of what is made of all expressions of a sample together."""
        number = sample.expressions[0].number if sample.expressions else None
        if self._saving.overlay and number is not None:
            yield overlay_name(sample.image, number, self._saving.files)
        if self._saving.html and number is not None:
            yield gallery_name(sample.image, number, self._saving.files)

    def _read(self, path: Path, read: Callable[[Path, int], Rgb]) -> Rgb:
        """The image once more; a drive may stall now that did not before."""
        try:
            return within(self._saving.timeout, lambda: read(path, self._saving.max_pixels))
        except TimeoutError:
            raise ImageError(f"{path}: {timed_out(self._saving.timeout)}") from None

    def _stage(self, name: str, data: bytes) -> None:
        path = self._folder.staging / str(next(self._numbers))
        try:
            with writing(self._folder.path / name):
                make_file(path, data)
        except OutputError:
            with suppress(OSError):
                path.unlink()
            raise
        self._staged[name] = Staged(path, FileMark(name, len(data), zlib.crc32(data)))


# --- what is committed ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunCounts:
    """What a commit brought.

    Attributes:
        entries: new ones; again: those in the place of an earlier result.
    """

    entries: int = 0
    again: int = 0
    records: int = 0
    no_target: int = 0
    failures: tuple[Failure, ...] = ()


@dataclass(slots=True)
class _Done:
    """One entry, as it will be written."""

    entry: Entry
    place: Place
    result: ImageResult
    failures: tuple[Failure, ...]
    predictions_text: bytes
    failures_text: bytes
    staged: list[Staged]


class RunWriter:
    """Commits results in the order given; a context manager that ends with all of them written.

    Args:
        folder: locked and prepared.
        stager: where the masks are.
        on_commit: told of every commit, in the writer's thread.
        stream: gets the records of the whole run, once they are on the disk.
    """

    def __init__(
        self,
        folder: RunFolder,
        stager: Stager,
        on_commit: Callable[[RunCounts], None],
        stream: BinaryIO | None = None,
    ) -> None:
        self._folder = folder
        self._stager = stager
        self._on_commit = on_commit
        self._stream = stream
        self._queue: queue.Queue[tuple[Entry, Place, ImageResult]] = queue.Queue(_QUEUED)
        self._error: BaseException | None = None
        self._broken = threading.Event()
        self._ending = threading.Event()
        self._complete = False
        self._redo: BinaryIO | None = None  # closed by the thread, as the next
        self._files: tuple[BinaryIO, ...] = ()  # predictions, failures, ledger
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="risam-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def complete(self) -> None:
        """Says that everything that was to do has been submitted."""
        self._complete = True

    def submit(self, entry: Entry, place: Place, result: ImageResult) -> None:
        """Queues one entry; waits where the disk is behind.

        Args:
            place: among what is there; all with the place ``END`` come last.

        Raises:
            OutputError: what was given before could not be written.
        """
        while True:
            if self._broken.is_set():
                assert self._error is not None
                raise self._error
            try:
                self._queue.put((entry, place, result), timeout=0.2)
                return
            except queue.Full:
                continue

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while items := self._next():
                started = time.perf_counter()
                self._write([self._done(*item) for item in items])
                self.seconds += time.perf_counter() - started
            if self._complete:
                self._open_files()
        except BaseException as error:
            if isinstance(error, BrokenPipeError) and self._stream is not None:
                _discard(self._stream)
            self._error = _as_output_error(error, self._folder.path)
            self._broken.set()
        finally:
            for file in (*filter(None, [self._redo]), *self._files):
                with suppress(OSError):  # a full disk was told of already
                    file.close()

    def _next(self) -> list[tuple[Entry, Place, ImageResult]]:
        """All that is queued, as soon as there is anything; nothing at the end."""
        items: list[tuple[Entry, Place, ImageResult]] = []
        while not items and not (self._ending.is_set() and self._queue.empty()):
            with suppress(queue.Empty):
                items.append(self._queue.get(timeout=0.05))
        while items and len(items) < _AT_ONCE and not self._queue.empty():
            items.append(self._queue.get())
        return items

    def _done(self, entry: Entry, place: Place, result: ImageResult) -> _Done:
        failures = [*entry.failures, *(_placed(one, entry.where) for one in result.failures)]
        return _Done(
            entry,
            place,
            result,
            tuple(failures),
            _lines(to_json(one) for one in result.predictions),
            _lines(failure_to_json(one) for one in failures),
            self._stager.take(result.sample, result.predictions),
        )

    def _write(self, done: list[_Done]) -> None:
        inside = [one for one in done if one.place is not Place.END]
        fresh = [one for one in done if one.place is Place.END]
        if inside:
            self._write_inside(inside)
        if fresh:
            self._append(fresh)
        if done:
            again = sum(one.place is Place.AGAIN for one in done)
            self._on_commit(
                RunCounts(
                    len(done) - again,
                    again,
                    sum(len(one.result.predictions) for one in done),
                    sum(p.no_target for one in done for p in one.result.predictions),
                    tuple(failure for one in done for failure in one.failures),
                )
            )

    def _append(self, done: list[_Done]) -> None:
        """Records, failures, then the ledger; once they are on the disk, the masks."""
        predictions, failures, ledger = files = self._open_files()
        lines = []
        for one in done:
            line = _ledger_line(one, predictions.tell(), failures.tell())
            predictions.write(one.predictions_text)
            failures.write(one.failures_text)
            lines.append(seal(line._asdict()))
        predictions.flush()
        failures.flush()
        ledger.write(b"".join(lines))
        ledger.flush()
        for file in files:
            os.fsync(file.fileno())
        self._publish(done)  # not before all that is moved is listed on the disk
        _require_there(ledger, self._folder)
        if self._stream is not None:
            with _stdout_named():
                for one in done:
                    self._stream.write(one.predictions_text)
                self._stream.flush()

    def _write_inside(self, done: list[_Done]) -> None:
        """To the journal: the three files take it over once all that goes inside is there."""
        redo = self._redo = self._redo or self._open_redo()
        for one in done:
            texts = one.predictions_text, one.failures_text
            redo.write(Redone(_ledger_line(one, 0, 0), *texts, self._folder.attempt).to_json())
        redo.flush()
        os.fsync(redo.fileno())
        self._publish(done)

    def _open_redo(self) -> BinaryIO:
        file = open(self._folder.redo, "ab")  # noqa: SIM115 - see _run
        sync_folder(self._folder.private)
        return file

    def _publish(self, done: list[_Done]) -> None:
        """Moves staged files, whose content is synced, to their places, and syncs their names."""
        self._folder.place((staged.path, staged.mark.path) for one in done for staged in one.staged)

    def _open_files(self) -> tuple[BinaryIO, ...]:
        """The three files, open at their ends, once what goes inside is in its place."""
        if not self._files:
            folder = self._folder
            if folder.redo.exists():
                splice_redone(folder)
            folder.end_retry()
            names = (folder.predictions, folder.failures, folder.ledger)
            self._files = tuple(open(path, "ab") for path in names)  # noqa: SIM115 - see _run
            if self._stream is not None:
                with open(folder.predictions, "rb") as before, _stdout_named():
                    shutil.copyfileobj(before, self._stream)
                    self._stream.flush()
        return self._files


def _require_there(ledger: BinaryIO, folder: RunFolder) -> None:
    """Raises OutputError where the folder was deleted and the open files lead nowhere."""
    try:
        there = os.path.samestat(os.fstat(ledger.fileno()), os.stat(folder.ledger))
    except FileNotFoundError:
        there = False
    if not there:
        raise OutputError(
            f"{folder.path} was deleted or replaced during the run",
            f"run again into a new {setting('output')}",
        )


def _ledger_line(done: _Done, predictions: int, failures: int) -> LedgerLine:
    """The line of an entry whose records and failures begin at these places."""
    entry, records, rows = done.entry, done.predictions_text, done.failures_text
    return LedgerLine(
        entry.index,
        entry.key,
        len(done.result.predictions) + len(done.failures),
        done.result.sha256,
        done.result.stamp,
        Span(predictions, len(records), zlib.crc32(records)),
        Span(failures, len(rows), zlib.crc32(rows)),
        tuple(staged.mark for staged in done.staged),
    )


def _placed(failure: Failure, where: str) -> Failure:
    """The failure with its manifest line in front of the message."""
    return replace(failure, message=f"{where}: {failure.message}") if where else failure


def _lines(texts: Iterable[str]) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


@contextmanager
def _stdout_named() -> Iterator[None]:
    """Errors of the stream name it, and not the output folder."""
    try:
        yield
    except OSError as error:
        error.filename = "stdout"
        raise


def _discard(stream: BinaryIO) -> None:
    """Gives what Python still flushes at exit somewhere to go, now that the reader is gone."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _as_output_error(error: BaseException, folder: Path) -> BaseException:
    """A message with a way out for what the system says about disks and pipes."""
    if isinstance(error, BrokenPipeError):
        return OutputError(
            "the reader of stdout is gone; finished work is kept",
            f"continue with {setting('resume')}",
        )
    if (machine := machine_error(error)) is not None:
        return machine
    if isinstance(error, OSError):
        return OutputError(f"{shown(error.filename or folder)}: {reason_of(error)}", CHECK)
    return error
