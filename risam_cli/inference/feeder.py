"""Reads samples ahead, puts those of one image together, and has their images loaded in time.

The source may be a folder walk, a manifest or a pipe that a person types into: it is read in a
thread of its own, never further than a fixed number of samples, and whoever asks for a batch is
given what there is as soon as nothing more is to be had at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from risam_cli.errors import MachineError, parts_of
from risam_cli.inference.loader import ImageLoader
from risam_cli.inference.loading import Loaded
from risam_cli.types import Sample

_IDLE = 0.01  # seconds of waiting for the source after which it counts as idle
_POLL = 0.02  # seconds between two looks at what no one notifies us of


T = TypeVar("T")
_NOTHING = Loaded(None, "", None, 0.0)


@dataclass(frozen=True, slots=True)
class ReadySample(Sample):
    """A sample whose image was in memory already; its ``path`` only tells it from the others.

    Attributes:
        ready: what a loader would have given.
    """

    ready: Loaded = _NOTHING


@dataclass(slots=True)
class ImageJob(Generic[T]):
    """One image with all samples, read ahead so far, that ask about it.

    Attributes:
        samples: each with its number in the source, which counts from 0, and what came with it.
    """

    path: Path
    samples: list[tuple[int, Sample, T]]
    future: Future[Loaded] | None = None

    @property
    def loaded(self) -> Loaded:
        """What became of its image, once it was taken.

        Raises:
            MachineError: the machine has run out of something.
        """
        assert self.future is not None, "the job was not taken from a feeder"
        loaded = self.future.result()
        if loaded.by_machine:
            raise MachineError(*parts_of(loaded.error))
        return loaded


class Feeder(threading.Thread, Generic[T]):
    """Turns a stream of samples into batches of loaded images.

    Args:
        samples: the source, each with what is to come out beside its result; read in this thread,
            closed by nobody else.
        loader: loads the images.
        lookahead: samples that may be read and not yet answered; within half of it the samples
            of one image are put together.
        prefetch: images that may be loaded and not yet taken.
    """

    def __init__(
        self,
        samples: Iterable[tuple[Sample, T]],
        loader: ImageLoader,
        lookahead: int,
        prefetch: int,
    ) -> None:
        super().__init__(daemon=True, name="risam-feeder")
        self._samples = samples
        self._loader = loader
        self._lookahead = lookahead
        self._prefetch = prefetch
        self._changed = threading.Condition()  # guards what follows
        self._jobs: deque[ImageJob[T]] = deque()  # not yet taken, in order
        self._open: dict[Path, ImageJob[T]] = {}  # the same, by path
        self._read = 0  # samples read
        self._out = 0  # samples whose result has left
        self._loading = 0  # jobs at the head that are loaded or being loaded
        self._waiting_since = float("inf")  # when the source was asked for the next sample
        self._full = self._ended = self._stop_asked = False
        self._error: BaseException | None = None

    def run(self) -> None:
        """Reads the source to its end; an error of the source is kept for the one who takes."""
        try:
            source = iter(self._samples)
            while True:
                with self._changed:
                    self._waiting_since = time.monotonic()
                carried = next(source, None)
                with self._changed:
                    self._waiting_since = float("inf")
                    if carried is None:
                        break
                    self._wait_for_room()
                    if self._stop_asked:
                        break
                    self._add(*carried)
        except BaseException as error:  # raised again where the samples are taken
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def take(self, count: int, stop: threading.Event | None = None) -> list[ImageJob[T]] | None:
        """The next jobs whose images are loaded (or failed to), up to ``count`` good ones.

        Waits for at least one; for more only while they are to be had at once.

        Args:
            stop: ends the waiting.

        Returns:
            None at the end of the source, or once stopped.

        Raises:
            BaseException: what the source raised, after all samples before it were taken.
        """
        with self._changed:
            while True:
                if self._stop_asked or (stop is not None and stop.is_set()):
                    return None
                ready = self._ready(count)
                if ready:
                    return [self._pop() for _ in range(ready)]
                if self._ended and not self._jobs:
                    if self._error is not None:
                        raise self._error
                    return None
                self._changed.wait(_POLL)
                self._loader.give_up_on_stalled()

    def is_idle(self) -> bool:
        """Whether all was taken, and nothing more is to be had at once."""
        with self._changed:
            return not self._jobs and self._is_quiet()

    def answered(self, samples: int) -> None:
        """Says that the results of so many more samples have left."""
        with self._changed:
            self._out += samples
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends reading and taking; the source's thread may still be waiting for its source."""
        with self._changed:
            self._stop_asked = True
            self._changed.notify_all()

    # --- under the condition ----------------------------------------------------------------------

    def _wait_for_room(self) -> None:
        while self._read - self._out >= self._lookahead and not self._stop_asked:
            self._full = True
            self._changed.notify_all()
            self._changed.wait(_POLL)
        self._full = False

    def _add(self, sample: Sample, item: T) -> None:
        job = self._open.get(sample.path) if sample.expressions else None
        if job is None:
            job = ImageJob(sample.path, [])
            if sample.expressions:
                self._open[sample.path] = job
            self._jobs.append(job)
        job.samples.append((self._read, sample, item))
        self._read += 1
        self._top_up()

    def _top_up(self) -> None:
        """Has the next images loaded, as many as may be in hand."""
        while self._loading < min(len(self._jobs), self._prefetch):
            job = self._jobs[self._loading]
            self._loading += 1
            sample = job.samples[0][1]
            if not sample.expressions:  # it only keeps its place in the order
                job.future = _at_once(_NOTHING)
                continue
            if isinstance(sample, ReadySample):
                job.future = _at_once(sample.ready)
                continue
            job.future = self._loader.submit(job.path)
            job.future.add_done_callback(self._loaded)

    def _loaded(self, future: Future[Loaded]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _pop(self) -> ImageJob[T]:
        job = self._jobs.popleft()
        if self._open.get(job.path) is job:
            del self._open[job.path]
        self._loading -= 1
        self._top_up()
        return job

    def _is_quiet(self) -> bool:
        """Whether nothing more will come at once."""
        return self._ended or self._full or time.monotonic() - self._waiting_since > _IDLE

    def _ready(self, count: int) -> int:
        """How many jobs at the head make a batch now; 0 to wait for more."""
        quiet = self._is_quiet()
        good = ready = 0
        for job in self._jobs:
            sealed = quiet or self._read - job.samples[0][0] >= self._lookahead // 2
            if job.future is None or not job.future.done() or not sealed:
                # What is being loaded is worth waiting for, so that batches are full.
                return 0 if job.future is not None or not sealed else ready
            ready += 1
            good += job.future.result().image is not None
            if good == count:
                return ready
        return ready if quiet else 0


def _at_once(loaded: Loaded) -> Future[Loaded]:
    future: Future[Loaded] = Future()
    future.set_result(loaded)
    return future
