"""Kills the process at its n-th change of a folder: a deterministic power switch.

Python imports a module of this name at start, so any command can be cut anywhere::

    PYTHONPATH=benchmarks/killer RISAM_KILL=12 RISAM_KILL_IN=out risam predict images -o out

counts what the process does below ``out``, and ends it by SIGKILL at the twelfth: at each
``os.replace``, ``os.rename``, ``os.link``, ``os.unlink``, ``os.rmdir``, ``os.mkdir``,
``os.truncate`` and ``os.fsync`` before it is done, and at each ``write`` of a file when half of
the bytes are written.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

_BY_PATH = ("replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir", "truncate")


class Switch:
    """Counts the changes of a folder, and kills at the one of a number; 0 only counts."""

    def __init__(self, folder: str, number: int = 0) -> None:
        self.root = os.path.realpath(folder)
        self.number = number
        self.count = 0
        self._lock = threading.Lock()
        self._process = os.getpid()

    def install(self) -> Switch:
        """Begin to count."""
        for name in _BY_PATH:
            setattr(os, name, self._by_path(getattr(os, name)))
        os.fsync = self._fsync(os.fsync)
        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]
        return self

    def change(self, half: Callable[[], object] = lambda: None) -> None:
        """One change is about to be made."""
        with self._lock:
            self.count += 1
            if self.count == self.number and os.getpid() == self._process:
                half()
                os.kill(os.getpid(), signal.SIGKILL)

    def is_inside(self, path: Any) -> bool:
        """Whether a path lies in the folder."""
        try:
            real = os.path.abspath(os.fsdecode(path))
        except (TypeError, ValueError):
            return False
        return real == self.root or real.startswith(self.root + os.sep)

    def _by_path(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*paths: Any, **more: Any) -> Any:
            if any(self.is_inside(path) for path in paths if isinstance(path, (str, os.PathLike))):
                self.change()
            return act(*paths, **more)

        return counted

    def _fsync(self, act: Callable[[int], None]) -> Callable[[int], None]:
        def counted(descriptor: int) -> None:
            if self.is_inside(os.readlink(f"/proc/self/fd/{descriptor}")):
                self.change()
            act(descriptor)

        return counted

    def _open(self, act: Callable[..., Any]) -> Callable[..., Any]:
        switch = self

        class Raw(io.FileIO):
            def write(self, data: Any, /) -> int:
                view = memoryview(data).cast("B")
                switch.change(lambda: super(Raw, self).write(view[: len(view) // 2]))
                return super().write(view)

        def counted(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **by: Any) -> Any:
            plain = isinstance(file, (str, os.PathLike)) and not more
            if not plain or not set(mode) & set("wax+") or not self.is_inside(file):
                return act(file, mode, buffering, *more, **by)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            kind: Any = io.BufferedRandom if "+" in mode else io.BufferedWriter
            binary = kind(raw)
            if "b" in mode:
                return binary
            text = {key: by[key] for key in ("encoding", "errors", "newline") if key in by}
            return io.TextIOWrapper(binary, **{"encoding": "utf-8", **text})

        return counted


if "RISAM_KILL" in os.environ:
    Switch(os.environ["RISAM_KILL_IN"], int(os.environ["RISAM_KILL"])).install()
