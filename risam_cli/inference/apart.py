"""Loading a file in a process of its own, which can be ended whatever its decoder is at.

Not :mod:`multiprocessing`: it would run the main module of whoever calls from Python once more.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from risam_cli.errors import MachineError, reason_of, require_machine
from risam_cli.inference.loading import (
    Load,
    Loaded,
    LoaderSettings,
    failed,
    load_safely,
    over_time,
)
from risam_cli.interrupts import ignore_ends_of_group

_CODE = (
    "import sys; sys.path[:] = sys.argv[1:]; from risam_cli.inference.apart import serve; serve()"
)
_FREE = b"+"
_WATCH = 0.5  # seconds between two looks at whether the main process lives
_PER_PIXEL = 48  # bytes that a decoder and what follows it may take
_ELSE = 1 << 30


class LoaderProcess:
    """A process that loads one file at a time; started at need, and again after its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._lock = threading.Lock()

    def load(
        self, load: Load, path: Path, settings: LoaderSettings, begun: Callable[[], None]
    ) -> Loaded:
        """What ``load`` gives, or why there is nothing.

        Args:
            begun: called once the process is there and begins.

        Raises:
            MachineError: no process can be had.
        """
        started = time.perf_counter()
        with self._lock:
            self._ended = False
            process = self._process = self._process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdout.read(1)  # for it to come up, or to be free
            begun()
            pickle.dump((load, path, replace(settings, workers=1)), process.stdin)
            process.stdin.flush()
            loaded: Loaded = pickle.load(process.stdout)
            return loaded
        except (EOFError, OSError, pickle.UnpicklingError):
            pass
        with self._lock:
            self._process = None
            ended = self._ended
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                pipe.close()
        if ended:
            return over_time(path, settings.timeout)
        why = f"the loader process died on it ({ending(code)})"
        return failed(path, why, time.perf_counter() - started)

    @property
    def is_ending(self) -> bool:
        """Whether it was ended, and has a file in hand all the same."""
        return self._process is not None and self._ended

    def end(self) -> bool:
        """Ends the process; False where there was nothing to end."""
        with self._lock:
            if self._process is None or self._ended:
                return False
            self._ended = True
            self._process.kill()
            return True


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _CODE, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        require_machine(error)
        raise MachineError(f"no process can be started: {reason_of(error)}") from error


def serve() -> None:
    """Loads what stdin asks for until it is closed; in the process."""
    ignore_ends_of_group()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with suppress(EOFError, BrokenPipeError):
        answers.write(_FREE)
        answers.flush()
        while True:
            _answer(asked, answers)


def _answer(asked: BinaryIO, answers: BinaryIO) -> None:
    load, path, settings = pickle.load(asked)
    _bound_memory(_ELSE + _PER_PIXEL * settings.max_pixels)
    pickle.dump(load_safely(load, path, settings), answers, protocol=5)
    answers.write(_FREE)
    answers.flush()


def _bound_memory(size: int) -> None:
    with suppress(ImportError, ValueError, OSError, AttributeError):  # not on every system
        import resource

        kind = resource.RLIMIT_DATA
        resource.setrlimit(kind, (size, resource.getrlimit(kind)[1]))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os._exit(1)


def ending(code: int | None) -> str:
    """How a process ended, by its exit code; None for one that did not."""
    if code is None:
        return "it stopped answering"
    if code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"exit code {code}"
