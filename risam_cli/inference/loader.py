"""Decodes images ahead of the network, in threads or in processes, and survives both.

A worker process that dies, on a file that crashes a decoder or by the hand of the kernel, costs its
image one try; the second time the image fails. An image that takes longer than the time limit, on a
network drive that stalls, fails alone. Results are futures, so the order is the caller's.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver, spawn
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from risam_cli.console.console import get_console
from risam_cli.data.images.bounds import SlowImage
from risam_cli.data.images.images import EncoderImage
from risam_cli.errors import MachineError, RisamError, reason_of
from risam_cli.inference.apart import LoaderProcess, ending
from risam_cli.inference.loading import (
    Load,
    Loaded,
    LoaderSettings,
    failed,
    load_image,
    load_safely,
    over_time,
    unexpected,
)
from risam_cli.interrupts import ignore_ends_of_group

if TYPE_CHECKING:
    from risam_cli.inference.compute import Ahead

_MOST_LEFT = 32  # threads left behind, from where on the run ends
_GRACE = 1.0  # seconds that the end of a process may take
_START_TIMEOUT = 300.0  # seconds that a worker process may take to begin its first image
_TICK = 0.25  # seconds between two looks at processes that send nothing
_EACH = 2  # images that each process is given ahead, as DataLoader has it

# How many worker processes suit a machine is settings' and users' business.
warnings.filterwarnings("ignore", message="This DataLoader will create")


Prepare = Callable[[EncoderImage], "Ahead"]


def open_loader(
    settings: LoaderSettings, load: Load = load_image, prepare: Prepare | None = None
) -> ImageLoader:
    """A loader; a context manager that leaves no process behind.

    Args:
        load: loads one file; a function of a module, so that processes can be given it.
        prepare: called with each loaded image, in a thread of this process.
    """
    if settings.workers:
        return ProcessLoader(settings, load, prepare)
    return ThreadLoader(settings, load, prepare)


def warm_up(workers: int) -> None:
    """Starts what worker processes are forked from: it imports torch while a model is loaded."""
    if workers and _CLEAN == "forkserver":
        _Processes()
        with suppress(OSError):  # told of where the processes themselves cannot be started
            forkserver.ensure_running()


@dataclass(slots=True, eq=False)
class _Task:
    """One image on its way."""

    number: int
    path: Path
    future: Future[Loaded]
    deaths: int = 0  # of processes that had it in hand


def _settle(task: _Task, loaded: Loaded) -> None:
    """Says what became of an image, unless that was said before."""
    with suppress(InvalidStateError):
        task.future.set_result(loaded)


class _Loader:
    """What both kinds of loader have."""

    def __init__(self, settings: LoaderSettings, load: Load, prepare: Prepare | None) -> None:
        self._settings = settings
        self._load = load
        self._prepare = prepare

    def __enter__(self) -> Self:
        return self

    def _prepared(self, task: _Task, loaded: Loaded) -> Loaded:
        try:
            if self._prepare is None or loaded.image is None:
                return loaded
            return replace(loaded, ahead=self._prepare(loaded.image))
        except Exception as error:  # likewise
            return unexpected(task.path, error, loaded.seconds)


# --- threads --------------------------------------------------------------------------------------


class ThreadLoader(_Loader):
    """Decodes in threads of this process: Pillow and OpenCV let others run meanwhile.

    A thread cannot be ended from outside, so files that may take long go to a process of the
    thread's own, and so do all while a thread that had to be left behind lives.
    """

    def __init__(self, settings: LoaderSettings, load: Load, prepare: Prepare | None) -> None:
        super().__init__(settings, load, prepare)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._left: list[_Decoder] = []
        self._apart = False  # whether all files go to processes: while one is left behind
        self._threads = {_Decoder(self._tasks, self._read) for _ in range(settings.threads)}
        self.lanes = settings.threads  # images that are loaded at a time

    def __exit__(self, *exception: object) -> None:
        """Ends all threads; images that were not begun are dropped."""
        for thread in self._threads:
            thread.stopped = True
            thread.process.end()
            self._tasks.put(None)

    def submit(self, path: Path) -> Future[Loaded]:
        """Starts on a file; the future never raises what the file caused."""
        task = _Task(0, path, Future())
        self._tasks.put(task)
        return task.future

    def give_up_on_stalled(self) -> None:
        """Fails the images over their time, and goes on without the threads that hold them.

        Raises:
            MachineError: of those, there are too many.
        """
        if self._left:
            self._left = [thread for thread in self._left if thread.is_alive()]
            self._apart = bool(self._left)
        limit = time.monotonic() - self._settings.timeout
        for thread in list(self._threads):
            hand = thread.hand
            if hand is None or hand[1] >= limit or thread.process.end():
                continue
            if thread.process.is_ending and hand[1] >= limit - _GRACE:
                continue
            thread.stopped = True
            self._threads.remove(thread)
            self._left.append(thread)
            self._apart = True
            _settle(hand[0], over_time(hand[0].path, self._settings.timeout))
            if len(self._left) >= _MOST_LEFT:
                raise MachineError(
                    f"{len(self._left)} files could not be read in time, nor their reading ended",
                    "check the drive that they are on",
                )
            self._threads.add(_Decoder(self._tasks, self._read))

    def _read(self, task: _Task, thread: _Decoder) -> Loaded:
        loaded = None
        if not self._apart:
            with suppress(SlowImage):
                loaded = load_safely(self._load, task.path, self._settings)
        if loaded is None:
            thread.begin(task, _START_TIMEOUT)
            loaded = thread.process.load(
                self._load, task.path, self._settings, lambda: thread.begin(task)
            )
        return self._prepared(task, loaded)


class _Decoder(threading.Thread):
    """Takes one task after another; a daemon, so that a stalled drive cannot hold the exit.

    Attributes:
        hand: the task in hand, and when it was begun on the monotonic clock.
        process: loads what this thread should not.
        stopped: set from outside, ends the thread after the task in hand.
    """

    def __init__(
        self,
        tasks: queue.SimpleQueue[_Task | None],
        read: Callable[[_Task, _Decoder], Loaded],
    ) -> None:
        super().__init__(daemon=True, name="risam-loader")
        self._tasks = tasks
        self._read = read
        self.hand: tuple[_Task, float] | None = None
        self.process = LoaderProcess()
        self.stopped = False
        self.start()

    def begin(self, task: _Task, later: float = 0.0) -> None:
        """Starts the clock of a task, now or so many seconds later."""
        self.hand = task, time.monotonic() + later

    def run(self) -> None:
        while not self.stopped and (task := self._tasks.get()) is not None:
            self.begin(task)
            try:
                loaded = self._read(task, self)
            except Exception as error:
                loaded = unexpected(task.path, error)
            self.hand = None
            _settle(task, loaded)
        self.process.end()


# --- processes ------------------------------------------------------------------------------------


class ProcessLoader(_Loader, threading.Thread):
    """Decodes in the worker processes of torch's ``DataLoader``.

    This thread drives one: its sampler hands out images as they are submitted, so it knows what is
    in flight. Where nothing is submitted it hands out nothing at all (None), for a sampler that
    waited would hold up the images that are loaded already. After a process died or an image was
    over its time, another DataLoader begins with what was in flight.
    """

    def __init__(self, settings: LoaderSettings, load: Load, prepare: Prepare | None) -> None:
        _Loader.__init__(self, settings, load, prepare)
        # Not in the main thread, where DataLoader would raise from a signal handler, anywhere.
        threading.Thread.__init__(self, daemon=True, name="risam-loader")
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: deque[_Task] = deque()
        self._in_flight: dict[int, _Task] = {}  # in the order in which they are to come back
        self._closed = False
        self._error: RisamError | None = None
        self.lanes, self._ahead = _fit_shared_memory(settings)
        if self.lanes < settings.workers:
            get_console().warn(
                f"/dev/shm has room for {self.lanes} worker processes instead of "
                f"{settings.workers}; give a container more (docker run --shm-size)"
            )
        self._context = _Processes()
        self._pool = ThreadPoolExecutor(min(4, self.lanes), "risam-prepare")
        self.start()

    def __exit__(self, *exception: object) -> None:
        """Ends all processes; images that are not loaded by now are dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, path: Path) -> Future[Loaded]:
        """Starts on a file; the future never raises what the file caused."""
        task = _Task(next(self._numbers), path, Future())
        with self._changed:
            if self._error is not None:
                task.future.set_exception(self._error)
            else:
                self._waiting.append(task)
                self._changed.notify_all()
        return task.future

    def give_up_on_stalled(self) -> None:
        """Nothing to do: the thread of this loader looks itself."""

    def run(self) -> None:
        """Drives one DataLoader after another until the loader is closed."""
        try:
            while self._has_work():
                self._drive()
        except Exception as caught:  # no processes to be had: raised where images are taken
            error = RisamError(
                f"images cannot be read in separate processes: {caught}",
                "use 0 workers, which reads them in threads",
            )
            with self._changed:
                self._error = error
                left = [*self._in_flight.values(), *self._waiting]
                self._in_flight.clear()
                self._waiting.clear()
            for task in left:
                task.future.set_exception(error)

    def _has_work(self) -> bool:
        """Waits until an image is to be loaded; False once closed."""
        with self._changed:
            while not (self._closed or self._in_flight or self._waiting):
                self._changed.wait()
            return not self._closed

    def _drive(self) -> None:
        """One DataLoader, until it is closed, a process dies or an image is over its time."""
        hands = _Hands(self._context, self.lanes)
        self._context.started.clear()
        images = iter(
            DataLoader(
                _Images(self._load, self._settings, hands),
                batch_size=None,
                sampler=self._hand_out(),
                num_workers=self.lanes,
                prefetch_factor=self._ahead,
                pin_memory=self._settings.pinned,
                timeout=min(_TICK, self._settings.timeout),
                worker_init_fn=_begin_worker,
                multiprocessing_context=self._context,
                generator=torch.Generator(),  # the caller's random numbers stay what they are
            )
        )
        heard = time.monotonic()
        broken = False
        try:
            while not broken and self._has_work():
                if not self._in_flight:
                    heard = time.monotonic()
                try:
                    sent = next(images)
                except Exception as error:
                    # What DataLoader raises after its timeout leaves it as it was.
                    quiet = "timed out" in str(error)
                    starting = not hands.held() and time.monotonic() - heard > _START_TIMEOUT
                    broken = self._over_time(hands)
                    if not quiet or starting:
                        broken = True
                        self._died(hands, error)
                    continue
                heard = time.monotonic()
                if sent is not None:
                    task = self._in_flight.pop(sent.number)
                    self._pool.submit(self._finish, task, sent)
        finally:
            if broken or self._in_flight:
                self._context.kill()
            del images  # joins its processes

    def _hand_out(self) -> Iterator[_Asked]:
        """The sampler; iterated in this thread."""
        # What the DataLoader before this one had in flight.
        yield from [(task.number, task.path) for task in self._in_flight.values()]
        while True:
            with self._changed:
                task = self._waiting.popleft() if self._waiting else None
                if task is not None:
                    self._in_flight[task.number] = task
            yield None if task is None else (task.number, task.path)

    def _over_time(self, hands: _Hands) -> bool:
        """Fails the images over their time; gives whether there are any."""
        limit = time.monotonic() - self._settings.timeout
        held = [(number, since) for number, since in hands.held() if number in self._in_flight]
        # Those that were begun a moment later are given that moment: what is in hand is lost.
        if not any(since < limit - _TICK for _, since in held):
            return False
        late = [number for number, since in held if since < limit]
        for number in late:
            task = self._in_flight.pop(number)
            task.future.set_result(over_time(task.path, self._settings.timeout))
        return True

    def _died(self, hands: _Hands, error: Exception) -> None:
        """Counts a death against the images that dead processes had in hand."""
        # What a dead process no longer sends is noticed before its end is known.
        living = [process for process in self._context.started if process.is_alive()]
        if len(living) == len(self._context.started):
            wait([process.sentinel for process in living], _GRACE)
        dead = [(k, p) for k, p in enumerate(self._context.started) if p.exitcode is not None]
        ends = {hands.held_by(worker): process.exitcode for worker, process in dead}
        guilty = {n: end for n, end in ends.items() if n in self._in_flight}
        if not guilty and self._in_flight:
            # It died on its way, or never came up: the image that is waited for pays for it, so
            # that this comes to an end.
            guilty = {next(iter(self._in_flight)): dead[0][1].exitcode if dead else None}
        for number, code in guilty.items():
            task = self._in_flight[number]
            task.deaths += 1
            if task.deaths == 2:
                del self._in_flight[number]
                how = ending(code) if dead else reason_of(error)
                why = f"the loader process died on it twice ({how})"
                task.future.set_result(failed(task.path, why, 0.0))

    def _finish(self, task: _Task, sent: _Sent) -> None:
        """In a thread of the pool: the image out of memory that is shared with its process."""
        loaded = sent.loaded
        if loaded.image is not None:
            views = [
                one.numpy() if self._settings.pinned else one.numpy().copy() for one in sent.views
            ]
            loaded = replace(loaded, image=replace(loaded.image, views=tuple(views)))
        task.future.set_result(self._prepared(task, loaded))


ImageLoader: TypeAlias = ThreadLoader | ProcessLoader
_Asked = tuple[int, Path] | None


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a worker process sends of one image; its views go through shared memory."""

    number: int
    loaded: Loaded
    views: tuple[Tensor, ...] = ()

    def pin_memory(self) -> _Sent:
        """Called by DataLoader, for a GPU."""
        return replace(self, views=tuple(view.pin_memory() for view in self.views))


class _Images(Dataset[_Sent | None]):
    """The images that the sampler hands out, in a worker process."""

    def __init__(self, load: Load, settings: LoaderSettings, hands: _Hands) -> None:
        self._load = load
        self._settings = settings
        self._hands = hands

    def __getitem__(self, asked: _Asked) -> _Sent | None:
        if asked is None:
            return None
        number, path = asked
        info = get_worker_info()
        assert info is not None, "called outside of a worker process"
        self._hands.take(info.id, number)
        loaded = load_safely(self._load, path, self._settings)
        self._hands.release(info.id)
        if loaded.image is None:
            return _Sent(number, loaded)
        views = tuple(torch.from_numpy(view) for view in loaded.image.views)
        return _Sent(number, replace(loaded, image=replace(loaded.image, views=())), views)


class _Hands:
    """Which image each worker process has in hand, and since when; shared with them."""

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._numbers: Any = context.RawArray("q", [-1] * workers)
        self._since: Any = context.RawArray("d", workers)

    def take(self, worker: int, number: int) -> None:
        """In a worker: it begins an image."""
        self._since[worker] = time.monotonic()  # first, so that the number finds its own time
        self._numbers[worker] = number

    def release(self, worker: int) -> None:
        """In a worker: it has ended its image."""
        self._numbers[worker] = -1

    def held_by(self, worker: int) -> int:
        """The image that a worker has in hand; -1 for none."""
        return int(self._numbers[worker])

    def held(self) -> list[tuple[int, float]]:
        """All images in hand, with the time of the monotonic clock when each was begun."""
        return [(n, float(t)) for n, t in zip(self._numbers, self._since, strict=True) if n >= 0]


_NAME = "risam-loader"  # of the processes
_TOLD = spawn.get_preparation_data


def _told(name: str) -> dict[str, Any]:
    """What a new process is told; ours are not told of the main module, of which they need nothing.

    They would run it again, and a script that calls from Python seldom guards against that by
    ``if __name__ == "__main__"``. multiprocessing has no setting for it.
    """
    told: dict[str, Any] = _TOLD(name)
    if name == _NAME:
        for key in ("init_main_from_name", "init_main_from_path"):
            told.pop(key, None)
    return told


spawn.get_preparation_data = _told
_CLEAN = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_Clean: Any = type(multiprocessing.get_context(_CLEAN))


class _Processes(_Clean):  # type: ignore[misc]
    """Processes forked from a clean server, so that none inherits torch's threads or locks.

    Attributes:
        started: those of the DataLoader that is driven, in the order of its workers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started: list[BaseProcess] = []
        if _CLEAN == "forkserver":
            self.set_forkserver_preload([__name__])

    def Process(self, *args: Any, **kwargs: Any) -> BaseProcess:
        """Makes a process and remembers it: DataLoader itself tells neither images nor exits."""
        process: BaseProcess = super().Process(*args, name=_NAME, **kwargs)
        self.started.append(process)
        return process

    def kill(self) -> None:
        """Ends the processes, whatever they are at."""
        for process in self.started:
            with suppress(ValueError, AttributeError):  # never started
                process.kill()


def _begin_worker(worker: int) -> None:
    """Signals and end of a worker process."""
    ignore_ends_of_group()
    # DataLoader's own handlers write to stderr; the loader says itself what an image died of.
    for name in ("SIGSEGV", "SIGBUS", "SIGFPE"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True, name="risam-parent").start()


def _end_with_parent() -> None:
    """Ends this process once the main process is gone, however that ended.

    DataLoader's own watch looks at the process that forked this one: the server, which waits for
    its children.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "called outside of a worker process"
    parent.join()
    os._exit(1)


def _fit_shared_memory(settings: LoaderSettings) -> tuple[int, int]:
    """Processes, and images that each is given ahead, as /dev/shm has room for their pixels.

    In containers it may be as small as 64 MB, and who writes over its end is killed.
    """
    try:
        room = shutil.disk_usage("/dev/shm").free // 2
    except OSError:
        return settings.workers, _EACH
    images = max(2, room // sum(3 * one.height * one.width for one in settings.frames))
    workers = min(settings.workers, images // 2)
    return workers, min(_EACH, images // workers - 1)
