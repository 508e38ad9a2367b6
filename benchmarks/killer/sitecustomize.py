"""Kills the process at its n-th change of a folder, or has that change fail: a fault by number.

Python imports a module of this name at start, so any command can be cut anywhere::

    PYTHONPATH=benchmarks/killer RISAM_KILL=12 RISAM_KILL_IN=out risam predict images -o out

counts what the process does below ``out``, and ends it by SIGKILL at the twelfth: at each
``os.replace``, ``os.rename``, ``os.link``, ``os.symlink``, ``os.unlink``, ``os.rmdir``,
``os.mkdir``, ``os.truncate``, ``os.ftruncate`` and ``os.fsync`` before it is done, at each file
that is made when it is there and empty, and at each ``write``, ``sendfile`` and ``truncate`` of a
file when half of it is done. ``RISAM_FAULT`` names what happens instead: see :data:`FAULTS`.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

FAULTS = {
    "kill": "SIGKILL",
    "full": "from the n-th change on, none that takes room is made (ENOSPC)",
    "once": "the n-th change fails, and no other (EIO)",
    "dead": "from the n-th change on, all fail (EIO)",
}
_BY_PATH = ("replace", "rename", "link", "symlink", "unlink", "remove", "rmdir", "mkdir")
_TAKE_ROOM = {"link", "symlink", "mkdir", "make", "write", "fsync"}
_WRITTEN_BY = os.O_CREAT | os.O_TRUNC


class Switch:
    """Counts the changes of a folder, and has a fault at the one of a number; 0 only counts."""

    def __init__(self, folder: str, number: int = 0, fault: str = "kill") -> None:
        self.root = os.path.realpath(folder)
        self.number = number
        self.fault = fault
        self.count = 0
        self._lock = threading.Lock()
        self._process = os.getpid()

    def install(self) -> Switch:
        """Begin to count."""
        for name in (*_BY_PATH, "truncate"):
            self._put(name, self._by_path(name, getattr(os, name)))
        for name in ("fsync", "ftruncate"):
            self._put(name, self._by_descriptor(name, getattr(os, name)))
        self._put("open", self._os_open(os.open))
        for name in ("write", "sendfile", "copy_file_range"):
            if hasattr(os, name):
                self._put(name, self._os_write(name, getattr(os, name)))
        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]
        return self

    @staticmethod
    def _put(name: str, counted: Callable[..., Any]) -> None:
        for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
            if getattr(os, name) in able:  # who asks goes the same way as without us
                able.add(counted)
        setattr(os, name, counted)

    def change(
        self, kind: str, half: Callable[[], object] = lambda: None, path: Any = None
    ) -> bool:
        """A change is about to be made; whether, of a write, the half is made already.

        Args:
            path: what an error would name.

        Raises:
            OSError: it fails.
        """
        with self._lock:
            if os.getpid() != self._process:
                return False
            self.count += 1
            if not self.number or self.count < self.number:
                return False
            if self.fault == "kill":
                if self.count == self.number:
                    with suppress(OSError):
                        half()
                    os.kill(os.getpid(), signal.SIGKILL)
                return False
            if self.fault == "full":
                if kind not in _TAKE_ROOM:
                    return False
                if self.count == self.number and kind == "write":
                    half()
                    return True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if self.fault == "dead" or self.count == self.number:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return False

    def is_inside(self, path: Any, folder: int | None = None) -> bool:
        """Whether a path, of a folder that is open, lies below the root."""
        try:
            if isinstance(path, int):
                real = os.readlink(f"/proc/self/fd/{path}")
            else:
                above = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")
                real = os.path.abspath(os.path.join(above, os.fsdecode(path)))
        except (TypeError, ValueError, OSError):
            return False
        return real == self.root or real.startswith(self.root + os.sep)

    def _by_path(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*paths: Any, **more: Any) -> Any:
            folders = [more.get("dir_fd", more.get(key)) for key in ("src_dir_fd", "dst_dir_fd")]
            kind = "write" if name == "truncate" else name
            if any(map(self.is_inside, paths[:2], folders)):
                self.change(kind, path=paths[0])
            return act(*paths, **more)

        return counted

    def _by_descriptor(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(descriptor: int, *more: Any) -> Any:
            if self.is_inside(descriptor):
                self.change(name)
            return act(descriptor, *more)

        return counted

    def _os_open(self, act: Callable[..., int]) -> Callable[..., int]:
        def counted(path: Any, flags: int, *more: Any, **by: Any) -> int:
            if flags & _WRITTEN_BY and self.is_inside(path, by.get("dir_fd")):
                self.change("make", lambda: act(path, flags, *more, **by), path)
            return act(path, flags, *more, **by)

        return counted

    def _os_write(self, name: str, act: Callable[..., int]) -> Callable[..., int]:
        def counted(*given: Any, **by: Any) -> int:
            target = given[1] if name == "copy_file_range" else given[0]
            if self.is_inside(target):
                written: list[int] = []

                def half() -> None:
                    if name == "write":
                        written.append(act(target, memoryview(given[1])[: len(given[1]) // 2]))
                    else:
                        written.append(0)

                if self.change("write", half):
                    return written[0]
            return act(*given, **by)

        return counted

    def _open(self, act: Callable[..., Any]) -> Callable[..., Any]:
        switch = self

        class Raw(io.FileIO):
            def write(self, data: Any, /) -> int:
                view = memoryview(data).cast("B")
                put = super().write
                half = len(view) // 2
                if switch.change("write", lambda: put(view[:half])) and half:
                    return half
                return put(view)

            def truncate(self, size: int | None = None, /) -> int:
                switch.change("write")
                return super().truncate(size)

        def counted(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **by: Any) -> Any:
            plain = isinstance(file, (str, os.PathLike)) and not more
            if not plain or not set(mode) & set("wax+") or not self.is_inside(file):
                return act(file, mode, buffering, *more, **by)
            pure = mode.replace("b", "").replace("t", "")
            if "w" in mode or not os.path.lexists(file):
                switch.change("make", lambda: io.FileIO(file, pure).close(), file)
            raw = Raw(file, pure)
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
    Switch(
        os.environ["RISAM_KILL_IN"],
        int(os.environ["RISAM_KILL"]),
        os.environ.get("RISAM_FAULT", "kill"),
    ).install()
