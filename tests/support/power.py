"""A power cut, as far as fsync can show: what a file system must have kept, and no more.

While :func:`recorded` holds, every ``os.fsync`` is noted: of a file, the content that it then had;
of a folder, the names that it then held and what they named. :meth:`Disk.after_power_cut` writes
what was noted, and only that, to another folder: a name that was not synced is not there, a file
whose content was not synced is empty, as delayed allocation leaves it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from risam_cli.files import write


class Disk:
    """What is surely on the disk of one folder and of those under it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[int, dict[str, int]] = {}  # of a folder's inode: name -> inode
        self.content: dict[int, bytes] = {}
        self.is_folder: dict[int, bool] = {}

    def synced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        inode = os.fstat(descriptor).st_ino
        if path.is_dir():
            entries = list(os.scandir(path))
            self.names[inode] = {entry.name: entry.inode() for entry in entries}
            for entry in entries:
                self.is_folder[entry.inode()] = entry.is_dir()
        else:
            self.content[inode] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def sync_all(self, root: Path) -> bool:
        """As syncfs does, of which no test could see what it wrote."""
        for folder, _, files in os.walk(self.root):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                descriptor = os.open(path, os.O_RDONLY)
                self.synced(descriptor)
                os.close(descriptor)
        return True

    def after_power_cut(self, target: Path) -> None:
        """Writes what a machine that starts again would find."""
        self._restore(self.root.stat().st_ino, target)

    def _restore(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, child in self.names.get(inode, {}).items():
            if self.is_folder[child]:
                self._restore(child, target / name)
            else:
                (target / name).write_bytes(self.content.get(child, b""))


@contextmanager
def recorded(root: Path) -> Iterator[Disk]:
    """Notes every sync; what ``root`` holds already counts as on the disk."""
    disk = Disk(root)
    disk.sync_all(root)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        disk.synced(descriptor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        patched.setattr(write, "_sync_file_system", disk.sync_all)
        yield disk
