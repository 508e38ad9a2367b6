"""Decodes images ahead of the network, in threads or in processes, and survives both.

A worker process that dies, on a file that crashes a decoder or by the hand of the kernel, is
replaced and its image retried once. An image that takes longer than the time limit, on a network
drive that stalls, fails alone. Results are futures, so the order is the caller's.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from risam_cli.data.images.files import FileStamp, file_stamp
from risam_cli.data.images.images import MAX_PIXELS, EncoderImage, read_for_encoder
from risam_cli.errors import ImageError

if TYPE_CHECKING:
    from risam_cli.inference.ahead import Ahead

TIMEOUT = 120.0
"""Seconds that reading and decoding one image may take."""

_START_TIMEOUT = 300.0


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """How images are loaded.

    Attributes:
        size: the encoder's side; images come with their longest side at it.
        workers: loader processes; 0 decodes in threads of this process.
        max_pixels: larger images are refused.
        timeout: seconds for one image.
        full_decode: decode every pixel before scaling; see :mod:`risam_cli.data.images.images`.
        threads: that decode where there are no processes.
    """

    size: int
    workers: int = 0
    max_pixels: int = MAX_PIXELS
    timeout: float = TIMEOUT
    full_decode: bool = False
    threads: int = 2


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of one file.

    Attributes:
        image: None where it failed.
        error: one line, where it failed.
        stamp: of the file, as far as there was one: by it a later run knows a mended file.
        seconds: taken to read, decode and scale.
        ahead: what was got ready of the image in this process, if the loader was asked to.
    """

    image: EncoderImage | None
    error: str
    stamp: FileStamp | None
    seconds: float
    ahead: Ahead | None = None


Load = Callable[[Path, LoaderSettings], Loaded]


def default_workers(device_type: str) -> int:
    """Loader processes where the user names no number.

    On a CPU the network takes all cores and decoding hides in a thread beside it; a GPU wants its
    images from several processes.
    """
    if device_type == "cpu":
        return 0
    return max(1, min(8, (os.cpu_count() or 2) - 1))


class ImageLoader:
    """Loads images in the background; a context manager that leaves no process behind.

    Args:
        load: loads one file; a function of a module, so that processes can be given it.
        prepare: called with each loaded image, in a thread of this process.
    """

    def __init__(
        self,
        settings: LoaderSettings,
        load: Load | None = None,
        prepare: Callable[[EncoderImage], Ahead] | None = None,
    ) -> None:
        self._settings = settings
        self._load = load or load_image
        self._prepare = prepare
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._lanes: list[_Lane] = []
        self._context = _process_context() if settings.workers else None
        for _ in range(settings.workers or settings.threads):
            self._open_lane()

    @property
    def lanes(self) -> int:
        """How many images are loaded at a time."""
        return len(self._lanes)

    def __enter__(self) -> ImageLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, path: Path) -> Future[Loaded]:
        """Starts on a file; the future never raises what the file caused."""
        task = _Task(path, Future())
        self._tasks.put(task)
        return task.future

    def give_up_on_stalled(self) -> None:
        """Fails the images over their time and goes on without the threads that hold them.

        Processes are killed by their own lane; a thread cannot be, it is left behind.
        """
        if self._context is not None:
            return
        limit = time.monotonic() - self._settings.timeout
        with self._lock:
            stalled = [lane for lane in self._lanes if lane.busy_since() < limit]
            for lane in stalled:
                self._lanes.remove(lane)
        for lane in stalled:
            lane.abandon(timed_out(self._settings.timeout))
            self._open_lane()

    def close(self) -> None:
        """Ends all workers; images that were not begun are dropped."""
        with self._lock:
            lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.stop()
        for _ in lanes:
            self._tasks.put(None)

    def _open_lane(self) -> None:
        work: _Work = (
            _InProcess(self._settings, self._load, self._context)
            if self._context is not None
            else _InThread(self._settings, self._load)
        )
        lane = _Lane(self._tasks, work, self._prepare)
        with self._lock:
            self._lanes.append(lane)
        lane.start()


# --- lanes: one thread each, that works itself or minds a process ---------------------------------


@dataclass(slots=True)
class _Task:
    path: Path
    future: Future[Loaded]


class _Work(Protocol):
    def load(self, path: Path) -> Loaded: ...

    def stop(self) -> None: ...


class _Lane(threading.Thread):
    """Takes one task after another; a daemon, so that a stalled drive cannot hold the exit."""

    def __init__(
        self,
        tasks: queue.SimpleQueue[_Task | None],
        work: _Work,
        prepare: Callable[[EncoderImage], Ahead] | None,
    ) -> None:
        super().__init__(daemon=True, name="risam-loader")
        self._tasks = tasks
        self._work = work
        self._prepare = prepare
        self._lock = threading.Lock()
        self._task: _Task | None = None
        self._since = float("inf")
        self._stopped = False

    def run(self) -> None:
        while not self._stopped:
            task = self._tasks.get()
            if task is None:
                break
            with self._lock:
                self._task, self._since = task, time.monotonic()
            try:
                loaded = self._work.load(task.path)
                if self._prepare is not None and loaded.image is not None:
                    loaded = replace(loaded, ahead=self._prepare(loaded.image))
            except Exception as error:  # a lane must outlive whatever one image does to it
                loaded = _failed(task.path, f"{type(error).__name__}: {error}", 0.0)
            # Set outside of the lock: whoever waits on the future may come back for it.
            if self._release(task):
                task.future.set_result(loaded)
        self._work.stop()

    def busy_since(self) -> float:
        """When the task in hand was begun, on the monotonic clock; infinite where there is none."""
        return self._since

    def abandon(self, why: str) -> None:
        """Fails the task in hand and ends the lane, should it ever come back."""
        self._stopped = True
        task = self._task
        if task is not None and self._release(task):
            # No look at the file: the drive that stalls would stall this thread as well.
            task.future.set_result(Loaded(None, f"{task.path}: {why}", None, 0.0))

    def stop(self) -> None:
        self._stopped = True
        self._work.stop()

    def _release(self, task: _Task) -> bool:
        """Whether the caller, alone, may say what became of the task."""
        with self._lock:
            mine = self._task is task
            if mine:
                self._task, self._since = None, float("inf")
            return mine


class _InThread:
    """Decoding in the lane's own thread: Pillow and OpenCV let others run meanwhile."""

    def __init__(self, settings: LoaderSettings, load: Load) -> None:
        self._settings = settings
        self._load = load

    def load(self, path: Path) -> Loaded:
        return self._load(path, self._settings)

    def stop(self) -> None:
        pass


class _InProcess:
    """Decoding in a process of its own, started when it is first needed."""

    def __init__(self, settings: LoaderSettings, load: Load, context: BaseContext) -> None:
        self._settings = settings
        self._load = load
        self._context = context
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._stopping = False

    def load(self, path: Path) -> Loaded:
        started = time.monotonic()
        for _ in range(2):
            try:
                connection = self._connect()
                connection.send(path)
                if connection.poll(self._settings.timeout):
                    loaded: Loaded = connection.recv()
                    return loaded
                self._kill()
                why = timed_out(self._settings.timeout)
                return Loaded(None, f"{path}: {why}", None, self._settings.timeout)
            except (EOFError, OSError):
                code = self._kill()
                if self._stopping:
                    break
        why = f"the loader process died on it twice ({_ending(code)})"
        return _failed(path, why, time.monotonic() - started)

    def stop(self) -> None:
        self._stopping = True
        self._kill()

    def _connect(self) -> Connection:
        if self._connection is None or self._process is None or not self._process.is_alive():
            self._kill()
            ours, theirs = self._context.Pipe()
            process = self._context.Process(  # type: ignore[attr-defined]
                target=_serve,
                args=(theirs, self._load, self._settings),
                daemon=True,
                name="risam-loader",
            )
            process.start()
            theirs.close()
            self._process, self._connection = process, ours
            # Its start is not the image's time.
            if not ours.poll(_START_TIMEOUT):
                raise OSError("a loader process did not start")
            ours.recv()
        return self._connection

    def _kill(self) -> int | None:
        process, connection = self._process, self._connection
        self._process = self._connection = None
        code = None
        if process is not None:
            process.join(0.2 if connection is not None and not self._stopping else 0)
            code = process.exitcode
            if code is None:
                process.kill()
                process.join(5)
        if connection is not None:
            connection.close()
        return code


def load_image(path: Path, settings: LoaderSettings) -> Loaded:
    """Loads one file here and now."""
    started = time.perf_counter()
    try:
        image = read_for_encoder(
            path, settings.size, settings.max_pixels, full_decode=settings.full_decode
        )
    except ImageError as error:
        return _failed(path, str(error), time.perf_counter() - started)
    except MemoryError:
        why = f"{path}: not enough memory to decode it"
        return _failed(path, why, time.perf_counter() - started)
    return Loaded(image, "", image.stamp, time.perf_counter() - started)


def _serve(connection: Connection, load: Load, settings: LoaderSettings) -> None:
    """A worker process: paths in, results out, until the other end is gone."""
    # Ctrl-C reaches the whole group; it is the main process that decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        connection.send("ready")
        while True:
            connection.send(load(connection.recv(), settings))
    except (EOFError, OSError):
        pass


def _failed(path: Path, why: str, seconds: float) -> Loaded:
    text = why if str(path) in why else f"{path}: {why}"
    return Loaded(None, text, file_stamp(path), seconds)


def timed_out(seconds: float) -> str:
    """What is said of a file that took longer than the limit."""
    return f"reading it took longer than {seconds:g} s; the drive may be stalled"


def _ending(code: int | None) -> str:
    if code is None:
        return "it stopped answering"
    if code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"exit code {code}"


def _process_context() -> BaseContext:
    """Processes forked from a clean server, so that none inherits torch's threads or locks."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        return context
    return multiprocessing.get_context("spawn")
