"""What a power cut leaves: files and names that the system was made to write to the disk.

A file is safe once its content is synced and then the folder that holds its name. A kill needs
neither: what a process handed to the system survives the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def sync_file(path: Path) -> None:
    """Has the system write a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Has the system write a folder's names to the disk, where folders can be opened."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folders(root: Path, folders: Iterable[Path]) -> None:
    """Syncs folders at or under ``root``, and those between it and them, each once."""
    between = {root}
    for folder in folders:
        while folder not in between and folder != folder.parent:
            between.add(folder)
            folder = folder.parent
    for folder in between:
        sync_folder(folder)


def sync_tree(root: Path) -> None:
    """Has the system write all files under ``root`` and their names to the disk.

    Linux is told once, for the file system that they are on; elsewhere they are synced one by one.
    """
    if not root.exists() or _sync_file_system(root):
        return
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(Path(folder))


def _sync_file_system(root: Path) -> bool:
    """Whether the system wrote all that is on the file system of ``root``."""
    if not sys.platform.startswith("linux"):
        return False
    descriptor = os.open(root, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(descriptor) == 0:
            return True
        number = ctypes.get_errno()
    except AttributeError:  # a C library without it
        return False
    finally:
        os.close(descriptor)
    if number == errno.ENOSYS:
        return False
    raise OSError(number, os.strerror(number), str(root))


def replace_durably(part: Path, path: Path) -> None:
    """Puts a finished file in its place: its content is on the disk before its name is."""
    sync_file(part)
    os.replace(part, path)
    sync_folder(path.parent)
